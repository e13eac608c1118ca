"""The connection that prompts are posted by, against servers that say what no ComfyUI does as well."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from comfyd.engine import submit_link
from comfyd.engine.submit_link import Answer, SubmitLink
from comfyd.errors import EngineUnavailable

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@attrs.define(eq=False)
class Server:
    """Answers each request on a connection by the next of *answers*; "" closes the connection instead."""

    answers: list[bytes]
    port: int = 0
    requests: list[bytes] = attrs.field(factory=list)
    connections: int = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        async with stream:
            while True:
                request = b""
                while not request.endswith(b"}"):
                    data = await stream.receive_some()
                    if not data:
                        return
                    request += data
                self.requests.append(request)
                answer = self.answers.pop(0)
                if not answer:
                    return
                for place in range(0, len(answer), 50):
                    await stream.send_all(answer[place : place + 50])
                    await trio.lowlevel.checkpoint()


@asynccontextmanager
async def serving(*answers: bytes, host: str = "127.0.0.1") -> AsyncIterator[tuple[Server, SubmitLink]]:
    server = Server(list(answers))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host=host)
            server.port = listeners[0].socket.getsockname()[1]
            await nursery.start(trio.serve_listeners, server.serve, listeners)
            link = SubmitLink(host=host, port=server.port, path="/prompt")
            yield server, link
            link.end()
            nursery.cancel_scope.cancel("the test is over")


async def test_requests_follow_each_other_on_one_connection_and_say_their_length() -> None:
    async with serving(OK, OK) as (server, link):
        assert await link.post(b'{"a":1}') == Answer(200, b"ok")
        assert await link.post(b"{}") == Answer(200, b"ok")
        assert server.connections == 1
    head = f"POST /prompt HTTP/1.1\r\nhost: 127.0.0.1:{server.port}\r\ncontent-type: application/json\r\n".encode()
    assert server.requests == [
        head + b'content-length: 7\r\n\r\n{"a":1}',
        head + b"content-length: 2\r\n\r\n{}",
    ]


async def test_an_ipv6_address_stands_in_brackets() -> None:
    try:
        async with serving(OK, host="::1") as (server, link):
            await link.post(b"{}")
    except OSError as exc:
        pytest.skip(f"this machine has no ::1: {exc}")
    assert f"\r\nhost: [::1]:{server.port}\r\n".encode() in server.requests[0]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", Answer(400, b"")),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nt: u\r\n\r\n",
            Answer(200, b"abcde"),
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, Answer(200, b"ok")),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 300\r\n\r\n" + b"x" * 300, Answer(200, b"x" * 300)),
    ],
    ids=["empty", "chunked", "continue", "in pieces"],
)
async def test_each_form_of_an_answer_is_read_and_the_connection_kept(answer: bytes, expected: Answer) -> None:
    async with serving(answer, OK) as (server, link):
        assert await link.post(b"{}") == expected
        assert await link.post(b"{}") == Answer(200, b"ok")
        assert server.connections == 1


@pytest.mark.parametrize("version", [b"HTTP/1.1 200 OK\r\nconnection: close", b"HTTP/1.0 200 OK"])
async def test_a_connection_that_is_not_kept_is_opened_anew(version: bytes) -> None:
    async with serving(version + b"\r\ncontent-length: 2\r\n\r\nok", OK) as (server, link):
        assert await link.post(b"{}") == Answer(200, b"ok")
        assert await link.post(b"{}") == Answer(200, b"ok")
        assert server.connections == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", "not HTTP/1.1"),
        (b"", "closed the connection without an answer"),
    ],
    ids=["ssh", "length", "upgrade", "closed"],
)
async def test_what_is_no_answer_is_told_and_the_next_request_has_a_new_connection(answer: bytes, reason: str) -> None:
    async with serving(answer, OK) as (server, link):
        with pytest.raises(EngineUnavailable, match=reason):
            await link.post(b"{}")
        assert await link.post(b"{}") == Answer(200, b"ok")
        assert server.connections == 2


async def test_an_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit_link, "_MAX_ANSWER_BYTES", 1000)
    async with serving(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n" + b"x" * 5000) as (_, link):
        with pytest.raises(EngineUnavailable, match="too large"):
            await link.post(b"{}")


async def test_a_request_that_was_cancelled_leaves_no_answer_to_the_next_one() -> None:
    async with serving(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", OK) as (server, link):
        with trio.move_on_after(0.05):
            await link.post(b'{"late":1}')
        assert await link.post(b"{}") == Answer(200, b"ok")
        assert server.connections == 2


async def test_two_requests_at_once_wait_for_each_other() -> None:
    answers: list[Answer] = []
    async with serving(OK, OK) as (server, link):

        async def post() -> None:
            answers.append(await link.post(b"{}"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(post)
            nursery.start_soon(post)
        assert server.connections == 1
    assert answers == [Answer(200, b"ok")] * 2


async def test_after_the_end_nothing_is_sent() -> None:
    async with serving() as (server, link):
        link.end()
        with pytest.raises(EngineUnavailable, match="gone"):
            await link.post(b"{}")
        assert server.connections == 0
