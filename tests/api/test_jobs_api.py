"""The jobs API of a whole daemon: what a client does that will not keep a connection open, with the real engine."""

import hashlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from api_support import Graph, b64, blank, graph_of, images, open_client, pixel, prompt, rest, saver, wait_folders_clean
from daemon_support import Daemon, large_file, problem, start_daemon, submit, wait_state
from jobs_http_kit import watching_at

ASYNC = {"prefer": "respond-async"}


@pytest.fixture
async def client(shared_daemon: Daemon) -> AsyncIterator[httpx.AsyncClient]:
    """After each test its jobs are deleted, and then no file is left."""
    async with open_client(shared_daemon) as client:
        yield client
        for job in (await client.get("/jobs?limit=200")).json()["jobs"]:
            await client.delete(job["links"]["self"])
        await wait_folders_clean(shared_daemon)
        shared_daemon.assert_no_bug()


async def begin(client: httpx.AsyncClient, graph: Graph, **fields: Any) -> str:
    """Post a prompt without waiting; the job's URL."""
    fields.setdefault("id", uuid.uuid4().hex)
    response = await client.post("/prompt", json={"prompt": graph, **fields}, headers=ASYNC)
    assert response.status_code == 202, response.text
    assert response.headers["preference-applied"] == "respond-async"
    return response.headers["location"]


def picture(seconds: float = 0.0, color: int = 0x00FF00) -> Graph:
    if seconds:
        return graph_of(blank("1", color=color), rest("slow", "1", seconds), saver("2", "slow"))
    return graph_of(blank("1", color=color), saver("2", "1"))


async def test_a_job_is_begun_watched_fetched_and_deleted(client: httpx.AsyncClient, shared_daemon: Daemon) -> None:
    url = await begin(client, picture(0.3))
    async with watching_at(shared_daemon.port, url) as watcher:
        events = await watcher.rest()
    names = [name for name, _ in events]
    assert names[-1] == "result"
    assert {data["state"] for name, data in events if name == "state"} >= {"accepted", "queued", "running"}
    assert any(data["node_title"] == "A rest" for name, data in events if name == "progress")
    (output,) = events[-1][1]["outputs"]
    view = (await client.get(f"{url}?wait=5")).json()
    assert view["state"] == "succeeded"
    assert view["outputs"] == [output]
    got = await client.get(output["href"])
    assert got.headers["content-type"] == "image/png"
    assert got.headers["content-disposition"] == f'inline; filename="{output["filename"]}"'
    assert pixel(got.content) == (0, 255, 0)
    async with watching_at(shared_daemon.port, url, last_id=watcher.parser.last_id) as again:
        assert again.status == 204
    assert (await client.delete(url)).status_code == 204
    problem(await client.get(url), 404, "not-found")
    problem(await client.get(output["href"]), 404, "not-found")


async def test_a_large_output_comes_in_parts(client: httpx.AsyncClient) -> None:
    url = await begin(client, large_file(40))
    view = (await client.get(f"{url}?wait=20")).json()
    (output,) = view["outputs"]
    assert output["size_bytes"] == 40 << 20
    whole = await client.get(output["href"])
    etag = whole.headers["etag"]
    parts = bytearray()
    while len(parts) < 40 << 20:
        asked = {"range": f"bytes={len(parts)}-{len(parts) + (15 << 20) - 1}", "if-range": etag}
        response = await client.get(output["href"], headers=asked)
        assert response.status_code == 206
        parts += response.content
    assert hashlib.sha256(parts).digest() == hashlib.sha256(whole.content).digest()
    assert (await client.delete(url)).status_code == 204


async def test_the_list_has_the_jobs_of_this_daemon_and_not_its_warm_up(client: httpx.AsyncClient) -> None:
    urls = [await begin(client, picture(color=n)) for n in range(3)]
    for url in urls:
        assert (await client.get(f"{url}?wait=20")).json()["state"] == "succeeded"
    document = (await client.get("/jobs?state=succeeded&limit=2")).json()
    assert [job["links"]["self"] for job in document["jobs"]] == urls[:0:-1]
    document = (await client.get(f"/jobs?state=succeeded&limit=1&before={document['next']}")).json()
    assert [job["links"]["self"] for job in document["jobs"]] == urls[:1]
    assert "warmup" not in (await client.get("/jobs")).text
    for url in urls:
        assert (await client.delete(url)).status_code == 204


