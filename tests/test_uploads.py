"""The SDK uploads files in parts."""

import hashlib
import os
from pathlib import Path

import openai
import pytest
from harness import valid

MIB = 1 << 20


def peak_bytes(pid):
    """The most memory that the process has had so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no VmHWM")


def test_a_large_file_comes_in_the_sdk_s_own_parts_and_memory_stays_flat(up, client, tmp_path):
    # Two whole parts of 64 MiB and one of the rest; the same pseudo-random megabyte, numbered.
    path = tmp_path / "large.bin"
    block = os.urandom(MIB - 8)
    digest = hashlib.md5()
    with path.open("wb") as file:
        for number in range(150):
            piece = number.to_bytes(8, "little") + block
            digest.update(piece)
            file.write(piece)
    before = peak_bytes(up.process.pid)
    upload = valid(
        client.uploads.upload_file_chunked(
            file=path, mime_type="application/octet-stream", purpose="user_data", md5=digest.hexdigest()
        )
    )
    assert peak_bytes(up.process.pid) - before < 64 * MIB
    assert (upload.object, upload.status, upload.bytes) == ("upload", "completed", 150 * MIB)
    assert (upload.file.object, upload.file.bytes, upload.file.filename) == ("file", 150 * MIB, "large.bin")
    assert client.files.retrieve(upload.file.id) == upload.file
    read = hashlib.md5()
    with client.files.with_streaming_response.content(upload.file.id) as reply:
        for piece in reply.iter_bytes(MIB):
            read.update(piece)
    assert read.hexdigest() == digest.hexdigest()
    client.files.delete(upload.file.id)


def test_parts_arrive_in_any_order_and_what_has_arrived_stays_after_a_mistake(client):
    content = b'{"a": 1}\n' * 9
    upload = client.uploads.create(
        bytes=len(content),
        filename="rows.jsonl",
        mime_type="text/jsonl",
        purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (upload.status, upload.file, upload.expires_at - upload.created_at) == ("pending", None, 3600)
    last = client.uploads.parts.create(upload.id, data=content[50:])
    first = valid(client.uploads.parts.create(upload.id, data=content[:50]))
    assert (first.object, first.upload_id) == ("upload.part", upload.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.uploads.complete(upload.id, part_ids=[first.id])
    assert refused.value.param == "part_ids" and "50 bytes" in str(refused.value)
    done = client.uploads.complete(upload.id, part_ids=[first.id, last.id])
    assert client.files.content(done.file.id).read() == content
    assert done.file.expires_at == done.file.created_at + 3600
    assert client.uploads.complete(upload.id, part_ids=[first.id, last.id]) == done


def test_an_upload_that_was_given_up_takes_nothing(client):
    upload = client.uploads.create(bytes=1, filename="a", mime_type="text/plain", purpose="user_data")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError) as refused:
        client.uploads.parts.create(upload.id, data=b"x")
    assert refused.value.code == "invalid_upload_state"


def test_a_file_in_parts_trains_like_any_other(service, client):
    from conftest import TINY
    from rows import sums
    import json

    content = "".join(json.dumps(row) + "\n" for row in sums(10)).encode()
    upload = client.uploads.upload_file_chunked(
        file=content, filename="rows.jsonl", bytes=len(content), mime_type="text/jsonl",
        purpose="fine-tune", part_size=100,
    )
    service.finish(service.create_job(upload.file.id, TINY, n_epochs=1, batch_size=10).id)
