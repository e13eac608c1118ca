"""Inputs by URL, from servers on loopback that misbehave in every way we know."""

import gzip
import os
import random
import socket
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing
from fetch_servers import (
    Answer,
    BadServer,
    bad_server,
    endless,
    half_closed,
    head,
    in_turn,
    raw,
    redirect,
    reset_after,
    self_signed,
    silent,
    then_hang,
    when,
    whole,
    zipped,
)
from media_kit import png, wav
from structlog.testing import LogCapture

from comfyd.media import fetch as fetch_module
from comfyd.media.fetch import DOWNLOADS_AT_ONCE, Fetcher, FetchLimits, InputNotFetched, open_fetcher
from comfyd.net import parse_policy

PNG = png(8, 8)
LIMITS = FetchLimits(max_bytes=4 << 20, max_megapixels=2, total_s=10, stall_s=5, connect_s=5)


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "_BACKOFF_S", 0.001)


@attrs.define(eq=False)
class Bench:
    """A fetcher and one bad server, with folders."""

    server: BadServer
    fetcher: Fetcher
    folder: Path

    async def get(self, path: str = "/", stem: str = "001") -> Path:
        return await self.fetcher.fetch(self.server.url(path), self.folder, stem)

    async def settled(self) -> None:
        """Wait until the connections are closed and the fetcher's tasks have ended: one removes its file last."""
        await self.server.all_closed.wait()
        while self.fetcher._nursery.child_tasks:  # noqa: ASYNC110  # a nursery tells nobody
            await trio.sleep(0.002)

    def left_over(self) -> list[str]:
        """Files of the spool and of the job."""
        return sorted(os.listdir(self.fetcher.spool) + os.listdir(self.folder))


@asynccontextmanager
async def bench(
    answers: Answer | dict[str, Answer], tmp_path: Path, limits: FetchLimits = LIMITS
) -> AsyncIterator[Bench]:
    folder = tmp_path / "job"
    folder.mkdir()
    with trio.fail_after(20):
        async with bad_server(answers) as server:
            policy = parse_policy("guarded", server.allow)
            async with open_fetcher(limits, policy, tmp_path / "spool") as fetcher:
                yield Bench(server=server, fetcher=fetcher, folder=folder)
    assert not (tmp_path / "spool").exists()


BIG = PNG + random.Random(1).randbytes(3 << 20)
GOOD: dict[str, tuple[Answer, bytes, str]] = {
    "plain": (whole(PNG), PNG, ".png"),
    "of 3 MiB": (whole(BIG), BIG, ".png"),
    "a content type that lies": (whole(PNG, Content_Type="text/html"), PNG, ".png"),
    "a sound": (whole(wav()), wav(), ".wav"),
    "HTTP/1.0 without a length": (raw(b"HTTP/1.0 200 OK\r\n\r\n" + PNG), PNG, ".png"),
    "half closed": (half_closed(head() + PNG), PNG, ".png"),
    "chunked": (
        raw(head(Transfer_Encoding="chunked"), b"%x\r\n" % len(PNG) + PNG + b"\r\n", b"0\r\n\r\n"),
        PNG,
        ".png",
    ),
    "byte for byte": (raw(head(Content_Length=str(len(PNG))), *(PNG[i : i + 1] for i in range(len(PNG)))), PNG, ".png"),
    "a length that is too short": (raw(head(Content_Length=str(len(PNG))) + PNG + b"more"), PNG, ".png"),
    "203": (whole(PNG, "203 Non-Authoritative Information"), PNG, ".png"),
    "a 103 first": (raw(b"HTTP/1.1 103 Early Hints\r\n\r\n", head(Content_Length=str(len(PNG))) + PNG), PNG, ".png"),
    "gzip that nobody asked for": (zipped(BIG), BIG, ".png"),
    "deflate": (whole(zlib.compress(PNG), Content_Encoding="deflate"), PNG, ".png"),
    "raw deflate": (whole(gzip.compress(PNG)[10:-8], Content_Encoding="deflate"), PNG, ".png"),
    "encoded as identity": (whole(PNG, Content_Encoding="identity"), PNG, ".png"),
}


