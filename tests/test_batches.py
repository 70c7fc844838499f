"""The SDK makes batches, whose lines are answered by models."""

import json

import openai
import pytest
from conftest import TINY
from harness import valid, wait_for


def requests(*custom_ids, model="m"):
    for custom_id in custom_ids:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
        yield {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def ended(client, batch):
    def look():
        now = client.batches.retrieve(batch.id)
        return now if now.status in ("completed", "failed", "cancelled") else None

    return wait_for(f"the end of {batch.id}", look)


def lines_of(client, file):
    return [json.loads(line) for line in client.files.content(file).text.splitlines()]


def test_a_batch_is_answered_line_by_line(service, client):
    rows = [*requests("a", "b", model=TINY), *requests("c")]
    file = service.upload(rows, name="in.jsonl", purpose="batch")
    batch = client.batches.create(
        input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h", metadata={"k": "v"}
    )
    assert (batch.object, batch.metadata) == ("batch", {"k": "v"})
    assert batch.id in [listed.id for listed in client.batches.list(limit=1)]
    done = valid(ended(client, batch))
    assert (done.status, done.model) == ("completed", None)
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (3, 2, 1)
    alone = client.chat.completions.create(**rows[0]["body"]).choices[0].message.content
    answers = lines_of(client, done.output_file_id)
    assert [line["custom_id"] for line in answers] == ["a", "b"]
    for line in answers:
        assert line["response"]["body"]["choices"][0]["message"]["content"] == alone
    (error,) = lines_of(client, done.error_file_id)
    assert (error["custom_id"], error["response"]["body"]["error"]["code"]) == ("c", "no_such_model")
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.cancel(batch.id)
    assert refused.value.code == "invalid_batch_state"


def test_a_broken_line_fails_the_batch_by_its_number(service, client):
    rows = [json.dumps(row) for row in requests("a", "a")]
    file = service.upload("\n".join([rows[0], "{", rows[1]]), name="in.jsonl", purpose="batch")
    batch = client.batches.create(
        input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
    )
    failed = valid(ended(client, batch))
    assert failed.status == "failed"
    assert [(error.code, error.line) for error in failed.errors.data] == [
        ("invalid_json_line", 2),
        ("duplicate_custom_id", 3),
    ]


def test_a_completion_of_a_model_that_is_not_there_is_a_404_that_names_it(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
    assert (refused.value.code, refused.value.param) == ("no_such_model", "model")
