"""S3Store through a proxy that misbehaves: what passes is tried again, what does not is told, a cancel ends it all."""

import os
import re
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
from storage_support import (
    MIB,
    QUICK,
    Asked,
    CutAnswer,
    Fault,
    FaultyProxy,
    Hang,
    Peer,
    Plan,
    Reply,
    ResetInBody,
    StallAnswer,
    Trickle,
    open_proxy,
    open_store,
)
from structlog.testing import LogCapture

from comfyd.storage import S3Config, S3Store, StorageFailed, Trouble

IN_PARTS = 3 * MIB + 1
SMALL_PARTS = attrs.evolve(QUICK, multipart_from_bytes=2 * MIB, part_bytes=MIB)

IMPATIENT = attrs.evolve(SMALL_PARTS, connect_timeout_s=0.4, read_timeout_s=0.4, stop_grace_s=0.1)


@pytest.fixture
def lenient_moto(moto: Peer, bucket: str) -> Peer:
    """moto, with the test's bucket in it."""
    with moto.client() as client:
        client.create_bucket(Bucket=bucket)
    return moto


Scene = Callable[[S3Store, FaultyProxy], Awaitable[None]]


async def through(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, plan: Plan, scene: Scene, config: S3Config = SMALL_PARTS
) -> FaultyProxy:
    """Play *scene* with a store that reaches *peer* through a proxy that does *plan*."""
    with trio.fail_after(30):
        async with open_proxy(peer, plan) as (proxy, seen):
            monkeypatch.setenv("AWS_ENDPOINT_URL", seen.url)
            with open_store(config) as store:
                await scene(store, proxy)
    return proxy


def once(method: str, fault: Fault, nth: int = 1) -> Plan:
    """Do *fault* to the *nth* request of *method*."""
    count = 0

    def plan(asked: Asked) -> Fault | None:
        nonlocal count
        count += asked.method == method
        return fault if asked.method == method and count == nth else None

    return plan


def parts_in(peer: Peer, bucket: str) -> int:
    """How many multipart uploads the store still remembers."""
    with peer.client() as client:
        return len(client.list_multipart_uploads(Bucket=bucket).get("Uploads", []))


def keys_in(peer: Peer, bucket: str) -> list[str]:
    with peer.client() as client:
        return [each["Key"] for each in client.list_objects_v2(Bucket=bucket).get("Contents", [])]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(os.urandom(300_000))
    return path


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "video.mp4"
    path.write_bytes(os.urandom(IN_PARTS))
    return path


def make_sparse(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)


def content(path: Path) -> bytes:
    return path.read_bytes()


def content_of(peer: Peer, bucket: str, key: str) -> bytes:
    with peer.client() as client:
        found: bytes = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return found


@pytest.mark.parametrize(
    "fault",
    [
        Reply(status=500, code="InternalError"),
        Reply(status=503, code="SlowDown"),
        Reply(status=429, code="TooManyRequests"),
        Reply(status=400, code="RequestTimeout"),
        Reply(status=502, body=b"<html>Bad Gateway</html>", headers={"Content-Type": "text/html"}),
        ResetInBody(after_bytes=100_000),
        ResetInBody(after_bytes=0),
        CutAnswer(),
    ],
    ids=str,
)
async def test_a_fault_that_passes_costs_one_more_attempt(
    lenient_moto: Peer,
    no_aws: pytest.MonkeyPatch,
    bucket: str,
    picture: Path,
    fault: Fault,
    log_output: LogCapture,
) -> None:
    async def scene(store: S3Store, _: FaultyProxy) -> None:
        await store.upload(picture, bucket, "x.png", "image/png")

    proxy = await through(lenient_moto, no_aws, once("PUT", fault), scene)
    assert [each.method for each in proxy.asked] == ["PUT", "PUT"]
    assert content_of(lenient_moto, bucket, "x.png") == content(picture)
    (retry,) = [entry for entry in log_output.entries if entry["event"] == "s3_retry"]
    assert (retry["attempt"], retry["key"]) == (1, "x.png")


