"""The routes under ``/jobs`` that look at jobs and end them, and ``/interrupt``."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from api_support import faults
from daemon_support import problem
from jobs_http_kit import FAILURE, Api, open_api
from trio.testing import wait_all_tasks_blocked

from comfyd.errors import Failure, FailureKind
from comfyd.jobs import JobState
from comfyd.journal import JournalUnavailable


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with open_api() as api:
        yield api


# One job


async def test_a_job_on_its_way_is_told_with_place_progress_time_and_links(api: Api) -> None:
    api.submit("first")
    job = api.submit(workflow="sd1.5/txt2img")
    api.service.service_time.measured(4.0)
    response = await api.client.get("/jobs/job")
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    view = response.json()
    accepted_at = view.pop("accepted_at")
    assert len(accepted_at) == 24
    assert accepted_at.endswith("Z")
    assert view == {
        "id": "job",
        "state": "queued",
        "workflow": "sd1.5/txt2img",
        "started_at": None,
        "ended_at": None,
        "attempts": 0,
        "position": 1,
        "percent": 0.0,
        "node_id": None,
        "node_title": None,
        "step": None,
        "steps": None,
        "eta_s": 8.0,
        "links": {"self": "/jobs/job", "events": "/jobs/job/events", "outputs": "/jobs/job/outputs"},
    }
    api.run(job)
    api.hear(job, "executing", node="1")
    view = (await api.client.get("/jobs/job")).json()
    assert (view["state"], view["position"], view["attempts"], view["node_title"]) == ("running", None, 1, "EmptyImage")
    assert view["started_at"] >= accepted_at


async def test_an_ended_job_is_told_with_its_result(api: Api) -> None:
    job = api.submit()
    api.run(job)
    api.succeed(job)
    view = (await api.client.get("/jobs/job")).json()
    assert (view["state"], view["percent"], view["outputs"]) == ("succeeded", 100.0, [])
    assert view["stats"]["attempts"] == 1
    assert view["ended_at"] >= view["started_at"] >= view["accepted_at"]
    assert view["workflow"] is None
    job = api.submit("bad")
    api.fail(job)
    view = (await api.client.get("/jobs/bad")).json()
    assert (view["state"], view["problem"]["type"], view["eta_s"]) == ("failed", "execution-failed", None)
    assert "outputs" not in view


async def test_an_end_is_not_told_before_it_is_on_disk(api: Api) -> None:
    api.ledger.holding = True
    job = api.submit()
    api.run(job)
    api.succeed(job)
    view = (await api.client.get("/jobs/job")).json()
    assert (view["state"], view["ended_at"]) == ("delivering", None)
    assert "outputs" not in view


async def test_head_is_answered_without_a_body(api: Api) -> None:
    api.submit()
    response = await api.client.head("/jobs/job")
    assert (response.status_code, response.content) == (200, b"")
    assert int(response.headers["content-length"]) > 100


@pytest.mark.parametrize("path", ["none", ".hidden", "a%20b", "%C3%A9", "a" * 129, "a%00b"])
async def test_an_unknown_job_is_404_whatever_is_asked_of_it(api: Api, path: str) -> None:
    for method, below in [("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/outputs"), ("GET", "/outputs/0")]:
        document = problem(await api.client.request(method, f"/jobs/{path}{below}"), 404, "not-found")
        assert document["detail"] == "there is no such job"


@pytest.mark.parametrize(
    "path", ["/jobs/job/other", "/jobs/job/outputs/0/1", "/jobs/job/events/1", "/jobsx", "/jobs/a%2Fb/c"]
)
async def test_an_unknown_route_is_404(api: Api, path: str) -> None:
    api.submit()
    problem(await api.client.get(path), 404, "not-found")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/jobs", "GET, HEAD"),
        ("/jobs/job", "GET, HEAD, DELETE"),
        ("/jobs/job/outputs/0", "GET, HEAD"),
        ("/interrupt", "POST"),
    ],
)
async def test_another_method_is_405_with_what_is_allowed(api: Api, path: str, allowed: str) -> None:
    response = await api.client.request("PATCH", path)
    problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == allowed


async def test_a_long_poll_is_answered_when_the_job_ends(api: Api) -> None:
    job = api.submit()
    views: list[Any] = []

    async def poll() -> None:
        views.append((await api.client.get("/jobs/job?wait=60")).json())

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll)
            await trio.sleep(0.05)
            api.run(job)
            await trio.sleep(0.05)
            assert views == []
            api.fail(job)
    assert views[0]["state"] == "failed"


async def test_a_long_poll_is_answered_when_its_time_is_over(api: Api) -> None:
    api.submit()
    began = trio.current_time()
    view = (await api.client.get("/jobs/job?wait=0.2")).json()
    assert 0.2 <= trio.current_time() - began < 2
    assert view["state"] == "queued"


async def test_a_long_poll_ends_when_the_daemon_puts_the_job_aside(api: Api) -> None:
    api.submit()
    states: list[str] = []

    async def poll() -> None:
        states.append((await api.client.get("/jobs/job?wait=60")).json()["state"])

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll)
            await trio.sleep(0.05)
            api.service.stop_all(FAILURE)
    assert states == ["queued"]


@pytest.mark.parametrize("wait", ["61", "-1", "", "soon", "1e1", "nan", "9" * 400, "٣"])
async def test_a_long_poll_of_a_wrong_length_is_refused(api: Api, wait: str) -> None:
    api.submit()
    response = await api.client.get("/jobs/job", params={"wait": wait})
    document = problem(response, 400, "invalid-request")
    assert document["location"] == "wait"
    assert "0 to 60" in document["detail"] or "0 to 60" in document["errors"][0]["message"]


# The list


def listed(document: dict[str, Any]) -> list[str]:
    return [job["id"] for job in document["jobs"]]


async def test_jobs_are_listed_the_newest_first_page_by_page(api: Api) -> None:
    for number in range(7):
        job = api.submit(f"job-{number}")
        if number % 2:
            api.run(job)
            api.succeed(job)
    seen: list[str] = []
    url = "/jobs?limit=3"
    pages = 0
    while url:
        response = await api.client.get(url)
        document = response.json()
        seen += listed(document)
        pages += 1
        link = response.headers.get("link")
        assert (link is None) == (document["next"] is None)
        url = ""
        if link is not None:
            assert link == f'</jobs?limit=3&before={document["next"]}>; rel="next"'
            url = link[1 : link.index(">")]
    assert seen == [f"job-{number}" for number in range(6, -1, -1)]
    assert pages == 3


async def test_a_page_that_is_just_full_has_no_next(api: Api) -> None:
    for number in range(3):
        api.submit(f"job-{number}")
    document = (await api.client.get("/jobs?limit=3")).json()
    assert len(document["jobs"]) == 3
    assert document["next"] is None
    assert (await api.client.get("/jobs?before=0")).json() == {"jobs": [], "next": None}


async def test_a_listed_job_has_what_costs_the_same_for_every_job(api: Api) -> None:
    job = api.submit(workflow="w")
    api.submit("bad")
    api.fail(api.service.get("bad") or job)
    bad, view = (await api.client.get("/jobs")).json()["jobs"]
    assert set(view) == {
        "id", "state", "workflow", "accepted_at", "started_at", "ended_at", "attempts", "percent", "links",
    }  # fmt: skip
    assert bad["problem"] == {
        "type": "execution-failed",
        "title": "A node failed",
        "status": 500,
        "detail": "a node raised",
    }


async def test_a_list_may_be_of_some_states_and_one_workflow(api: Api) -> None:
    for job_id, workflow in (
        ("queued", "a/b"),
        ("running", "a/b"),
        ("succeeded", "a/b"),
        ("failed", ""),
        ("other", "c"),
    ):
        job = api.submit(job_id, workflow=workflow)
        if job_id in {"running", "succeeded"}:
            api.run(job)
        if job_id == "succeeded":
            api.succeed(job)
        if job_id == "failed":
            api.fail(job)

    async def ids(query: str) -> list[str]:
        return listed((await api.client.get(f"/jobs?{query}")).json())

    assert await ids("state=queued,running") == ["other", "running", "queued"]
    assert await ids("state=active") == ["other", "running", "queued"]
    assert await ids("state=ended") == ["failed", "succeeded"]
    assert await ids("state=failed,%20active") == ["other", "failed", "running", "queued"]
    assert await ids("workflow=a/b") == await ids("workflow=a%2Fb") == ["succeeded", "running", "queued"]
    assert await ids("workflow=a/b&state=ended") == ["succeeded"]
    assert await ids("workflow=") == ["failed"], "those of /prompt have none"
    response = await api.client.get("/jobs?limit=1&state=ended,queued&workflow=a/b")
    assert "workflow=a/b&" in response.headers["link"] or "workflow=a%2Fb&" in response.headers["link"]
    assert listed((await api.client.get(response.headers["link"].split(">")[0][1:])).json()) == ["queued"]


WRONG = {
    "unknown": ("stat=queued", {"stat": 'did you mean "state"?'}),
    "unknown and like nothing": ("xyz=1", {"xyz": "state, workflow, limit, before"}),
    "state": ("state=runing", {"state": 'did you mean "running"?'}),
    "no state": ("state=", {"state": "accepted, preparing, queued"}),
    "limit 0": ("limit=0", {"limit": "from 1 to 200"}),
    "limit 201": ("limit=201", {"limit": "from 1 to 200"}),
    "limit a word": ("limit=many", {"limit": '"many"'}),
    "limit long": (f"limit={'1' * 5000}", {"limit": "from 1 to 200"}),
    "limit in other digits": ("limit=%D9%A3", {"limit": "from 1 to 200"}),
    "before": ("before=-1", {"before": "at least 0"}),
    "workflow long": (f"workflow={'w' * 513}", {"workflow": "at most 512"}),
    "twice": ("limit=1&limit=2", {"limit": "twice"}),
    "all at once": ("limit=x&state=y&z=", {"limit": "whole number", "state": "one of", "z": "unknown"}),
    "too many": ("&".join(f"a{n}=1" for n in range(33)), {"": "more than 32"}),
    "a name of 5000": ("n" * 5000 + "=1", {"n" * 80: "unknown"}),
    "not UTF-8": ("state=%FF", {"state": "one of"}),
}


@pytest.mark.parametrize(("query", "wanted"), WRONG.values(), ids=WRONG.keys())
async def test_a_wrong_query_is_refused_at_every_place(api: Api, query: str, wanted: dict[str, str]) -> None:
    response = await api.client.get(f"/jobs?{query}")
    found = faults(problem(response, 400, "invalid-request"))
    assert set(found) == set(wanted)
    assert all(text in found[place] for place, text in wanted.items()), found
    assert len(response.content) < 3000
    assert api.ledger.pages == []


# Ending jobs


@pytest.mark.parametrize("where", ["queued", "running"])
async def test_delete_cancels_a_job_on_its_way(api: Api, where: str) -> None:
    job = api.submit()
    if where == "running":
        api.run(job)
    response = await api.client.delete("/jobs/job")
    assert response.status_code == 200
    view = response.json()
    assert (view["state"], view["problem"]["type"], view["problem"]["status"]) == ("cancelled", "job-cancelled", 409)
    assert job.state is JobState.CANCELLED
    assert len(api.service.queue) == 0


@pytest.mark.parametrize("by", ["delete", "interrupt"])
async def test_a_cancelled_job_is_answered_only_when_that_is_on_disk(api: Api, by: str) -> None:
    api.ledger.holding = True
    api.submit()
    answered: list[int] = []

    async def cancel() -> None:
        if by == "delete":
            answered.append((await api.client.delete("/jobs/job")).status_code)
        else:
            answered.append((await api.client.post("/interrupt", json={"id": "job"})).status_code)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel)
            while not api.ledger.held:  # noqa: ASYNC110  # told by nobody
                await trio.sleep(0.002)
            await wait_all_tasks_blocked(0.02)
            assert answered == []
            api.ledger.held[0]()
    assert answered == [200]


async def test_delete_that_comes_too_late_tells_how_the_job_ended_and_removes_nothing(api: Api) -> None:
    api.ledger.holding = True
    job = api.submit()
    api.run(job)
    api.succeed(job)
    answers: list[dict[str, Any]] = []

    async def delete() -> None:
        answers.append((await api.client.delete("/jobs/job")).json())

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(delete)
            await trio.sleep(0.05)
            api.ledger.held[0]()
    assert answers[0]["state"] == "succeeded"
    assert api.ledger.forgotten == []


async def test_delete_of_an_ended_job_forgets_it(api: Api) -> None:
    job = api.submit()
    api.run(job)
    api.succeed(job)
    response = await api.client.delete("/jobs/job")
    assert (response.status_code, response.content) == (204, b"")
    assert "content-length" not in response.headers
    assert api.ledger.forgotten == ["job"]
    problem(await api.client.get("/jobs/job"), 404, "not-found")
    problem(await api.client.delete("/jobs/job"), 404, "not-found")


async def test_an_ended_job_of_which_somebody_must_still_be_told_is_not_forgotten(api: Api) -> None:
    api.fail(api.submit())
    api.ledger.untold.add("job")
    problem(await api.client.delete("/jobs/job"), 409, "webhook-pending")
    assert (await api.client.get("/jobs/job")).status_code == 200


async def test_a_job_that_is_put_aside_is_not_said_to_be_cancelled(api: Api) -> None:
    job = api.submit()
    api.service.stop_all(FAILURE)
    api.service._known["job"] = job  # as if it were shelved between the look and the cancel
    problem(await api.client.delete("/jobs/job"), 503, "draining")


async def test_a_journal_that_does_not_answer_is_told_and_jobs_in_memory_are_not_touched(api: Api) -> None:
    api.submit()
    ended = api.submit("ended")
    api.fail(ended)
    api.ledger.broken = True
    assert (await api.client.get("/jobs/job")).json()["state"] == "queued"
    assert (await api.client.get("/jobs/ended")).json()["state"] == "failed"
    for method, path in (
        ("GET", "/jobs/unknown"),
        ("GET", "/jobs/unknown/events"),
        ("GET", "/jobs"),
        ("DELETE", "/jobs/ended"),
    ):
        response = await api.client.request(method, path)
        assert "the disk is full" in problem(response, 503, "not-ready")["detail"]
        assert response.headers["retry-after"] == "30"
    assert (await api.client.delete("/jobs/job")).status_code == 200


async def test_a_cancelled_job_that_the_journal_never_took_was_never_there(api: Api) -> None:
    api.ledger.accepting = False
    job = api.submit()
    answers: list[int] = []

    async def delete() -> None:
        answers.append((await api.client.delete("/jobs/job")).status_code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(delete)
        while job.decided is None:  # noqa: ASYNC110  # told by nobody
            await trio.sleep(0.002)
        api.ledger.unaccepted[0](JournalUnavailable("the disk is full"))
    assert answers == [404]


@pytest.mark.parametrize("where", ["queued", "running"])
async def test_interrupt_says_success_when_it_ended_the_job(api: Api, where: str) -> None:
    job = api.submit(respond_async=False)
    if where == "running":
        api.run(job)
    response = await api.client.post("/interrupt", json={"id": "job"})
    assert (response.status_code, response.json()) == (200, {"id": "job", "interrupted": "success"})
    assert isinstance(job.outcome, Failure)
    assert job.outcome.kind is FailureKind.JOB_CANCELLED


async def test_interrupt_says_failed_of_a_job_that_it_did_not_end(api: Api) -> None:
    api.fail(api.submit("ended"))
    api.ledger.holding = True
    decided = api.submit("decided")
    api.run(decided)
    api.succeed(decided)
    for job_id in ("ended", "decided", "none"):
        response = await api.client.post("/interrupt", json={"id": job_id})
        assert (response.status_code, response.json()) == (404, {"id": job_id, "interrupted": "failed"})
        assert response.headers["content-type"].startswith("application/json")


async def test_only_one_of_many_interrupts_says_success(api: Api) -> None:
    api.submit()
    statuses: list[int] = []

    async def ask() -> None:
        statuses.append((await api.client.post("/interrupt", json={"id": "job"})).status_code)

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(ask)
    assert sorted(statuses) == [200] + [404] * 9


BODIES = {
    "empty": (b"", ""),
    "no JSON": (b"{id: 1}", ""),
    "a list": (b"[]", ""),
    "no id": (b"{}", "id"),
    "null": (b'{"id": null}', "id"),
    "a number": (b'{"id": 5}', "id"),
    "a slash": (b'{"id": "a/b"}', "id"),
    "unknown field": (b'{"id": "a", "all": true}', "all"),
}


@pytest.mark.parametrize(("body", "place"), BODIES.values(), ids=BODIES.keys())
async def test_a_bad_interrupt_is_refused(api: Api, body: bytes, place: str) -> None:
    response = await api.client.post("/interrupt", content=body, headers={"content-type": "application/json"})
    assert problem(response, 400, "invalid-request")["location"] == place


async def test_a_large_interrupt_is_refused_without_being_read(api: Api) -> None:
    document = problem(await api.client.post("/interrupt", content=b" " * 70_000), 413, "body-too-large")
    assert "64 KB" in document["detail"]
    problem(
        await api.client.post("/interrupt", content=b"x", headers={"content-type": "text/plain"}),
        415,
        "unsupported-media-type",
    )
