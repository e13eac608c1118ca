"""S3Store against OpenStack Swift's s3api: a store that checks signatures, and is not Amazon's."""

import http.client
import os
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trio
from storage_support import MIB, QUICK, Peer, Reply, open_proxy, open_store

from comfyd.storage import StorageFailed, Trouble

pytestmark = pytest.mark.swift


@pytest.fixture
def swift_bucket(swift: Peer, bucket: str) -> str:
    with swift.client() as client:
        client.create_bucket(Bucket=bucket)
    return bucket


def written(path: Path, size_bytes: int) -> Path:
    path.write_bytes(os.urandom(size_bytes))
    return path


def content(path: Path) -> bytes:
    return path.read_bytes()


@pytest.mark.parametrize("size_bytes", [0, 1, QUICK.multipart_from_bytes - 1, QUICK.multipart_from_bytes + 1], ids=str)
async def test_what_is_uploaded_is_signed_right_and_comes_back(
    swift_bucket: str, tmp_path: Path, size_bytes: int
) -> None:
    path = written(tmp_path / "x", size_bytes)
    with trio.fail_after(60), open_store() as store:
        await store.upload(path, swift_bucket, "a/x.mp4", "video/mp4")
        await store.download(swift_bucket, "a/x.mp4", tmp_path / "y", max_bytes=size_bytes)
    assert content(tmp_path / "y") == content(path)


# Not here: dots as path segments and a leading slash, which Swift's own URLs cannot carry.
@pytest.mark.parametrize(
    "key", ["with space .png", "a#b?c=d&e.png", "50%25.png", "a+b=c,d;e:f@g.png", "\u00e9 e\u0301 \U0001f431.png"]
)
async def test_strange_keys_are_signed_right_also_in_presigned_urls(
    swift: Peer, swift_bucket: str, tmp_path: Path, key: str
) -> None:
    path = written(tmp_path / "x", 1000)
    with trio.fail_after(30), open_store() as store:
        await store.upload(path, swift_bucket, key, "image/png")
        url = await store.presign(swift_bucket, key, 60)
    with swift.client() as client:
        (only,) = client.list_objects_v2(Bucket=swift_bucket)["Contents"]
    assert only["Key"] == key
    assert await trio.to_thread.run_sync(get, url) == (200, content(path), "image/png")
    status, _, _ = await trio.to_thread.run_sync(get, url.replace("X-Amz-Expires=60", "X-Amz-Expires=61"))
    assert status == 403


def get(url: str) -> tuple[int, bytes, str | None]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    try:
        connection.request("GET", f"{parts.path}?{parts.query}")
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.getheader("content-type")
    finally:
        connection.close()


@pytest.mark.parametrize("size_bytes", [10, QUICK.multipart_from_bytes])
async def test_a_wrong_secret_is_told_and_not_tried_again(
    swift: Peer, swift_bucket: str, no_aws: pytest.MonkeyPatch, tmp_path: Path, size_bytes: int
) -> None:
    no_aws.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with trio.fail_after(30):
        async with open_proxy(swift) as (proxy, seen):
            no_aws.setenv("AWS_ENDPOINT_URL", seen.url)
            with open_store() as store, pytest.raises(StorageFailed) as caught:
                await store.upload(written(tmp_path / "x", size_bytes), swift_bucket, "x", "image/png")
    assert caught.value.trouble is Trouble.BAD_CREDENTIALS
    assert caught.value.cause == "the secret key is wrong (SignatureDoesNotMatch)"
    assert "not-the-secret" not in str(caught.value)
    assert len(proxy.asked) == 1


async def test_an_unknown_access_key_is_told(swift_bucket: str, no_aws: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_aws.setenv("AWS_ACCESS_KEY_ID", "nobody:nothing")
    with trio.fail_after(30), open_store() as store, pytest.raises(StorageFailed) as caught:
        await store.upload(written(tmp_path / "x", 10), swift_bucket, "x", "image/png")
    assert caught.value.trouble in (Trouble.BAD_CREDENTIALS, Trouble.ACCESS_DENIED)
    assert "nobody" not in str(caught.value)


async def test_missing_buckets_and_objects_are_told(swift: Peer, swift_bucket: str, tmp_path: Path) -> None:
    with trio.fail_after(30), open_store() as store:
        with pytest.raises(StorageFailed, match="the bucket does not exist"):
            await store.upload(written(tmp_path / "x", 10), "nowhere", "x", "image/png")
        with pytest.raises(StorageFailed, match="there is no such object"):
            await store.download(swift_bucket, "x", tmp_path / "y", max_bytes=MIB)


async def test_a_wrong_region_is_followed_or_told(
    swift_bucket: str, no_aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_aws.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    path = written(tmp_path / "x", 10)
    with trio.fail_after(30), open_store() as store:
        await store.upload(path, swift_bucket, "x", "image/png")
        await store.download(swift_bucket, "x", tmp_path / "y", max_bytes=MIB)
    assert content(tmp_path / "y") == content(path)


async def test_a_refused_part_leaves_no_upload_behind(
    swift: Peer, swift_bucket: str, no_aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = written(tmp_path / "x", QUICK.part_bytes + MIB)
    with trio.fail_after(60):
        async with open_proxy(
            swift, lambda asked: Reply(status=403, code="AccessDenied") if "partNumber=2" in asked.target else None
        ) as (_, seen):
            no_aws.setenv("AWS_ENDPOINT_URL", seen.url)
            with open_store() as store, pytest.raises(StorageFailed, match="access denied"):
                await store.upload(path, swift_bucket, "x", "video/mp4")
    with swift.client() as client:
        assert "Uploads" not in client.list_multipart_uploads(Bucket=swift_bucket)
        assert "Contents" not in client.list_objects_v2(Bucket=swift_bucket)