@pytest.mark.parametrize("fault", [Reply(status=503, code="SlowDown"), ResetInBody(after_bytes=700_000)], ids=str)
async def test_a_part_that_fails_is_the_only_one_sent_again(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, video: Path, fault: Fault
) -> None:
    async def scene(store: S3Store, _: FaultyProxy) -> None:
        await store.upload(video, bucket, "x.mp4", "video/mp4")

    proxy = await through(lenient_moto, no_aws, once("PUT", fault, nth=2), scene)
    numbers = [re.findall(r"partNumber=(\d+)", each.target)[0] for each in proxy.requests("PUT")]
    assert numbers == ["1", "2", "2", "3", "4"]
    assert content_of(lenient_moto, bucket, "x.mp4") == content(video)


async def test_an_upload_whose_completion_is_answered_into_the_void_is_done_again(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, video: Path
) -> None:
    """It may be there, as here, but a store that says NoSuchUpload then is no reason to believe it."""
    posts = 0

    def plan(asked: Asked) -> Fault | None:
        nonlocal posts
        posts += asked.method == "POST"
        completes: dict[int, Fault] = {2: CutAnswer(), 3: Reply(status=404, code="NoSuchUpload")}
        return completes.get(posts) if asked.method == "POST" else None

    async def scene(store: S3Store, _: FaultyProxy) -> None:
        await store.upload(video, bucket, "x.mp4", "video/mp4")

    proxy = await through(lenient_moto, no_aws, plan, scene)
    assert len(proxy.requests("PUT")) == 8
    assert content_of(lenient_moto, bucket, "x.mp4") == content(video)
    assert parts_in(lenient_moto, bucket) == 0


async def test_a_completion_that_fails_under_status_200_is_no_success(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, video: Path
) -> None:
    """S3 begins to answer before it is done, so a failure may come as a 200 (API reference, this operation)."""

    async def scene(store: S3Store, _: FaultyProxy) -> None:
        await store.upload(video, bucket, "x.mp4", "video/mp4")

    proxy = await through(lenient_moto, no_aws, once("POST", Reply(status=200, code="InternalError"), nth=2), scene)
    assert len(proxy.requests("POST")) == 3  # create, and complete twice
    assert content_of(lenient_moto, bucket, "x.mp4") == content(video)


