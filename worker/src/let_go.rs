//! Letting go of a job: the one write that ends its lease.

use crate::lease::LeaseKeeper;
use crate::results::results_csv;
use crate::retry::retry;
use crate::session::{Claim, Ending, Outcome, SessionError};
use bytes::Bytes;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::protocol::Finished;
use tunesmith_store::lease::{AfterLoss, Completed, MAX_TRIES};
use tunesmith_store::objects::{ObjectKey, ObjectPrefix};

/// The result file's name, as OpenAI's is called.
const RESULT_FILENAME: &str = "step_metrics.csv";

impl Claim<'_> {
    /// Writes how the job ended, or where it goes on from.
    pub(crate) async fn let_go(&self, keeper: &LeaseKeeper, ending: Ending) -> Outcome {
        let job_id = &self.job.id;
        let written = match self.write(keeper, ending).await {
            // A job whose results cannot be stored is lost as one whose trainer died.
            Err(SessionError::Attempt(reason)) => self.write(keeper, Ending::Lost(reason)).await,
            written => written,
        };
        match written {
            Ok(outcome) => outcome,
            Err(SessionError::Stale) => self.lease_is_lost(),
            Err(error) => {
                tracing::error!(%job_id, %error, "a job cannot be let go of; its lease runs out");
                Outcome::Lost
            }
        }
    }

    /// Notes that nothing may be written any more.
    pub(crate) fn lease_is_lost(&self) -> Outcome {
        tracing::warn!(
            job_id = %self.job.id,
            attempt = self.lease.attempt,
            "the lease is lost, so nothing more is written for this attempt"
        );
        Outcome::LetGo
    }

    async fn write(&self, keeper: &LeaseKeeper, ending: Ending) -> Result<Outcome, SessionError> {
        let (store, lease, job_id) = (&self.context.store, &self.lease, &self.job.id);
        match ending {
            Ending::Finished { finished, initial_valid_loss } => {
                let completed = self.store_results(&finished, initial_valid_loss).await?;
                let _settling = keeper.settle().await;
                retry("complete_job", || store.complete_job(lease, &completed)).await?;
                tracing::info!(%job_id, "a job succeeded");
                self.discard_state().await;
            }
            Ending::GiveBack(reason) => {
                let _settling = keeper.settle().await;
                retry("give_back", || store.give_back(lease, reason)).await?;
                tracing::info!(%job_id, ?reason, "a job is given back");
            }
            Ending::Cancelled => {
                let _settling = keeper.settle().await;
                retry("cancel_job", || store.cancel_job(lease)).await?;
                tracing::info!(%job_id, "a job is cancelled");
                self.discard_state().await;
            }
            Ending::Failed(error) => {
                let _settling = keeper.settle().await;
                retry("fail_job", || store.fail_job(lease, error.clone())).await?;
                tracing::info!(%job_id, %error, "a job failed");
                self.discard_state().await;
            }
            Ending::Lost(reason) => {
                let _settling = keeper.settle().await;
                let error = lost(&reason);
                let after = retry("lose_job", || store.lose_job(lease, error.clone())).await?;
                tracing::warn!(%job_id, attempt = lease.attempt, reason, "an attempt is lost");
                if after == AfterLoss::Ended {
                    self.discard_state().await;
                }
                return Ok(Outcome::Lost);
            }
        }
        Ok(Outcome::LetGo)
    }

    /// Stores the loss curve as a file. It is nobody's until the job is completed with it; one
    /// that never is goes with the uploads that broke off.
    async fn store_results(
        &self,
        finished: &Finished,
        initial_valid_loss: Option<f64>,
    ) -> Result<Completed, SessionError> {
        let (store, project) = (&self.context.store, &self.job.project_id);
        let mut steps = retry("metrics", || store.metrics(project, &self.job.id, 0)).await?;
        // A run that went back and then stopped early leaves steps that are none of its own.
        steps.retain(|step| step.step <= finished.steps);
        let csv = results_csv(&steps, initial_valid_loss)
            .map_err(|error| SessionError::Attempt(format!("the result file: {error}")))?;
        let csv = Bytes::from(csv);
        let result_file = retry("begin_file", || store.begin_file(project)).await?;
        let key = ObjectKey::File(result_file.clone());
        let objects = store.objects();
        let result_stored =
            retry("upload of the result file", || objects.put_bytes(&key, csv.clone())).await?;
        Ok(Completed {
            trained_tokens: finished.trained_tokens,
            steps: finished.steps,
            model_step: finished.model_step,
            result_file,
            result_filename: RESULT_FILENAME.to_owned(),
            result_stored,
        })
    }

    /// Removes the state of the last checkpoint: nothing resumes a job that has ended.
    async fn discard_state(&self) {
        let (store, job) = (&self.context.store, &self.job);
        let discarded = async {
            if let Some(place) = store.job(&job.project_id, &job.id).await?.resume {
                store.objects().delete_prefix(&ObjectPrefix::CheckpointState(place)).await?;
            }
            Ok::<_, tunesmith_store::StoreError>(())
        };
        if let Err(error) = discarded.await {
            let job_id = &job.id;
            tracing::warn!(%job_id, %error, "the state of an ended job stays in the object store");
        }
    }
}

/// What the owner reads if this loss was one too many.
fn lost(reason: &str) -> ApiError {
    ApiError::new(
        ErrorCode::WorkerLost,
        format!(
            "Training was cut off {MAX_TRIES} times without a new checkpoint between. The last \
             time: {reason}. If memory ran out, try a smaller batch_size or max_seq_length; the \
             worker's log has the trainer's last words."
        ),
    )
}
