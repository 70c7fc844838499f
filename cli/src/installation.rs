//! An installation's database and object store, for the commands that work on them directly.

use anyhow::{Context as _, bail};
use reqwest::Url;
use std::path::{Path, PathBuf};
use tunesmith_store::embedded::Embedded;
use tunesmith_store::{Store, StoreConfig};

/// Where `up` keeps everything unless it is told otherwise.
pub(crate) const DEFAULT_DATA_DIR: &str = "tunesmith-data";

/// The object store of a command that touches no objects.
pub(crate) const NO_OBJECTS: &str = "memory:///";

/// A database and an object store, for the parts run apart.
#[derive(Debug, clap::Args)]
pub(crate) struct StoreArgs {
    /// postgres://…
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    database_url: String,
    /// file:///…, s3://…, gs://…, az://… or memory:///
    #[arg(long, env = "OBJECT_STORE_URL", value_name = "URL")]
    object_store_url: String,
}

impl StoreArgs {
    /// Connects to both.
    pub(crate) async fn connect(&self) -> anyhow::Result<Store> {
        connect(&self.database_url, &self.object_store_url).await
    }
}

/// Which installation a command works on: `--data-dir`, else DATABASE_URL, else the usual
/// data directory.
#[derive(Debug, clap::Args)]
pub(crate) struct InstallationArgs {
    /// The data directory of a `tunesmith up`, which may be running or not
    #[arg(long, env = "TUNESMITH_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// The database, when the parts run apart; --data-dir comes first
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    database_url: Option<String>,
    /// The object store, beside the database
    #[arg(long, env = "OBJECT_STORE_URL", value_name = "URL")]
    object_store_url: Option<String>,
}

impl InstallationArgs {
    /// Whether it was said which installation is meant.
    pub(crate) fn is_named(&self) -> bool {
        self.data_dir.is_some() || self.database_url.is_some()
    }

    /// Connects to the installation; a data directory's PostgreSQL is started for the time of the
    /// command if no `up` runs it.
    pub(crate) async fn open(&self) -> anyhow::Result<Installation> {
        match (self.external_database(), &self.object_store_url) {
            (None, _) => self.open_data_dir().await,
            (Some(database), Some(objects)) => Installation::apart(database, objects).await,
            (Some(_), None) => {
                bail!("OBJECT_STORE_URL is missing: with DATABASE_URL, it says where objects are")
            }
        }
    }

    /// The same for a command that reads and writes no objects.
    pub(crate) async fn open_database(&self) -> anyhow::Result<Installation> {
        match self.external_database() {
            None => self.open_data_dir().await,
            Some(database) => Installation::apart(database, NO_OBJECTS).await,
        }
    }

    fn external_database(&self) -> Option<&str> {
        self.database_url.as_deref().filter(|_| self.data_dir.is_none())
    }

    async fn open_data_dir(&self) -> anyhow::Result<Installation> {
        let path = self.data_dir.as_deref().unwrap_or(Path::new(DEFAULT_DATA_DIR));
        let data = DataDir::create(path)?;
        let postgres = Embedded::attach(&data.root).await?;
        let store = connect(postgres.url(), &data.object_store_url()?).await?;
        store.migrate().await?;
        Ok(Installation { store, postgres: Some(postgres), cache_dir: Some(data.cache_dir()) })
    }
}

/// Connects to both; each failure names its own setting.
pub(crate) async fn connect(database_url: &str, object_store_url: &str) -> anyhow::Result<Store> {
    let config = StoreConfig {
        database_url: database_url.to_owned(),
        object_store_url: object_store_url.to_owned(),
    };
    Store::connect(&config).await.context("the store cannot be opened")
}

/// What lies where in a data directory.
#[derive(Debug)]
pub(crate) struct DataDir {
    /// The directory itself, as an absolute path.
    pub(crate) root: PathBuf,
}

impl DataDir {
    /// The data directory at `path`, which is made if it is not there.
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        let unusable = || format!("the data directory {} cannot be used", path.display());
        std::fs::create_dir_all(path).with_context(unusable)?;
        let root = path.canonicalize().with_context(unusable)?;
        let layout = Self { root };
        std::fs::create_dir_all(layout.cache_dir()).with_context(unusable)?;
        Ok(layout)
    }

    /// Base models, as workers keep them.
    pub(crate) fn cache_dir(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// Files of the job at hand.
    pub(crate) fn work_dir(&self) -> PathBuf {
        self.root.join("work")
    }

    /// What PostgreSQL says.
    pub(crate) fn postgres_log(&self) -> PathBuf {
        self.root.join("postgres.log")
    }

    /// The first API key.
    pub(crate) fn api_key(&self) -> PathBuf {
        self.root.join("api-key")
    }

    /// The object store's address.
    pub(crate) fn object_store_url(&self) -> anyhow::Result<String> {
        let dir = self.root.join("objects");
        match Url::from_directory_path(&dir) {
            Ok(url) => Ok(url.into()),
            Err(()) => bail!("{} has no URL", dir.display()),
        }
    }
}

/// An open installation.
pub(crate) struct Installation {
    store: Store,
    postgres: Option<Embedded>,
    cache_dir: Option<PathBuf>,
}

impl Installation {
    async fn apart(database_url: &str, object_store_url: &str) -> anyhow::Result<Self> {
        let store = connect(database_url, object_store_url).await?;
        Ok(Self { store, postgres: None, cache_dir: None })
    }

    /// Its database and object store.
    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// A new directory for large files, on the installation's own disk where it has one.
    pub(crate) fn scratch(&self) -> anyhow::Result<tempfile::TempDir> {
        match &self.cache_dir {
            Some(dir) => tempfile::tempdir_in(dir),
            None => tempfile::tempdir(),
        }
        .context("there is no place for temporary files")
    }

    /// Closes the connections, and stops the PostgreSQL that was started for them.
    pub(crate) async fn close(self) -> anyhow::Result<()> {
        self.store.close().await;
        match self.postgres {
            Some(postgres) => postgres.stop().await.context("PostgreSQL did not stop"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(data_dir: Option<&str>, database_url: Option<&str>) -> InstallationArgs {
        InstallationArgs {
            data_dir: data_dir.map(PathBuf::from),
            database_url: database_url.map(str::to_owned),
            object_store_url: None,
        }
    }

    #[test]
    fn a_data_directory_comes_before_a_database() {
        assert_eq!(args(Some("d"), Some("postgres://x")).external_database(), None);
        assert_eq!(args(None, Some("postgres://x")).external_database(), Some("postgres://x"));
        assert_eq!(args(None, None).external_database(), None);
        assert!(!args(None, None).is_named() && args(Some("d"), None).is_named());
    }

    #[tokio::test]
    async fn a_database_without_an_object_store_is_refused_by_the_settings_name() {
        let opened = args(None, Some("postgres://x")).open().await;
        let error = opened.err().expect("refused").to_string();
        assert!(error.contains("OBJECT_STORE_URL"), "{error}");
    }

    #[test]
    fn a_data_directory_with_odd_characters_has_a_url() {
        let dir = tempfile::tempdir().expect("temp dir");
        let data = DataDir::create(&dir.path().join("a b%#ü")).expect("create");
        let url: Url = data.object_store_url().expect("a URL").parse().expect("parses");
        assert_eq!(url.to_file_path().expect("a path"), data.root.join("objects"));
    }
}
