"""Projects and keys over the SDK and the command line; models shared between projects."""

import openai
import pytest
from conftest import TINY
from harness import run_cli, valid
from rows import sums


@pytest.fixture(scope="module")
def admin(up, service):
    """The SDK with an admin key."""
    key = run_cli("keys", "create", "--admin", "--name", "tests", "--data-dir", up.data_dir).stdout.split()[-1]
    return openai.OpenAI(base_url=service.base_url, api_key=key, admin_api_key=key)


def test_projects_and_keys_are_administered_by_the_sdk(service, admin):
    projects = admin.admin.organization.projects
    project = valid(projects.create(name="search"))
    assert (project.object, project.name, project.status) == ("organization.project", "search", "active")
    assert project.id in [listed.id for listed in projects.list(limit=1)]
    account = valid(projects.service_accounts.create(project.id, name="ci"))
    member = service.with_key(account.api_key.value)
    assert list(member.sdk.files.list()) == []
    (key,) = projects.api_keys.list(project.id)
    valid(key)
    assert (key.object, key.name, key.id) == ("organization.project.api_key", "ci", account.api_key.id)
    assert key.redacted_value.endswith(account.api_key.value[-4:]) and account.api_key.value not in key.to_json()
    assert projects.api_keys.retrieve(key.id, project_id=project.id) == key
    assert projects.api_keys.delete(key.id, project_id=project.id).deleted
    with pytest.raises(openai.AuthenticationError):
        member.sdk.files.list()
    assert projects.update(project.id, name="find").name == "find"
    assert projects.archive(project.id).status == "archived"
    assert project.id not in [listed.id for listed in projects.list()]

    keys = admin.admin.organization.admin_api_keys
    made = valid(keys.create(name="second"))
    assert made.value.startswith("sk-admin-")
    assert made.id in [listed.id for listed in keys.list()]
    assert keys.retrieve(made.id).name == "second"
    assert keys.delete(made.id).deleted


def test_a_project_s_key_administers_nothing(service):
    sdk = openai.OpenAI(base_url=service.base_url, api_key=service.key, admin_api_key=service.key)
    with pytest.raises(openai.PermissionDeniedError):
        sdk.admin.organization.projects.list()


def test_the_command_line_makes_lists_and_revokes(up, service):
    where = ("--data-dir", up.data_dir)
    project = run_cli("projects", "create", "reports", *where).stdout.strip()
    assert project in run_cli("projects", "list", *where).stdout
    key = run_cli("keys", "create", "--project", "reports", "--name", "nightly", *where).stdout.strip()
    (line,) = [line for line in run_cli("keys", "list", *where).stdout.splitlines() if "nightly" in line]
    assert key not in line and f"sk-...{key[-4:]}" in line and "reports" in line
    caller = service.with_key(key)
    caller.sdk.files.list()
    run_cli("keys", "revoke", line.split()[0], *where)
    with pytest.raises(openai.AuthenticationError):
        caller.sdk.files.list()
    assert run_cli("keys", "revoke", line.split()[0], *where, check=False).returncode != 0


def test_a_model_is_shared_with_another_project_for_as_long_as_its_owner_likes(service, admin, client):
    job = service.finish(service.create_job(sums(10), TINY, n_epochs=1, batch_size=10).id)
    name = job.fine_tuned_model
    project = admin.admin.organization.projects.create(name="borrower")
    account = admin.admin.organization.projects.service_accounts.create(project.id, name="b")
    borrower = service.with_key(account.api_key.value)
    with pytest.raises(openai.NotFoundError):
        borrower.sdk.models.retrieve(name)
    for granter in (client, admin):
        permissions = granter.fine_tuning.checkpoints.permissions
        (made,) = permissions.create(name, project_ids=[project.id])
        valid(made)
        assert (made.object, made.project_id) == ("checkpoint.permission", project.id)
        assert [listed.id for listed in permissions.list(name, order="ascending", project_id=project.id)] == [made.id]
        assert borrower.sdk.models.retrieve(name).id == name
        assert permissions.delete(made.id, fine_tuned_model_checkpoint=name).deleted
        with pytest.raises(openai.NotFoundError):
            borrower.sdk.models.retrieve(name)
