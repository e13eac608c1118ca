"""Outputs that go to S3: the objects are there when their URLs are told, and a 202 ends in one outcome.

What the bucket holds is looked at by a client of the test's own. At the end the daemon's log holds no secret.
"""

import os
import signal
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import httpx
import pytest
import trio
from api_support import (
    ACCESS_KEY,
    SECRET_KEY,
    URL_SECRET,
    Graph,
    assert_no_secret,
    b64,
    blank,
    faults,
    graph_of,
    images,
    loader,
    media_environment,
    node,
    open_client,
    pixel,
    png,
    prompt,
    rest,
    saver,
    wait_folders_clean,
)
from daemon_support import Daemon, open_daemon, problem, submit, wait_state
from fetch_servers import bad_server, silent, whole
from storage_support import Asked, FaultyProxy, Hang, Peer, Reply, open_proxy

from comfyd.media.sniff import sniff

RED: Final = 0xFA0A0A


@pytest.fixture
async def client(media_daemon: Daemon) -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(media_daemon) as client:
        yield client
        await wait_folders_clean(media_daemon)
        media_daemon.assert_no_bug()


@attrs.frozen
class Stored:
    """An object as the store has it."""

    data: bytes
    content_type: str


@attrs.frozen
class Bucket:
    """A bucket of one test."""

    name: str
    peer: Peer

    def block(self, prefix: str = "", *, is_async: bool = False, **more: Any) -> dict[str, Any]:
        """The ``s3`` block of a request."""
        return {"bucket": self.name, "prefix": prefix, **more, **({"async": True} if is_async else {})}

    async def objects(self) -> dict[str, Stored]:
        return await trio.to_thread.run_sync(self._objects)

    def _objects(self) -> dict[str, Stored]:
        with self.peer.client() as s3:
            keys = [each["Key"] for each in s3.list_objects_v2(Bucket=self.name).get("Contents", ())]
            answers = {key: s3.get_object(Bucket=self.name, Key=key) for key in keys}
            return {key: Stored(each["Body"].read(), each["ContentType"]) for key, each in answers.items()}


@pytest.fixture
async def bucket(s3_server: Peer) -> Bucket:
    name = f"out-{uuid.uuid4().hex[:12]}"

    def make() -> None:
        with s3_server.client() as s3:
            s3.create_bucket(Bucket=name)

    await trio.to_thread.run_sync(make)
    return Bucket(name, s3_server)


def picture(*, color: int = RED, prefix: str = "x", batch_size: int = 1, seconds: float = 0.0) -> Graph:
    graph = graph_of(blank("1", color=color, batch_size=batch_size))
    if seconds:
        return graph_of(graph, rest("slow", "1", seconds), saver("2", "slow", prefix=prefix))
    return graph_of(graph, saver("2", "1", prefix=prefix))


