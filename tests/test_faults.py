"""Kill, drain and cancel in the middle of a job: the curve is the undisturbed one, bit for bit."""

import hashlib
import os
import signal

import pytest
from conftest import TINY
from harness import trainers_of, wait_for
from rows import sums

STEPS = 400
# A disturbance waits for this step: past several checkpoints, far from the end.
MIDDLE = 90


# Rows of a job that is still running whenever it is cancelled, however fast the machine.
ENDLESS = 4000


def start(service, rows=32):
    """The job that every test here runs: the same rows, seed and hyperparameters."""
    return service.create_job(
        sums(rows),
        TINY,
        validation=sums(4, start=100),
        n_epochs=50,
        batch_size=4,
        eval_steps=20,
        checkpoint_steps=25,
        adapter={"dropout": 0.1},
    )


def weights_hash(service, model, directory):
    content = (service.weights(model, directory) / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(parts, tmp_path_factory):
    """(curve, sha256 of the final weights) of the job when nothing happens to it."""
    parts.start_worker()
    job = parts.service.finish(start(parts.service).id)
    parts.stop_workers()
    curve = parts.service.curve(job.id)
    assert [row["step"] for row in curve] == list(range(1, STEPS + 1))
    return curve, weights_hash(parts.service, job.fine_tuned_model, tmp_path_factory.mktemp("w") / "w")


@pytest.fixture(autouse=True)
def no_workers_left(parts):
    yield
    parts.stop_workers()


def check_equal(service, job_id, undisturbed, directory):
    """The job ends as the undisturbed one did, and its events show each step once."""
    job = service.finish(job_id)
    curve, weights = undisturbed
    assert service.curve(job_id) == curve
    assert weights_hash(service, job.fine_tuned_model, directory) == weights
    steps = [event.data["step"] for event in service.events(job_id) if event.type == "metrics"]
    assert steps == list(range(1, STEPS + 1))


def test_a_killed_trainer_is_resumed_bit_for_bit(parts, undisturbed, tmp_path):
    service = parts.service
    parts.start_worker()
    job = start(service)
    service.wait_for_step(job.id, MIDDLE)
    _, trainer = parts.worker_of_running_job()
    os.kill(trainer, signal.SIGKILL)
    check_equal(service, job.id, undisturbed, tmp_path / "w")


def test_a_killed_worker_s_job_is_taken_over_bit_for_bit(parts, undisturbed, tmp_path):
    service = parts.service
    parts.start_worker()
    job = start(service)
    service.wait_for_step(job.id, MIDDLE)
    worker, trainer = parts.worker_of_running_job()
    worker.kill()
    wait_for("the orphaned trainer's end", lambda: not os.path.exists(f"/proc/{trainer}"))
    parts.start_worker()
    check_equal(service, job.id, undisturbed, tmp_path / "w")


def test_a_drained_worker_gives_the_job_back_and_it_goes_on_bit_for_bit(parts, undisturbed, tmp_path):
    service = parts.service
    worker = parts.start_worker()
    job = start(service)
    service.wait_for_step(job.id, MIDDLE)
    assert worker.stop() == 0
    assert service.job(job.id).status == "queued"
    done = len(service.curve(job.id))
    assert MIDDLE <= done < STEPS
    shown = {c.step_number for c in service.sdk.fine_tuning.jobs.checkpoints.list(job.id)}
    assert shown <= set(range(25, STEPS + 1, 25)), "the checkpoint of the drain is not for show"
    parts.start_worker()
    check_equal(service, job.id, undisturbed, tmp_path / "w")


def test_cancel_in_the_middle_ends_the_trainer_and_frees_the_worker(parts):
    service = parts.service
    worker = parts.start_worker()
    job = start(service, ENDLESS)
    service.wait_for_step(job.id, MIDDLE)
    service.sdk.fine_tuning.jobs.cancel(job.id)
    cancelled = service.wait_for_status(job.id, "cancelled")
    assert cancelled.finished_at and cancelled.fine_tuned_model is None
    wait_for("the trainer's end", lambda: not trainers_of(worker.pid))
    assert len(service.curve(job.id)) >= MIDDLE, "what it has learned stays to be seen"
    following = service.create_job(sums(10), TINY, n_epochs=1, batch_size=10)
    service.finish(following.id)


def test_a_queued_job_is_cancelled_at_once(parts):
    service = parts.service
    job = service.create_job(sums(10), TINY)
    service.wait_for_status(job.id, "queued")
    assert service.sdk.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_two_workers_share_one_queue(parts):
    service = parts.service
    first, second = parts.start_worker(), parts.start_worker()
    jobs = [start(service, ENDLESS) for _ in range(2)]
    wait_for("a trainer at each worker", lambda: trainers_of(first.pid) and trainers_of(second.pid))
    assert {service.job(job.id).status for job in jobs} == {"running"}
    for job in jobs:
        service.sdk.fine_tuning.jobs.cancel(job.id)
        service.wait_for_status(job.id, "cancelled")
