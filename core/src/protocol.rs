//! What a worker and its trainer child say to each other: frames of a 4-byte big-endian length
//! and that many bytes of JSON, on the child's standard input and output.
//!
//! The trainer logs to standard error and to nowhere else. When its standard input ends without
//! [`ToTrainer::Stop`], its worker is gone and it exits at once.

use crate::errors::ErrorCode;
use crate::hyperparameters::Precision;
use crate::ids::JobId;
use crate::job::TrainSpec;
use crate::metrics::{BestStep, RowLoss, StepMetrics};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io::{self, Read, Write};
use std::path::PathBuf;

/// How glibc keeps a trainer's memory. A step asks for the same large matrices again and again; as
/// it comes, glibc gives each back to the system when it is freed, and clearing its pages anew
/// takes a sixth of a step. So large blocks stay in one heap, on huge pages where the system has
/// them. Other C libraries ignore this; what the user has set himself comes first.
pub const TRAINER_MEMORY: (&str, &str) = (
    "GLIBC_TUNABLES",
    "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=4294967296:\
     glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1",
);

/// The largest frame either side accepts.
pub const MAX_FRAME_BYTES: usize = 16 << 20;

/// The most rows of a [`FromTrainer::Rows`], so that it fits into a frame.
pub const MAX_ROWS_A_FRAME: usize = 10_000;

/// The half of a checkpoint directory that people download.
pub const WEIGHTS_DIR: &str = "weights";
/// The half of a checkpoint directory that a run goes on from.
pub const STATE_DIR: &str = "state";

/// Worker → trainer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToTrainer {
    /// The first frame: do this.
    Train(Box<TrainRequest>),
    /// Finish the step at hand, write a checkpoint, say [`FromTrainer::Stopped`], exit.
    Stop,
}

/// Everything a trainer needs; all paths are local.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainRequest {
    /// For log lines only.
    pub job_id: JobId,
    /// What to train.
    pub spec: TrainSpec,
    /// A Hugging Face directory.
    pub base_model_dir: PathBuf,
    /// The PEFT adapter that the run begins with, in place of a new one; merged into the base model
    /// where every weight trains.
    #[serde(default)]
    pub start_from: Option<PathBuf>,
    /// The training file as uploaded.
    pub training_file: PathBuf,
    /// The validation file as uploaded.
    pub validation_file: Option<PathBuf>,
    /// A checkpoint directory of an earlier attempt, as [`CheckpointWritten::dir`] named it.
    pub resume_from: Option<PathBuf>,
    /// An empty directory for everything that the trainer writes.
    pub output_dir: PathBuf,
    /// `auto`, `cpu`, `cuda`, `cuda:N`, or a list of GPUs such as `cuda:0,cuda:1`.
    pub device: String,
}

/// Trainer → worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromTrainer {
    /// The model and the data are loaded; training begins.
    Started(Started),
    /// What the rows of the next step showed, up to [`MAX_ROWS_A_FRAME`] of them.
    Rows {
        /// Each with its loss.
        rows: Vec<RowLoss>,
    },
    /// A step is done.
    Step(StepMetrics),
    /// A checkpoint directory is complete on disk.
    Checkpoint(CheckpointWritten),
    /// A sentence for the job's owner.
    Note(Note),
    /// The run has come to its end.
    Finished(Finished),
    /// The trainer obeyed [`ToTrainer::Stop`]; the last checkpoint is where to go on.
    Stopped,
    /// The job cannot go on.
    Failed {
        /// Which error of the table.
        code: ErrorCode,
        /// For the job's owner.
        message: String,
        /// The request's parameter at fault.
        param: Option<String>,
    },
}

/// A sentence for the job's owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// How much it matters.
    pub level: NoteLevel,
    /// The sentence.
    pub message: String,
    /// Names the occasion: a run that is resumed may say a note again, and it is stored once.
    pub key: String,
}

/// How much a note matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoteLevel {
    /// As it should be.
    Info,
    /// Worth a look.
    Warn,
}

/// A run that has come to its end, by its last step or by early stopping.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finished {
    /// Tokens seen in training, each epoch counted.
    pub trained_tokens: u64,
    /// Optimiser steps done: fewer than [`Started::total_steps`] after early stopping.
    pub steps: u64,
    /// The step with the lowest validation loss, where there are validation rows.
    pub best: Option<BestStep>,
    /// The step whose checkpoint is the tuned model. It was reported as a
    /// [`FromTrainer::Checkpoint`] that is not for resuming only.
    pub model_step: u64,
}

