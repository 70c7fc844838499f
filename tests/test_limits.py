"""Limits of a project, aliases of base models, and calls from a browser's page."""

import openai
import pytest
from conftest import TINY
from harness import Up
from rows import sums

ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def limited(tmp_path_factory, tiny_dir):
    directory = tmp_path_factory.mktemp("limited")
    with Up(
        directory,
        "--model-alias", f"gpt-4o-mini={TINY},gpt-4o-mini-2024-07-18={TINY}",
        "--max-unfinished-jobs", "1",
        "--cors-origin", ORIGIN,
    ) as server:
        server.import_model(tiny_dir, TINY)
        yield server


def test_code_for_openai_s_model_trains_the_operator_s(limited):
    service = limited.service
    assert "gpt-4o-mini" in [model.id for model in service.sdk.models.list()]
    job = service.create_job(sums(10), "gpt-4o-mini", n_epochs=1, batch_size=10)
    assert job.model == "gpt-4o-mini"
    # While it runs there is no room for a second one, and the SDK is told not to try again.
    with pytest.raises(openai.RateLimitError) as refused:
        service.create_job(job.training_file, TINY)
    assert refused.value.code == "insufficient_quota"
    finished = service.finish(job.id)
    assert finished.fine_tuned_model.startswith("ft:gpt-4o-mini:")
    weights = service.weights(finished.fine_tuned_model, limited.directory / "weights")
    assert f'"base_model_name_or_path": "{TINY}"' in (weights / "adapter_config.json").read_text()


def test_a_page_of_an_allowed_origin_reads_the_reply_and_another_does_not(limited):
    for origin, allowed in ((ORIGIN, ORIGIN), ("https://evil.example", None)):
        _, headers, _ = limited.service.request("GET", "/files", headers={"Origin": origin})
        assert headers["Access-Control-Allow-Origin"] == allowed


def test_a_project_over_its_requests_a_minute_is_told_when_to_come_back(tmp_path):
    with Up(tmp_path / "slow", "--requests-per-minute", "3") as server:
        service = server.service
        for left in ("2", "1", "0"):
            status, headers, _ = service.request("GET", "/files")
            assert (status, headers["x-ratelimit-remaining-requests"]) == (200, left)
        with pytest.raises(openai.RateLimitError) as refused:
            service.sdk.with_options(max_retries=0).files.list()
        assert refused.value.code == "rate_limit_exceeded"
        assert 0 < float(refused.value.response.headers["retry-after"]) <= 20
        # The SDK itself waits as long as it is told, and gets its answer.
        assert list(service.sdk.files.list()) == []