@pytest.mark.parametrize("file", ["picture", "video"])
async def test_a_store_that_stays_unavailable_fails_the_upload_after_three_attempts(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, file: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(file)

    async def scene(store: S3Store, _: FaultyProxy) -> None:
        with pytest.raises(StorageFailed) as caught:
            await store.upload(path, bucket, "x", "image/png")
        assert caught.value.trouble is Trouble.UNAVAILABLE
        assert caught.value.cause == "the store answers 503 SlowDown (after 3 attempts)"

    def plan(asked: Asked) -> Fault | None:
        return Reply(status=503, code="SlowDown") if asked.method == "PUT" else None

    proxy = await through(lenient_moto, no_aws, plan, scene)
    assert len(proxy.requests("PUT")) == 3
    assert keys_in(lenient_moto, bucket) == []
    assert parts_in(lenient_moto, bucket) == 0


@pytest.mark.parametrize(
    ("status", "code", "trouble", "text"),
    [
        (403, "AccessDenied", Trouble.ACCESS_DENIED, "access denied"),
        (403, "SomethingNew", Trouble.ACCESS_DENIED, "access denied (403 SomethingNew)"),
        (403, "SignatureDoesNotMatch", Trouble.BAD_CREDENTIALS, "the secret key is wrong"),
        (403, "InvalidAccessKeyId", Trouble.BAD_CREDENTIALS, "the access key is not known"),
        (400, "ExpiredToken", Trouble.BAD_CREDENTIALS, "has expired"),
        (403, "RequestTimeTooSkewed", Trouble.CLOCK, "clock"),
        (400, "KeyTooLongError", Trouble.REFUSED, "too long"),
        (400, "New<Code> with secrets", Trouble.REFUSED, "the store refuses the request (400)"),
        (501, "NotImplemented", Trouble.REFUSED, "the store refuses the request (501 NotImplemented)"),
    ],
)
async def test_a_refusal_is_final_and_put_into_words_of_ours(
    lenient_moto: Peer,
    no_aws: pytest.MonkeyPatch,
    bucket: str,
    picture: Path,
    status: int,
    code: str,
    trouble: Trouble,
    text: str,
    log_output: LogCapture,
) -> None:
    async def scene(store: S3Store, _: FaultyProxy) -> None:
        with pytest.raises(StorageFailed) as caught:
            await store.upload(picture, bucket, "x", "image/png")
        assert caught.value.trouble is trouble
        assert text in caught.value.cause
        assert "AKIDSECRET" not in str(caught.value)  # what the store's message quotes

    proxy = await through(lenient_moto, no_aws, once("PUT", Reply(status=status, code=code)), scene)
    assert len(proxy.asked) == 1
    assert log_output.entries == []


MALFORMED = b"""<?xml version="1.0"?><Error><Code>AuthorizationHeaderMalformed</Code><Message>m</Message>
<Region>eu-west-3</Region></Error>"""


@pytest.mark.parametrize(
    "fault",
    [
        Reply(status=301, code="PermanentRedirect", headers={"x-amz-bucket-region": "eu-west-3"}),
        Reply(status=400, body=MALFORMED),
    ],
    ids=["redirect", "malformed"],
)
async def test_a_bucket_in_another_region_is_followed_there_and_presigned_for_it(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, picture: Path, fault: Fault
) -> None:
    urls: list[str] = []

    async def scene(store: S3Store, _: FaultyProxy) -> None:
        await store.upload(picture, bucket, "x", "image/png")
        urls.append(await store.presign(bucket, "x", 60))
        await store.upload(picture, bucket, "y", "image/png")

    proxy = await through(lenient_moto, no_aws, once("PUT", fault), scene)
    first, *later = (each.headers["authorization"] for each in proxy.asked)
    assert "/us-east-1/s3/" in first
    assert len(later) == 2
    assert all("/eu-west-3/s3/" in each for each in later)
    assert "%2Feu-west-3%2Fs3%2F" in urls[0]
    assert content_of(lenient_moto, bucket, "x") == content(picture)


@pytest.mark.parametrize(
    ("code", "headers", "text"),
    [
        ("PermanentRedirect", {}, "in another region or at another endpoint; see AWS_REGION"),
        ("PermanentRedirect", {"x-amz-bucket-region": "eu-west-3"}, "in region eu-west-3; set AWS_REGION"),
    ],
)
async def test_a_region_that_cannot_be_followed_is_told(
    lenient_moto: Peer,
    no_aws: pytest.MonkeyPatch,
    bucket: str,
    picture: Path,
    code: str,
    headers: dict[str, str],
    text: str,
) -> None:
    async def scene(store: S3Store, _: FaultyProxy) -> None:
        with pytest.raises(StorageFailed) as caught:
            await store.upload(picture, bucket, "x", "image/png")
        assert caught.value.trouble is Trouble.WRONG_REGION
        assert text in caught.value.cause

    proxy = await through(lenient_moto, no_aws, lambda _: Reply(status=301, code=code, headers=headers), scene)
    assert [each.method for each in proxy.asked] == ["PUT"] * (2 if headers else 1)


async def test_a_store_that_hangs_is_left_by_the_time_out(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, picture: Path
) -> None:
    async def scene(store: S3Store, proxy: FaultyProxy) -> None:
        with pytest.raises(StorageFailed) as caught:
            await store.upload(picture, bucket, "x", "image/png")
        assert caught.value.trouble is Trouble.TIMED_OUT
        assert caught.value.cause == f"127.0.0.1:{proxy.port} did not answer in time (after 3 attempts)"

    proxy = await through(lenient_moto, no_aws, lambda _: Hang(), scene, IMPATIENT)
    assert len(proxy.asked) == 3


async def test_a_slow_store_is_no_dead_store(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, video: Path, tmp_path: Path
) -> None:
    """Either way takes longer than the time-out in all, but never as long for a part or between two bytes."""
    config = attrs.evolve(SMALL_PARTS, read_timeout_s=1.5)

    async def scene(store: S3Store, _: FaultyProxy) -> None:
        for work in (
            partial(store.upload, video, bucket, "x", "image/png"),
            partial(store.download, bucket, "x", tmp_path / "back", max_bytes=IN_PARTS),
        ):
            began_at = trio.current_time()
            await work()
            assert trio.current_time() - began_at > config.read_timeout_s

    proxy = await through(lenient_moto, no_aws, lambda _: Trickle(piece_bytes=200_000, wait_s=0.11), scene, config)
    assert [each.method for each in proxy.asked] == ["POST", "PUT", "PUT", "PUT", "PUT", "POST", "GET"]
    assert content_of(lenient_moto, bucket, "x") == content(video) == content(tmp_path / "back")


async def test_a_cancel_ends_an_upload_in_a_part_and_the_store_forgets_it(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, tmp_path: Path
) -> None:
    """The part is larger than what fits into the sockets, which would take a small one whole."""
    video = tmp_path / "video"
    make_sparse(video, QUICK.part_bytes + MIB)
    slow = Trickle(piece_bytes=65_536, wait_s=0.05, mark_bytes=500_000)

    async def scene(store: S3Store, proxy: FaultyProxy) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.upload, video, bucket, "x.mp4", "video/mp4")
            await slow.reached.wait()
            assert parts_in(lenient_moto, bucket) == 1
            began_at = trio.current_time()
            nursery.cancel_scope.cancel("the client left")
        assert trio.current_time() - began_at < 3  # the part alone would take twelve
        assert [each.method for each in proxy.asked] == ["POST", "PUT", "DELETE"]
        with trio.fail_after(1):  # the thread has ended, or is about to hand in its token
            async with store._limiter:
                pass

    await through(lenient_moto, no_aws, once("PUT", slow), scene, attrs.evolve(QUICK, max_concurrent=1))
    assert parts_in(lenient_moto, bucket) == 0
    assert keys_in(lenient_moto, bucket) == []


