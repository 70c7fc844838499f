use super::*;
use crate::test_db::TestDb;
use serde_json::json;

fn new(name: &str) -> NewBaseModel {
    NewBaseModel {
        name: name.to_owned(),
        context_length: 2048,
        config: json!({"model_type": "llama", "rope_theta": 10000.5}),
    }
}

fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("directory");
    for (name, content) in [
        ("config.json", "{}"),
        ("model.safetensors", "weights"),
        (".gitattributes", "hidden"),
        (MANIFEST_NAME, "of an earlier copy"),
    ] {
        std::fs::write(directory.path().join(name), content).expect("file");
    }
    std::fs::create_dir(directory.path().join("onnx")).expect("directory");
    directory
}

#[tokio::test]
async fn an_imported_model_has_its_files_and_their_manifest() {
    let db = TestDb::new().await;
    let store = db.store();
    let directory = directory();
    let model = store.import_base_model(&new("smol"), directory.path()).await.expect("import");
    let names: Vec<&str> = model.manifest.files.iter().map(|file| &*file.name).collect();
    assert_eq!(names, ["config.json", "model.safetensors"]);
    assert_eq!((model.bytes(), model.context_length), (9, 2048));
    assert_eq!(model.config, new("smol").config);
    let weights = store.objects().read(&model.file("model.safetensors")).await.expect("object");
    assert_eq!(weights, "weights");
    let manifest = store.objects().read(&model.file(MANIFEST_NAME)).await.expect("object");
    assert_eq!(serde_json::from_slice::<Manifest>(&manifest).expect("json"), model.manifest);

    assert_eq!(store.base_model("smol").await.expect("by name"), model);
    assert_eq!(store.base_model_by_id(&model.id).await.expect("by id"), model);
    assert_eq!(store.list_base_models().await.expect("list"), [model]);
    let missing = store.base_model("other").await;
    assert!(matches!(missing, Err(StoreError::NotFound { .. })));
}

#[tokio::test]
async fn a_name_is_taken_once_also_by_imports_at_the_same_time() {
    let db = TestDb::new().await;
    let directory = directory();
    let imports = (0..4).map(|_| {
        let (store, path) = (db.store().clone(), directory.path().to_owned());
        tokio::spawn(async move { store.import_base_model(&new("smol"), &path).await })
    });
    let imported = futures::future::join_all(imports).await;
    let refused = imported.into_iter().filter_map(|import| import.expect("task").err());
    let refused: Vec<StoreError> = refused.collect();
    assert_eq!(refused.len(), 3);
    assert!(refused.iter().all(|error| matches!(error, StoreError::AlreadyExists { .. })));
    assert_eq!(db.store().list_base_models().await.expect("list").len(), 1);
}

#[tokio::test]
async fn a_failed_import_says_which_file_and_registers_nothing() {
    let db = TestDb::new().await;
    let directory = directory();
    std::os::unix::fs::symlink("/nowhere", directory.path().join("tokenizer.json")).expect("link");
    let error = db.store().import_base_model(&new("smol"), directory.path()).await;
    let message = error.expect_err("a dangling link").to_string();
    assert!(message.contains("tokenizer.json"), "{message}");
    assert_eq!(db.store().list_base_models().await.expect("list"), []);
}
