"""Files as they really come: each trains, and rows mean the same however they are written."""

import json

import pytest
from conftest import TINY
from rows import chat, sums


def lines(ending="\n", last=True):
    text = ending.join(json.dumps(row) for row in sums(10))
    return text + ending if last else text


@pytest.fixture(scope="module")
def plain_curve(service):
    return train(service, lines())


def train(service, content):
    job = service.create_job(service.upload(content), TINY, n_epochs=1, batch_size=5, checkpoint_steps=100)
    service.finish(job.id)
    return service.curve(job.id)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("\ufeff" + lines(), id="byte order mark"),
        pytest.param(lines("\r\n"), id="CRLF"),
        pytest.param(lines(last=False), id="no final newline"),
        pytest.param(lines("\n\n"), id="blank lines"),
        pytest.param(json.dumps(sums(10)), id="JSON array"),
        pytest.param("\n".join(json.dumps(row, indent=2) for row in sums(10)), id="pretty-printed"),
    ],
)
def test_the_same_rows_written_differently_give_the_same_curve(service, plain_curve, content):
    assert train(service, content) == plain_curve


def test_without_validation_rows_the_job_succeeds_without_validation_losses(service, client):
    job = service.finish(service.create_job(sums(10), TINY, n_epochs=2, batch_size=5).id)
    assert job.validation_file is None
    assert all(row["valid_loss"] is None for row in service.metrics(job.id))
    table = client.files.content(job.result_files[0]).text.splitlines()
    assert all(cell for line in table[1:] for cell in line.split(","))


def test_a_validation_split_holds_rows_out(service):
    job = service.finish(service.create_job(sums(20), TINY, n_epochs=1, batch_size=4, validation_split=0.2).id)
    rows = service.metrics(job.id)
    assert len(rows) == 4, "16 rows train in steps of 4"
    assert any(row["valid_loss"] is not None or row["full_valid_loss"] is not None for row in rows)


def test_a_row_longer_than_the_context_is_cut_and_reported(service):
    rows = sums(10)
    rows.append(chat("Count.", " ".join(str(n) for n in range(1000))))
    job = service.finish(service.create_job(rows, TINY, n_epochs=1, batch_size=11).id)
    assert job.method.supervised.hyperparameters.model_extra["max_seq_length"] == 256
    (row,) = service.metrics(job.id)
    assert row["tokens"] < 11 * 256
    assert any("truncated" in message or "cut" in message for message in service.messages(job.id))


def test_full_fine_tuning_gives_a_hugging_face_directory(service, tmp_path):
    from transformers import AutoModelForCausalLM

    job = service.finish(
        service.create_job(sums(10), TINY, n_epochs=1, batch_size=5, adapter={"type": "full"}).id
    )
    directory = service.weights(job.fine_tuned_model, tmp_path / "full")
    assert (directory / "config.json").exists()
    assert not (directory / "adapter_config.json").exists()
    assert AutoModelForCausalLM.from_pretrained(directory).num_parameters() > 0