async def test_a_cancel_does_not_wait_for_a_store_that_hangs_and_the_parts_go_all_the_same(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, video: Path
) -> None:
    forgotten = trio.Event()
    hang = Hang()

    def plan(asked: Asked) -> Fault | None:
        if asked.method == "DELETE":
            forgotten.set()
        return hang if "partNumber=2" in asked.target else None

    config = attrs.evolve(IMPATIENT, read_timeout_s=2.0, max_concurrent=1)

    async def scene(store: S3Store, _: FaultyProxy) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.upload, video, bucket, "x.mp4", "video/mp4")
            await hang.reached.wait()
            began_at = trio.current_time()
            nursery.cancel_scope.cancel("the client left")
        assert trio.current_time() - began_at < 1
        assert not forgotten.is_set()
        assert store._limiter.borrowed_tokens == 1  # the thread still counts
        await forgotten.wait()
        async with store._limiter:  # the thread has ended
            pass

    await through(lenient_moto, no_aws, plan, scene, config)
    assert parts_in(lenient_moto, bucket) == 0
    assert keys_in(lenient_moto, bucket) == []


async def test_a_cancel_ends_the_wait_before_the_next_attempt(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, picture: Path
) -> None:
    config = attrs.evolve(QUICK, first_delay_s=60, max_delay_s=60, stop_grace_s=60)
    tried = trio.Event()

    def plan(_: Asked) -> Fault:
        tried.set()
        return Reply(status=503, code="SlowDown")

    async def scene(store: S3Store, _: FaultyProxy) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.upload, picture, bucket, "x", "image/png")
            await tried.wait()
            nursery.cancel_scope.cancel("the client left")

    await through(lenient_moto, no_aws, plan, scene, config)


async def test_parts_that_cannot_be_forgotten_are_told_to_the_operator(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, video: Path, log_output: LogCapture
) -> None:
    def plan(asked: Asked) -> Fault | None:
        return Reply(status=403, code="AccessDenied") if asked.method in ("PUT", "DELETE") else None

    async def scene(store: S3Store, _: FaultyProxy) -> None:
        with pytest.raises(StorageFailed, match="access denied"):
            await store.upload(video, bucket, "x.mp4", "video/mp4")

    await through(lenient_moto, no_aws, plan, scene)
    (left,) = log_output.entries
    assert left["event"] == "s3_parts_left"
    assert (left["bucket"], left["key"], left["reason"]) == (bucket, "x.mp4", "access-denied")


