//! Numbers that go wrong: what counts as a leap of the loss, and the way back from one.
//!
//! The way back is the last checkpoint at half the learning rate. Leaving out the rows at which it
//! happened would not help: from the same checkpoint the same steps bring back the same weights,
//! bit by bit, and it is these that the loss diverged with. A lower rate leads elsewhere, and no
//! row is dropped unseen.

use std::fs;
use std::path::{Path, PathBuf};

use tunesmith_core::protocol::{STATE_DIR, WEIGHTS_DIR};

use crate::error::EngineError;

/// How often a run goes back before it fails after all.
pub(super) const MAX_ROLLBACKS: u64 = 3;
/// What the learning rate is multiplied by each time.
const RATE_FACTOR: f64 = 0.5;
/// Losses that a new one is compared with, and the fewest that there must be.
const WINDOW: usize = 20;
const FEWEST: usize = 5;

/// The factor on the learning rate after `rollbacks`.
pub(super) fn rate_factor(rollbacks: u64) -> f64 {
    RATE_FACTOR.powi(i32::try_from(rollbacks).unwrap_or(i32::MAX))
}

/// Takes the loss of another step into the last ones.
pub(super) fn remember(recent: &mut Vec<f64>, loss: f64) {
    if recent.len() == WINDOW {
        recent.remove(0);
    }
    recent.push(loss);
}

/// The median of the last losses, when `loss` is more than `factor` times it. A factor of 0 looks
/// for nothing, and so does anything before there are enough losses.
pub(super) fn leap(recent: &[f64], loss: f64, factor: f64) -> Option<f64> {
    if factor <= 0.0 || recent.len() < FEWEST {
        return None;
    }
    let mut sorted = recent.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let median = if sorted.len().is_multiple_of(2) {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    } else {
        sorted[middle]
    };
    (loss > factor * median).then_some(median)
}

/// The last checkpoint, kept on this disk: a worker removes one as soon as it is stored.
#[derive(Debug, Default)]
pub(super) struct WayBack {
    dir: Option<PathBuf>,
    /// Whether `dir` was made here and goes when the next one is kept.
    is_copy: bool,
}

impl WayBack {
    /// The checkpoint directory to go back to.
    pub(super) fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// Goes back to `dir` from now on; it stays where it is.
    pub(super) fn point_to(&mut self, dir: &Path) -> Result<(), EngineError> {
        self.replace(dir.to_owned(), false)
    }

    /// Goes back to the checkpoint in `dir` from now on, whoever removes it: its files get a second
    /// name, which costs no space.
    pub(super) fn keep(&mut self, dir: &Path) -> Result<(), EngineError> {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let copy = dir.with_file_name(format!("way-back-{name}"));
        for half in [WEIGHTS_DIR, STATE_DIR] {
            let (from, to) = (dir.join(half), copy.join(half));
            fs::create_dir_all(&to).map_err(EngineError::io(&to))?;
            for entry in fs::read_dir(&from).map_err(EngineError::io(&from))? {
                let path = entry.map_err(EngineError::io(&from))?.path();
                let link = to.join(path.file_name().unwrap_or_default());
                fs::hard_link(&path, &link).map_err(EngineError::io(&link))?;
            }
        }
        self.replace(copy, true)
    }

    fn replace(&mut self, dir: PathBuf, is_copy: bool) -> Result<(), EngineError> {
        let old = self.dir.replace(dir).filter(|_| self.is_copy);
        self.is_copy = is_copy;
        match old {
            Some(old) => fs::remove_dir_all(&old).map_err(EngineError::io(&old)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leap_is_a_loss_above_the_factor_times_the_median_of_the_last_ones() {
        let mut recent = Vec::new();
        for loss in [2.0, 1.0, 9.0, 1.5] {
            assert_eq!(leap(&recent, 1e9, 3.0), None, "too few to tell");
            remember(&mut recent, loss);
        }
        remember(&mut recent, 1.0);
        assert_eq!(leap(&recent, 4.5, 3.0), None);
        assert_eq!(leap(&recent, 4.6, 3.0), Some(1.5));
        assert_eq!(leap(&recent, 1e9, 0.0), None, "nobody looks");
        remember(&mut recent, 2.0);
        assert_eq!(leap(&recent, 100.0, 3.0), Some(1.75), "the middle of two");
    }

    #[test]
    fn only_the_last_losses_are_remembered() {
        let mut recent = Vec::new();
        (0..100).for_each(|loss| remember(&mut recent, f64::from(loss)));
        assert_eq!(recent, (80..100).map(f64::from).collect::<Vec<_>>());
    }

    #[test]
    fn the_way_back_outlives_the_checkpoint_and_goes_with_the_next() {
        let dir = tempfile::tempdir().expect("directory");
        let checkpoint = |step: u64| {
            let path = dir.path().join(format!("checkpoint-{step}"));
            for half in [WEIGHTS_DIR, STATE_DIR] {
                fs::create_dir_all(path.join(half)).expect("directory");
                fs::write(path.join(half).join("file"), step.to_string()).expect("file");
            }
            path
        };
        let mut way_back = WayBack::default();
        for step in [2, 4] {
            let written = checkpoint(step);
            way_back.keep(&written).expect("kept");
            fs::remove_dir_all(&written).expect("removed");
            let file = way_back.dir().expect("a way back").join(STATE_DIR).join("file");
            assert_eq!(fs::read_to_string(file).expect("file"), step.to_string());
            assert_eq!(fs::read_dir(dir.path()).expect("directory").count(), 1);
        }
    }
}
