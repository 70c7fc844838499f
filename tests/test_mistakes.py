"""Every mistake gets its reply, and the reply says what to do."""

import json

import openai
import pytest
from conftest import TINY
from rows import chat, sums


def test_a_bad_key_is_a_401(service):
    with pytest.raises(openai.AuthenticationError) as refused:
        service.with_key("sk-wrong").sdk.fine_tuning.jobs.list()
    assert refused.value.code == "invalid_api_key"


def test_every_error_reply_has_its_four_keys_and_a_request_id(service):
    for path in ("/files/file-none", "/fine_tuning/jobs/none", "/nowhere"):
        status, headers, body = service.request("GET", path)
        assert status == 404
        assert headers["x-request-id"]
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_a_missing_file_is_a_404_that_names_it(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.files.retrieve("file-none")
    assert refused.value.body["message"] == "No such File object: file-none"
    assert refused.value.body["param"] == "id"


def test_a_job_on_a_missing_file_is_refused_by_name(client):
    with pytest.raises(openai.APIStatusError) as refused:
        client.fine_tuning.jobs.create(model=TINY, training_file="file-none")
    assert refused.value.status_code in (400, 404)
    assert "file-none" in refused.value.body["message"]
    assert refused.value.body["param"] == "training_file"


def test_a_missing_job_is_a_404_with_openai_s_code(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.fine_tuning.jobs.retrieve("ftjob-none")
    assert refused.value.body["message"] == "Could not find fine tune: ftjob-none"
    assert (refused.value.param, refused.value.code) == ("fine_tune_id", "fine_tune_not_found")


def test_an_unknown_model_is_a_400_that_lists_those_there_are(service):
    with pytest.raises(openai.BadRequestError) as refused:
        service.create_job(sums(10), "gpt-17")
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")
    message = refused.value.body["message"]
    assert message.startswith("Model gpt-17 is not available for fine-tuning or does not exist.")
    assert TINY in message


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("n_epochs", 51, "between 1 and 50"),
        ("batch_size", 0, "between 1 and 256"),
        ("learning_rate", -1, "greater than 0"),
        ("lr_scheduler", "sawtooth", "cosine"),
        ("prompt_loss_weight", 1.5, "between 0 and 1"),
        ("adapter", {"r": 0}, "r"),
        ("adapter", {"target_modules": ["w_pack"]}, "q_proj"),
    ],
)
def test_a_bad_hyperparameter_is_a_400_naming_value_and_range(service, name, value, rule):
    with pytest.raises(openai.BadRequestError) as refused:
        service.create_job(sums(10), TINY, **{name: value})
    assert refused.value.param.startswith(f"method.supervised.hyperparameters.{name}")
    assert rule in refused.value.body["message"]


def test_nine_rows_fail_naming_the_minimum(service):
    error = service.fail(service.create_job(sums(9), TINY).id)
    assert (error.code, error.param) == ("invalid_n_examples", "training_file")
    assert error.message == "Training file has 9 example(s), but must have at least 10 examples"


def test_a_broken_seventh_row_is_named_with_rule_and_place(service):
    rows = sums(12)
    rows[6]["messages"][1]["role"] = "asistant"
    error = service.fail(service.create_job(rows, TINY).id)
    assert (error.code, error.param) == ("invalid_file_format", "training_file")
    assert "7" in error.message and "role" in error.message and "assistant" in error.message


def test_a_broken_row_of_the_validation_file_is_named_as_such(service):
    validation = sums(3)
    del validation[1]["messages"][1]
    error = service.fail(service.create_job(sums(10), TINY, validation=validation).id)
    assert (error.code, error.param) == ("invalid_file_format", "validation_file")
    assert "2" in error.message


def test_a_line_that_is_not_json_is_named(service):
    lines = [json.dumps(row) for row in sums(11)]
    lines[4] = lines[4][:-1]
    error = service.fail(service.create_job(service.upload("\n".join(lines)), TINY).id)
    assert error.code == "invalid_file_format"
    assert "5" in error.message


def test_a_file_that_is_in_use_is_not_deleted_under_the_job(service, client):
    training = service.upload(sums(40))
    job = service.create_job(training, TINY, n_epochs=50, batch_size=2, checkpoint_steps=1000)
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.delete(training)
    assert refused.value.code == "file_in_use"
    client.fine_tuning.jobs.cancel(job.id)
    service.wait_for_status(job.id, "cancelled")


def test_a_finished_job_is_not_cancelled_again(service, client):
    job = service.create_job(sums(9), TINY)
    service.fail(job.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.cancel(job.id)
    assert refused.value.code == "invalid_job_state"


def test_a_row_whose_every_target_is_cut_away_is_refused(service):
    rows = sums(11)
    rows[3] = chat("word " * 600, "Never seen.")
    error = service.fail(service.create_job(rows, TINY, prompt_loss_weight=0).id)
    assert (error.code, error.param) == ("invalid_file_format", "training_file")
    assert "4" in error.message
