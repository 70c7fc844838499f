"""The running server answers as docs/openapi.yaml says: each example, and what is made at random."""

import copy
import json
import os
import re
import subprocess
import urllib.request

import pytest
import yaml
from conftest import TINY
from harness import PATIENCE_SECONDS, ROOT, Receiver, Service, run_cli
from jsonschema import Draft202012Validator
from rows import sums

DOCUMENT = yaml.safe_load((ROOT / "docs/openapi.yaml").read_text())
OPERATIONS = {
    operation["operationId"]: (method.upper(), path, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}
JSON, FORM = "application/json", "multipart/form-data"
BOUNDARY, PROJECT = "a-boundary", "described"
# Operations that take away what others need.
TAKES = re.compile("delete|archive|cancel|complete")


def examples(operation_id):
    """The examples of the operation's path, in order, and of its JSON body."""
    _, _, operation = OPERATIONS[operation_id]
    found = [p["example"] for p in operation.get("parameters", []) if p["in"] == "path"]
    return found, operation.get("requestBody", {}).get("content", {}).get(JSON, {}).get("example")


def form(**parts):
    """The body of a form with a file as its last part."""
    pieces = []
    for name, content in parts.items():
        file = '; filename="rows.jsonl"' if isinstance(content, bytes) else ""
        content = content if isinstance(content, bytes) else content.encode()
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        pieces += [head.encode(), content, b"\r\n"]
    return b"".join([*pieces, f"--{BOUNDARY}--\r\n".encode()])


def check(schema, value, what):
    schema = {**schema, "components": DOCUMENT["components"]}
    errors = [f"{e.json_path}: {e.message}" for e in Draft202012Validator(schema).iter_errors(value)]
    assert not errors, f"{what}: {errors}\n{json.dumps(value, indent=1)}"


def check_reply(operation_id, reply):
    """The reply has a status, a type and a form that the document names; gives its JSON."""
    status, headers, body = reply
    responses = OPERATIONS[operation_id][2]["responses"]
    assert str(status) in responses, f"{operation_id}: {status} is not described: {body[:500]}"
    contents = responses[str(status)]["content"]
    assert headers["content-type"] in contents, (operation_id, status, headers["content-type"])
    if headers["content-type"] != JSON:
        return None
    value = json.loads(body)
    check(contents[JSON]["schema"], value, f"{operation_id}, {status}")
    return value


class World:
    """A project with one of everything, which stands there for the examples' names."""

    def __init__(self, server, hook):
        where = ("--data-dir", server.data_dir)
        secret = lambda *arguments: run_cli("keys", "create", *arguments, *where).stdout.split()[-1]
        self.hook = hook
        run_cli("projects", "create", PROJECT, *where)
        self.service = server.service.with_key(secret("--project", PROJECT))
        self.admin = server.service.with_key(secret("--admin", "--name", "described"))
        self.root = self.service.base_url.removesuffix("/v1")
        self.real = {}
        sdk, admin = self.service.sdk, self.admin
        self.set("createJob", body=["model"], real=TINY)
        self.file = self.service.upload(sums(10))
        self.set("retrieveFile", self.file)
        job = self.service.finish(self.service.create_job(self.file, TINY, n_epochs=1, batch_size=10).id)
        self.job = job.id
        self.set("retrieveJob", job.id)
        self.set("retrieveModel", job.fine_tuned_model)
        adapter = self.service.weights(job.fine_tuned_model, server.directory / "adapter")
        files = {"adapter_config": ".json", "adapter_model": ".safetensors"}
        self.adapter = {name: (adapter / f"{name}{kind}").read_bytes() for name, kind in files.items()}
        requests = self.service.upload([{}], name="requests.jsonl", purpose="batch")
        self.set("createBatch", body=["input_file_id"], real=requests)
        body = {"model": TINY, "messages": [{"role": "user", "content": "hi"}]}
        line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
        many = [{"custom_id": str(number), **line} for number in range(2_000)]
        self.many_requests = self.service.upload(many, name="many.jsonl", purpose="batch")
        self.set("retrieveBatch", self.batch(requests))
        self.set("retrieveWebhookEndpoint", self.endpoint())
        projects = "/organization/projects"
        project = self.made(admin, projects, {"name": "other"})["id"]
        account = self.made(admin, f"{projects}/{project}/service_accounts", {"name": "ci"})
        self.set("retrieveProjectKey", project, account["api_key"]["id"])
        key = self.made(admin, "/organization/admin_api_keys", {"name": "k"})["id"]
        self.set("retrieveAdminKey", key)
        (given,) = sdk.fine_tuning.checkpoints.permissions.create(job.fine_tuned_model, project_ids=[project])
        self.set("deletePermission", job.fine_tuned_model, given.id)
        self.set("addUploadPart", self.upload())

    @staticmethod
    def made(service, path, body):
        status, _, reply = service.request("POST", path, body)
        assert status == 200, (path, status, reply)
        return json.loads(reply)

    def batch(self, file):
        return self.service.sdk.batches.create(
            input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
        ).id

    def endpoint(self):
        return self.service.sdk.webhooks.create(
            name="here", url=self.hook, event_types=["fine_tuning.job.failed"]
        ).id

    def upload(self, length=5):
        return self.service.sdk.uploads.create(
            bytes=length, filename="a", mime_type="text/plain", purpose="user_data"
        ).id

    def set(self, operation_id, *real_names, body=(), real=None):
        """Puts real names in the place of the examples of the operation's path or body."""
        in_path, example = examples(operation_id)
        self.real.update(zip(in_path, real_names))
        for step in body:
            example = example[step]
        if body:
            self.real[example] = real

    def prepare(self, operation_id):
        """Makes what the operation uses up, or needs in a state that does not last."""
        if operation_id in ("cancelJob", "pauseJob", "resumeJob"):
            job = self.service.create_job(self.file, TINY, n_epochs=50, batch_size=1)
            if operation_id == "resumeJob":
                self.made(self.service, f"/fine_tuning/jobs/{job.id}/pause", {})
            self.set(operation_id, job.id)
        elif operation_id in ("addUploadPart", "completeUpload", "cancelUpload"):
            upload = self.upload()
            self.set(operation_id, upload)
            if operation_id == "completeUpload":
                part = self.service.sdk.uploads.parts.create(upload, data=b"a\nb\nc")
                self.set(operation_id, body=["part_ids", 0], real=part.id)
        elif operation_id == "deleteFile":
            # The other one may have a job that still runs.
            self.set(operation_id, self.service.upload(sums(10)))
        elif operation_id == "testWebhookEndpoint":
            self.set(operation_id, self.endpoint())
        elif operation_id == "cancelBatch":
            # So many answers take longer than the next request.
            self.set(operation_id, self.batch(self.many_requests))

    def restore(self, operation_id):
        """Ends what would go on, and puts the lasting names back."""
        if operation_id in ("pauseJob", "resumeJob"):
            self.send("cancelJob")
        self.set("retrieveJob", self.job)

    def send(self, operation_id, with_key=True):
        """Sends the operation's example with real names in it: (status, headers, body in bytes)."""
        method, path, operation = OPERATIONS[operation_id]
        service = self.admin if operation["tags"] == ["Organization"] else self.service
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "path":
                name = self.real.get(parameter["example"], parameter["example"])
                path = path.replace(f"{{{parameter['name']}}}", urllib.request.quote(name, safe=""))
        body, kind = None, JSON
        content = operation.get("requestBody", {}).get("content", {})
        if JSON in content:
            body = self.with_real_names(content[JSON]["example"])
        elif FORM in content:
            names = content[FORM]["schema"]["properties"]
            parts = {"file": b"a\nb\nc", "data": b"a\nb\nc", "purpose": "fine-tune", "model": TINY, **self.adapter}
            body = form(**{name: part for name, part in parts.items() if name in names})
            kind = f"{FORM}; boundary={BOUNDARY}"
        key = service.key if with_key else "sk-unknown"
        return Service(self.root, key).request(method, path, body, {"Content-Type": kind})

    def with_real_names(self, value):
        """A value out of the document with the real names in it."""
        if isinstance(value, dict):
            return {key: self.with_real_names(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.with_real_names(inner) for inner in value]
        return self.real.get(value, value) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def world(inside):
    with Receiver() as receiver:
        yield World(inside, receiver.url)


def test_every_example_of_a_request_is_valid():
    for operation_id, (_, _, operation) in OPERATIONS.items():
        content = operation.get("requestBody", {}).get("content", {})
        if JSON in content:
            check(content[JSON]["schema"], content[JSON]["example"], operation_id)


def conforms(clients, world, service, directory, *selection):
    """Runs schemathesis over the operations of `selection`; fails with what it reports."""
    document = copy.deepcopy(DOCUMENT)
    for methods in document["paths"].values():
        for operation in methods.values():
            if not TAKES.match(operation["operationId"]):
                operation.update(world.with_real_names(operation))
    path = directory / "openapi.json"
    path.write_text(json.dumps(document))
    program, config = clients / "python/bin/schemathesis", ROOT / "tests/schemathesis.toml"
    done = subprocess.run(
        [program, "--config-file", config, "run", path, "--url", world.root, *selection],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=os.environ | {"TUNESMITH_API_KEY": service.key},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"


def test_what_a_project_may_do_is_answered_as_it_is_described(clients, world, tmp_path):
    conforms(clients, world, world.service, tmp_path, "--exclude-tag", "Organization")


def test_what_an_administrator_may_do_is_answered_as_it_is_described(clients, world, tmp_path):
    conforms(clients, world, world.admin, tmp_path, "--include-tag", "Organization")


def test_every_operation_answers_its_example_as_it_is_described(world):
    # What takes away the things of the others comes last, and whole projects at the very end.
    taking = [i for i in OPERATIONS if i.startswith("delete")] + ["archiveProject"]
    for operation_id in [i for i in OPERATIONS if i not in taking] + taking:
        world.prepare(operation_id)
        status, *rest = world.send(operation_id)
        value = check_reply(operation_id, (status, *rest))
        # Whether a sampler has the model by now is not this test's question.
        if operation_id not in ("createChatCompletion", "createCompletion"):
            assert 200 <= status < 300, (operation_id, status, value)
        world.restore(operation_id)


def test_without_a_key_every_operation_refuses_as_it_is_described(world):
    for operation_id, (_, _, operation) in OPERATIONS.items():
        if "security" not in operation:
            reply = world.send(operation_id, with_key=False)
            assert reply[0] == 401, (operation_id, reply)
            assert check_reply(operation_id, reply)["error"]["code"] == "invalid_api_key"
