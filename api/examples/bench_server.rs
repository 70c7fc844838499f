//! The front-end as it is run, for `make bench-api`: its own durable PostgreSQL, an object store in
//! a directory, and logs on standard error.
//!
//! `bench_server DIRECTORY MODEL` keeps everything in DIRECTORY and imports the base model `bench`
//! of the files in MODEL. Prints one line of JSON that says where everything is, and ends with its
//! standard input. On a second address it streams a local file with nothing between file and
//! client, which a download is measured against.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use actix_web::body::SizedStream;
use actix_web::{App, HttpResponse, HttpServer, web};
use bytes::Bytes;
use futures::stream;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, stdin};
use tracing_subscriber::{EnvFilter, fmt};
use tunesmith_api::{ApiConfig, ApiServer};
use tunesmith_store::base_models::NewBaseModel;
use tunesmith_store::embedded::Embedded;
use tunesmith_store::{Store, StoreConfig};
use url::Url;

/// The base model's name.
const MODEL: &str = "bench";
/// What the measured uploads stay under.
const MAX_FILE_BYTES: u64 = 4 << 30;
/// Bytes that the bare stream reads at a time, as actix-files does.
const BARE_READ_BYTES: usize = 64 << 10;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // As the program itself logs.
    let filter = EnvFilter::new("warn,sqlx::query=error,tunesmith_api=info,tunesmith_store=info");
    fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).init();
    // As the program does; it fails only when one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut args = std::env::args().skip(1);
    let (Some(directory), Some(model)) = (args.next(), args.next()) else {
        return Err("give a directory to keep things in, and one of a model's small files".into());
    };
    let directory = Path::new(&directory).canonicalize()?;
    let postgres = Embedded::start(&directory).await?;
    let objects = Url::from_directory_path(directory.join("objects"));
    let objects = objects.map_err(|()| "the directory has no URL")?;
    let config = StoreConfig {
        database_url: postgres.url().to_owned(),
        object_store_url: objects.to_string(),
    };
    let store = Store::connect(&config).await?;
    store.migrate().await?;
    let project = store.ensure_default_project().await?;
    let key = store.create_api_key(&project, MODEL).await?;
    import_model(&store, Path::new(&model)).await?;

    let config = ApiConfig { max_file_bytes: MAX_FILE_BYTES, ..ApiConfig::new("127.0.0.1:0") };
    let server = ApiServer::bind(&config, store.clone())?;
    let bare = HttpServer::new(|| App::new().route("/{path:.*}", web::get().to(bare_file)))
        .disable_signals()
        .bind("127.0.0.1:0")?;
    let facts = json!({
        "address": server.local_addr(),
        "bare": bare.addrs().first(),
        "database_url": postgres.url(),
        "project": project,
        "key": key.secret,
        "model": MODEL,
    });
    let bare = bare.run();
    let stop_bare = bare.handle();
    let bare = tokio::spawn(bare);
    println!("{facts}");
    let until_the_input_ends = async {
        let mut rest = Vec::new();
        // An input that breaks ends too.
        let _ = stdin().read_to_end(&mut rest).await;
    };
    server.run(until_the_input_ends).await?;
    stop_bare.stop(true).await;
    bare.await??;
    store.close().await;
    postgres.stop().await?;
    Ok(())
}

async fn import_model(store: &Store, files: &Path) -> Result<(), Box<dyn Error>> {
    let config: Value = serde_json::from_slice(&std::fs::read(files.join("config.json"))?)?;
    let context_length = config["max_position_embeddings"].as_u64();
    let context_length = context_length.ok_or("config.json says nothing of the context")?;
    let new = NewBaseModel { name: MODEL.to_owned(), context_length, config };
    store.import_base_model(&new, files).await?;
    Ok(())
}

/// The file at the absolute path that follows the first slash, as actix-files streams it.
async fn bare_file(path: web::Path<String>) -> io::Result<HttpResponse> {
    let file = File::open(format!("/{path}"))?;
    let bytes = file.metadata()?.len();
    let content = stream::try_unfold((file, bytes), |(mut file, left)| async move {
        if left == 0 {
            return Ok::<_, actix_web::Error>(None);
        }
        let (piece, file) = web::block(move || {
            let mut piece = Vec::with_capacity(BARE_READ_BYTES);
            let most = left.min(BARE_READ_BYTES as u64);
            file.by_ref().take(most).read_to_end(&mut piece).map(|_| (piece, file))
        })
        .await??;
        let left = left - piece.len() as u64;
        Ok(Some((Bytes::from(piece), (file, left))))
    });
    Ok(HttpResponse::Ok().body(SizedStream::new(bytes, Box::pin(content))))
}
