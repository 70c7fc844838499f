"""A create whose reply is lost is sent again by the SDK, and makes one job."""

import http.client
import http.server
import threading
import urllib.parse

import openai
import pytest
from conftest import TINY
from rows import sums


@pytest.fixture
def lossy(service):
    """A proxy before the server that loses the reply to the first POST of a job."""
    target = urllib.parse.urlsplit(service.base_url)
    lost = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            upstream = http.client.HTTPConnection(target.hostname, target.port)
            upstream.request("POST", self.path, body, dict(self.headers))
            reply = upstream.getresponse()
            content = reply.read()
            if not lost:
                lost.append(reply.status)
                self.close_connection = True
                return
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{proxy.server_port}/v1", api_key=service.key), lost
    proxy.shutdown()
    proxy.server_close()


def jobs_on(client, training):
    return [job.id for job in client.fine_tuning.jobs.list(limit=100) if job.training_file == training]


def test_the_sdk_s_own_retry_makes_one_job(service, client, lossy):
    through_proxy, lost = lossy
    training = service.upload(sums(10))
    job = through_proxy.fine_tuning.jobs.create(model=TINY, training_file=training, seed=3)
    assert lost == [200], "the first try reached the server and its reply was lost"
    assert jobs_on(client, training) == [job.id]


def test_the_same_idempotency_key_gives_the_same_job(service, client):
    training = service.upload(sums(10))
    headers = {"Idempotency-Key": "one-and-only"}

    def create(seed):
        return client.fine_tuning.jobs.create(model=TINY, training_file=training, seed=seed, extra_headers=headers)

    first = create(1)
    assert create(1).id == first.id
    with pytest.raises(openai.BadRequestError) as refused:
        create(2)
    assert refused.value.code == "idempotency_conflict"
    assert jobs_on(client, training) == [first.id]


def test_two_equal_requests_that_are_no_retry_make_two_jobs(service, client):
    training = service.upload(sums(10))
    for _ in range(2):
        client.fine_tuning.jobs.create(model=TINY, training_file=training, seed=1)
    assert len(jobs_on(client, training)) == 2
