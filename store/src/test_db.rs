//! A database of its own for every test, with the schema, in a few milliseconds.
//!
//! One private PostgreSQL serves all tests of a process. It ends with the process, and what it
//! wrote goes too.

use crate::base_models::BaseModel;
use crate::embedded::{Embedded, Settings};
use crate::models::Model;
use crate::objects::ObjectPrefix;
use crate::{Store, StoreConfig, StoreError};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::sync::OnceCell;
use tunesmith_core::hyperparameters::AdapterConfig;
use tunesmith_core::ids::{BaseModelId, JobId};
use tunesmith_core::weights::{
    CONFIG_NAME, CheckpointPlace, MANIFEST_NAME, Manifest, ManifestFile, WeightsPlace,
};

/// The database that every test's is a copy of.
const TEMPLATE: &str = "migrated";

static CLUSTER: OnceCell<Embedded> = OnceCell::const_new();
static DATABASES: AtomicU32 = AtomicU32::new(0);

/// A store on a fresh database and an object store in memory.
#[derive(Debug, Clone)]
pub struct TestDb {
    store: Store,
    url: String,
}

impl TestDb {
    /// A fresh one.
    ///
    /// # Panics
    /// No PostgreSQL, which a test cannot do without.
    pub async fn new() -> Self {
        match Self::try_new().await {
            Ok(database) => database,
            Err(error) => panic!("no test database: {error}"),
        }
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The database, for a second store or another program.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Lets the lease of a job run out now, as if 30 s had gone by.
    ///
    /// # Panics
    /// No worker holds the job.
    pub async fn expire_lease(&self, job: &JobId) {
        let expired = sqlx::query(
            "UPDATE jobs SET lease_expires_at = now() - interval '1 second'
             WHERE id = $1 AND lease_expires_at IS NOT NULL",
        )
        .bind(job.as_str())
        .execute(&self.store.pool)
        .await;
        match expired {
            Ok(done) => assert_eq!(done.rows_affected(), 1, "no worker holds {job}"),
            Err(error) => panic!("{error}"),
        }
    }

    /// A model of one small file that was tuned in full from `origin`, as the base model of adapters.
    /// `job` says which job has made it, and need not be there.
    ///
    /// # Panics
    /// The database or the object store has failed.
    pub async fn tuned_base(&self, job: &str, origin: &BaseModelId) -> BaseModel {
        match self.try_tuned_base(job, origin).await {
            Ok(base) => base,
            Err(error) => panic!("no tuned base model: {error}"),
        }
    }

    async fn try_tuned_base(
        &self,
        job: &str,
        origin: &BaseModelId,
    ) -> Result<BaseModel, StoreError> {
        const CONFIG: &str = "{}";
        let place: WeightsPlace = CheckpointPlace { job: job.into(), attempt: 1, step: 1 }.into();
        let prefix = ObjectPrefix::from(place.clone());
        let config = ManifestFile::measure(CONFIG_NAME, CONFIG.as_bytes())
            .map_err(StoreError::local_file(Path::new(CONFIG_NAME)))?;
        let manifest = serde_json::to_vec(&Manifest { files: vec![config] })?;
        let objects = self.store.objects();
        objects.put_bytes(&prefix.file(CONFIG_NAME), CONFIG.into()).await?;
        objects.put_bytes(&prefix.file(MANIFEST_NAME), manifest.into()).await?;
        let model = Model {
            name: format!("ft:{job}"),
            organization_id: "org-test".into(),
            place,
            base_model_id: origin.clone(),
            adapter: AdapterConfig::default(),
            created_at: time::OffsetDateTime::UNIX_EPOCH,
        };
        self.store.tuned_base(&model).await
    }

    async fn try_new() -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let cluster = CLUSTER.get_or_try_init(start_cluster).await?;
        let name = format!("test_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        let mut connection = PgConnection::connect(cluster.url()).await?;
        sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {name} TEMPLATE {TEMPLATE}")))
            .execute(&mut connection)
            .await?;
        connection.close().await?;
        let url = url_of(cluster, &name);
        Ok(Self { store: open(&url).await?, url })
    }
}

async fn open(database_url: &str) -> Result<Store, StoreError> {
    Store::connect(&StoreConfig {
        database_url: database_url.to_owned(),
        object_store_url: "memory:///".to_owned(),
    })
    .await
}

fn url_of(cluster: &Embedded, database: &str) -> String {
    cluster.url().replacen("/tunesmith?", &format!("/{database}?"), 1)
}

async fn start_cluster() -> Result<Embedded, Box<dyn std::error::Error + Send + Sync>> {
    let directory = tempfile::Builder::new().prefix("tunesmith-test-").tempdir()?.keep();
    // The database's user must get in.
    std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o755))?;
    let cluster = Embedded::start_with(&directory, Settings { durable: false }).await?;
    remove_at_the_end(&directory, &cluster)?;
    let mut connection = PgConnection::connect(cluster.url()).await?;
    sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {TEMPLATE}")))
        .execute(&mut connection)
        .await?;
    connection.close().await?;
    let store = open(&url_of(&cluster, TEMPLATE)).await?;
    store.migrate().await?;
    // A database with a connection open cannot be copied.
    store.close().await;
    Ok(cluster)
}

/// Nothing in this process runs after its end, so a shell waits for that end (its standard input
/// closes), for the server's, and cleans up.
fn remove_at_the_end(directory: &Path, cluster: &Embedded) -> std::io::Result<()> {
    const SCRIPT: &str =
        "cat; while [ -e \"/proc/$1/cwd\" ]; do sleep 0.05; done; rm -rf \"$2\" \"$3\"";
    let pid = cluster.pid().map(|pid| pid.as_raw_nonzero().to_string()).unwrap_or_default();
    let mut cleaner = Command::new("sh");
    {
        use std::os::unix::process::CommandExt as _;
        cleaner.process_group(0);
    }
    let cleaner = cleaner
        .args(["-c", SCRIPT, "sh", &pid])
        .arg(directory)
        .arg(cluster.socket_dir().unwrap_or(directory))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    // Its standard input must stay open as long as the process lives.
    std::mem::forget(cleaner);
    Ok(())
}
