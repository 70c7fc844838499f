//! Checks of exports: a front-end sends one, and a child process of its own compares it with the
//! served model.
//!
//! One is checked at a time; who comes meanwhile waits before anything of its export is read. The
//! children that answer are not asked: a check that dies, or is killed for its memory, takes nothing
//! with it.

use crate::fetch::{self, FetchError};
use crate::http::Desk;
use crate::model::EXIT_GRACE;
use crate::models::Context;
use actix_web::HttpResponse;
use actix_web::web::{Bytes, Payload};
use futures::{StreamExt as _, stream};
use std::io::{self, Read};
use std::path::{Component, Path};
use tokio::sync::mpsc;
use tokio_util::io::{StreamReader, SyncIoBridge};
use tunesmith_core::export_check::{CheckFiles, CheckOrder, CheckReply};
use tunesmith_core::hyperparameters::AdapterType;
use tunesmith_core::sampling::{FromSampler, ToSampler};
use tunesmith_core::serving::MAX_ORDER_BYTES;
use tunesmith_worker::{ChildError, FramedChild, TransferError};

/// Pieces of an export on their way from the network to the disk.
const PIECES: usize = 4;

type Child = FramedChild<ToSampler, FromSampler>;

/// Why there is no comparison.
enum Stopped {
    /// For a reason that says nothing about the export.
    NotMade(String),
    /// What was served is damaged.
    Unfit(String),
}

impl From<FetchError> for Stopped {
    fn from(error: FetchError) -> Self {
        match error {
            FetchError::Transfer(
                TransferError::Damaged { .. } | TransferError::BadManifest { .. },
            ) => Self::Unfit(error.to_string()),
            other => not_made(other),
        }
    }
}

fn not_made(error: impl std::fmt::Display) -> Stopped {
    Stopped::NotMade(error.to_string())
}

/// Reads an order and the export behind it, and answers with a [`CheckReply`].
pub(crate) async fn check(desk: &Desk, payload: Payload) -> HttpResponse {
    // Nobody closes it.
    let _turn = desk.checks.acquire().await;
    let reply = match checked(desk.models.context(), payload).await {
        Ok(reply) => reply,
        Err(Stopped::NotMade(reason)) => CheckReply::NotMade { reason },
        Err(Stopped::Unfit(reason)) => CheckReply::Unfit { reason },
    };
    HttpResponse::Ok().json(reply)
}

async fn checked(context: &Context, payload: Payload) -> Result<CheckReply, Stopped> {
    let dir = context.work_dir.job_dir("export").map_err(not_made)?;
    let export_dir = dir.path().join("export");
    std::fs::create_dir(&export_dir).map_err(not_made)?;
    let order = receive(payload, &export_dir).await?;
    let tuned = fetch::tuned(context, &order.tuned).await?;
    // It stays in the cache until the child has read it.
    let base = match order.tuned.kind {
        AdapterType::Full => None,
        AdapterType::Lora => Some(fetch::base_model(context, &order.base_model).await?),
    };
    let (model_dir, adapter_dir) = match &base {
        None => (tuned.path(), None),
        Some(base) => (base.path(), Some(tuned.path().to_owned())),
    };
    let files = CheckFiles {
        model_dir: model_dir.to_owned(),
        adapter_dir,
        export_dir,
        form: order.form,
        scratch_dir: dir.path().join("imported"),
        prompts: order.prompts,
    };
    let place = order.tuned.place.to_string();
    ask_child(context, &place, files).await
}

/// The order on the body's first line, and the archive's files in `dir`. All of the body is read:
/// who sends hears nothing before its end.
async fn receive(mut payload: Payload, dir: &Path) -> Result<CheckOrder, Stopped> {
    let mut line = Vec::new();
    let rest = loop {
        let piece = payload.next().await.ok_or_else(|| not_made("the order broke off"))?;
        let piece = piece.map_err(not_made)?;
        if let Some(end) = piece.iter().position(|&byte| byte == b'\n') {
            line.extend_from_slice(&piece[..end]);
            break piece.slice(end + 1..);
        }
        line.extend_from_slice(&piece);
        if line.len() > MAX_ORDER_BYTES {
            return Err(not_made(format!("the order is over {MAX_ORDER_BYTES} bytes")));
        }
    };
    let (sender, mut pieces) = mpsc::channel::<io::Result<Bytes>>(PIECES);
    let archive = stream::poll_fn(move |context| pieces.poll_recv(context));
    let target = dir.to_owned();
    let reader = SyncIoBridge::new(StreamReader::new(archive.boxed()));
    let unpacking = tokio::task::spawn_blocking(move || unpack(reader, &target));
    let mut rest = stream::iter([Ok(rest)]).chain(payload);
    while let Some(piece) = rest.next().await {
        let piece = piece.map_err(io::Error::other);
        let is_over = piece.is_err();
        // A disk that is full does not stop the sender, which would not hear why.
        let _ = sender.send(piece).await;
        if is_over {
            break;
        }
    }
    drop(sender);
    unpacking.await.map_err(not_made)?.map_err(not_made)?;
    serde_json::from_slice(&line).map_err(not_made)
}

/// Unpacks the files of `archive` into `dir`.
fn unpack(mut archive: impl Read, dir: &Path) -> io::Result<()> {
    for entry in tar::Archive::new(&mut archive).entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let is_within = path.components().all(|part| matches!(part, Component::Normal(_)));
        if !is_within || !entry.header().entry_type().is_file() {
            return Err(io::Error::other(format!("{} is no file of an export", path.display())));
        }
        let target = dir.join(path);
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent)?;
        }
        io::copy(&mut entry, &mut std::fs::File::create_new(target)?)?;
    }
    io::copy(&mut archive, &mut io::sink()).map(|_| ())
}

async fn ask_child(
    context: &Context,
    place: &str,
    files: CheckFiles,
) -> Result<CheckReply, Stopped> {
    let name = place.to_owned();
    let log = move |line: &str| {
        tracing::info!(target: "tunesmith::sampler", checks = name, "{line}");
    };
    let said = async {
        let mut child = Child::start("check of the export", &context.config.child, log)?;
        child.send(&ToSampler::Check(files)).await?;
        let said = child.next().await?;
        child.close();
        Ok::<_, ChildError>((said, child.wait(EXIT_GRACE).await?))
    };
    match said.await.map_err(not_made)? {
        (Some(FromSampler::Checked { reply }), _) => Ok(reply),
        (Some(other), _) => Err(not_made(format!("its process said {other:?}"))),
        (None, exit) => Err(not_made(exit)),
    }
}
