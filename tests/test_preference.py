"""Preference pairs by the official OpenAI SDK, from the upload to the tuned model."""

import csv
import io
import math

import pytest
from conftest import TINY
from rows import sums


def pairs(count, start=0):
    """`count` questions with a right answer that is preferred to a rude one."""
    return [
        {
            "input": {"messages": [{"role": "user", "content": f"What is {n} plus {n + 3}?"}]},
            "preferred_output": [{"role": "assistant", "content": f"{n} plus {n + 3} is {2 * n + 3}."}],
            "non_preferred_output": [{"role": "assistant", "content": "Go away."}],
        }
        for n in range(start, start + count)
    ]


def create(service, rows, validation=None, **hyperparameters):
    files = {"training_file": service.upload(rows)}
    if validation is not None:
        files["validation_file"] = service.upload(validation)
    return service.sdk.fine_tuning.jobs.create(
        model=TINY,
        seed=7,
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
        **files,
    )


@pytest.fixture(scope="module")
def finished(service):
    """A DPO job with validation pairs that has run to its end."""
    created = create(
        service,
        pairs(12),
        validation=pairs(3, start=50),
        beta=0.2,
        n_epochs=3,
        batch_size=4,
        learning_rate=2e-3,
        warmup_ratio=0,
        eval_steps=3,
        checkpoint_steps=3,
    )
    return service.finish(created.id)


def test_a_dpo_job_succeeds_and_shows_its_method(finished):
    assert finished.method.type == "dpo"
    assert finished.method.supervised is None
    hyperparameters = finished.method.dpo.hyperparameters
    assert (hyperparameters.beta, hyperparameters.n_epochs, hyperparameters.batch_size) == (0.2, 3, 4)
    assert hyperparameters.model_extra["preference_loss"] == "dpo"
    assert finished.fine_tuned_model.startswith(f"ft:{TINY}:")


def test_the_loss_begins_at_log_2_and_falls_as_the_margin_grows(service, finished):
    rows = service.metrics(finished.id)
    assert len(rows) == 9
    assert rows[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["train_reward_margin"] > 0
    assert rows[-1]["train_reward_accuracy"] == 1
    assert rows[-1]["valid_reward_margin"] > 0


def test_events_and_checkpoints_have_numbers(service, client, finished):
    metrics = [event for event in service.events(finished.id) if event.type == "metrics"]
    assert [event.data["step"] for event in metrics] == list(range(1, 10))
    for event in metrics:
        for name in ("train_loss", "train_mean_token_accuracy", "train_reward_accuracy", "train_reward_margin"):
            assert math.isfinite(event.data[name]), name
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(finished.id))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [9, 6, 3]
    for checkpoint in checkpoints:
        assert checkpoint.metrics.train_loss > 0
        assert checkpoint.metrics.full_valid_loss > 0
        assert 0 <= checkpoint.metrics.model_extra["train_reward_accuracy"] <= 1


def test_every_cell_of_the_result_file_is_a_number(client, finished):
    (file_id,) = finished.result_files
    table = list(csv.DictReader(io.StringIO(client.files.content(file_id).text)))
    assert len(table) == 9
    assert all(math.isfinite(float(cell)) for row in table for cell in row.values())


def test_every_spelling_of_pairs_gives_the_same_curve(service):
    def curve(rows):
        job = service.finish(create(service, rows, n_epochs=1, batch_size=5, checkpoint_steps=100).id)
        return service.curve(job.id)

    openai = pairs(10)
    question = [row["input"]["messages"] for row in openai]
    answers = [(row["preferred_output"], row["non_preferred_output"]) for row in openai]
    trl = [{"prompt": q, "chosen": a, "rejected": b} for q, (a, b) in zip(question, answers)]
    implicit = [{"chosen": q + a, "rejected": q + b} for q, (a, b) in zip(question, answers)]
    expected = curve(openai)
    assert curve(trl) == expected
    assert curve(implicit) == expected


def test_orpo_and_simpo_run_too(service):
    for loss in ("orpo", "simpo"):
        job = create(service, pairs(10), preference_loss=loss, n_epochs=1, batch_size=5)
        job = service.finish(job.id)
        assert job.method.dpo.hyperparameters.model_extra["preference_loss"] == loss
        assert all(math.isfinite(row["train_loss"]) for row in service.metrics(job.id))


def test_chat_rows_under_dpo_fail_naming_the_method_they_belong_to(service):
    error = service.fail(create(service, sums(10)).id)
    assert (error.code, error.param) == ("invalid_file_format", "training_file")
    assert error.message.startswith('Line 1: the row is a chat row, but method "dpo" takes preference pairs.')
    assert 'method "supervised"' in error.message


def test_pairs_in_a_supervised_job_fail_naming_dpo(service):
    error = service.fail(service.create_job(pairs(10), TINY).id)
    assert 'method "dpo"' in error.message


def test_a_long_text_trains_in_windows(service):
    text = " ".join(str(n) for n in range(2000))
    job = service.finish(service.create_job([{"text": text}], TINY, n_epochs=1, batch_size=8).id)
    assert any("windows of at most 256 tokens" in message for message in service.messages(job.id))
    tokens = service.metrics(job.id)[-1]["tokens"]
    assert tokens == job.trained_tokens > 2000
