//! Where the progress goes: a bar that redraws itself, or lines that a file can take.

use super::curve::Curve;
use crate::bars;
use crate::rest::wire::Job;
use indicatif::ProgressBar;
use std::io::IsTerminal as _;
use tunesmith_core::state::JobStatus;

/// The progress as a person sees it.
pub(crate) enum View {
    /// Standard error is a terminal.
    Bar(ProgressBar),
    /// It is not: each line that differs from the one before, on standard output.
    Lines {
        /// The newest line.
        last: String,
    },
}

impl View {
    /// A bar where one can be drawn.
    pub(crate) fn new() -> Self {
        if std::io::stderr().is_terminal() {
            Self::Bar(bars::spinner())
        } else {
            Self::Lines { last: String::new() }
        }
    }

    /// A line that stays: an event.
    pub(crate) fn say(&self, line: &str) {
        match self {
            Self::Bar(bar) => bar.suspend(|| println!("{line}")),
            Self::Lines { .. } => println!("{line}"),
        }
    }

    /// Where the job stands now.
    pub(crate) fn show(&mut self, job: &Job, curve: &Curve) {
        match self {
            Self::Bar(bar) => match curve.total_steps() {
                Some(total) if job.status == JobStatus::Running => {
                    bar.set_style(bars::style(bars::STEPS));
                    bar.set_length(total);
                    bar.set_position(curve.last_step());
                    bar.set_message(curve.line());
                }
                _ => {
                    bar.set_style(bars::style(bars::WAITING));
                    bar.set_message(standing(job));
                }
            },
            Self::Lines { last } => {
                let line = plain_line(job, curve);
                if line != *last {
                    println!("{line}");
                    *last = line;
                }
            }
        }
    }

    /// The server does not answer for now.
    pub(crate) fn wait(&mut self, reason: &str) {
        match self {
            Self::Bar(bar) => {
                bar.set_style(bars::style(bars::WAITING));
                bar.set_message(format!("{reason}; trying again"));
            }
            Self::Lines { last } => {
                let line = format!("{reason}; trying again");
                if line != *last {
                    println!("{line}");
                    *last = line;
                }
            }
        }
    }

    /// Takes the bar away: what follows is the outcome.
    pub(crate) fn finish(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// What a job without steps is doing.
fn standing(job: &Job) -> String {
    match job.status {
        JobStatus::ValidatingFiles => "the files are being checked".to_owned(),
        JobStatus::Queued if job.paused => "paused".to_owned(),
        JobStatus::Queued => "waits for a worker".to_owned(),
        JobStatus::Running => "the model is being loaded".to_owned(),
        ended => ended.to_string(),
    }
}

fn plain_line(job: &Job, curve: &Curve) -> String {
    match (job.status, curve.last_step()) {
        (JobStatus::Running, step @ 1..) => {
            let total = curve.total_steps().map(|total| format!("/{total}")).unwrap_or_default();
            format!("step {step}{total} · {}", curve.line())
        }
        _ => standing(job),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(status: &str, paused: bool) -> Job {
        serde_json::from_value(serde_json::json!({
            "id": "ftjob-1", "created_at": 1, "model": "m", "status": status, "paused": paused,
            "fine_tuned_model": null, "trained_tokens": null, "error": null,
        }))
        .expect("a job")
    }

    #[test]
    fn a_job_without_steps_says_what_it_waits_for() {
        for (status, paused, line) in [
            ("validating_files", false, "the files are being checked"),
            ("queued", false, "waits for a worker"),
            ("queued", true, "paused"),
            ("running", false, "the model is being loaded"),
            ("cancelled", false, "cancelled"),
        ] {
            assert_eq!(plain_line(&job(status, paused), &Curve::default()), line);
        }
    }

    #[test]
    fn a_running_job_shows_its_step_with_the_total_once_that_is_known() {
        let part = |total_steps| {
            serde_json::from_value(serde_json::json!({
                "data": [{
                    "step": 4, "epoch": 1.0, "train_loss": 0.5, "train_mean_token_accuracy": 0.9,
                    "valid_loss": null, "valid_mean_token_accuracy": null,
                    "full_valid_loss": null, "full_valid_mean_token_accuracy": null,
                    "learning_rate": 0.1, "grad_norm": 1.0, "tokens": 10,
                    "tokens_per_second": 99.6, "elapsed_seconds": 8.0,
                }],
                "total_steps": total_steps,
            }))
            .expect("a part of a curve")
        };
        let running = job("running", false);
        let mut curve = Curve::default();
        curve.extend(part(None));
        assert_eq!(plain_line(&running, &curve), "step 4 · loss 0.5000 · 100 tokens/s");
        curve.extend(part(Some(10)));
        assert_eq!(
            plain_line(&running, &curve),
            "step 4/10 · loss 0.5000 · 100 tokens/s · 12s left"
        );
    }
}