async def ended(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    """Ask for the job until it has ended; return what is said of it then."""
    while True:
        response = await client.get(f"/jobs/{job_id}")
        assert response.status_code == 200, response.text
        assert_no_secret(response.text)
        document: dict[str, Any] = response.json()
        if document["state"] in {"succeeded", "failed", "cancelled"}:
            return document
        await trio.sleep(0.02)


# The caller waits


async def test_the_answer_holds_urls_of_objects_that_are_there(client: httpx.AsyncClient, bucket: Bucket) -> None:
    graph = graph_of(picture(), node("3", "SaveTextFile", text="hello", filename_prefix="note"))
    response = await prompt(client, graph, id="stored", s3=bucket.block("a/"))
    assert response.status_code == 200, response.text
    assert_no_secret(response.text)
    answer = response.json()
    keys = ["a/stored_x_00001_.png", "a/stored_note_00001_.txt"]
    urls = [f"s3://{bucket.name}/{key}" for key in keys]
    assert answer["images"] == urls
    assert answer["filenames"] == [key.removeprefix("a/") for key in keys]
    assert answer["s3"] == bucket.block("a/")
    there = await bucket.objects()
    assert sorted(there) == sorted(keys)
    assert [(output["url"], output["media_type"], output["size_bytes"]) for output in answer["outputs"]] == [
        (url, there[key].content_type, len(there[key].data)) for url, key in zip(urls, keys, strict=True)
    ]
    assert [there[key].content_type for key in keys] == ["image/png", "text/plain"]
    assert pixel(there[keys[0]].data) == (0xFA, 0x0A, 0x0A)
    assert b"stored_x" in there[keys[0]].data, "the bytes are those of the node, with the prompt inside"
    assert there[keys[1]].data == b"hello"
    assert answer["stats"]["upload_time"] > 0


async def test_what_is_converted_is_stored_as_such(client: httpx.AsyncClient, bucket: Bucket) -> None:
    response = await prompt(client, picture(), id="both", s3=bucket.block(), convert_output={"format": "jpg"})
    (output,) = response.json()["outputs"]
    assert output["converted"] is True
    assert response.json()["images"] == [f"s3://{bucket.name}/both_x_00001_.jpg"]
    ((key, stored),) = (await bucket.objects()).items()
    assert (key, stored.content_type) == ("both_x_00001_.jpg", "image/jpeg")
    kind = sniff(stored.data)
    assert kind is not None
    assert kind.name == "image/jpeg"
    assert len(stored.data) == output["size_bytes"]


@pytest.mark.parametrize(
    "prefix", ["", "no-slash-", "a//b/", "with space/", "q?a=b&c#d/", "100%25/", "ünï/日本/", "/x/"]
)
async def test_a_prefix_is_put_before_the_name_as_it_is(client: httpx.AsyncClient, bucket: Bucket, prefix: str) -> None:
    response = await prompt(client, picture(), id="verbatim", s3=bucket.block(prefix))
    key = f"{prefix}verbatim_x_00001_.png"
    assert response.json()["images"] == [f"s3://{bucket.name}/{key}"]
    assert list(await bucket.objects()) == [key]


async def test_an_object_can_be_the_input_of_the_next_job(client: httpx.AsyncClient, bucket: Bucket) -> None:
    response = await prompt(client, picture(), s3=bucket.block("back and forth?/"))
    (url,) = response.json()["images"]
    response = await prompt(client, graph_of(loader("1", url), saver("2", "1")))
    assert [pixel(data) for data in images(response)] == [(0xFA, 0x0A, 0x0A)]


async def test_a_presigned_url_can_be_had_by_anybody(client: httpx.AsyncClient, bucket: Bucket) -> None:
    response = await prompt(client, picture(), s3=bucket.block("a b/", presign_s=600))
    assert SECRET_KEY not in response.text
    (output,) = response.json()["outputs"]
    assert response.json()["images"] == [f"s3://{bucket.name}/a b/{output['filename']}"]
    signed = httpx.URL(output["url"])
    assert signed.params["X-Amz-Expires"] == "600"
    assert len(signed.params["X-Amz-Signature"]) == 64
    assert signed.params["X-Amz-Credential"].startswith(f"{ACCESS_KEY}/"), "the key's public half, as S3 wants it"
    async with httpx.AsyncClient(trust_env=False) as anybody:
        got = await anybody.get(signed)
    assert got.status_code == 200
    assert got.headers["content-type"] == "image/png"
    assert pixel(got.content) == (0xFA, 0x0A, 0x0A)


async def test_many_outputs_are_stored_each_under_its_name(client: httpx.AsyncClient, bucket: Bucket) -> None:
    graph = graph_of(*(picture_of(number) for number in range(5)))
    response = await prompt(client, graph, id="many", s3=bucket.block())
    answer = response.json()
    assert len(answer["images"]) == 40
    there = await bucket.objects()
    assert sorted(f"s3://{bucket.name}/{key}" for key in there) == sorted(answer["images"])
    in_order = [pixel(there[name].data)[2] for name in answer["filenames"]]
    assert in_order == [number for number in range(5) for _ in range(8)]


def picture_of(number: int) -> Graph:
    return graph_of(
        blank(f"blank-{number}", color=number, batch_size=8), saver(f"{number}", f"blank-{number}", prefix=f"p{number}")
    )


async def test_outputs_of_one_name_in_two_folders_are_two_objects(client: httpx.AsyncClient, bucket: Bucket) -> None:
    graph = graph_of(
        blank("1", color=1), saver("2", "1", prefix="a/x"), blank("3", color=2), saver("4", "3", prefix="b/x")
    )
    response = await prompt(client, graph, id="same", s3=bucket.block())
    answer = response.json()
    assert answer["filenames"] == ["same_x_00001_.png", "same_x_00001_-2.png"]
    assert answer["images"] == [f"s3://{bucket.name}/{name}" for name in answer["filenames"]]
    there = await bucket.objects()
    assert [pixel(there[name].data)[2] for name in answer["filenames"]] == [1, 2]


BAD: dict[str, tuple[Any, str]] = {
    "no bucket": ({}, "s3.bucket"),
    "a bucket that cannot be": ({"bucket": "a/b"}, "s3.bucket"),
    "no object": ("bucket", "s3"),
    "async a text": ({"bucket": "abc", "async": "yes"}, "s3.async"),
    "unknown field": ({"bucket": "abc", "prefx": "a"}, "s3.prefx"),
    "a long prefix": ({"bucket": "abc", "prefix": "a" * 901}, "s3.prefix"),
    "presigned for ever": ({"bucket": "abc", "presign_s": 604_801}, "s3.presign_s"),
}


@pytest.mark.parametrize(("block", "location"), BAD.values(), ids=BAD.keys())
async def test_a_bad_block_is_refused_by_its_place(client: httpx.AsyncClient, block: Any, location: str) -> None:
    response = await prompt(client, picture(), s3=block)
    assert list(faults(problem(response, 400, "invalid-request"))) == [location]


# The store fails


async def test_a_bucket_that_is_not_there_is_a_failure_that_says_so(client: httpx.AsyncClient) -> None:
    response = await prompt(client, picture(batch_size=3), s3={"bucket": "no-such-bucket-of-ours"})
    document = problem(response, 502, "storage-failed")
    assert "bucket" in document["detail"].rpartition(": ")[2]
    assert document["node_id"] == "2"
    assert {"images", "outputs", "s3"}.isdisjoint(document)
    assert_no_secret(response.text)


@asynccontextmanager
async def faulty_store(folder: Path, peer: Peer) -> AsyncIterator[tuple[FaultyProxy, Daemon, httpx.AsyncClient]]:
    """A daemon whose S3 is behind a proxy that misbehaves; set its plan."""
    async with (
        open_proxy(peer) as (proxy, through),
        open_daemon(folder, environ=media_environment(through)) as daemon,
        open_client(daemon) as client,
    ):
        yield proxy, daemon, client
        await wait_folders_clean(daemon)
        assert_no_secret(str(daemon.log))


async def test_a_store_that_denies_fails_or_is_gone_is_a_failure_with_its_cause(
    tmp_path: Path, s3_server: Peer, bucket: Bucket
) -> None:
    async with faulty_store(tmp_path, s3_server) as (proxy, _, client):

        async def failure(cause: str, attempts: int) -> None:
            before = len(proxy.requests("PUT"))
            response = await prompt(client, picture(), s3=bucket.block())
            document = problem(response, 502, "storage-failed")
            assert cause in document["detail"]
            assert {"images", "outputs"}.isdisjoint(document)
            assert_no_secret(response.text)
            assert "AKIDSECRET" not in response.text, "the store's own words are not passed on"
            assert len(proxy.requests("PUT")) - before == attempts

        proxy.plan = lambda asked: Reply(status=403, code="AccessDenied") if asked.method == "PUT" else None
        await failure("access denied", 1)
        proxy.plan = lambda asked: Reply(status=503, code="SlowDown") if asked.method == "PUT" else None
        await failure("the store answers 503 SlowDown", 3)

        def the_second_of_three(asked: Asked) -> Reply | None:
            return Reply(status=403, code="AccessDenied") if "00002" in asked.target else None

        proxy.plan = the_second_of_three
        response = await prompt(client, picture(batch_size=3), s3=bucket.block())
        document = problem(response, 502, "storage-failed")
        assert "x_00002_.png" in document["detail"]
        assert {"images", "outputs"}.isdisjoint(document)

        def once(asked: Asked) -> Reply | None:
            proxy.plan = lambda _: None
            return Reply(status=503, code="SlowDown")

        proxy.plan = once
        response = await prompt(client, picture(), id="retried", s3=bucket.block())
        assert response.json()["images"] == [f"s3://{bucket.name}/retried_x_00001_.png"]
        assert "retried_x_00001_.png" in await bucket.objects()


async def test_a_store_that_cannot_be_reached_is_a_failure_with_its_cause(tmp_path: Path, s3_server: Peer) -> None:
    environ = media_environment(attrs.evolve(s3_server, port=1))
    async with open_daemon(tmp_path, environ=environ) as daemon, open_client(daemon) as client:
        response = await prompt(client, picture(), s3={"bucket": "somewhere"})
        document = problem(response, 502, "storage-failed")
        assert document["detail"].endswith(": 127.0.0.1:1 refuses connections (after 3 attempts)")
        response = await prompt(client, picture(), id="later", s3={"bucket": "somewhere", "async": True})
        assert response.status_code == 202
        document = await ended(client, "later")
        assert (document["state"], document["problem"]["type"]) == ("failed", "storage-failed")
        assert "outputs" not in document
        await wait_folders_clean(daemon)


async def test_a_client_that_leaves_or_a_time_out_ends_an_upload(
    tmp_path: Path, s3_server: Peer, bucket: Bucket
) -> None:
    async with faulty_store(tmp_path, s3_server) as (proxy, daemon, client), trio.open_nursery() as nursery:
        hang = Hang()
        proxy.plan = lambda _: hang
        job = await submit(daemon, nursery, client, picture(), s3=bucket.block())
        await hang.reached.wait()
        job.leave()
        await daemon.log.wait("job.abandoned", job_id=job.job_id, state="delivering")
        response = await prompt(client, picture(), s3=bucket.block(), timeout_s=0.5)
        assert "delivering" in problem(response, 504, "timeout")["detail"]
        proxy.plan = lambda _: None
        await wait_folders_clean(daemon)
        assert await bucket.objects() == {}
        nursery.cancel_scope.cancel("its thread in the daemon may sit in a socket for a while")


# The caller does not wait


async def test_a_job_is_accepted_at_once_and_its_objects_are_there_when_it_has_succeeded(
    client: httpx.AsyncClient, media_daemon: Daemon, bucket: Bucket
) -> None:
    graph = picture(seconds=0.4)
    block = bucket.block("later/", is_async=True)
    began = trio.current_time()
    response = await prompt(client, graph, id="async-1", s3=block)
    assert trio.current_time() - began < 0.35, "it waited for the job"
    assert response.status_code == 202
    assert response.headers["location"] == "/jobs/async-1"
    assert response.json() == {"id": "async-1", "status": "ok", "prompt": graph, "s3": block}
    assert (await client.get(response.headers["location"])).json()["state"] in {"queued", "running"}
    document = await ended(client, "async-1")
    assert document["state"] == "succeeded"
    (output,) = document["outputs"]
    assert output["url"] == f"s3://{bucket.name}/later/async-1_x_00001_.png"
    there = await bucket.objects()
    assert list(there) == ["later/async-1_x_00001_.png"]
    assert len(there["later/async-1_x_00001_.png"].data) == output["size_bytes"]
    await wait_folders_clean(media_daemon)
    assert (await ended(client, "async-1"))["outputs"] == [output], "it is known for who asks later"


async def test_the_answer_does_not_wait_for_a_download_either(client: httpx.AsyncClient, bucket: Bucket) -> None:
    async with bad_server(silent()) as server:
        url = server.url(f"/never.png?token={URL_SECRET}")
        graph = graph_of(loader("1", url), saver("2", "1"))
        job_id = f"slow-{uuid.uuid4().hex}"
        block = bucket.block(is_async=True)
        response = await prompt(client, graph, id=job_id, s3=block, timeout_s=0.5)
        assert response.status_code == 202
        document = await ended(client, job_id)
        await server.all_closed.wait()
    assert (document["state"], document["problem"]["type"]) == ("failed", "timeout")


async def test_a_bad_input_is_told_by_the_job(client: httpx.AsyncClient, bucket: Bucket) -> None:
    async with bad_server(whole(b"", "404 Not Found")) as server:
        graph = graph_of(loader("1", server.url("/a.png")), saver("2", "1"))
        response = await prompt(client, graph, id="bad-input", s3=bucket.block(is_async=True))
        assert response.status_code == 202
        document = await ended(client, "bad-input")
    assert document["state"] == "failed"
    assert document["problem"]["type"] == "invalid-input"
    assert faults(document["problem"]) == {"prompt.1.inputs.image": f"{server.url('/a.png')} answered 404 Not Found"}
    assert await bucket.objects() == {}


async def test_what_is_wrong_at_first_sight_is_refused_and_not_accepted(
    client: httpx.AsyncClient, bucket: Bucket
) -> None:
    response = await prompt(client, blank("1"), id="none", s3=bucket.block(is_async=True))
    problem(response, 400, "no-output-node")
    assert (await client.get("/jobs/none")).status_code == 404


async def test_the_same_request_again_joins_and_another_is_a_conflict(
    client: httpx.AsyncClient, media_daemon: Daemon, bucket: Bucket
) -> None:
    job_id = f"twice-{uuid.uuid4().hex}"
    block = bucket.block(is_async=True)
    graph = picture(seconds=0.3)
    first = await prompt(client, graph, id=job_id, s3=block)
    second = await prompt(client, graph, id=job_id, s3=block)
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json() == second.json()
    problem(await prompt(client, picture(color=3), id=job_id, s3=block), 409, "id-conflict")
    problem(await prompt(client, graph, id=job_id), 409, "id-conflict")
    assert (await ended(client, job_id))["state"] == "succeeded"
    third = await prompt(client, graph, id=job_id, s3=block)
    assert third.json() == first.json(), "it is known after its end as well"
    await media_daemon.log.wait("job.joined", job_id=job_id, count=2)
    assert len(media_daemon.log.find("job.accepted", job_id=job_id)) == 1
    assert len(await bucket.objects()) == 1


async def test_a_client_that_leaves_after_the_202_cancels_nothing(
    client: httpx.AsyncClient, media_daemon: Daemon, bucket: Bucket
) -> None:
    job_id = f"left-{uuid.uuid4().hex}"
    async with media_daemon.client() as short:
        block = bucket.block(is_async=True)
        assert (await prompt(short, picture(seconds=0.3), id=job_id, s3=block)).status_code == 202
    assert (await ended(client, job_id))["state"] == "succeeded"
    assert list(await bucket.objects()) == [f"{job_id}_x_00001_.png"]
    assert media_daemon.log.find("job.abandoned", job_id=job_id) == []


async def test_a_conversion_is_done_before_the_upload(client: httpx.AsyncClient, bucket: Bucket) -> None:
    block = bucket.block(is_async=True)
    response = await prompt(client, picture(), id="async-webp", s3=block, convert_output={"format": "webp"})
    assert response.status_code == 202
    document = await ended(client, "async-webp")
    assert document["outputs"][0]["converted"] is True
    ((key, stored),) = (await bucket.objects()).items()
    assert (key, stored.content_type) == ("async-webp_x_00001_.webp", "image/webp")


# The daemon's own life


async def test_a_daemon_that_is_asked_to_stop_finishes_what_it_accepted(
    tmp_path: Path, s3_server: Peer, bucket: Bucket
) -> None:
    async with open_daemon(tmp_path, environ=media_environment(s3_server)) as daemon:
        async with open_client(daemon) as client:
            for number in range(3):
                block = bucket.block(is_async=True)
                response = await prompt(client, picture(seconds=0.2, color=number), id=f"drained-{number}", s3=block)
                assert response.status_code == 202
        daemon.signal()
        assert await daemon.wait_exit() == 0
        assert len(daemon.log.find("job.ended", state="succeeded")) == 3
        assert_no_secret(str(daemon.log))
    assert sorted(await bucket.objects()) == [f"drained-{number}_x_00001_.png" for number in range(3)]


async def test_a_job_whose_engine_dies_is_run_again(tmp_path: Path, s3_server: Peer, bucket: Bucket) -> None:
    environ = media_environment(s3_server, ALWAYS_RESTART_COMFYUI="true")
    async with open_daemon(tmp_path, environ=environ) as daemon, open_client(daemon) as client:
        value = b64(png(colour=(1, 2, 3)))
        graph = graph_of(loader("1", value), rest("slow", "1", 0.8), saver("2", "slow"))
        block = bucket.block(is_async=True)
        assert (await prompt(client, graph, id="again", s3=block)).status_code == 202
        await wait_state(daemon, "again", "running", node_id="slow")
        os.kill(daemon.engine_pid, signal.SIGKILL)
        document = await ended(client, "again")
        assert document["state"] == "succeeded", document
        assert document["stats"]["attempts"] == 2
        ((key, stored),) = (await bucket.objects()).items()
        assert key == "again_x_00001_.png"
        assert pixel(stored.data) == (1, 2, 3), "the input that it brought was there for the second run"
        await wait_folders_clean(daemon)


def test_the_engine_does_not_see_the_credentials(media_daemon: Daemon) -> None:
    mine = Path(f"/proc/{media_daemon.pid}/environ").read_bytes()
    assert SECRET_KEY.encode() in mine, "this test looks for the wrong thing"
    environ = Path(f"/proc/{media_daemon.engine_pid}/environ").read_bytes()
    assert b"URL_ALLOW=" in environ, "what is no secret is passed on"
    assert b"AWS_" not in environ
    assert SECRET_KEY.encode() not in environ
