//! The API as the official SDK's own tests want it: with the objects whose ids they use.
//!
//! Prints its base URL, then the word `ready` for every line of its standard input, after it has
//! put all objects back as they were. Ends with its input. It has a database of its own, and no
//! worker.

use std::error::Error;

use tokio::io::{AsyncBufReadExt as _, BufReader, stdin};
use tunesmith_api::{ApiConfig, ApiServer};
use tunesmith_store::test_db::TestDb;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let database = TestDb::new().await;
    let store = database.store().clone();
    store.seed_fixtures().await?;
    let server = ApiServer::bind(&ApiConfig::new("127.0.0.1:0"), store.clone())?;
    println!("http://{}/v1", server.local_addr());
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
