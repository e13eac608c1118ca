"""S3Store against moto: what arrives is what was sent, under the very key; and each failure says what it is."""

import contextlib
import hashlib
import http.client
import os
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import attrs
import pytest
import trio
from storage_support import MIB, QUICK, Peer, clean_environment, open_store

from comfyd.errors import FailureKind
from comfyd.storage import S3Config, StorageFailed, Trouble
from comfyd.storage.s3 import run_stoppable

KEYS = (
    "plain.png",
    "with space .png",
    "a#b?c=d&e.png",
    "50%25.png",
    "a+b=c,d;e:f@g.png",
    "/leading/slash.png",
    "//two//slashes//.png",
    "../up/../.././dots.png",
    "trailing/..",
    "\u00e4\u00f6\u00fc \u65e5\u672c\u8a9e \U0001f431.png",
    "e\u0301 is not \u00e9.png",  # nothing normalises
    "'\"<>&\\|^`{}[]~.png",
    "k" * 1000,
)


def written(path: Path, size_bytes: int) -> Path:
    path.write_bytes(os.urandom(size_bytes))
    return path


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def make_bucket(peer: Peer, bucket: str) -> None:
    with peer.client() as client:
        client.create_bucket(Bucket=bucket)


@pytest.mark.parametrize(
    "size_bytes", [0, 1, QUICK.multipart_from_bytes - 1, QUICK.multipart_from_bytes, 40 * MIB + 1], ids=str
)
async def test_a_file_arrives_whole_and_comes_back_whole(
    moto: Peer, bucket: str, tmp_path: Path, size_bytes: int
) -> None:
    make_bucket(moto, bucket)
    path = written(tmp_path / "out.mp4", size_bytes)
    with trio.fail_after(60), open_store() as store:
        await store.upload(path, bucket, "out.mp4", "video/mp4")
        with moto.client() as client:
            head = client.head_object(Bucket=bucket, Key="out.mp4")
        assert (head["ContentLength"], head["ContentType"]) == (size_bytes, "video/mp4")
        assert ("-" in head["ETag"]) == (size_bytes >= QUICK.multipart_from_bytes)  # what S3 adds to one in parts
        back = tmp_path / "back.mp4"
        assert await store.download(bucket, "out.mp4", back, max_bytes=size_bytes) == size_bytes
    assert md5(back.read_bytes()) == md5(path.read_bytes())
    assert sorted(os.listdir(tmp_path)) == ["back.mp4", "out.mp4"]


async def test_every_key_is_verbatim(moto: Peer, bucket: str, tmp_path: Path) -> None:
    make_bucket(moto, bucket)
    with trio.fail_after(60), open_store() as store:
        for place, key in enumerate(KEYS):
            path = tmp_path / f"{place}.png"
            path.write_text(key)
            await store.upload(path, bucket, key, "image/png")
        with moto.client() as client:
            found = {each["Key"] for each in client.list_objects_v2(Bucket=bucket)["Contents"]}
        assert found == set(KEYS)
        for key in KEYS:
            back = tmp_path / "back"
            await store.download(bucket, key, back, max_bytes=MIB)
            assert back.read_text() == key


async def test_a_large_file_under_a_strange_key_is_one_object(moto: Peer, bucket: str, tmp_path: Path) -> None:
    make_bucket(moto, bucket)
    path = written(tmp_path / "out.bin", 17 * MIB)
    with trio.fail_after(60), open_store() as store:
        await store.upload(path, bucket, "/a b/#?%20\U0001f431", "application/octet-stream")
    with moto.client() as client:
        (only,) = client.list_objects_v2(Bucket=bucket)["Contents"]
        assert (only["Key"], only["Size"]) == ("/a b/#?%20\U0001f431", 17 * MIB)
        assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)


async def test_sixteen_uploads_at_once_keep_to_the_limit(moto: Peer, bucket: str, tmp_path: Path) -> None:
    make_bucket(moto, bucket)
    config = attrs.evolve(QUICK, max_concurrent=4)
    files = [written(tmp_path / f"{place}.png", 300_000) for place in range(16)]
    most = 0
    with trio.fail_after(60), open_store(config) as store:
        async with trio.open_nursery() as nursery:
            for path in files:
                nursery.start_soon(store.upload, path, bucket, path.name, "image/png")
            while nursery.child_tasks:
                most = max(most, store._limiter.borrowed_tokens)
                await trio.lowlevel.checkpoint()
        assert most == 4
        with moto.client() as client:
            found = {each["Key"]: each["ETag"].strip('"') for each in client.list_objects_v2(Bucket=bucket)["Contents"]}
    assert found == {path.name: md5(path.read_bytes()) for path in files}