@pytest.mark.parametrize("case", GOOD)
async def test_what_can_be_read_becomes_a_file_named_by_its_content(case: str, tmp_path: Path) -> None:
    answer, content, ending = GOOD[case]
    async with bench(answer, tmp_path) as on:
        path = await on.get("/some.jpg?x=y", stem="007")
        assert path == on.folder / f"007{ending}"
        assert path.read_bytes() == content
        await on.settled()
        assert on.left_over() == [path.name]
    assert len(on.server.requests) == 1
    assert "\r\nAccept-Encoding: identity\r\n" in on.server.heads[0]


NOT_FOUND_PAGE = b"<html><body>" + b"x" * 500
BAD: dict[str, tuple[Answer, str, int]] = {  # the answer, the reason, the requests that it takes
    "404": (whole(NOT_FOUND_PAGE, "404 <script>"), "answered 404 Not Found$", 1),
    "403": (whole(b"", "403 Forbidden"), "answered 403 Forbidden$", 1),
    "500": (whole(b"", "500 x"), "answered 500 Internal Server Error$", 1),
    "503 for ever": (whole(b"", "503 x"), r"answered 503 Service Unavailable \(3 attempts\)$", 3),
    "204": (raw(head("204 No Content")), "answered 204 No Content$", 1),
    "206": (whole(PNG, "206 Partial Content"), "answered 206 Partial Content$", 1),
    "304": (raw(head("304 Not Modified")), "answered 304 Not Modified$", 1),
    "299": (whole(PNG, "299 x"), "answered 299$", 1),
    "a redirect to nowhere": (whole(b"", "302 Found"), "answered 302 Found$", 1),
    "empty": (whole(b""), "is empty$", 1),
    "empty, chunked": (raw(head(Transfer_Encoding="chunked") + b"0\r\n\r\n"), "is empty$", 1),
    "empty gzip": (whole(gzip.compress(b""), Content_Encoding="gzip"), "is empty$", 1),
    "a web page": (whole(NOT_FOUND_PAGE, Content_Type="image/png"), "holds no picture, video or sound", 1),
    "an endless web page": (endless(head(), b"<p>" * 1000), "holds no picture, video or sound", 1),
    "text of 3 bytes": (whole(b"abc"), "holds no picture, video or sound", 1),
    "a closed connection": (raw(), r"closed without an answer \(3 attempts\)$", 3),
    "a reset connection": (reset_after(), r"cannot be fetched: .* \(3 attempts\)$", 3),
    "half a head": (raw(b"HTTP/1.1 200 OK\r\nContent-"), "closed without an answer", 3),
    "not HTTP": (raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), "the answer is not valid HTTP$", 1),
    "two lengths": (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"), "not valid HTTP$", 1),
    "a huge head": (raw(b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 300_000 + b"\r\n\r\n"), "not valid HTTP$", 1),
    "an endless head": (endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000), "not valid HTTP$", 1),
    "a length that is too long": (raw(head(Content_Length="999999") + PNG), "it is truncated", 1),
    "half a body": (raw(head(Content_Length=str(len(BIG))) + BIG[: 2 << 20]), "it is truncated", 1),
    "chunks without an end": (raw(head(Transfer_Encoding="chunked") + b"5\r\n\x89PNG\r\r\n"), "it is truncated", 1),
    "a reset in the middle": (reset_after(head(Content_Length="99999") + PNG), "connection was lost|truncated", 1),
    "too long by its own words": (raw(head(Content_Length=str(5 << 20))), r"is larger than 4 MB \(MAX_INPUT", 1),
    "too long without a word": (endless(head() + PNG), r"is larger than 4 MB \(MAX_INPUT", 1),
    "too long in chunks": (
        endless(head(Transfer_Encoding="chunked"), b"1000\r\n" + PNG[:8] + bytes(4088) + b"\r\n"),
        r"is larger than 4 MB \(MAX_INPUT",
        1,
    ),
    "truncated gzip": (whole(gzip.compress(PNG)[:-9], Content_Encoding="gzip"), "it is truncated", 1),
    "damaged gzip": (whole(b"\x1f\x8b" + PNG, Content_Encoding="gzip"), "compressed data is damaged", 1),
    "gzip and more": (whole(gzip.compress(PNG) * 2, Content_Encoding="gzip"), "something follows", 1),
    "gzip that is none": (whole(PNG, Content_Encoding="gzip"), "compressed data is damaged", 1),
    "brotli": (whole(PNG, Content_Encoding="br"), "was not asked for", 1),
    "gzip in gzip": (whole(gzip.compress(gzip.compress(PNG)), Content_Encoding="gzip, gzip"), "not asked for", 1),
    "a gzip bomb": (zipped(PNG + bytes(64 << 20)), r"is larger than 4 MB \(MAX_INPUT", 1),
    "too many pixels": (whole(png(2000, 1001)), r"has 2000 x 1001 pixels, more than 2 million \(MAX_INPUT", 1),
    "a damaged picture": (whole(PNG[:20] + bytes(80)), "cannot be used: it is damaged", 1),
    "a redirect loop": (redirect("/"), "is refused: it redirects more than 5 times$", 6),
    "a redirect to a file": (redirect("file:///etc/passwd"), "is refused: it redirects to file://", 1),
    "a redirect to loopback": (
        redirect("http://127.0.0.1:1/"),
        "it redirects to http://127.0.0.1:1/, but .*loopback",
        1,
    ),
    "a redirect to metadata": (redirect("http://169.254.169.254/latest"), "it redirects to .* metadata service", 1),
}


