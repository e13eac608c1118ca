"""One attempt with a real receiver: what counts as taken, and that silence ends it and length does not."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
from outbox_kit import LOOPBACK, SECRET, output, verify
from webhook_receiver import Cut, Reply, webhook_receiver

from comfyd.media.json_files import FileChanged, JsonFiles
from comfyd.net import parse_policy
from comfyd.webhooks.delivery import Failed, Taken, open_courier

SMALL = JsonFiles((b'{"a":1}',))


def large(folder: Path, size_bytes: int = 32 << 20) -> JsonFiles:
    """A body that no socket's buffers hold."""
    made = output(folder, "large.bin", b"")
    with made.path.open("wb") as file:
        file.truncate(size_bytes)
    return JsonFiles.around(b"[", (attrs.evolve(made, size_bytes=size_bytes),), b"]")


@asynccontextmanager
async def raw_server(handle: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
    """Serve connections by *handle*; gives the port."""
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel("the test is over")


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_every_2xx_is_taken(status: int) -> None:
    with trio.fail_after(10):
        async with (
            webhook_receiver(Reply(status=status)) as receiver,
            open_courier(LOOPBACK, [SECRET], stall_s=5, at_once=2) as courier,
        ):
            assert await courier.deliver(receiver.url(), "msg_1", SMALL) == Taken()
    (request,) = receiver.received
    assert (request.method, request.body) == ("POST", b'{"a":1}')
    verify(request, [SECRET])


@pytest.mark.parametrize(
    ("reply", "failed"),
    [
        (Reply(status=500), Failed(reason="it answered 500", answered=True)),
        (Reply(status=404), Failed(reason="it answered 404", answered=True)),
        (Reply(status=410), Failed(reason="it answered 410", answered=True, final=True)),
        (
            Reply(status=429, headers={"Retry-After": "7"}),
            Failed(reason="it answered 429", retry_after_s=7.0, answered=True),
        ),
        (
            Reply(status=301, headers={"Location": "http://other.example/"}),
            Failed(reason="it redirects (301), which webhooks do not follow", answered=True),
        ),
        (
            Reply(status=308, headers={"Location": "::not a url::"}),
            Failed(reason="it redirects (308), which webhooks do not follow", answered=True),
        ),
        (Reply(cut=Cut.AT_BODY), Failed(reason="the connection was closed without an answer")),
        (Reply(cut=Cut.IN_ANSWER), Failed(reason="the connection was closed without an answer")),
        (Reply(never=True), Failed(reason="no answer within 0.3 s")),
    ],
)
async def test_everything_else_is_a_failure_with_a_reason_of_ours(reply: Reply, failed: Failed) -> None:
    with trio.fail_after(10):
        async with webhook_receiver(reply) as receiver, open_courier(LOOPBACK, [], stall_s=0.3, at_once=2) as courier:
            assert await courier.deliver(receiver.url(), "msg_1", SMALL) == failed
    assert len(receiver.begun) == 1


async def test_a_receiver_that_is_not_there_or_not_https_is_a_failure() -> None:
    with trio.fail_after(10):
        async with (
            webhook_receiver(up=False) as nobody,
            webhook_receiver() as plain,
            open_courier(LOOPBACK, [], stall_s=5, at_once=2) as courier,
        ):
            assert await courier.deliver(nobody.url(), "msg_1", SMALL) == Failed(reason="connection refused")
            url = plain.url().replace("http:", "https:")
            result = await courier.deliver(url, "msg_1", SMALL)
    assert isinstance(result, Failed)
    assert not result.final


async def test_a_connection_that_is_not_made_ends_in_time() -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    with trio.fail_after(10):
        async with raw_server(silent) as port, open_courier(LOOPBACK, [], stall_s=0.3, at_once=2) as courier:
            result = await courier.deliver(f"https://127.0.0.1:{port}/", "msg_1", SMALL)
    assert result == Failed(reason="no connection within 0.3 s")


async def test_a_receiver_that_stops_taking_the_body_ends_the_attempt(tmp_path: Path) -> None:
    async def stops(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await trio.sleep_forever()

    with trio.fail_after(10):
        async with raw_server(stops) as port, open_courier(LOOPBACK, [], stall_s=0.3, at_once=2) as courier:
            result = await courier.deliver(f"http://127.0.0.1:{port}/", "msg_1", large(tmp_path))
    assert result == Failed(reason="it took nothing more for 0.3 s")


async def test_a_receiver_that_is_slow_may_take_longer_than_any_silence(tmp_path: Path) -> None:
    body = large(tmp_path, 6 << 20)

    async def slow(stream: trio.SocketStream) -> None:
        head = await stream.receive_some(16_384)
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        left = length - len(head.partition(b"\r\n\r\n")[2])
        while left:
            left -= len(await stream.receive_some(128 << 10))
            await trio.sleep(0.015)
        await stream.send_all(b"HTTP/1.1 204 No Content\r\n\r\n")

    with trio.fail_after(30):
        async with raw_server(slow) as port, open_courier(LOOPBACK, [], stall_s=0.5, at_once=2) as courier:
            began = trio.current_time()
            assert await courier.deliver(f"http://127.0.0.1:{port}/", "msg_1", body) == Taken()
            assert trio.current_time() - began > 0.75, "the attempt as a whole took longer than the silence allowed"


async def test_an_answer_that_comes_drop_by_drop_is_not_waited_for() -> None:
    async def drips(stream: trio.SocketStream) -> None:
        await stream.receive_some(65_536)
        for character in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1000:
            await stream.send_all(bytes([character]))
            await trio.sleep(0.05)

    with trio.fail_after(10):
        async with raw_server(drips) as port, open_courier(LOOPBACK, [], stall_s=0.3, at_once=2) as courier:
            result = await courier.deliver(f"http://127.0.0.1:{port}/", "msg_1", SMALL)
    assert result == Failed(reason="no answer within 0.3 s")


async def test_the_body_of_an_answer_is_not_read_to_its_end() -> None:
    with trio.fail_after(10):
        async with (
            webhook_receiver(Reply(endless=True)) as receiver,
            open_courier(LOOPBACK, [], stall_s=5, at_once=2) as courier,
        ):
            assert await courier.deliver(receiver.url(), "msg_1", SMALL) == Taken()
            await receiver.wait_until(lambda: receiver.open_connections == 0)


async def test_the_connection_serves_again_after_a_short_answer() -> None:
    with trio.fail_after(10):
        async with (
            webhook_receiver(Reply(status=503, body=b"busy")) as receiver,
            open_courier(LOOPBACK, [], stall_s=5, at_once=2) as courier,
        ):
            for _ in range(3):
                await courier.deliver(receiver.url(), "msg_1", SMALL)
    assert receiver.connections == 1


async def test_an_answer_before_the_end_of_the_body_counts(tmp_path: Path) -> None:
    with trio.fail_after(10):
        async with (
            webhook_receiver(Reply(status=413, early=True)) as receiver,
            open_courier(LOOPBACK, [], stall_s=5, at_once=2) as courier,
        ):
            result = await courier.deliver(receiver.url(), "msg_1", large(tmp_path))
    assert result == Failed(reason="it answered 413", answered=True)


@pytest.mark.parametrize("large_ones", [False, True])
async def test_a_file_that_is_gone_is_the_callers_to_judge(tmp_path: Path, large_ones: bool) -> None:
    body = large(tmp_path, (1 << 20) if large_ones else 1000)
    (tmp_path / "large.bin").unlink()
    with trio.fail_after(10):
        async with webhook_receiver() as receiver, open_courier(LOOPBACK, [], stall_s=5, at_once=2) as courier:
            with pytest.raises(FileChanged, match=r"^large\.bin$"):
                await courier.deliver(receiver.url(), "msg_1", body)
            assert await courier.deliver(receiver.url(), "msg_2", SMALL) == Taken()
    assert [request.headers["webhook-id"] for request in receiver.received] == ["msg_2"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "http://localhost/", "http://[::1]/", "ftp://a/", "nonsense"])
async def test_a_url_that_is_refused_by_its_text_is_final(url: str) -> None:
    with trio.fail_after(10):
        async with open_courier(parse_policy("guarded", ""), [], stall_s=5, at_once=2) as courier:
            result = await courier.deliver(url, "msg_1", SMALL)
    assert isinstance(result, Failed)
    assert result.final
    assert result.reason.startswith("its URL is refused: ")


async def test_a_large_graph_is_sent_in_pieces_and_whole() -> None:
    body = JsonFiles((b'"' + b"x" * (3 << 20) + b'"',))
    with trio.fail_after(10):
        async with webhook_receiver() as receiver, open_courier(LOOPBACK, [SECRET], stall_s=5, at_once=2) as courier:
            assert await courier.deliver(receiver.url(), "msg_1", body) == Taken()
    (request,) = receiver.received
    assert request.body == body.joined()
    verify(request, [SECRET])


async def test_a_connection_that_is_reset_is_a_failure(tmp_path: Path) -> None:
    with trio.fail_after(10):
        async with (
            webhook_receiver(Reply(cut=Cut.AT_HEAD)) as receiver,
            open_courier(LOOPBACK, [], stall_s=5, at_once=2) as courier,
        ):
            for body in (SMALL, large(tmp_path)):  # seen while the answer is waited for, or while the body is sent
                result = await courier.deliver(receiver.url(), "msg_1", body)
                assert isinstance(result, Failed)
                assert result.reason in ("the connection was lost", "the connection was closed without an answer")
                assert not result.final
