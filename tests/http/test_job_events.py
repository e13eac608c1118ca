"""The event stream of a job: every state, the newest progress, one end; and going on after a break."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from daemon_support import problem
from http_server_kit import tasks_living
from jobs_http_kit import FAILURE, Api, open_api, watching
from jobs_kit import event, make_service, submit
from trio.testing import MockClock

from comfyd.errors import Failure, FailureKind
from comfyd.http import events as module
from comfyd.http.events import EventStreams
from comfyd.jobs import JobState
from comfyd.journal import JournalUnavailable


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with open_api() as api:
        yield api


def states(events: list[tuple[str, Any]]) -> list[str]:
    return [data["state"] for name, data in events if name == "state"]


async def test_a_job_is_followed_from_its_first_state_to_its_result(api: Api) -> None:
    job = api.submit()
    async with watching(api.server) as watcher:
        assert watcher.status == 200
        assert b"\r\ncontent-type: text/event-stream\r\n" in watcher.head
        assert b"no-store" in watcher.head
        first = await watcher.until("progress")
        assert watcher.raw.startswith(b": ok\nretry: 2000\n\n")
        assert states(first) == ["accepted", "queued"]
        waiting = first[-1][1]
        assert (waiting["state"], waiting["position"], waiting["percent"]) == ("queued", 0, 0.0)
        api.run(job)
        api.hear(job, "executing", node="1")
        api.hear(job, "progress", value=1, max=4)
        at_work = (await watcher.until("progress", step=1))[-1][1]
        assert at_work == {
            "id": "job",
            "state": "running",
            "position": None,
            "percent": 12.5,
            "node_id": "1",
            "node_title": "EmptyImage",
            "step": 1,
            "steps": 4,
            "eta_s": None,
        }
        api.succeed(job)
        last = await watcher.rest()
    assert states(last) == ["delivering"]
    assert [name for name, _ in last][-1] == "result"
    result = last[-1][1]
    assert set(result) == {"id", "state", "outputs", "stats"}
    assert (result["id"], result["state"], result["outputs"]) == ("job", "succeeded", [])


async def test_the_title_of_a_node_is_told_where_it_has_one_and_cached_nodes_count(api: Api) -> None:
    job = api.submit()
    job.graph["2"]["_meta"] = {"title": "Keep it"}
    api.run(job)
    api.hear(job, "execution_cached", nodes=["1"])
    api.hear(job, "executing", node="2")
    async with watching(api.server) as watcher:
        (*_, (_, view)) = await watcher.until("progress")
    assert (view["percent"], view["node_title"]) == (50.0, "Keep it")


async def test_a_failure_is_told_as_its_problem(api: Api) -> None:
    job = api.submit()
    async with watching(api.server) as watcher:
        await watcher.until("progress")
        api.fail(job)
        ((name, result),) = await watcher.rest()
    assert name == "result"
    assert (result["state"], result["problem"]["type"], result["problem"]["id"]) == (
        "failed",
        "execution-failed",
        "job",
    )


async def test_who_comes_after_the_end_is_told_all_states_and_the_result(api: Api) -> None:
    job = api.submit()
    api.run(job)
    api.succeed(job)
    async with watching(api.server) as watcher:
        events = await watcher.rest()
    assert states(events) == ["accepted", "queued", "running", "delivering"]
    assert [name for name, _ in events] == ["state"] * 4 + ["result"]
    times = [data["at"] for name, data in events if name == "state"]
    assert times == sorted(times)
    assert all(len(time) == 24 and time.endswith("Z") for time in times)


async def test_a_client_that_was_cut_off_is_told_every_state_that_it_has_not_seen(api: Api) -> None:
    job = api.submit()
    async with watching(api.server) as watcher:
        await watcher.until("progress")
        last_id = watcher.parser.last_id
    api.run(job)
    api.service.enqueue(job)  # its engine was lost
    api.run(job)
    async with watching(api.server, last_id=last_id) as watcher:
        events = await watcher.until("progress")
        assert states(events) == ["running", "queued", "running"]
        last_id = watcher.parser.last_id
    async with watching(api.server, last_id=last_id) as watcher:
        assert [name for name, _ in [await watcher.next()]] == ["progress"]
        api.succeed(job)
        assert states(await watcher.rest()) == ["delivering"]


async def test_the_first_connection_of_a_browser_may_resume_by_the_query_and_the_header_counts_more(api: Api) -> None:
    job = api.submit()
    async with watching(api.server) as watcher:
        assert await watcher.next()
        first_id = watcher.parser.last_id
        await watcher.until("progress")
        second_id = watcher.parser.last_id
    api.fail(job)
    async with watching(api.server, query=f"?last_event_id={first_id}") as watcher:
        assert states(await watcher.rest()) == ["queued"]
    async with watching(api.server, query=f"?last_event_id={first_id}", last_id=second_id) as watcher:
        assert states(await watcher.rest()) == []


async def test_who_has_the_result_is_told_to_stop_in_every_life_of_the_daemon(api: Api) -> None:
    job = api.submit()
    api.run(job)
    api.succeed(job)
    async with watching(api.server) as watcher:
        await watcher.rest()
        last_id = watcher.parser.last_id
    async with watching(api.server, last_id=last_id) as watcher:
        assert watcher.status == 204
        assert await watcher.next() == ("end", None)
        assert b"content-length" not in watcher.head
    assert EventStreams(api.service).life not in last_id


@pytest.mark.parametrize(
    "given", ["", "5", "0-0", "-end", "another-life-9", "é", "x" * 500, "{life}-{key}-", "{life}-{key}-9x"]
)
async def test_an_id_that_is_not_of_this_life_of_the_job_brings_everything(api: Api, given: str) -> None:
    job = api.submit()
    async with watching(api.server) as watcher:
        await watcher.until("progress")
        life, key, _ = watcher.parser.last_id.split("-")
    async with watching(api.server, last_id=given.format(life=life, key=key)) as watcher:
        assert states(await watcher.until("progress")) == ["accepted", "queued"]
    api.fail(job)


async def test_the_id_of_an_earlier_job_of_that_name_brings_everything(api: Api) -> None:
    job = api.submit("twice")
    async with watching(api.server, "twice") as watcher:
        await watcher.next()
        api.fail(job)
        await watcher.rest()
        last_id = watcher.parser.last_id
    api.ledger.jobs.clear()
    api.service._remembered.clear()
    api.submit("twice")
    async with watching(api.server, "twice", last_id=last_id) as watcher:
        assert states(await watcher.until("progress")) == ["accepted", "queued"]


async def test_a_job_that_only_the_journal_knows_is_told_by_its_result(api: Api) -> None:
    """Its states are forgotten; a client of before, whose id has a greater number than any now, gets the result."""
    job = api.submit("old")
    api.run(job)
    async with watching(api.server, "old") as watcher:
        await watcher.until("progress")
        last_id = watcher.parser.last_id
    api.succeed(job)
    api.service._remembered.clear()
    job.revision = 1
    del job.states[:-1]
    async with watching(api.server, "old", last_id=last_id) as watcher:
        events = await watcher.rest()
    assert [name for name, _ in events] == ["result"]


async def test_an_end_is_not_told_before_it_is_on_disk(api: Api) -> None:
    api.ledger.holding = True
    job = api.submit()
    api.run(job)
    async with watching(api.server) as watcher:
        await watcher.until("progress")
        api.succeed(job)
        await watcher.until("state", state="delivering")
        await watcher.until("progress", state="delivering")
        with trio.move_on_after(0.1) as silence:
            await watcher.next()
        assert silence.cancelled_caught
        (told,) = api.ledger.held
        told()
        assert [name for name, _ in await watcher.rest()] == ["result"]


async def test_a_watcher_of_a_job_that_is_put_aside_is_let_go_without_a_result(api: Api) -> None:
    api.submit()
    async with watching(api.server) as watcher:
        await watcher.until("progress")
        assert api.service.stop_all(Failure(kind=FailureKind.DRAINING, detail="stopping")) == 1
        assert await watcher.rest() == []
        assert not watcher.raw.endswith(b"still here\n\n")


async def test_a_watcher_of_a_job_that_the_journal_does_not_take_is_let_go(api: Api) -> None:
    """There was no promise yet: the one who posted it gets a 503, and the job was never there."""
    api.ledger.accepting = False
    api.submit()
    async with watching(api.server) as watcher:
        assert [name for name, _ in await watcher.until("progress")] == ["state", "progress"]
        api.ledger.unaccepted[0](JournalUnavailable("the disk is full"))
        assert await watcher.rest() == []
    problem(await api.client.get("/jobs/job/events"), 404, "not-found")


async def test_the_answer_is_whole_when_the_stream_ends(api: Api) -> None:
    """A chunked body that ends by itself, so that an HTTP client sees no error."""
    job = api.submit()
    async with trio.open_nursery() as nursery:

        async def end() -> None:
            while not api.watchers:  # noqa: ASYNC110
                await trio.sleep(0.002)
            api.fail(job)

        nursery.start_soon(end)
        response = await api.client.get("/jobs/job/events")
    assert response.status_code == 200
    assert response.headers["transfer-encoding"] == "chunked"
    assert response.text.count("event: result\n") == 1


async def test_head_says_what_get_would_and_other_methods_what_is_allowed(api: Api) -> None:
    api.submit()
    response = await api.client.head("/jobs/job/events")
    assert (response.status_code, response.headers["content-type"], response.text) == (200, "text/event-stream", "")
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        response = await api.client.request(method, "/jobs/job/events")
        problem(response, 405, "method-not-allowed")
        assert response.headers["allow"] == "GET, HEAD"


async def test_an_unknown_job_or_parameter_is_a_problem(api: Api) -> None:
    problem(await api.client.get("/jobs/none/events"), 404, "not-found")
    api.submit()
    document = problem(await api.client.get("/jobs/job/events?last_id=3"), 400, "invalid-request")
    assert document["location"] == "last_id"
    assert "last_event_id" in document["errors"][0]["message"]


async def test_a_slow_watcher_misses_no_state_and_is_owed_only_the_newest_progress(api: Api) -> None:
    job = api.submit()
    api.run(job)
    async with watching(api.server) as watcher:
        await watcher.until("progress")
        tasks = tasks_living()
        for step in range(10_000):
            api.hear(job, "progress", value=step, max=10_000)
        assert tasks_living() == tasks
        for _ in range(3):
            api.service.enqueue(job)
            api.run(job)
        api.hear(job, "executing", node="2")
        events = await watcher.until("progress", node_id="2")
        assert states(events) == ["queued", "running"] * 3
        assert len(events) <= 8, "at most one progress before these states, and one after"


async def test_a_watcher_that_does_not_read_costs_a_bounded_buffer_and_delays_nobody(api: Api) -> None:
    job = api.submit()
    api.run(job)
    job.graph["1"]["_meta"] = {"title": "t" * 800_000}  # 24 MB if each of 30 were kept for the one who sleeps
    async with watching(api.server) as sleeper, watching(api.server) as awake:
        await sleeper.next()
        await awake.until("progress")
        for step in range(1, 31):
            api.hear(job, "executing", node="1")
            api.hear(job, "progress", value=step, max=100)
            await awake.until("progress", step=step)
        api.fail(job)
        assert (await awake.rest())[-1][0] == "result"
        late = await sleeper.rest()
    assert late[-1][0] == "result"
    steps = [data["step"] for name, data in late if name == "progress" and data["step"] is not None]
    assert steps == sorted(set(steps))
    assert len(steps) < 30, "what the kernel does not take is not kept"


async def test_a_client_that_leaves_takes_its_tasks_and_descriptors_along() -> None:
    async with open_api() as api:
        api.submit()
        for _ in range(5):
            async with watching(api.server) as watcher:
                await watcher.next()
        await api.server.wait_at_rest()
        assert api.watchers == 0


async def test_five_hundred_watchers_of_a_job_are_all_told_its_end(api: Api) -> None:
    job = api.submit()
    told: list[list[tuple[str, Any]]] = []
    ready = trio.Event()

    async def watch() -> None:
        async with watching(api.server) as watcher:
            events = await watcher.until("progress")
            if api.watchers == 500:
                ready.set()
            told.append(events + await watcher.rest())

    async with trio.open_nursery() as nursery:
        for _ in range(500):
            nursery.start_soon(watch)
        await ready.wait()
        api.run(job)
        api.succeed(job)
    assert len(told) == 500
    assert all(events[-1][0] == "result" for events in told)
    assert all(states(events) == ["accepted", "queued", "running", "delivering"] for events in told)
    assert api.watchers == 0


# In memory, with a clock of its own


class Sent:
    """An ASGI send that keeps the bodies, with the times."""

    def __init__(self) -> None:
        self.bodies: list[tuple[float, bytes]] = []

    async def __call__(self, message: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.bodies.append((trio.current_time(), message["body"]))

    def data(self, name: bytes) -> list[Any]:
        found = b"".join(body for _, body in self.bodies).split(b"\n\n")
        return [json.loads(block.split(b"data: ")[1]) for block in found if b"event: %b\n" % name in block]


async def test_a_silent_job_is_told_to_be_watched_each_fifteen_seconds(autojump_clock: MockClock) -> None:
    service = make_service()
    job = submit(service)
    streams, sent = EventStreams(service), Sent()
    with trio.move_on_after(100):
        await streams._follow(sent, job, 0)
    (_, first), *beats = sent.bodies
    assert first.count(b"event: progress") == 1
    assert [body for _, body in beats] == [b": still here\n\n"] * len(beats)
    assert len(beats) == 6
    gaps = [after - before for (before, _), (after, _) in zip(sent.bodies, beats, strict=False)]
    assert all(15 <= gap <= 20.1 for gap in gaps), gaps


async def test_a_waiting_job_hears_of_its_new_place_and_time_without_a_change_of_its_own(
    autojump_clock: MockClock,
) -> None:
    service = make_service()
    first, job = submit(service, "first"), submit(service, "job")
    service.service_time.measured(10.0)
    streams, sent = EventStreams(service), Sent()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(streams._follow, sent, job, 0)
        await trio.sleep(1)
        service.queue.remove(first)
        await trio.sleep(6)
        nursery.cancel_scope.cancel()
    assert [(view["position"], view["eta_s"]) for view in sent.data(b"progress")] == [(1, 20.0), (0, 10.0)]


async def test_many_watchers_are_written_to_less_often(autojump_clock: MockClock) -> None:
    service = make_service()
    job = submit(service)
    service.queue.remove(job)
    service.started(job)
    counts = []
    for watchers in (1, 1000):
        streams, sent = EventStreams(service), Sent()
        streams.watching = watchers
        with trio.move_on_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(streams._follow, sent, job, 0)
                for step in range(100_000):
                    job.progress.hear(event("progress", value=step, max=100_000))
                    job.touch()
                    await trio.sleep(0.01)
        counts.append(len(sent.bodies))
    few, many = counts
    assert few == pytest.approx(10 / module._SHORTEST_GAP_S, abs=30)
    assert 5 <= many <= 10 * module._WRITES_PER_S / 1000 + 1


async def test_one_change_is_not_written_to_all_watchers_in_one_go(autojump_clock: MockClock) -> None:
    service = make_service()
    job = submit(service)
    streams = EventStreams(service)
    streams.watching = 100
    watchers = [Sent() for _ in range(100)]
    async with trio.open_nursery() as nursery:
        for sent in watchers:
            nursery.start_soon(streams._follow, sent, job, 0)
        await trio.sleep(1)
        job.touch()
        service.queue.remove(job)
        service.started(job)
        began = trio.current_time()
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    times = [sent.bodies[1][0] - began for sent in watchers]
    share_s = 100 / module._WRITES_PER_S
    assert all(0 <= time <= share_s for time in times)
    for quarter in range(4):  # each quarter of the time has its watchers, and none has most of them
        assert 0 < sum(quarter <= 4 * time / share_s < quarter + 1 for time in times) < 60


async def test_no_state_before_the_last_is_hidden(api: Api) -> None:
    """Whatever states a job may go through, a watcher who comes late is told of all but the last as states."""
    job = api.submit()
    api.run(job)
    api.fail(job, FAILURE)
    async with watching(api.server) as watcher:
        events = await watcher.rest()
    assert [JobState(state) for state in states(events)] == [change.state for change in job.states[:-1]]