/// The facts of a run, known once everything is loaded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Started {
    /// Optimiser steps of the whole job.
    pub total_steps: u64,
    /// Steps that the checkpoint resumed from had done; 0 on a fresh start.
    pub resumed_from_step: u64,
    /// Rows that train, after the held-out split.
    pub train_rows: u64,
    /// Rows held out for validation or read from the validation file.
    pub valid_rows: u64,
    /// Rows cut at `max_seq_length`.
    pub truncated_rows: u64,
    /// Loss on the validation rows before the first step, where there are any.
    pub initial_valid_loss: Option<f64>,
    /// The device, in words.
    pub device: String,
    /// The numbers that products multiply on it: never `auto`.
    #[serde(default = "Precision::before_there_was_a_choice")]
    pub precision: Precision,
}

/// A complete checkpoint on the trainer's disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointWritten {
    /// Optimiser steps done.
    pub step: u64,
    /// Its directory: [`WEIGHTS_DIR`] for people (PEFT adapter or Hugging Face model) and
    /// [`STATE_DIR`] to resume from (optimiser, schedule and sampler position).
    pub dir: PathBuf,
    /// The step's metrics.
    pub metrics: Option<StepMetrics>,
    /// Whether it was written because of [`ToTrainer::Stop`]: to resume from, not to show.
    pub for_resume_only: bool,
}

/// Writes one frame and flushes.
///
/// # Errors
/// What the writer gives, or `InvalidData` for a message over [`MAX_FRAME_BYTES`].
pub fn write_frame(writer: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let body = encode(message)?;
    writer.write_all(&body)?;
    writer.flush()
}

/// One frame as bytes, length first.
///
/// # Errors
/// `InvalidData` for a message over [`MAX_FRAME_BYTES`] or one that is not JSON.
pub fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message)?;
    let length = frame.len() - 4;
    if length > MAX_FRAME_BYTES {
        return Err(oversized(length));
    }
    let length = u32::try_from(length).map_err(|_| oversized(length))?;
    frame[..4].copy_from_slice(&length.to_be_bytes());
    Ok(frame)
}

/// Reads one frame; `None` when the stream ends between frames.
///
/// # Errors
/// What the reader gives, `UnexpectedEof` for a torn frame, `InvalidData` for one that is too
/// long or not the JSON that was expected.
pub fn read_frame<T: DeserializeOwned>(reader: &mut impl Read) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    let first = reader.read(&mut length)?;
    if first == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut length[first..])?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_FRAME_BYTES {
        return Err(oversized(length));
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(Some(serde_json::from_slice(&body)?))
}

fn oversized(length: usize) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("a frame of {length} bytes is over the {MAX_FRAME_BYTES} that are accepted"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_in_order_and_the_end_is_none() {
        let mut wire = Vec::new();
        write_frame(&mut wire, &ToTrainer::Stop).expect("write");
        let note = FromTrainer::Note(Note {
            level: NoteLevel::Warn,
            message: "The loss rises.".to_owned(),
            key: "rises".to_owned(),
        });
        write_frame(&mut wire, &note).expect("write");
        let mut reader = wire.as_slice();
        assert_eq!(read_frame(&mut reader).expect("read"), Some(ToTrainer::Stop));
        assert_eq!(read_frame(&mut reader).expect("read"), Some(note));
        assert_eq!(read_frame::<ToTrainer>(&mut reader).expect("read"), None);
    }

    #[test]
    fn a_message_that_holds_a_list_comes_back() {
        let row = RowLoss { row: 3, line: 5, step: 2, loss: 1.5 };
        for rows in [vec![], vec![row.clone(), row]] {
            let message = FromTrainer::Rows { rows };
            let mut wire = Vec::new();
            write_frame(&mut wire, &message).expect("write");
            assert_eq!(read_frame(&mut wire.as_slice()).expect("read"), Some(message));
        }
    }

    #[test]
    fn a_torn_frame_is_an_error_and_not_an_end() {
        let mut wire = Vec::new();
        write_frame(&mut wire, &ToTrainer::Stop).expect("write");
        for length in 1..wire.len() {
            let error = read_frame::<ToTrainer>(&mut &wire[..length]).expect_err("torn");
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{length} bytes");
        }
    }

    #[test]
    fn a_length_over_the_cap_is_refused_before_it_is_allocated() {
        let error = read_frame::<ToTrainer>(&mut [0xff; 8].as_slice()).expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