@pytest.mark.parametrize("case", BAD)
async def test_what_cannot_be_used_is_told_and_leaves_no_file(case: str, tmp_path: Path) -> None:
    answer, reason, requests = BAD[case]
    async with bench(answer, tmp_path) as on:
        with pytest.raises(InputNotFetched, match=reason) as caught:
            await on.get("/?token=secret")
        assert str(caught.value).startswith(f"{on.server.url()} ")
        assert "secret" not in str(caught.value)
        assert len(on.server.requests) == requests
        await on.settled()
        assert on.left_over() == []


async def test_a_bomb_within_the_size_limit_is_refused_by_its_ratio(tmp_path: Path) -> None:
    limits = attrs.evolve(LIMITS, max_bytes=1 << 30)
    async with bench(zipped(PNG + bytes(64 << 20)), tmp_path, limits) as on:
        with pytest.raises(InputNotFetched, match="compressed more than 100 times"):
            await on.get()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (silent(), "it sent nothing for 0.2 s"),
        (then_hang(b"HTTP/1.1 200 OK\r\n"), "it sent nothing for 0.2 s"),
        (then_hang(head(Content_Length="9999") + PNG), "it sent nothing for 0.2 s"),
        (endless(head() + PNG, b"\0", every_s=0.05), r"it took longer than 0.6 s \(INPUT_TIMEOUT_S\)"),
        (endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", every_s=0.05), r"it took longer than 0.6 s"),
    ],
    ids=["silent", "silent in the head", "silent in the body", "dripping", "dripping head"],
)
async def test_silence_and_dripping_end_in_time(answer: Answer, reason: str, tmp_path: Path) -> None:
    async with bench(answer, tmp_path, attrs.evolve(LIMITS, stall_s=0.2, total_s=0.6)) as on:
        began = trio.current_time()
        with pytest.raises(InputNotFetched, match=reason):
            await on.get()
        assert trio.current_time() - began < 1.5
        assert len(on.server.requests) == 1
        await on.server.all_closed.wait()


@pytest.mark.parametrize(
    "first",
    [whole(b"", "503 x"), whole(b"", "502 x"), whole(b"", "504 x"), raw(), reset_after()],
    ids=["503", "502", "504", "closed", "reset"],
)
async def test_passing_trouble_is_tried_again(first: Answer, tmp_path: Path) -> None:
    async with bench(in_turn(first, first, whole(PNG)), tmp_path) as on:
        assert (await on.get()).read_bytes() == PNG
        assert len(on.server.requests) == 3


