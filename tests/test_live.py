"""A job watched live: server-sent events, read by the SDK's own stream."""

from conftest import TINY
from openai import Stream
from openai.types.fine_tuning import FineTuningJobEvent
from rows import sums


def watch(client, job, part, kind):
    path = f"/fine_tuning/jobs/{job}/{part}?stream=true"
    return client.get(path, cast_to=kind, stream=True, stream_cls=Stream[kind])


def test_streams_follow_a_running_job_to_its_end(service, client):
    job = service.create_job(sums(12), TINY, n_epochs=2, batch_size=4)
    events = watch(client, job.id, "events", FineTuningJobEvent)
    steps = watch(client, job.id, "metrics", dict)
    followed = list(events)
    assert followed[0].message == f"Created fine-tuning job: {job.id}"
    assert followed[-1].message == "The job has successfully completed."
    stored = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
    assert [event.id for event in followed] == [event.id for event in reversed(stored)]
    curve = [step["step"] for step in steps]
    assert curve == list(range(1, 7))
