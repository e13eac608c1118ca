"""What is around every plain ASGI endpoint: bugs are told once, and a client that leaves is none."""

from typing import Any

import pytest
import trio
from hypercorn.typing import ASGISendCallable
from structlog.testing import LogCapture

from comfyd.errors import RequestRefused
from comfyd.http import problems
from comfyd.http.asgi import Exchange, by_method, guarded, send_json, until_client_gone


class Sent:
    """An ASGI send that keeps what is sent, and fails from message number *fails_from* on."""

    def __init__(self, fails_from: int = 1000) -> None:
        self.messages: list[Any] = []
        self.fails_from = fails_from

    async def __call__(self, message: Any) -> None:
        await trio.lowlevel.checkpoint()
        if len(self.messages) >= self.fails_from:
            raise ConnectionError("the client has left")
        self.messages.append(message)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])


async def receive() -> Any:
    """The client stays."""
    await trio.sleep_forever()


def staying(send: ASGISendCallable) -> Exchange:
    """A request on a server that has not our extension, whose client stays."""
    scope: Any = {"type": "http", "extensions": {}}
    return Exchange(scope, receive, send)


async def flood(send: ASGISendCallable) -> None:
    await send_json(send, 200, {})
    while True:
        await send({"type": "http.response.body", "body": b"x", "more_body": True})


@pytest.mark.parametrize("fails_from", [0, 1, 5])
@pytest.mark.parametrize("watched", [False, True])
async def test_a_send_that_finds_the_client_gone_ends_the_endpoint_and_is_no_bug(
    log_output: LogCapture, fails_from: int, watched: bool
) -> None:
    async def endpoint(send: ASGISendCallable) -> None:
        if watched:
            await until_client_gone(staying(send), lambda: flood(send))
        else:
            await flood(send)

    sent = Sent(fails_from)
    with trio.fail_after(5):
        await guarded(sent, endpoint)
    assert len(sent.messages) == fails_from
    assert log_output.entries == []


@pytest.mark.parametrize("watched", [False, True])
async def test_a_bug_is_logged_once_and_told_without_details(log_output: LogCapture, watched: bool) -> None:
    async def fail() -> None:
        raise LookupError("the secret")

    sent = Sent()
    await guarded(sent, lambda send: until_client_gone(staying(send), fail) if watched else fail())
    assert sent.status == 500
    assert b"secret" not in sent.messages[1]["body"]
    assert [entry["event"] for entry in log_output.entries] == ["http.bug"]


async def test_a_bug_of_ours_that_is_a_connection_error_is_still_a_bug(log_output: LogCapture) -> None:
    async def endpoint(_: ASGISendCallable) -> None:
        raise ConnectionRefusedError("somebody else's connection")

    sent = Sent()
    await guarded(sent, endpoint)
    assert sent.status == 500
    assert [entry["event"] for entry in log_output.entries] == ["http.bug"]


async def test_a_bug_in_the_middle_of_an_answer_is_passed_on_so_that_the_answer_is_cut(log_output: LogCapture) -> None:
    async def endpoint(send: ASGISendCallable) -> None:
        await send_json(send, 200, {})
        raise LookupError("late")

    with pytest.raises(LookupError):
        await guarded(Sent(), endpoint)
    assert log_output.entries[0]["answer_begun"]


@pytest.mark.parametrize(("method", "status"), [("GET", 404), ("HEAD", 404), ("POST", 405)])
async def test_a_refusal_of_a_handler_is_told_as_a_problem(method: str, status: int) -> None:
    async def refuse(_: Exchange) -> None:
        raise RequestRefused(problems.not_found("such thing"))

    sent = Sent()
    scope: Any = {"type": "http", "method": method, "headers": []}
    await by_method(Exchange(scope, receive, sent), {"GET": refuse})
    assert sent.status == status
    assert (b"content-type", b"application/problem+json") in sent.messages[0]["headers"]