async def test_nobody_listening_and_an_unknown_certificate_are_told(tmp_path: Path) -> None:
    tls, _ = self_signed(tmp_path)
    with trio.fail_after(10), socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with (
            bad_server(whole(PNG), tls=tls) as server,
            open_fetcher(LIMITS, parse_policy("guarded", "127.0.0.1"), tmp_path / "spool") as fetcher,
        ):
            with pytest.raises(InputNotFetched, match=r"cannot be fetched: connection refused \(3 attempts\)$"):
                await fetcher.fetch(f"http://127.0.0.1:{closed.getsockname()[1]}/", tmp_path, "001")
            with pytest.raises(InputNotFetched, match=r"its certificate is not accepted: self.signed certificate$"):
                await fetcher.fetch(server.url(), tmp_path, "001")


async def test_a_refused_url_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    async with bench(whole(PNG), tmp_path) as on:
        for url in ("http://127.0.0.1:1/", "http://2130706433:1/?k=secret", "file:///etc/passwd"):
            with pytest.raises(InputNotFetched, match="is refused: ") as caught:
                await on.fetcher.fetch(url, on.folder, "001")
            assert "secret" not in str(caught.value)
    assert on.server.requests == []


async def test_fifty_waiters_share_one_request_and_have_independent_files(tmp_path: Path) -> None:
    go = trio.Event()
    paths: list[Path] = []

    async def one(on: Bench, number: int) -> None:
        fragment = f"/x?a=b#{number}"  # a fragment is the client's own business
        paths.append(await on.get(fragment, stem=f"{number:03d}"))

    async with bench(when(go, whole(BIG)), tmp_path) as on:
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(one, on, number)
            await on.server.asked.wait()
            go.set()
        assert len(on.server.requests) == 1
        assert len(set(paths)) == 50
        paths[0].unlink()
        assert all(path.read_bytes() == BIG for path in paths[1:])
        await on.get("/x?a=b", stem="later")  # nothing is kept: asked again
        assert len(on.server.requests) == 2


async def test_a_failure_is_shared_and_not_kept(tmp_path: Path) -> None:
    go = trio.Event()
    failures: list[str] = []

    async def one(on: Bench, number: int) -> None:
        with pytest.raises(InputNotFetched) as caught:
            await on.get(stem=str(number))
        failures.append(str(caught.value))

    async with bench(in_turn(when(go, whole(b"", "404 x")), whole(PNG)), tmp_path) as on:
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(one, on, number)
            await on.server.asked.wait()
            go.set()
        assert failures == [f"{on.server.url()} answered 404 Not Found"] * 5
        assert (await on.get()).read_bytes() == PNG


async def test_a_download_outlives_the_waiter_that_began_it(tmp_path: Path) -> None:
    go = trio.Event()
    paths: list[Path] = []

    async def one(on: Bench, stem: str, scope: trio.CancelScope) -> None:
        with scope:
            paths.append(await on.get(stem=stem))

    async with bench(when(go, whole(PNG)), tmp_path) as on:
        first, second = trio.CancelScope(), trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, on, "first", first)
            await on.server.asked.wait()
            nursery.start_soon(one, on, "second", second)
            await trio.testing.wait_all_tasks_blocked()
            first.cancel("the test says so")
            await trio.testing.wait_all_tasks_blocked()
            go.set()
        assert [path.name for path in paths] == ["second.png"]
        assert len(on.server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [silent(), then_hang(head(Content_Length=str(4 << 20)) + BIG), endless(head() + PNG, every_s=0.01)],
    ids=["before the answer", "in the body", "while it comes"],
)
async def test_a_download_that_nobody_waits_for_is_stopped_at_once(answer: Answer, tmp_path: Path) -> None:
    async with bench(in_turn(answer, whole(PNG)), tmp_path) as on:
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(partial(on.get, stem=str(number)))
            await on.server.asked.wait()
            await trio.sleep(0.05)  # into the body
            began = trio.current_time()
            nursery.cancel_scope.cancel("the test says so")
        await on.server.all_closed.wait()
        assert trio.current_time() - began < 1
        # Who asks now, does not get what is being stopped.
        assert (await on.get(stem="later")).read_bytes() == PNG
        await on.settled()
        assert on.left_over() == ["later.png"]