async def get(url: str) -> tuple[int, bytes]:
    """GET *url* as it stands; HTTP libraries that normalise would take the dots out of it."""

    def blocking() -> tuple[int, bytes]:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
        try:
            connection.request("GET", f"{parts.path}?{parts.query}")
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    return await trio.to_thread.run_sync(blocking)


@pytest.mark.parametrize("key", ["plain.png", "a b/#?%20\u00e9\U0001f431.png", "/../x.png"])
async def test_a_presigned_url_is_good_for_a_plain_get(moto: Peer, bucket: str, tmp_path: Path, key: str) -> None:
    make_bucket(moto, bucket)
    path = written(tmp_path / "x.png", 1000)
    with trio.fail_after(30), open_store() as store:
        await store.upload(path, bucket, key, "image/png")
        url = await store.presign(bucket, key, 90)
    assert await get(url) == (200, path.read_bytes())
    assert "X-Amz-Expires=90" in url
    assert moto.secret_key not in url


async def test_a_region_in_aws_region_is_signed_with(no_aws: pytest.MonkeyPatch) -> None:
    no_aws.setenv("AWS_ACCESS_KEY_ID", "a")
    no_aws.setenv("AWS_SECRET_ACCESS_KEY", "b")
    config = S3Config.from_environment({"AWS_REGION": "eu-west-3"})
    with trio.fail_after(30), open_store(config) as store:
        url = await store.presign("pictures", "a b.png", 60)
    assert url.startswith("https://pictures.s3.eu-west-3.amazonaws.com/a%20b.png?X-Amz-Algorithm=AWS4-HMAC-SHA256")


@pytest.mark.parametrize(
    ("style", "endpoint", "start"),
    [
        ("auto", "https://store.test", "https://store.test/pictures/x"),
        ("virtual", "https://store.test", "https://pictures.store.test/x"),
        ("path", "", "https://s3.eu-west-3.amazonaws.com/pictures/x"),
        ("auto", "", "https://pictures.s3.eu-west-3.amazonaws.com/x"),
    ],
)
async def test_buckets_are_addressed_by_path_where_an_endpoint_is_set(
    no_aws: pytest.MonkeyPatch, style: str, endpoint: str, start: str
) -> None:
    no_aws.setenv("AWS_ACCESS_KEY_ID", "a")
    no_aws.setenv("AWS_SECRET_ACCESS_KEY", "b")
    if endpoint:
        no_aws.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    config = S3Config.from_environment({"AWS_REGION": "eu-west-3", "AWS_S3_ADDRESSING_STYLE": style})
    with trio.fail_after(30), open_store(config) as store:
        assert (await store.presign("pictures", "x", 60)).startswith(start)
        if not endpoint:  # what is no host name goes into the path
            by_path = await store.presign("Old_Style.Bucket", "x", 60)
            assert by_path.startswith("https://s3.eu-west-3.amazonaws.com/Old_Style.Bucket/x?")


async def failed_upload(path: Path, bucket: str = "nowhere") -> StorageFailed:
    with trio.fail_after(30), open_store() as store, pytest.raises(StorageFailed) as caught:
        await store.upload(path, bucket, "a b.png", "image/png")
    return caught.value


@pytest.mark.parametrize("size_bytes", [10, QUICK.multipart_from_bytes])
async def test_an_upload_to_a_missing_bucket_says_so_at_once(moto: Peer, tmp_path: Path, size_bytes: int) -> None:
    error = await failed_upload(written(tmp_path / "x", size_bytes))
    assert (error.trouble, error.cause) == (Trouble.NO_SUCH_BUCKET, "the bucket does not exist")
    failure = error.failure
    assert failure.kind is FailureKind.STORAGE_FAILED
    assert failure.detail == "s3://nowhere/a b.png: the bucket does not exist"


async def test_a_download_says_what_is_missing_and_leaves_nothing(moto: Peer, bucket: str, tmp_path: Path) -> None:
    make_bucket(moto, bucket)
    with trio.fail_after(30), open_store() as store:
        for name, text in ((bucket, "there is no such object"), ("nowhere", "the bucket does not exist")):
            with pytest.raises(StorageFailed, match=text):
                await store.download(name, "a/b", tmp_path / "x", max_bytes=MIB)
    assert os.listdir(tmp_path) == []


async def test_an_object_over_the_bound_is_not_downloaded(moto: Peer, bucket: str, tmp_path: Path) -> None:
    make_bucket(moto, bucket)
    path = written(tmp_path / "x", MIB + 1)
    with trio.fail_after(30), open_store() as store:
        await store.upload(path, bucket, "x", "image/png")
        with pytest.raises(StorageFailed, match="is larger than 1 MB") as caught:
            await store.download(bucket, "x", tmp_path / "y", max_bytes=MIB)
        assert caught.value.trouble is Trouble.TOO_LARGE
        assert os.listdir(tmp_path) == ["x"]
        assert await store.download(bucket, "x", tmp_path / "y", max_bytes=MIB + 1) == MIB + 1


