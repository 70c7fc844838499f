//! The API as the official SDK's own tests want it: with the objects whose ids they use.
//!
//! `fixture_mode DIRECTORY` keeps its objects in the directory. Prints its base URL and that of its
//! database, for other programs of the service, then the word `ready` for every line of its standard
//! input, after it has put all objects back as they were. Ends with its input. It has a database of
//! its own, and neither worker nor sampler.

use std::error::Error;

use tokio::io::{AsyncBufReadExt as _, BufReader, stdin};
use tunesmith_api::{ApiConfig, ApiServer};
use tunesmith_store::test_db::TestDb;
use tunesmith_store::{Store, StoreConfig};

/// The tests' model for plain prompts, and for conversations.
const ALIAS: (&str, &str) = ("gpt-3.5-turbo-instruct", "gpt-6-astra");

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let directory = std::env::args().nth(1).ok_or("usage: fixture_mode DIRECTORY")?;
    let database = TestDb::new().await;
    let store = Store::connect(&StoreConfig {
        database_url: database.url().to_owned(),
        object_store_url: format!("file://{directory}"),
    })
    .await?;
    store.seed_fixtures().await?;
    let mut config = ApiConfig::new("127.0.0.1:0");
    config.model_aliases = [ALIAS].map(|(alias, name)| (alias.to_owned(), name.to_owned())).into();
    let server = ApiServer::bind(&config, store.clone())?;
    println!("http://{}/v1\n{}", server.local_addr(), database.url());
    let commands = async {
        let mut lines = BufReader::new(stdin()).lines();
        while let Ok(Some(_)) = lines.next_line().await {
            // A request or the validator may hold what is emptied.
            let mut seeded = store.seed_fixtures().await;
            while seeded.as_ref().is_err_and(|error| error.is_transient()) {
                seeded = store.seed_fixtures().await;
            }
            match seeded {
                Ok(()) => println!("ready"),
                Err(error) => return eprintln!("the fixtures cannot be made: {error}"),
            }
        }
    };
    server.run(commands).await?;
    Ok(())
}