async def test_a_file_that_shrinks_under_the_upload_fails_it(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, video: Path
) -> None:
    def plan(asked: Asked) -> Fault | None:
        if "partNumber=2" in asked.target:
            os.truncate(video, 2 * MIB)
        return None

    async def scene(store: S3Store, _: FaultyProxy) -> None:
        with pytest.raises(StorageFailed, match="became shorter") as caught:
            await store.upload(video, bucket, "x.mp4", "video/mp4")
        assert caught.value.trouble is Trouble.LOCAL_FILE

    await through(lenient_moto, no_aws, plan, scene)
    assert keys_in(lenient_moto, bucket) == []
    assert parts_in(lenient_moto, bucket) == 0


@pytest.fixture
def stored(lenient_moto: Peer, bucket: str) -> bytes:
    """An object ``stored`` of 1 MB in the bucket."""
    content = os.urandom(MIB)
    with lenient_moto.client() as client:
        client.put_object(Bucket=bucket, Key="stored", Body=content)
    return content


@pytest.mark.parametrize("fault", [CutAnswer(after_bytes=500_000), Reply(status=503, code="SlowDown")], ids=str)
async def test_a_download_that_breaks_off_begins_again(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, stored: bytes, tmp_path: Path, fault: Fault
) -> None:
    async def scene(store: S3Store, _: FaultyProxy) -> None:
        assert await store.download(bucket, "stored", tmp_path / "x", max_bytes=MIB) == MIB

    proxy = await through(lenient_moto, no_aws, once("GET", fault), scene)
    assert len(proxy.asked) == 2
    assert (tmp_path / "x").read_bytes() == stored
    assert os.listdir(tmp_path) == ["x"]


async def test_a_download_that_always_breaks_off_leaves_nothing(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, stored: bytes, tmp_path: Path
) -> None:
    async def scene(store: S3Store, _: FaultyProxy) -> None:
        with pytest.raises(StorageFailed) as caught:
            await store.download(bucket, "stored", tmp_path / "x", max_bytes=MIB)
        assert caught.value.trouble is Trouble.BROKEN_OFF

    proxy = await through(lenient_moto, no_aws, lambda _: CutAnswer(after_bytes=MIB), scene)
    assert len(proxy.asked) == 3
    assert os.listdir(tmp_path) == []


async def test_a_cancel_ends_a_download_that_moves_and_leaves_nothing(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, stored: bytes, tmp_path: Path
) -> None:
    slow = Trickle(piece_bytes=30_000, wait_s=0.05, mark_bytes=300_000)

    async def scene(store: S3Store, _: FaultyProxy) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: store.download(bucket, "stored", tmp_path / "x", max_bytes=MIB))
            await slow.reached.wait()
            assert len(os.listdir(tmp_path)) == 1
            nursery.cancel_scope.cancel("the client left")
        assert os.listdir(tmp_path) == []

    await through(lenient_moto, no_aws, once("GET", slow), scene)


async def test_a_cancel_does_not_wait_for_a_download_that_stalls_and_nothing_is_left(
    lenient_moto: Peer, no_aws: pytest.MonkeyPatch, bucket: str, stored: bytes, tmp_path: Path
) -> None:
    stall = StallAnswer(after_bytes=500_000)
    config = attrs.evolve(IMPATIENT, read_timeout_s=2.0, max_concurrent=1)

    async def scene(store: S3Store, _: FaultyProxy) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: store.download(bucket, "stored", tmp_path / "x", max_bytes=MIB))
            await stall.reached.wait()
            began_at = trio.current_time()
            nursery.cancel_scope.cancel("the client left")
        assert trio.current_time() - began_at < 1
        async with store._limiter:  # the thread has ended
            pass
        assert os.listdir(tmp_path) == []

    await through(lenient_moto, no_aws, once("GET", stall), scene, config)
