"""Everything large lies in S3: the parts run against a server that speaks it and checks each signature."""

import hashlib
import io
import json
import os
import socket
import subprocess
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import pytest
from conftest import TINY
from harness import ROOT, Parts, wait_for
from rows import sums

BUCKET = "weights"
PREFIX = "some/where"
MIB = 1 << 20


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class S3:
    """nanio with one bucket, whose objects are files of a directory."""

    def __init__(self, directory):
        self.directory = directory
        self.objects = directory / BUCKET / PREFIX
        (directory / BUCKET).mkdir(parents=True)
        install = subprocess.run([ROOT / "scripts/test-s3.sh"], check=True, stdout=subprocess.PIPE, text=True)
        port, key, secret = free_port(), "tunesmith", "kept between the two"
        self.endpoint = f"http://127.0.0.1:{port}"
        self.settings = {
            "OBJECT_STORE_URL": f"s3://{BUCKET}/{PREFIX}",
            "AWS_ENDPOINT": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
        }
        self.log = (directory.parent / "s3.log").open("wb")
        self.process = subprocess.Popen(
            [install.stdout.strip(), "serve", "--data-dir", directory, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, "NANIO_ACCESS_KEY": key, "NANIO_SECRET_KEY": secret},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        wait_for("the S3 server", self.answers)

    def answers(self):
        assert self.process.poll() is None, Path(self.log.name).read_text()
        try:
            urllib.request.urlopen(self.endpoint)
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    def files(self):
        """The keys of all objects under the prefix."""
        files = (path for path in self.objects.rglob("*") if path.is_file())
        return {str(path.relative_to(self.objects)) for path in files if not path.name.startswith(".")}

    def stop(self):
        self.process.terminate()
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    server = S3(tmp_path_factory.mktemp("s3") / "data")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def parts_on_s3(s3, tmp_path_factory, tiny_dir):
    with Parts(tmp_path_factory.mktemp("on-s3"), **s3.settings) as running:
        running.run("models", "import", tiny_dir, "--name", TINY)
        yield running


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def address(service, path):
    """Where a request with `redirect` is sent to."""
    request = urllib.request.Request(service.base_url + path, headers={"Authorization": f"Bearer {service.key}"})
    with pytest.raises(urllib.error.HTTPError) as reply:
        urllib.request.build_opener(NoRedirect).open(request)
    assert reply.value.code == 307, reply.value.read()
    return reply.value.headers["Location"]


def status_of(url, method="GET"):
    with pytest.raises(urllib.error.HTTPError) as reply:
        urllib.request.urlopen(urllib.request.Request(url, method=method, data=b"x" if method == "PUT" else None))
    return reply.value.code


def test_a_file_goes_to_s3_in_parts_and_comes_from_its_signed_address_for_who_has_that(s3, parts_on_s3):
    service = parts_on_s3.service
    before = s3.files()
    # Three parts of the object store's protocol, the last of them short.
    content = os.urandom(MIB) * 20
    file = service.sdk.files.create(file=("large.bin", content), purpose="user_data")
    assert s3.files() - before == {f"files/{file.id}"}
    assert (s3.objects / "files" / file.id).read_bytes() == content
    assert service.sdk.files.content(file.id).read() == content

    url = address(service, f"/files/{file.id}/content?redirect=true&expires_in=120")
    assert url.startswith(f"{s3.endpoint}/{BUCKET}/{PREFIX}/files/{file.id}?"), url
    # A plain client, without any key.
    assert urllib.request.urlopen(url).read() == content
    part = urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=5-14"}))
    assert (part.status, part.read()) == (206, content[5:15])

    # It opens that object alone, to read, and for as long as is said.
    split = urlsplit(url)
    query = dict(parse_qsl(split.query))

    def changed(**other):
        return urlunsplit(split._replace(query=urlencode(query | other)))

    assert urllib.request.urlopen(changed()).status == 200
    assert status_of(changed(**{"X-Amz-Expires": "604800"})) == 403
    signature = query["X-Amz-Signature"]
    assert status_of(changed(**{"X-Amz-Signature": signature[::-1]})) == 403
    assert status_of(urlunsplit(split._replace(query=""))) == 403
    assert status_of(url.replace(file.id, "another")) == 403
    assert status_of(url, "PUT") == 403

    service.sdk.files.delete(file.id)
    assert s3.files() == before
    assert status_of(url) == 404


def test_an_upload_in_parts_leaves_one_object_and_one_that_is_given_up_leaves_none(s3, parts_on_s3):
    client = parts_on_s3.service.sdk
    before = s3.files()
    pieces = [os.urandom(6 * MIB), os.urandom(9 * MIB), b"the rest"]
    content = b"".join(pieces)
    upload = client.uploads.create(
        bytes=len(content), filename="a.bin", mime_type="application/octet-stream", purpose="user_data"
    )
    ids = [client.uploads.parts.create(upload.id, data=piece).id for piece in pieces]
    assert len(s3.files() - before) == 3
    file = client.uploads.complete(upload.id, part_ids=ids, md5=hashlib.md5(content).hexdigest()).file
    assert client.files.content(file.id).read() == content
    wait_for("the parts to go", lambda: s3.files() - before == {f"files/{file.id}"})
    client.files.delete(file.id)

    upload = client.uploads.create(
        bytes=7, filename="a.bin", mime_type="application/octet-stream", purpose="user_data"
    )
    client.uploads.parts.create(upload.id, data=b"content")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    wait_for("the parts to go", lambda: s3.files() == before)


def test_a_job_trains_from_s3_and_its_adapter_comes_from_a_signed_address(s3, parts_on_s3):
    service = parts_on_s3.service
    parts_on_s3.start_worker()
    job = service.finish(service.create_job(sums(20), TINY, n_epochs=1, batch_size=10).id)
    parts_on_s3.stop_workers()
    path = f"/models/{quote(job.fine_tuned_model, safe='')}/weights"
    status, _, archive = service.request("GET", path)
    assert status == 200, archive
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    manifest = {file["name"]: file["sha256"] for file in json.loads(files["manifest.json"])["files"]}
    for name, digest in manifest.items():
        content = urllib.request.urlopen(address(service, f"{path}?redirect={name}")).read()
        assert content == files[name] and hashlib.sha256(content).hexdigest() == digest, name

    # One tensor after another, by ranges of the base model's object.
    status, _, merged = service.request("GET", f"{path}?format=merged&dtype=bf16&max_shard_size=1MB")
    assert status == 200, merged
    with tarfile.open(fileobj=io.BytesIO(merged)) as tar:
        assert "model-00002-of-00002.safetensors" in tar.getnames()

    weights = {name for name in s3.files() if name.startswith(f"jobs/{job.id}/")}
    assert weights
    service.sdk.models.delete(job.fine_tuned_model)
    left = wait_for("the weights to go", lambda: [s3.files()] if not weights & s3.files() else None)
    assert any(name.startswith("models/") for name in left[0]), "the base model stays"