@pytest.mark.parametrize("by", ["delete", "interrupt"])
async def test_a_running_job_is_cancelled_and_its_caller_told(
    client: httpx.AsyncClient, shared_daemon: Daemon, by: str
) -> None:
    async with trio.open_nursery() as nursery:
        posted = await submit(shared_daemon, nursery, client, picture(20, color=0x123456))
        await wait_state(shared_daemon, posted.job_id, "running", node_id="slow")
        if by == "delete":
            response = await client.delete(f"/jobs/{posted.job_id}")
            assert response.json()["state"] == "cancelled"
        else:
            response = await client.post("/interrupt", json={"id": posted.job_id})
            assert response.json() == {"id": posted.job_id, "interrupted": "success"}
        assert response.status_code == 200
        document = problem(await posted.wait(5), 409, "job-cancelled")
    assert "cancelled by a caller" in document["detail"]
    response = await client.post("/interrupt", json={"id": posted.job_id})
    assert (response.status_code, response.json()["interrupted"]) == (404, "failed")
    assert len(images(await prompt(client, picture()))) == 1, "the engine is free again"


async def test_a_cancelled_job_that_nobody_waits_for_can_be_asked_for(client: httpx.AsyncClient) -> None:
    url = await begin(client, picture(20, color=0x654321))
    assert (await client.delete(url)).json()["state"] == "cancelled"
    assert (await client.get(url)).json()["problem"]["type"] == "job-cancelled"
    assert (await client.delete(url)).status_code == 204


async def test_a_bad_input_of_a_job_that_nobody_waits_for_is_in_its_result(client: httpx.AsyncClient) -> None:
    graph = graph_of({"1": {"class_type": "LoadImage", "inputs": {"image": b64(b"nothing")}}}, saver("2", "1"))
    url = await begin(client, graph)
    view = (await client.get(f"{url}?wait=20")).json()
    assert (view["state"], view["problem"]["type"]) == ("failed", "invalid-input")
    problem(await client.get(f"{url}/outputs/0"), 404, "not-found")
    assert (await client.delete(url)).status_code == 204


# Over the end of a daemon


async def test_an_ended_job_is_known_to_the_next_daemon_with_its_outputs(tmp_path: Path) -> None:
    first = await trio.to_thread.run_sync(started, tmp_path)
    try:
        async with open_client(first) as client:
            url = await begin(client, picture(), id="kept")
            async with watching_at(first.port, url) as watcher:
                result = (await watcher.rest())[-1][1]
            last_id = watcher.parser.last_id
            data = (await client.get(result["outputs"][0]["href"])).content
        assert await trio.to_thread.run_sync(first.stop) == 0
    finally:
        first.close()
    second = await trio.to_thread.run_sync(started, tmp_path)
    try:
        async with open_client(second) as client:
            async with watching_at(second.port, url) as watcher:
                assert await watcher.rest() == [("result", result)]
            async with watching_at(second.port, url, last_id=last_id) as watcher:
                assert watcher.status == 204
            assert (await client.get(result["outputs"][0]["href"])).content == data
            assert [job["id"] for job in (await client.get("/jobs")).json()["jobs"]] == ["kept"]
            assert (await client.delete(url)).status_code == 204
            await wait_folders_clean(second)
        assert await trio.to_thread.run_sync(second.stop) == 0
        second.assert_nothing_left()
    finally:
        second.close()


async def test_a_watcher_of_a_job_that_outlives_the_daemon_goes_on_with_the_next(tmp_path: Path) -> None:
    environ = {"DRAIN_TIMEOUT_S": "0.5"}
    first = await trio.to_thread.run_sync(started, tmp_path, environ)
    try:
        async with open_client(first) as client:
            url = await begin(client, picture(3.0), id="longer")
            async with watching_at(first.port, url) as watcher:
                await watcher.until("state", state="running")
                first.signal()
                events = await watcher.rest()
            assert "result" not in [name for name, _ in events]
            last_id = watcher.parser.last_id
        assert await first.wait_exit() == 0
    finally:
        first.close()
    second = await trio.to_thread.run_sync(started, tmp_path, environ)
    try:
        async with open_client(second) as client:
            async with watching_at(second.port, url, last_id=last_id) as watcher:
                events = await watcher.rest()
            assert events[0][0] == "state", "another life, other numbers: everything is told"
            assert (events[-1][0], events[-1][1]["state"]) == ("result", "succeeded")
            assert (await client.delete(url)).status_code == 204
            await wait_folders_clean(second)
        assert await trio.to_thread.run_sync(second.stop) == 0
        second.assert_nothing_left()
    finally:
        second.close()


def started(folder: Path, environ: dict[str, str] | None = None) -> Daemon:
    daemon = start_daemon(folder, environ=environ)
    try:
        daemon.wait_ready()
    except BaseException:
        daemon.close()
        raise
    return daemon
