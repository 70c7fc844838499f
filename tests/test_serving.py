"""Models answer the official SDK: base models, tuned ones, streamed or whole."""

import concurrent.futures
import json
from typing import Literal

import openai
import pydantic
import pytest
from conftest import TINY
from harness import valid
from rows import chat

QUESTION = [{"role": "user", "content": "What is the word?"}]


def ask(client, model, **options):
    options = {"temperature": 0, "max_completion_tokens": 12, "messages": QUESTION} | options
    return client.chat.completions.create(model=model, **options)


def text_of(answer):
    return answer.choices[0].message.content


@pytest.fixture(scope="module")
def tuned(service):
    """Two adapters on one base model, each of which has learned its own word."""
    jobs = [
        service.create_job([chat(QUESTION[0]["content"], word)] * 16, TINY, n_epochs=20, batch_size=8,
                           learning_rate=0.02, checkpoint_steps=1000)
        for word in ("alpha", "omega")
    ]
    return [service.finish(job.id).fine_tuned_model for job in jobs]


def test_each_adapter_says_its_own_word_side_by_side_with_its_base(client, tuned):
    models = [TINY, *tuned] * 3
    with concurrent.futures.ThreadPoolExecutor(len(models)) as pool:
        answers = [text_of(valid(answer)) for answer in pool.map(lambda model: ask(client, model), models)]
    assert answers[:3] * 3 == answers
    for answer, word in zip(answers[1:3], ("alpha", "omega")):
        assert answer.startswith(word)
        assert not answers[0].startswith(word)


def test_a_model_that_was_tuned_whole_answers_too(service, client):
    rows = [chat(QUESTION[0]["content"], "gamma")] * 16
    adapter = {"type": "full"}
    job = service.create_job(rows, TINY, adapter=adapter, n_epochs=20, batch_size=8, learning_rate=0.005)
    model = service.finish(job.id).fine_tuned_model
    assert text_of(valid(ask(client, model))).startswith("gamma")
    assert not text_of(ask(client, TINY)).startswith("gamma")
    # What it has learned is there from the first step of a job that starts from it.
    job = service.create_job(rows, model, n_epochs=1, batch_size=16, learning_rate=1e-9)
    assert text_of(ask(client, service.finish(job.id).fine_tuned_model)).startswith("gamma")


def test_a_stream_is_the_whole_answer(client):
    whole = valid(ask(client, TINY, seed=3, temperature=1, n=2, logprobs=True, top_logprobs=2))
    assert whole.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in whole.choices)
    for token in whole.choices[0].logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2
    texts = ["", ""]
    for chunk in ask(client, TINY, seed=3, temperature=1, n=2, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert chunk.usage.completion_tokens == whole.usage.completion_tokens


def test_a_stop_string_is_cut(client, tuned):
    answer = ask(client, tuned[0], stop="ph")
    assert (text_of(answer), answer.choices[0].finish_reason) == ("al", "stop")


def test_a_plain_prompt_is_gone_on_from(client):
    answer = valid(client.completions.create(model=TINY, prompt="Once", max_tokens=4, temperature=0, echo=True))
    assert answer.choices[0].text.startswith("Once")
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_what_cannot_be_answered_is_refused(service, client):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, TINY, max_completion_tokens=4096)
    assert refused.value.code == "context_length_exceeded"
    unsatisfiable = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "colour"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, TINY, response_format=unsatisfiable)
    assert refused.value.code == "invalid_value" and "JSON schema" in str(refused.value)


class Parcel(pydantic.BaseModel):
    model_config = {"extra": "forbid"}
    state: Literal["lost", "late"]
    days: int = pydantic.Field(ge=0, le=30)
    insured: bool


def test_an_answer_is_what_the_sdk_s_schema_says_whatever_the_model_would_say(client):
    parsed = client.chat.completions.parse(
        model=TINY, messages=QUESTION, response_format=Parcel, temperature=1, seed=5, n=2, max_completion_tokens=200
    )
    for choice in parsed.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Parcel)
    assert not text_of(ask(client, TINY)).startswith("{")


def test_a_forced_call_calls_the_tool_with_arguments_of_its_schema(client):
    tool = openai.pydantic_function_tool(Parcel, name="track")
    for tool_choice in ("required", {"type": "function", "function": {"name": "track"}}):
        answer = valid(ask(client, TINY, tools=[tool], tool_choice=tool_choice, max_completion_tokens=200))
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "track"
        Parcel.model_validate_json(call.function.arguments)
        assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("tool_calls", None)


def test_without_a_sampler_the_reply_says_how_to_start_one(parts):
    with pytest.raises(openai.APIStatusError) as refused:
        ask(parts.service.sdk.with_options(max_retries=0), TINY)
    assert (refused.value.status_code, refused.value.code) == (503, "model_not_served")
    assert "tunesmith sampler" in json.dumps(refused.value.body)
