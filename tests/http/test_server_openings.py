"""After every malformed opening the server still serves, and nothing of the connection is left."""

from typing import Any

import malformed_openings
import pytest
import trio
from http_server_kit import (
    Server,
    assert_answers,
    quart_app,
    quick_config,
    raw_app,
    read_all,
    serving,
    status_of,
)
from malformed_openings import GOAWAY, Opening

#: An incomplete opening is cut after this; complete ones are answered at once.
CONFIG = quick_config(header_timeout_s=0.15, body_timeout_s=0.15, keep_alive_timeout_s=0.08)
APPS = {"raw": raw_app, "quart": quart_app}


async def answer_to(server: Server, opening: Opening) -> bytes:
    """What the server says to *opening* until it closes; it does so by itself, as every phase has its time limit."""
    stream = await server.connect()
    async with stream, trio.open_nursery() as nursery:

        async def send() -> None:
            try:
                for piece in opening.pieces:
                    await stream.send_all(piece)
                    if len(opening.pieces) > 1:
                        await trio.sleep(0.01)  # so that the server may see each piece alone; nothing depends on it
            except trio.BrokenResourceError:
                return  # it closed before all was sent, as it may

        nursery.start_soon(send)
        if opening.name.startswith("ws: ") and opening.answers and 101 in opening.answers:
            answer = b""
            with trio.move_on_after(0.1):  # an open websocket may stay so
                async for data in stream:
                    answer += data
        else:
            answer = await read_all(stream)
        nursery.cancel_scope.cancel()
    return answer


def code_of(answer: bytes) -> int:
    if not answer:
        return 0
    return -2 if answer.startswith(GOAWAY) else status_of(answer)


@pytest.mark.parametrize("kind", APPS)
@pytest.mark.parametrize(
    "openings",
    [
        pytest.param(openings, id=name)
        for name, openings in vars(malformed_openings).items()
        if name in {"HTTP1", "HTTP2", "H2C", "WEBSOCKET"}
    ],
)
async def test_server_survives_and_answers_openings(kind: str, openings: tuple[Opening, ...]) -> None:
    """One server takes the whole table; each failure names its opening."""
    wrong: list[str] = []
    async with serving(APPS[kind](), CONFIG) as server:
        for opening in openings:
            code = code_of(await answer_to(server, opening))
            if opening.answers is not None and code not in opening.answers:
                wrong.append(f"{opening.name}: answered {code}, allowed {sorted(opening.answers)}")
            await server.wait_at_rest()
            await assert_answers(server)
    assert not wrong, "\n".join(wrong)


def test_the_table_is_large_and_its_names_are_unique() -> None:
    names = [opening.name for opening in malformed_openings.ALL]
    assert len(names) == len(set(names)) >= 60
    assert sum(opening.fatal for opening in malformed_openings.ALL) >= 9


@pytest.mark.parametrize(
    "opening", [o for o in malformed_openings.ALL if o.fatal], ids=lambda opening: opening.name.replace(" ", "-")
)
async def test_what_ends_stock_hypercorn_a_hundred_times_over_ends_nothing(opening: Opening) -> None:
    async with serving(raw_app(), CONFIG) as server:
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(answer_to, server, opening)
        await server.wait_at_rest()
        await assert_answers(server)


async def test_a_failure_in_the_connection_itself_is_logged_once_and_stays_there(
    monkeypatch: pytest.MonkeyPatch, log_output: Any
) -> None:
    """The guard of last resort, for the defect that nobody has found yet."""
    from comfyd.http.server import connection

    def fail(*_: object) -> None:
        raise LookupError("a defect")

    async with serving(raw_app(), CONFIG) as server:
        with monkeypatch.context() as patch:
            patch.setattr(connection.Connection, "_open_stream", fail)
            async with await server.connect() as stream:
                await stream.send_all(b"GET /hello HTTP/1.1\r\nHost: test\r\n\r\n")
                assert await read_all(stream) == b""
        await server.wait_at_rest()
        await assert_answers(server)
    failures = [entry for entry in log_output.entries if entry["event"] == "http.connection_failed"]
    assert len(failures) == 1
    assert isinstance(failures[0]["exc_info"].exceptions[0], (LookupError, ExceptionGroup))
