"""Data is checked before it costs anything: reports on files, previews of jobs, rows by their loss."""

import json
from pathlib import Path

import pytest
from conftest import TINY
from harness import wait_for
from rows import chat, sums

SAMPLES = Path(__file__).resolve().parent.parent / "core/tests/data"


def report(service, file_id, query=""):
    """The report once it is made; until then the server says so."""

    def made():
        status, headers, body = service.request("GET", f"/files/{file_id}/report{query}")
        if status == 202:
            assert headers["Retry-After"]
            assert json.loads(body)["status"] == "in_progress"
            return None
        assert status == 200, body
        return json.loads(body)

    return wait_for(f"a report on {file_id}", made)


@pytest.mark.parametrize(
    ("name", "container", "shape", "rows", "faulty"),
    [
        ("openai-node-10-rows.jsonl", "json_lines", "chat", 10, 0),
        ("travel-chat.jsonl", "json_lines", "chat", 10, 0),
        ("travel-validation-no-assistant.jsonl", "json_lines", None, 5, 5),
        ("sharegpt-dummy-conversation.json", "json_array", "share_gpt", 500, 0),
        ("prompt-completion-crlf.jsonl", "json_lines", "prompt_completion", 10, 0),
    ],
)
def test_samples_that_people_upload_are_told_for_what_they_are(service, name, container, shape, rows, faulty):
    found = report(service, service.upload((SAMPLES / name).read_bytes(), name))
    assert (found["container"], found["shape"]) == (container, shape)
    assert (found["rows"], found["faulty_rows"]) == (rows, faulty)
    assert found["model"] == TINY, "the model that was imported first counts"
    if not faulty:
        assert 0 < found["tokens"]["trained"] < found["tokens"]["total"]


def test_a_broken_file_uploads_and_says_so(service, client):
    rows = sums(12)
    rows[6]["messages"][1]["role"] = "asistant"
    rows[8] = chat("word " * 600, "Never seen.")
    file = service.upload(rows)
    found = report(service, file)
    assert [problem["line"] for problem in found["problems"]] == [7, 9]
    assert found["problems"][0]["place"] == "messages[1].role"
    assert found["rows_without_targets"] == 1
    shown = client.files.retrieve(file)
    assert shown.status == "processed"
    assert "Line 7" in shown.status_details


def test_plain_text_is_reported_and_trains(service):
    text = "".join(f"On day {n} the ship sailed {n * 7} miles to the north.\n\n" for n in range(200))
    file = service.upload(text, "logbook.txt")
    assert report(service, file)["container"] == "plain_text"
    job = service.create_job(file, TINY, n_epochs=1, batch_size=8, max_seq_length=128)
    assert service.finish(job.id).trained_tokens > 1000


def test_a_preview_tells_what_the_job_then_does(service):
    file = service.upload(sums(20))
    arguments = ["--model", TINY, "--training-file", file]
    hyperparameters = {"n_epochs": 2, "batch_size": 4}
    body = {
        "model": TINY,
        "training_file": file,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    }
    status, _, reply = service.request("POST", "/fine_tuning/jobs/preview", body)
    preview = json.loads(reply)
    assert status == 200 and preview["would_run"], preview
    assert preview["memory"]["peak_bytes"] > 1 << 20
    job = service.finish(service.create_job(file, TINY, **hyperparameters).id)
    assert len(service.metrics(job.id)) == preview["steps"]["total"] == 10
    assert job.trained_tokens == preview["tokens"]["value"]
    shown = job.method.supervised.hyperparameters.model_dump()
    # The machine that runs the job chooses its precision.
    assert preview["hyperparameters"]["precision"] == "auto"
    assert shown == preview["hyperparameters"] | {"precision": shown["precision"]}
    assert shown["precision"] in ("fp32", "bf16")

    table = service.cli("jobs", "preview", *arguments, "--hyperparameters", json.dumps(hyperparameters)).stdout
    assert table.startswith("The job would run.")
    for words in ("HYPERPARAMETER", "peak memory", "<|im_start|>", "tokens a second"):
        assert words in table
    refused = service.cli("jobs", "preview", *arguments, "--hyperparameters", '{"n_epochs": 0}', check=False)
    assert refused.returncode != 0
    assert "n_epochs" in refused.stdout and "between 1 and 50" in refused.stdout


def test_a_wrong_label_is_at_the_top_of_the_rows(service):
    rows = sums(24)
    rows[13] = chat(rows[13]["messages"][0]["content"], "Zq xylophone vortex!")
    job = service.finish(service.create_job(rows, TINY, n_epochs=6, batch_size=4, learning_rate=5e-3).id)
    ranked = service.get(f"/fine_tuning/jobs/{job.id}/rows?order=loss&limit=100")["data"]
    assert ranked[0]["line"] == 14
    assert sorted(row["line"] for row in ranked) == list(range(1, 25))
    losses = [row["loss"] for row in ranked]
    assert losses == sorted(losses, reverse=True)
    # The last epoch's rows: their losses are those of the curve's last steps.
    last = service.metrics(job.id)[-1]
    assert any(row["step"] == last["step"] for row in ranked)


def test_every_cell_of_the_result_file_is_a_number_to_pandas(service, client):
    import io

    import pandas

    for options in ({}, {"validation": sums(3, start=50)}):
        job = service.finish(service.create_job(sums(12), TINY, n_epochs=2, batch_size=5, **options).id)
        table = pandas.read_csv(io.StringIO(client.files.content(job.result_files[0]).text))
        assert list(table.columns) == [
            "step",
            "train_loss",
            "train_accuracy",
            "valid_loss",
            "valid_mean_token_accuracy",
        ]
        assert len(table) == len(service.metrics(job.id))
        assert all(pandas.api.types.is_numeric_dtype(kind) for kind in table.dtypes)
        assert not table.isna().any().any()
