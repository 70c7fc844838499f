use super::*;
use crate::base_models::NewBaseModel;
use crate::fixtures::{World, once};
use crate::models::NewImportedAdapter;
use bytes::Bytes;
use serde_json::json;
use tunesmith_core::hyperparameters::AdapterConfig;

const NAMES: [&str; 2] = ["config.json", "model.safetensors"];

/// An import whose importer was lost before it had registered anything.
async fn lost(store: &Store, importing: &Importing) {
    store.begin_import(importing).await.expect("begun");
    for name in NAMES {
        let key = importing.prefix().file(name);
        store.objects().put_bytes(&key, Bytes::from_static(b"{}")).await.expect("put");
    }
}

async fn objects(store: &Store, importing: &Importing) -> usize {
    store.objects().list(&importing.prefix()).await.expect("list").len()
}

/// Makes as if nothing had been heard of an import for two hours.
async fn age(store: &Store, importing: &Importing) {
    let aged = "UPDATE imports SET seen_at = now() - interval '2 hours' WHERE id = $1";
    let aged = sqlx::query(aged).bind(importing.id()).execute(&store.pool).await.expect("aged");
    assert_eq!(aged.rows_affected(), 1);
}

fn both() -> [Importing; 2] {
    let mut rng = rand::rng();
    [
        Importing::BaseModel(BaseModelId::generate(&mut rng)),
        Importing::Adapter(ImportedAdapterId::generate(&mut rng)),
    ]
}

fn adapter(world: &World, importing: &Importing) -> NewImportedAdapter {
    let Importing::Adapter(id) = importing else { panic!("{importing:?} is no adapter") };
    NewImportedAdapter {
        id: id.clone(),
        base_model_id: world.base_model.clone(),
        tuned: None,
        base_model: "smol".to_owned(),
        suffix: None,
        adapter: AdapterConfig::default(),
    }
}

#[tokio::test]
async fn objects_of_a_lost_import_go_and_those_of_any_other_stay() {
    let world = World::new().await;
    let store = world.store();
    let (lost_ones, running) = (both(), both());
    for importing in lost_ones.iter().chain(&running) {
        lost(store, importing).await;
    }
    for importing in &lost_ones {
        age(store, importing).await;
    }
    assert_eq!(store.purge_imports(IMPORT_SILENCE).await.expect("purged"), 2);
    for importing in &lost_ones {
        assert_eq!(objects(store, importing).await, 0, "{importing:?}");
    }
    for importing in &running {
        assert_eq!(objects(store, importing).await, NAMES.len(), "{importing:?}");
        assert!(store.renew_import(importing).await.expect("renewed"));
    }
    assert_eq!(store.purge_imports(IMPORT_SILENCE).await.expect("purged"), 0);
    // What was registered is no import any more, however long ago that was.
    let base = store.base_model_by_id(&world.base_model).await.expect("base");
    store.purge_imports(Duration::ZERO).await.expect("purged");
    assert!(!store.objects().list(&base.prefix()).await.expect("list").is_empty());
}

#[tokio::test]
async fn an_importer_that_comes_back_too_late_registers_nothing() {
    let world = World::new().await;
    let store = world.store();
    let [_, importing] = both();
    lost(store, &importing).await;
    age(store, &importing).await;
    assert_eq!(store.purge_imports(IMPORT_SILENCE).await.expect("purged"), 1);

    // It writes on, and hears of it at the latest when it wants to be done.
    let key = importing.prefix().file("late");
    store.objects().put_bytes(&key, Bytes::from_static(b"{}")).await.expect("put");
    assert!(!store.renew_import(&importing).await.expect("renewed"));
    let made = store.import_adapter(&world.caller, &adapter(&world, &importing), &once(1)).await;
    assert!(matches!(made, Err(StoreError::ImportGivenUp)), "{made:?}");
    assert_eq!(store.list_models(&world.caller.project_id).await.expect("list"), []);
    store.purge_imports(IMPORT_SILENCE).await.expect("purged");
    assert_eq!(objects(store, &importing).await, 0, "what came late goes too");
}

#[tokio::test]
async fn what_was_registered_is_not_abandoned() {
    let world = World::new().await;
    let store = world.store();
    let [_, importing] = both();
    lost(store, &importing).await;
    store
        .import_adapter(&world.caller, &adapter(&world, &importing), &once(1))
        .await
        .expect("made");
    // As when the reply to the commit was lost.
    store.abandon_import(&importing).await;
    assert_eq!(objects(store, &importing).await, NAMES.len());

    let [_, importing] = both();
    lost(store, &importing).await;
    store.abandon_import(&importing).await;
    assert_eq!(objects(store, &importing).await, 0);
    assert!(!store.renew_import(&importing).await.expect("asked"));
}

#[tokio::test]
async fn a_sweep_and_a_registration_at_the_same_time_leave_a_whole_model_or_none() {
    let world = World::new().await;
    let store = world.store();
    for _ in 0..8 {
        let [_, importing] = both();
        lost(store, &importing).await;
        age(store, &importing).await;
        let (new, asked) = (adapter(&world, &importing), once(1));
        let (made, purged) = tokio::join!(
            store.import_adapter(&world.caller, &new, &asked),
            store.purge_imports(IMPORT_SILENCE)
        );
        purged.expect("purged");
        let left = objects(store, &importing).await;
        assert_eq!(left, if made.is_ok() { NAMES.len() } else { 0 }, "{made:?}");
    }
}

#[tokio::test]
async fn a_base_model_s_import_that_is_cut_off_is_found() {
    let world = World::new().await;
    let (store, directory) = (world.store().clone(), tempfile::tempdir().expect("directory"));
    for name in NAMES {
        std::fs::write(directory.path().join(name), vec![7; 1 << 20]).expect("file");
    }
    let path = directory.path().to_owned();
    let new = NewBaseModel { name: "other".to_owned(), context_length: 8, config: json!({}) };
    // The lock keeps it from being registered, and the importer is lost while it waits.
    let mut blocker = store.pool.begin().await.expect("transaction");
    sqlx::query("LOCK TABLE base_models").execute(&mut *blocker).await.expect("locked");
    let importer = {
        let store = store.clone();
        tokio::spawn(async move { store.register_directory(&new, &path).await })
    };
    let importing = loop {
        let row = sqlx::query("SELECT id, kind FROM imports").fetch_optional(&store.pool).await;
        if let Some(row) = row.expect("row") {
            let id = BaseModelId::from(row.get::<String, _>("id"));
            let importing = Importing::BaseModel(id);
            if objects(&store, &importing).await == NAMES.len() + 1 {
                break importing;
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    importer.abort();
    assert!(importer.await.expect_err("it is lost").is_cancelled());
    blocker.rollback().await.expect("unlocked");
    age(&store, &importing).await;
    assert_eq!(store.purge_imports(IMPORT_SILENCE).await.expect("purged"), 1);
    assert_eq!(objects(&store, &importing).await, 0);
    assert_eq!(store.list_base_models().await.expect("list").len(), 1);
}
