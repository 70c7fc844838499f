"""Two projects see nothing of each other."""

import openai
import pytest
from conftest import TINY
from harness import run_cli
from rows import sums


@pytest.fixture(scope="module")
def other(up, service):
    """The same server with the key of another project."""
    created = run_cli("keys", "create", "--project", "other", "--data-dir", up.data_dir)
    return service.with_key(created.stdout.split()[-1])


@pytest.fixture(scope="module")
def job(service):
    return service.finish(service.create_job(sums(10), TINY, n_epochs=1, batch_size=5).id)


def test_another_project_s_ids_answer_like_ids_that_do_not_exist(service, other, job):
    sdk = other.sdk
    for call in (
        lambda: sdk.files.retrieve(job.training_file),
        lambda: sdk.files.content(job.training_file),
        lambda: sdk.files.delete(job.training_file),
        lambda: sdk.fine_tuning.jobs.retrieve(job.id),
        lambda: sdk.fine_tuning.jobs.cancel(job.id),
        lambda: list(sdk.fine_tuning.jobs.list_events(job.id)),
        lambda: list(sdk.fine_tuning.jobs.checkpoints.list(job.id)),
        lambda: sdk.models.retrieve(job.fine_tuned_model),
        lambda: sdk.models.delete(job.fine_tuned_model),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    for path in (f"/fine_tuning/jobs/{job.id}/metrics", f"/models/{job.fine_tuned_model}/weights"):
        assert other.request("GET", path)[0] == 404
    # Word for word, so that nothing tells the two apart.
    foreign = other.request("GET", f"/fine_tuning/jobs/{job.id}")[2]
    absent = other.request("GET", "/fine_tuning/jobs/ftjob-none")[2]
    assert foreign.replace(job.id.encode(), b"X") == absent.replace(b"ftjob-none", b"X")
    assert service.job(job.id).status == "succeeded"


def test_another_project_s_lists_are_empty_but_for_base_models(other, job):
    assert list(other.sdk.files.list()) == []
    assert list(other.sdk.fine_tuning.jobs.list()) == []
    models = {model.id for model in other.sdk.models.list()}
    assert TINY in models and job.fine_tuned_model not in models


def test_another_project_s_file_does_not_train(other, job):
    with pytest.raises(openai.APIStatusError) as refused:
        other.sdk.fine_tuning.jobs.create(model=TINY, training_file=job.training_file)
    assert refused.value.param == "training_file"
