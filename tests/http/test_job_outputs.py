"""``/jobs/<id>/outputs``: what jobs made, byte for byte, in part, and safely shown."""

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from daemon_support import problem
from http_server_kit import open_files
from hypothesis import given
from hypothesis import strategies as st
from jobs_http_kit import Api, open_api
from structlog.testing import LogCapture

from comfyd.http import outputs as module
from comfyd.http.disposition import content_disposition, content_type
from comfyd.http.ranges import Part, Unsatisfiable, not_modified, wanted_part
from comfyd.jobs import Job, Success

DATA = bytes(range(256)) * 40
SIZE = len(DATA)


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with open_api() as api:
        yield api


@pytest.fixture
async def job(api: Api, tmp_path: Path) -> Job:
    """A job with one output, which is :data:`DATA`."""
    return await api.finished("job", tmp_path, DATA)


URL = "/jobs/job/outputs/0"


async def test_an_output_is_sent_whole_with_its_name_and_type(api: Api, job: Job) -> None:
    response = await api.client.get(URL)
    assert response.status_code == 200
    assert response.content == DATA
    assert response.headers["content-type"] == "image/png"
    assert response.headers["content-length"] == str(SIZE)
    assert response.headers["content-disposition"] == 'inline; filename="a.png"'
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-security-policy"].startswith("sandbox;")
    assert re.fullmatch(r'"[^"]+"', response.headers["etag"])
    assert "content-range" not in response.headers


async def test_the_result_says_where_the_outputs_are(api: Api, tmp_path: Path) -> None:
    await api.finished("two", tmp_path, b"first", b"", name="x.png")
    view = (await api.client.get("/jobs/two")).json()
    assert [output["href"] for output in view["outputs"]] == ["/jobs/two/outputs/0", "/jobs/two/outputs/1"]
    assert (await api.client.get(view["links"]["outputs"])).json() == {"id": "two", "outputs": view["outputs"]}
    for output, data in zip(view["outputs"], (b"first", b""), strict=True):
        response = await api.client.get(output["href"])
        assert (response.status_code, response.content) == (200, data)
        assert len(data) == output["size_bytes"]
    assert str(tmp_path) not in str(view)


@pytest.mark.parametrize(
    ("asked", "begin", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, SIZE),
        ("bytes=5-9", 5, 10),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        (f"bytes=0-{SIZE - 1}", 0, SIZE),
        ("bytes=100-99999999999999999", 100, SIZE),
        ("bytes=-1", SIZE - 1, SIZE),
        ("bytes=-99999999999999999", 0, SIZE),
        ("BYTES = 5-9", 5, 10),
    ],
)
async def test_a_range_is_sent_as_a_part(api: Api, job: Job, asked: str, begin: int, end: int) -> None:
    response = await api.client.get(URL, headers={"range": asked})
    assert response.status_code == 206
    assert response.content == DATA[begin:end]
    assert response.headers["content-range"] == f"bytes {begin}-{end - 1}/{SIZE}"
    assert response.headers["content-length"] == str(end - begin)


@pytest.mark.parametrize(
    "asked",
    ["bytes=9-5", "bytes=-", "bytes=", "bytes", "bytes=a-b", "bytes=1-2,4-5", "items=0-5", "bytes=0--1", "bytes=+1-2",
     "bytes=1.5-2", "bytes=" + "9" * 5000 + "-", "bytes=٣-٤".encode().decode("latin-1"), ""],
)  # fmt: skip
async def test_a_range_that_means_nothing_here_brings_the_whole(api: Api, job: Job, asked: str) -> None:
    response = await api.client.get(URL, headers=[(b"range", asked.encode("latin-1"))])
    assert response.status_code == 200
    assert response.content == DATA


@pytest.mark.parametrize(
    "asked", [f"bytes={SIZE}-", f"bytes={SIZE}-{SIZE + 5}", "bytes=-0", "bytes=9999999999999999999-"]
)
async def test_a_range_after_the_end_is_416(api: Api, job: Job, asked: str) -> None:
    response = await api.client.get(URL, headers={"range": asked})
    document = problem(response, 416, "range-not-satisfiable")
    assert response.headers["content-range"] == f"bytes */{SIZE}"
    assert document["detail"] == document["error"]


async def test_a_download_goes_on_only_in_the_same_file(api: Api, job: Job) -> None:
    etag = (await api.client.get(URL)).headers["etag"]
    cases = [(etag, 206), ('"other"', 200), (f"W/{etag}", 200), ("Sat, 29 Oct 1994 19:43:31 GMT", 200), ("", 200)]
    for condition, status in cases:
        response = await api.client.get(URL, headers={"range": "bytes=100-", "if-range": condition})
        assert response.status_code == status, condition
        assert response.content == (DATA[100:] if status == 206 else DATA)
    response = await api.client.get(URL, headers={"range": f"bytes={SIZE}-", "if-range": '"other"'})
    assert response.status_code == 200, "a range that does not count cannot be wrong"


