"""Deliveries that the SDK verifies, that outlive failures and restarts, and that stay outside."""

import socket

import openai
import pytest
from conftest import TINY
from harness import Receiver, valid
from rows import sums


def failing_job(service):
    """A job that fails at once, as its file has too few rows."""
    job = service.create_job(sums(7), TINY)
    service.fail(job.id)
    return job


def test_the_sdk_makes_changes_and_deletes_endpoints(client):
    assert "fine_tuning.job.succeeded" in valid(client.webhooks.event_types.list()).data
    made = valid(
        client.webhooks.create(
            name="mine", url="https://example.com/hook", event_types=["fine_tuning.job.succeeded"]
        )
    )
    assert made.object == "webhook_endpoint" and made.signing_secret.startswith("whsec_")
    read = valid(client.webhooks.retrieve(made.id))
    assert made.signing_secret not in read.to_json()
    assert made.signing_secret.endswith(read.signing_secret_hint[-4:])
    assert made.id in [endpoint.id for endpoint in client.webhooks.list(limit=1)]
    assert client.webhooks.update(made.id, name="other").name == "other"
    rotated = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    assert rotated.signing_secret != made.signing_secret
    assert valid(client.webhooks.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError):
        client.webhooks.retrieve(made.id)


def test_a_delivery_is_verified_by_the_sdk_and_an_altered_one_is_not(inside):
    client = inside.service.sdk
    with Receiver() as receiver:
        endpoint = client.webhooks.create(
            name="mine", url=receiver.url, event_types=["fine_tuning.job.failed"]
        )
        test = valid(client.webhooks.test(endpoint.id, event_type="fine_tuning.job.failed"))
        assert test.status_code == 200
        job = failing_job(inside.service)
        (sample, _), (body, headers) = receiver.wait_for(2)
        event = client.webhooks.unwrap(body, headers, secret=endpoint.signing_secret)
        assert (event.object, event.type, event.data.id) == ("event", "fine_tuning.job.failed", job.id)
        assert headers["webhook-id"] == event.id
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body.replace(b"failed", b"passed"), headers, secret=endpoint.signing_secret)
        client.webhooks.delete(endpoint.id)


def test_a_delivery_that_is_not_taken_comes_again_with_the_same_id(inside):
    client = inside.service.sdk
    with Receiver(statuses=[500]) as receiver:
        endpoint = client.webhooks.create(
            name="mine", url=receiver.url, event_types=["fine_tuning.job.failed"]
        )
        failing_job(inside.service)
        (first, first_headers), (second, second_headers) = receiver.wait_for(2)[:2]
        assert first == second and first_headers["webhook-id"] == second_headers["webhook-id"]
        client.webhooks.delete(endpoint.id)


def test_a_delivery_outlives_the_server(inside):
    client = inside.service.sdk
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    # Nobody listens there when the job ends.
    endpoint = client.webhooks.create(
        name="mine", url=f"http://127.0.0.1:{port}/", event_types=["fine_tuning.job.failed"]
    )
    job = failing_job(inside.service)
    inside.process.kill()
    with Receiver(port) as receiver:
        inside.start()
        (body, headers), *_ = receiver.wait_for(1)
        event = inside.service.sdk.webhooks.unwrap(body, headers, secret=endpoint.signing_secret)
        assert event.data.id == job.id
        inside.service.sdk.webhooks.delete(endpoint.id)


def test_no_endpoint_leads_inside_unless_the_operator_says_so(client):
    def create(url):
        return client.webhooks.create(name="mine", url=url, event_types=["fine_tuning.job.failed"])

    for url in (
        "http://example.com/",
        "https://127.0.0.1/",
        "https://2130706433/",
        "https://169.254.169.254/latest/meta-data/",
        "https://[::ffff:10.0.0.1]/",
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            create(url)
        assert refused.value.param == "url"
    # A name is looked at when something is sent to it.
    endpoint = create("https://localhost:1/")
    with pytest.raises(openai.BadRequestError) as refused:
        client.webhooks.test(endpoint.id, event_type="fine_tuning.job.failed")
    assert refused.value.code == "webhook_not_reached"
    client.webhooks.delete(endpoint.id)