async def test_no_credentials_is_a_failure_that_names_the_variables(
    moto: Peer, no_aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_aws.delenv("AWS_ACCESS_KEY_ID")
    no_aws.delenv("AWS_SECRET_ACCESS_KEY")
    error = await failed_upload(written(tmp_path / "x", 10))
    assert error.trouble is Trouble.NO_CREDENTIALS
    assert "AWS_ACCESS_KEY_ID" in error.cause
    with trio.fail_after(30), open_store() as store, pytest.raises(StorageFailed, match="no S3 credentials"):
        await store.presign("pictures", "x", 60)


async def test_credentials_that_come_later_are_found(
    moto: Peer, bucket: str, no_aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_bucket(moto, bucket)
    path = written(tmp_path / "x", 10)
    no_aws.delenv("AWS_ACCESS_KEY_ID")
    with trio.fail_after(30), open_store() as store:
        with pytest.raises(StorageFailed, match="no S3 credentials"):
            await store.upload(path, bucket, "x", "image/png")
        no_aws.setenv("AWS_ACCESS_KEY_ID", moto.access_key)
        await store.upload(path, bucket, "x", "image/png")


async def test_half_of_the_credentials_is_told_from_none(
    moto: Peer, no_aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_aws.delenv("AWS_SECRET_ACCESS_KEY")
    error = await failed_upload(written(tmp_path / "x", 10))
    assert error.trouble is Trouble.NO_CREDENTIALS
    assert "half" in error.cause


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("AWS_ENDPOINT_URL", "no url", "AWS_ENDPOINT_URL"),
        ("AWS_PROFILE", "not-there", "ProfileNotFound"),
    ],
)
async def test_settings_that_make_no_sense_fail_the_upload_and_not_the_daemon(
    moto: Peer, no_aws: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str, text: str
) -> None:
    no_aws.setenv(variable, value)
    error = await failed_upload(written(tmp_path / "x", 10))
    assert error.trouble is Trouble.MISCONFIGURED
    assert text in error.cause


@pytest.mark.parametrize(
    "variable", ["AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE"]
)
async def test_an_empty_variable_is_an_unset_one(
    moto: Peer, bucket: str, no_aws: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    make_bucket(moto, bucket)
    no_aws.setenv(variable, "")
    with trio.fail_after(30), open_store(attrs.evolve(QUICK, region=None)) as store:
        await store.upload(written(tmp_path / "x", 10), bucket, "x", "image/png")


async def test_credentials_come_from_the_profile(moto: Peer, no_aws: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[profile other]\nregion = eu-west-2\n")
    (tmp_path / "credentials").write_text("[other]\naws_access_key_id = OTHER\naws_secret_access_key = s\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        no_aws.delenv(name)
    no_aws.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    no_aws.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    no_aws.setenv("AWS_PROFILE", "other")
    with trio.fail_after(30), open_store() as store:
        url = await store.presign("pictures", "x", 60)
    assert "X-Amz-Credential=OTHER%2F" in url
    assert "%2Feu-west-2%2F" in url


async def test_a_client_that_could_not_be_made_is_made_again_once_that_is_mended(
    moto: Peer, bucket: str, no_aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_bucket(moto, bucket)
    path = written(tmp_path / "x", 10)
    no_aws.setenv("AWS_PROFILE", "not-there")
    with trio.fail_after(30), open_store() as store:
        with pytest.raises(StorageFailed, match="ProfileNotFound"):
            await store.upload(path, bucket, "x", "image/png")
        no_aws.delenv("AWS_PROFILE")
        await store.upload(path, bucket, "x", "image/png")


async def test_an_endpoint_that_refuses_is_tried_three_times_and_named(
    moto: Peer, no_aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    await listeners[0].aclose()
    no_aws.setenv("AWS_ENDPOINT_URL", f"http://user:pass-word@127.0.0.1:{port}/path")
    error = await failed_upload(written(tmp_path / "x", 10))
    assert error.trouble is Trouble.UNREACHABLE
    assert error.cause == f"127.0.0.1:{port} refuses connections (after 3 attempts)"


async def test_an_endpoint_whose_name_does_not_resolve_is_named(
    moto: Peer, no_aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unknown(*_: object) -> None:  # in the resolver's place, which is not on this machine
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    no_aws.setattr(socket, "getaddrinfo", unknown)
    no_aws.setenv("AWS_ENDPOINT_URL", "http://minio.test:9000")
    error = await failed_upload(written(tmp_path / "x", 10))
    assert error.trouble is Trouble.UNREACHABLE
    assert error.cause == "the name of minio.test:9000 does not resolve (after 3 attempts)"


async def test_an_endpoint_that_speaks_no_tls_is_told_from_one_that_is_away(
    moto: Peer, no_aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_aws.setenv("AWS_ENDPOINT_URL", moto.url.replace("http:", "https:"))
    error = await failed_upload(written(tmp_path / "x", 10))
    assert error.trouble is Trouble.UNREACHABLE
    assert "there is no TLS with 127.0.0.1" in error.cause


async def test_a_certificate_is_trusted_by_aws_ca_bundle_only(
    moto: Peer, no_aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    certificate = tmp_path / "certificate.pem"
    context = make_certificate(certificate, tmp_path / "key.pem")
    connected = 0

    async def answer(stream: trio.SSLStream[trio.SocketStream]) -> None:
        nonlocal connected
        connected += 1
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                if await stream.receive_some(65536):  # TLS is up
                    await stream.send_all(b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")

    path = written(tmp_path / "x", 10)
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(
            trio.serve_listeners, answer, await trio.open_ssl_over_tcp_listeners(0, context, host="127.0.0.1")
        )
        port = listener.transport_listener.socket.getsockname()[1]
        no_aws.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{port}")
        untrusted = await failed_upload(path)
        assert untrusted.trouble is Trouble.UNREACHABLE
        assert untrusted.cause == f"the certificate of 127.0.0.1:{port} is not trusted (AWS_CA_BUNDLE)"
        assert connected == 1
        no_aws.setenv("AWS_CA_BUNDLE", str(certificate))
        assert (await failed_upload(path)).trouble is Trouble.ACCESS_DENIED
        nursery.cancel_scope.cancel("the test is over")


def make_certificate(certificate: Path, key: Path) -> ssl.SSLContext:
    """A server's context with a certificate for 127.0.0.1 that it has signed itself."""
    subject = ("-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1", "-nodes")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", *subject, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context


async def test_a_file_that_is_not_there_is_a_failure_of_ours(moto: Peer, tmp_path: Path) -> None:
    error = await failed_upload(tmp_path / "not-there")
    assert error.trouble is Trouble.LOCAL_FILE
    assert str(tmp_path) not in str(error)


async def test_a_download_to_where_nothing_can_be_written_is_a_failure_of_ours(
    moto: Peer, bucket: str, tmp_path: Path
) -> None:
    make_bucket(moto, bucket)
    with trio.fail_after(30), open_store() as store:
        await store.upload(written(tmp_path / "x", 10), bucket, "x", "image/png")
        with pytest.raises(StorageFailed) as caught:
            await store.download(bucket, "x", tmp_path / "no-folder" / "x", max_bytes=MIB)
    assert caught.value.trouble is Trouble.LOCAL_FILE
    assert str(tmp_path) not in str(caught.value)


async def test_a_cancel_before_a_thread_is_free_does_not_wait() -> None:
    limiter = trio.CapacityLimiter(1)
    stop = threading.Event()
    ran: list[str] = []
    with trio.fail_after(5):
        async with limiter:
            with trio.move_on_after(0.05) as scope:
                await run_stoppable(lambda: ran.append("work"), stop, limiter=limiter, grace_s=60)
    assert scope.cancelled_caught
    assert stop.is_set()
    assert ran == []


_LAZY = """
import sys
import trio
from comfyd.storage import S3Store
async def main():
    S3Store()
trio.run(main)
print(sorted({name.partition(".")[0] for name in sys.modules} & {"boto3", "botocore", "s3transfer", "urllib3"}))
"""


def test_a_daemon_without_s3_does_not_import_boto3() -> None:
    done = subprocess.run([sys.executable, "-c", _LAZY], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"


_BIG = """
import sys
from pathlib import Path
import trio
from comfyd.storage import S3Store

def peak_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024

async def main():
    small, big, bucket, back = sys.argv[1:]
    store = S3Store()
    await store.upload(Path(small), bucket, "small", "image/png")
    before = peak_mb()
    await store.upload(Path(big), bucket, "big", "video/mp4")
    size = Path(big).stat().st_size
    assert await store.download(bucket, "big", Path(back), max_bytes=size) == size
    print(before, peak_mb() - before)
trio.run(main)
"""


def test_a_large_file_takes_no_memory(moto: Peer, bucket: str, tmp_path: Path) -> None:
    """The bound is of the design: 80 MB for 500 MB. Here it is a file of 200 MB and a tenth of it."""
    make_bucket(moto, bucket)
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(200 * MIB)
    environment = clean_environment(os.environ) | moto.environment()
    done = subprocess.run(
        [sys.executable, "-c", _BIG, str(written(tmp_path / "small", 10)), str(big), bucket, str(tmp_path / "back")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    _, grown_mb = map(int, done.stdout.split())
    assert grown_mb < 20