async def test_leaving_the_fetcher_ends_its_downloads_and_tells_who_waits(tmp_path: Path) -> None:
    told: list[str] = []

    async def one(fetcher: Fetcher, url: str) -> None:
        with pytest.raises(InputNotFetched) as caught:
            await fetcher.fetch(url, tmp_path, "001")
        told.append(caught.value.reason)

    with trio.fail_after(5):
        async with bad_server(silent()) as server, trio.open_nursery() as nursery:
            policy = parse_policy("guarded", server.allow)
            async with open_fetcher(LIMITS, policy, tmp_path / "spool") as fetcher:
                # Not how the daemon does it: there, who waits has gone before the fetcher goes.
                nursery.start_soon(one, fetcher, server.url())  # noqa: ASYNC111
                await server.asked.wait()
            await server.all_closed.wait()
    assert told == ["was not fetched: comfyd is stopping"]
    assert not (tmp_path / "spool").exists()


async def test_downloads_run_side_by_side_up_to_the_bound(tmp_path: Path) -> None:
    """As many as there are slots are all under way before the first is answered; one more waits its turn."""
    go, most = trio.Event(), 0
    arrived = trio.Event()

    async def answer(stream: trio.abc.Stream) -> None:
        nonlocal most
        most += 1
        if most == DOWNLOADS_AT_ONCE:
            arrived.set()
        await go.wait()
        await whole(PNG)(stream)

    async with bench(answer, tmp_path) as on:
        async with trio.open_nursery() as nursery:
            for number in range(DOWNLOADS_AT_ONCE + 1):
                nursery.start_soon(partial(on.get, f"/{number}", stem=f"{number}"))
            await arrived.wait()
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert most == DOWNLOADS_AT_ONCE
            go.set()
        assert len(os.listdir(on.folder)) == DOWNLOADS_AT_ONCE + 1


async def test_32_urls_take_about_as_long_as_the_slowest(tmp_path: Path) -> None:
    async def answer(stream: trio.abc.Stream) -> None:
        await trio.sleep(0.3)
        await whole(PNG)(stream)

    async with bench(answer, tmp_path) as on:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(32):
                nursery.start_soon(partial(on.get, f"/{number}", stem=f"{number}"))
        assert trio.current_time() - began < 2  # one after the other: 9.6 s


async def test_without_hard_links_the_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    async with bench(whole(BIG), tmp_path) as on:
        assert (await on.get()).read_bytes() == BIG


async def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    async with bench(whole(PNG), tmp_path) as on:
        path = await on.get()
        path.write_bytes(b"mine")
        with pytest.raises(FileExistsError):
            await on.get()
        assert path.read_bytes() == b"mine"


async def test_a_bug_that_an_answer_finds_fails_its_download_and_not_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_output: LogCapture
) -> None:
    def bug(path: Path) -> tuple[int, int]:
        raise ZeroDivisionError

    async with bench(whole(PNG), tmp_path) as on:
        with monkeypatch.context() as patch:
            patch.setattr(fetch_module, "picture_size", bug)
            with pytest.raises(InputNotFetched, match="a fault of comfyd's own"):
                await on.get()
        assert (await on.get()).read_bytes() == PNG
    assert [entry["event"] for entry in log_output.entries if entry["log_level"] == "error"] == ["input.fetch_failed"]


async def test_a_disk_that_cannot_be_written_fails_the_fetch_and_not_the_daemon(tmp_path: Path) -> None:
    async with bench(whole(PNG), tmp_path) as on:
        on.fetcher.spool.rmdir()
        with pytest.raises(FileNotFoundError):
            await on.get()
        on.fetcher.spool.mkdir()
        assert (await on.get()).read_bytes() == PNG
