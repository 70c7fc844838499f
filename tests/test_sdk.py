"""The official OpenAI SDK drives files, jobs, events, checkpoints and models."""

import csv
import hashlib
import io
import json

import openai
import pytest
from conftest import TINY
from rows import sums


@pytest.fixture(scope="module")
def finished(service):
    """A job with validation rows that has run to its end."""
    created = service.create_job(
        sums(12), TINY, validation=sums(3, start=50), n_epochs=2, batch_size=4, eval_steps=2, checkpoint_steps=3
    )
    return service.finish(created.id)


def test_files_are_created_listed_read_and_deleted(client):
    content = b'{"text": "one"}\n'
    file = client.files.create(file=("one.jsonl", content), purpose="fine-tune")
    assert (file.object, file.bytes, file.filename, file.purpose, file.status) == (
        "file",
        len(content),
        "one.jsonl",
        "fine-tune",
        "processed",
    )
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == content
    assert file.id in [listed.id for listed in client.files.list(purpose="fine-tune")]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_list_of_files_comes_in_pages_newest_first(client):
    ids = [client.files.create(file=(f"{n}.txt", b"x"), purpose="user_data").id for n in range(5)]
    page = client.files.list(purpose="user_data", limit=2)
    assert [file.id for file in page.data] == ids[:-3:-1]
    assert page.has_more
    assert [file.id for file in client.files.list(purpose="user_data", limit=2)] == ids[::-1]


def test_a_range_of_a_file_comes_alone(service):
    file = service.upload(b"0123456789", name="digits.txt", purpose="user_data")
    path = f"/files/{file}/content"
    status, headers, body = service.request("GET", path, headers={"Range": "bytes=2-4"})
    assert (status, body, headers["Content-Range"]) == (206, b"234", "bytes 2-4/10")
    status, _, body = service.request("GET", path, headers={"Range": "bytes=-3"})
    assert (status, body) == (206, b"789")
    assert service.request("GET", path, headers={"Range": "bytes=20-"})[0] == 416


def test_a_finished_job_has_every_field_of_the_contract(client, finished):
    assert finished.object == "fine_tuning.job"
    assert finished.status == "succeeded"
    assert finished.error is None or finished.error.code is None
    assert finished.finished_at >= finished.created_at
    assert finished.fine_tuned_model.startswith(f"ft:{TINY}:")
    assert finished.trained_tokens > 0
    assert finished.seed == 7
    assert finished.hyperparameters.n_epochs == 2
    hyperparameters = finished.method.supervised.hyperparameters
    assert hyperparameters.batch_size == 4
    # Ours ride beside OpenAI's, and nothing is left at "auto".
    ours = hyperparameters.model_extra
    assert ours["adapter"]["r"] == 16
    assert ours["prompt_loss_weight"] == 0.1
    assert "auto" not in json.dumps(finished.to_dict())
    assert finished.id in [job.id for job in client.fine_tuning.jobs.list(limit=5)]


def test_events_tell_the_whole_story_in_order(service, finished):
    messages = service.messages(finished.id)
    story = [
        f"Created fine-tuning job: {finished.id}",
        f"Validating training file: {finished.training_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 1/6: training loss=",
        "Step 6/6: training loss=",
        "Checkpoint created at step 6",
        f"New fine-tuned model created: {finished.fine_tuned_model}",
        "The job has successfully completed.",
    ]
    positions = [next(n for n, m in enumerate(messages) if m.startswith(start)) for start in story]
    assert positions == sorted(positions)
    metrics = [event for event in service.events(finished.id) if event.type == "metrics"]
    assert [event.data["step"] for event in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(event.data["total_steps"] == 6 for event in metrics)


def test_checkpoints_are_listed_newest_first_with_their_metrics(client, finished):
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(finished.id))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [6, 3]
    for checkpoint in checkpoints:
        assert checkpoint.object == "fine_tuning.job.checkpoint"
        assert checkpoint.fine_tuning_job_id == finished.id
        assert checkpoint.fine_tuned_model_checkpoint.endswith(f":ckpt-step-{checkpoint.step_number}")
        assert checkpoint.metrics.step == checkpoint.step_number
        assert checkpoint.metrics.train_loss > 0


def test_the_curve_has_every_step_and_column(service, finished):
    rows = service.metrics(finished.id)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows][2::3] == [1, 2]
    for row in rows:
        for column in ("train_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "elapsed_seconds"):
            assert row[column] >= 0, column
        assert "valid_loss" in row
    assert any(row["valid_loss"] for row in rows)
    tokens = [row["tokens"] for row in rows]
    assert tokens == sorted(tokens) and tokens[-1] == finished.trained_tokens


def test_the_result_file_is_a_csv_of_numbers_alone(client, finished):
    (file_id,) = finished.result_files
    assert client.files.retrieve(file_id).purpose == "fine-tune-results"
    table = list(csv.DictReader(io.StringIO(client.files.content(file_id).text)))
    assert list(table[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert [int(row["step"]) for row in table] == [1, 2, 3, 4, 5, 6]
    assert all(float(cell) == float(cell) for row in table for cell in row.values())


def test_models_are_listed_retrieved_and_deleted(service, client):
    job = service.finish(service.create_job(sums(10), TINY, n_epochs=1, batch_size=10).id)
    name = job.fine_tuned_model
    listed = {model.id for model in client.models.list()}
    assert {name, TINY} <= listed
    assert client.models.retrieve(name).object == "model"
    assert client.models.delete(name).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(name)
    assert name not in {model.id for model in client.models.list()}


def test_weights_carry_a_manifest_whose_sums_are_right(service, client, finished, tmp_path):
    checkpoint = client.fine_tuning.jobs.checkpoints.list(finished.id).data[-1]
    for index, name in enumerate([finished.fine_tuned_model, checkpoint.fine_tuned_model_checkpoint]):
        directory = service.weights(name, tmp_path / str(index))
        files = {path.name for path in directory.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md", "manifest.json"} <= files
        manifest = json.loads((directory / "manifest.json").read_text())
        assert {entry["name"] for entry in manifest["files"]} == files - {"manifest.json"}
        for entry in manifest["files"]:
            content = (directory / entry["name"]).read_bytes()
            assert len(content) == entry["bytes"]
            assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert finished.id in (directory / "README.md").read_text()


def test_same_seed_gives_the_same_curve_and_another_seed_another(service):
    def curve(seed):
        job = service.create_job(sums(12), TINY, seed=seed, n_epochs=1, batch_size=3, checkpoint_steps=100)
        service.finish(job.id)
        return service.curve(job.id)

    first = curve(1)
    assert curve(1) == first
    assert curve(2) != first