@pytest.mark.parametrize("condition", ["{}", "W/{}", '"a", {} ,"b"', "*"])
async def test_who_has_the_file_is_not_sent_it_again(api: Api, job: Job, condition: str) -> None:
    etag = (await api.client.get(URL)).headers["etag"]
    headers = {"if-none-match": condition.format(etag), "range": "bytes=0-5"}
    response = await api.client.get(URL, headers=headers)
    assert (response.status_code, response.content) == (304, b"")
    assert response.headers["etag"] == etag
    assert (await api.client.get(URL, headers={"if-none-match": '"other"'})).status_code == 200


async def test_the_same_id_used_again_is_another_file(api: Api, tmp_path: Path) -> None:
    await api.finished("again", tmp_path, b"one")
    first = await api.client.get("/jobs/again/outputs/0")
    assert (await api.client.delete("/jobs/again")).status_code == 204
    await api.finished("again", tmp_path, b"two")
    headers = {"if-none-match": first.headers["etag"]}
    second = await api.client.get("/jobs/again/outputs/0", headers=headers)
    assert (second.status_code, second.content) == (200, b"two")


async def test_head_says_what_get_would(api: Api, job: Job, log_output: LogCapture) -> None:
    got = await api.client.get(URL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", lambda *_: pytest.fail("nothing is to be read for it"))
        head = await api.client.head(URL, headers={"range": "bytes=5-9"})
    assert (head.status_code, head.content) == (200, b"")
    assert not [entry for entry in log_output.entries if entry["event"] == "http.bug"]
    hop = {"date", "connection"}
    assert {k: v for k, v in head.headers.items() if k not in hop} == {
        k: v for k, v in got.headers.items() if k not in hop
    }


async def test_an_empty_file_is_sent_and_has_no_range(api: Api, tmp_path: Path) -> None:
    await api.finished("empty", tmp_path, b"")
    url = "/jobs/empty/outputs/0"
    assert (await api.client.get(url)).headers["content-length"] == "0"
    problem(await api.client.get(url, headers={"range": "bytes=0-"}), 416, "range-not-satisfiable")
    assert (await api.client.get(url, headers={"range": "bytes=-5"})).status_code == 200


@pytest.mark.parametrize("place", ["1", "-1", "x", "", "0x0", "٠", "9" * 5000, "1e0"])
async def test_an_output_that_is_not_there_is_404(api: Api, job: Job, place: str) -> None:
    document = problem(await api.client.get(f"/jobs/job/outputs/{place}"), 404, "not-found")
    assert document["detail"].endswith("the job has 1, counted from 0")


async def test_a_job_that_has_not_succeeded_has_no_outputs(api: Api) -> None:
    job = api.submit()
    for path in ("/jobs/job/outputs", URL):
        assert "not ended" in problem(await api.client.get(path), 404, "not-found")["detail"]
    api.fail(job)
    for path in ("/jobs/job/outputs", URL):
        assert "failed" in problem(await api.client.get(path), 404, "not-found")["detail"]


async def test_an_output_that_went_out_with_the_answer_is_404_and_has_no_href(api: Api, tmp_path: Path) -> None:
    job = api.submit("sync", respond_async=False)
    with api.service.attached(job):
        api.run(job)
        made = await api.finished("made", tmp_path, b"x")
        assert isinstance(made.outcome, Success)
        api.succeed(job, *made.outcome.outputs)
        (output,) = (await api.client.get("/jobs/sync")).json()["outputs"]
        assert "href" not in output
        problem(await api.client.get("/jobs/sync/outputs/0"), 404, "not-found")


@pytest.mark.parametrize(
    ("url", "status"), [("https://s3.example/b/k?X-Amz-Signature=1", 302), ("s3://bucket/key.png", 404), (None, 404)]
)
async def test_a_stored_output_is_where_it_is_stored(api: Api, tmp_path: Path, url: str | None, status: int) -> None:
    await api.finished("stored", tmp_path, b"x", object_url="s3://bucket/key.png", url=url)
    response = await api.client.get("/jobs/stored/outputs/0")
    assert response.status_code == status
    if status == 302:
        assert response.headers["location"] == url
        assert response.headers["cache-control"] == "no-store"
    else:
        assert "s3://bucket/key.png" in problem(response, 404, "not-found")["detail"]
    (output,) = (await api.client.get("/jobs/stored")).json()["outputs"]
    assert "href" not in output


async def test_a_url_never_breaks_out_of_its_header(api: Api, tmp_path: Path) -> None:
    url = "https://s3.example/b/名 %20.png?X=1&Y=%2F\r\nSet-Cookie: a=b"
    await api.finished("odd", tmp_path, b"x", object_url="s3://b/k", url=url)
    response = await api.client.get("/jobs/odd/outputs/0")
    assert "set-cookie" not in response.headers
    expected = "https://s3.example/b/%E5%90%8D%20%20.png?X=1&Y=%2F%0D%0ASet-Cookie:%20a=b"
    assert response.headers["location"] == expected


@pytest.mark.parametrize("change", ["gone", "a folder", "shorter", "longer", "a pipe"])
async def test_a_file_that_is_not_what_it_was_is_404_and_logged(
    api: Api, job: Job, change: str, log_output: LogCapture
) -> None:
    assert isinstance(job.outcome, Success)
    path = job.outcome.outputs[0].path
    if change in {"shorter", "longer"}:
        path.write_bytes(DATA[:-1] if change == "shorter" else DATA + b"x")
    else:
        path.unlink()
        if change == "a folder":
            path.mkdir()
        elif change == "a pipe":
            os.mkfifo(path)
    before = open_files()
    response = await api.client.get(URL)
    document = problem(response, 404, "not-found")
    assert str(path.parent) not in response.text
    assert document["detail"] == "there is no file of this output any more"
    assert [entry["log_level"] for entry in log_output.entries if entry["event"] == "http.output_gone"] == ["error"]
    assert open_files() <= before + 1, "the connection itself may not be closed yet"


async def test_a_file_that_is_removed_while_it_is_sent_comes_whole(api: Api, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 24
    job = await api.finished("large", tmp_path, data)
    async with await api.server.connect() as stream:
        await stream.send_all(b"GET /jobs/large/outputs/0 HTTP/1.0\r\n\r\n")
        received = bytearray(await stream.receive_some(1000))
        assert isinstance(job.outcome, Success)
        job.outcome.outputs[0].path.unlink()
        async for piece in stream:
            received += piece
    assert received.partition(b"\r\n\r\n")[2] == data


async def test_a_file_that_is_cut_while_it_is_sent_is_seen_to_be_not_whole(
    api: Api, tmp_path: Path, log_output: LogCapture
) -> None:
    job = await api.finished("large", tmp_path, bytes(24 << 20))
    assert isinstance(job.outcome, Success)
    path = job.outcome.outputs[0].path
    async with await api.server.connect() as stream:
        await stream.send_all(b"GET /jobs/large/outputs/0 HTTP/1.0\r\n\r\n")
        received = len(await stream.receive_some(1000))
        os.truncate(path, 1000)
        async for piece in stream:
            received += len(piece)
    assert received < 24 << 20
    assert [entry["event"] for entry in log_output.entries if entry["log_level"] == "error"][:1] == ["http.bug"]


async def test_a_client_that_stalls_or_leaves_holds_one_piece_and_then_nothing(
    tmp_path: Path, log_output: LogCapture
) -> None:
    read_bytes = 0
    real = os.pread

    def counting(file: int, length: int, place: int) -> bytes:
        nonlocal read_bytes
        data = real(file, length, place)
        read_bytes += len(data)
        return data

    async with open_api() as api:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pread", counting)
            path = tmp_path / "film"
            with path.open("wb") as file:
                file.truncate(1 << 30)
            job = await api.finished("film", tmp_path, b"", media_type="video/mp4", name="film.mp4")
            assert isinstance(job.outcome, Success)
            output = attrs.evolve(job.outcome.outputs[0], path=path, size_bytes=1 << 30)
            job.outcome = attrs.evolve(job.outcome, outputs=(output,))
            for _ in range(10):
                async with await api.server.connect() as stream:
                    await stream.send_all(b"GET /jobs/film/outputs/0 HTTP/1.1\r\nHost: x\r\n\r\n")
                    await stream.receive_some(10)
                    before = -1
                    while before != read_bytes:  # until the kernel takes no more
                        before = read_bytes
                        await trio.sleep(0.05)
            assert read_bytes < 10 * (20 << 20), "what a stalled client gets is what the kernel takes"
            await api.server.wait_at_rest()
    assert not [entry for entry in log_output.entries if entry["log_level"] in {"error", "warning"}]


async def test_two_parts_of_a_large_file_make_the_whole(api: Api, tmp_path: Path) -> None:
    data = os.urandom(3 * module._PIECE_BYTES + 17)
    await api.finished("large", tmp_path, data)
    url = "/jobs/large/outputs/0"
    middle = module._PIECE_BYTES + 3
    first = await api.client.get(url, headers={"range": f"bytes=0-{middle - 1}"})
    second = await api.client.get(url, headers={"range": f"bytes={middle}-", "if-range": first.headers["etag"]})
    assert first.content + second.content == data


# Headers by themselves


@pytest.mark.parametrize(
    ("media_type", "shown"),
    [
        ("image/png", True),
        ("IMAGE/PNG", True),
        ("image/avif", True),
        ("video/mp4", True),
        ("audio/flac", True),
        ("text/plain", True),
        ("image/svg+xml", False),
        ("image/SVG+XML", False),
        ("text/html", False),
        ("text/javascript", False),
        ("application/xhtml+xml", False),
        ("text/xml", False),
        ("text/css", False),
        ("application/pdf", False),
        ("application/octet-stream", False),
        ("", False),
        ("rubbish", False),
    ],
)
def test_only_what_is_merely_looked_at_is_shown(media_type: str, shown: bool) -> None:
    assert content_disposition("f", media_type).startswith(b"inline;" if shown else b"attachment;")


@pytest.mark.parametrize(
    ("filename", "value"),
    [
        ("a b.png", b'inline; filename="a b.png"'),
        ("naïve 名.png", b"inline; filename=\"na_ve _.png\"; filename*=UTF-8''na%C3%AFve%20%E5%90%8D.png"),
        ('q"\\.png', b"inline; filename=\"q__.png\"; filename*=UTF-8''q%22_.png"),
        ("100%41.png", b"inline; filename=\"100_41.png\"; filename*=UTF-8''100%2541.png"),
        ("../etc/passwd", b'inline; filename=".._etc_passwd"'),
        ("a\r\nSet-Cookie: x", b'inline; filename="a__Set-Cookie: x"'),
        ("lone\udc80.png", b"inline; filename=\"lone_.png\"; filename*=UTF-8''lone%3F.png"),
        ("", b'inline; filename=""'),
    ],
)
def test_a_name_is_told_so_that_every_client_reads_the_same(filename: str, value: bytes) -> None:
    assert content_disposition(filename, "image/png") == value


@given(st.text(), st.text())
def test_no_name_or_type_breaks_out_of_its_header(filename: str, media_type: str) -> None:
    value = content_disposition(filename, media_type)
    plain = rb'(inline|attachment); filename="[^"\\\x00-\x1f\x7f-\xff/%]*"'
    extended = rb"(; filename\*=UTF-8''([A-Za-z0-9._~-]|%[0-9A-F]{2})+)?"
    assert re.fullmatch(plain + extended, value)
    assert re.fullmatch(rb"[!-~]+/[!-~]+(; charset=utf-8)?", content_type(media_type))


def test_text_is_said_to_be_utf_8_and_what_is_no_type_to_be_bytes() -> None:
    assert content_type("text/plain") == b"text/plain; charset=utf-8"
    assert content_type("Video/MP4") == b"video/mp4"
    for rubbish in ("", "png", "a/b/c", "a/b\r\nX: y", "a/b; c=d", "é/f"):
        assert content_type(rubbish) == b"application/octet-stream"


def scope(**headers: str) -> Any:
    named = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http", "method": "GET", "headers": named}


@given(st.integers(0, 10**6), st.integers(0, 2 * 10**6), st.integers(0, 2 * 10**6))
def test_a_part_lies_within_the_file_and_begins_where_it_was_asked(size: int, first: int, last: int) -> None:
    try:
        part = wanted_part(scope(range=f"bytes={first}-{last}"), '"e"', size)
    except Unsatisfiable:
        assert first >= size
    else:
        assert (part is None) == (last < first)
        if part is not None:
            assert part == Part(first, min(last + 1, size))
            assert 0 < part.size_bytes <= size


@given(st.text(st.characters(codec="latin-1", exclude_characters="\r\n"), max_size=40), st.integers(0, 50))
def test_no_range_brings_anything_but_a_part_the_whole_or_a_refusal(text: str, size: int) -> None:
    for value in (text, f"bytes={text}"):
        try:
            part = wanted_part(scope(range=value), '"e"', size)
        except Unsatisfiable:
            continue
        assert part is None or 0 <= part.begin < part.end <= size


def test_a_condition_is_about_the_very_tag() -> None:
    assert not not_modified(scope(), '"e"')
    assert not not_modified(scope(if_none_match='"e2", "xe"'), '"e"')
    assert not_modified(scope(if_none_match='"x",W/"e"'), '"e"')
