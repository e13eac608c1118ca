"""What an application has of its client: the messages that wait for it, and the word that it has left."""

from typing import Any

import pytest
import trio
from http_server_kit import GOOD_REQUEST, read_until, serving

from comfyd.http.server import DISCONNECT
from comfyd.http.server.streams import Inbox

FAREWELL = {"type": "http.disconnect"}


async def test_messages_are_received_in_their_order_and_then_the_farewell_for_ever() -> None:
    inbox = Inbox(5, dict(FAREWELL))
    for number in range(5):
        await inbox.put(number)
    inbox.close()
    await inbox.put("too late")
    assert [await inbox.receive() for _ in range(5)] == list(range(5))
    with trio.testing.assert_checkpoints():  # or an application that asks in a loop would stop the world
        assert await inbox.receive() == FAREWELL
    assert await inbox.receive() == FAREWELL


async def test_who_puts_more_than_there_is_room_for_waits_for_room(nursery: trio.Nursery) -> None:
    inbox = Inbox(2, dict(FAREWELL))
    put: list[int] = []

    async def fill() -> None:
        for number in range(4):
            await inbox.put(number)
            put.append(number)

    nursery.start_soon(fill)
    await trio.testing.wait_all_tasks_blocked()
    assert put == [0, 1]
    assert await inbox.receive() == 0
    await trio.testing.wait_all_tasks_blocked()
    assert put == [0, 1, 2]
    inbox.close()
    await trio.testing.wait_all_tasks_blocked()
    assert put == [0, 1, 2, 3], "nobody waits for room in what is closed"
    assert [await inbox.receive() for _ in range(3)] == [1, 2, FAREWELL]


async def test_who_waits_for_a_message_is_woken_by_it_or_by_the_end(nursery: trio.Nursery) -> None:
    inbox = Inbox(2, dict(FAREWELL))
    received: list[Any] = []

    async def take() -> None:
        received.append(await inbox.receive())

    nursery.start_soon(take)
    await trio.testing.wait_all_tasks_blocked()
    await inbox.put("a")
    await trio.testing.wait_all_tasks_blocked()
    nursery.start_soon(take)
    await trio.testing.wait_all_tasks_blocked()
    inbox.close()
    await trio.testing.wait_all_tasks_blocked()
    assert received == ["a", FAREWELL]


@pytest.mark.parametrize("begun", [False, True])
async def test_an_app_is_called_once_when_its_client_leaves_before_the_answer_is_out(begun: bool) -> None:
    called: list[str] = []
    left = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        def gone() -> None:
            called.append("first")
            left.set()

        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
            await send({"type": "http.response.body", "body": b"12", "more_body": True})
        scope["extensions"][DISCONNECT]["on_disconnect"](gone)
        await left.wait()
        scope["extensions"][DISCONNECT]["on_disconnect"](lambda: called.append("at once"))

    async with serving(app) as server:
        async with await server.connect() as stream:
            await stream.send_all(GOOD_REQUEST)
            if begun:
                await read_until(stream, b"12")
        with trio.fail_after(5):
            await left.wait()
            await server.wait_at_rest()
    assert called == ["first", "at once"]


async def test_an_app_is_not_called_when_its_answer_is_out() -> None:
    called: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["extensions"][DISCONNECT]["on_disconnect"](lambda: called.append("early"))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok", "more_body": False})
        scope["extensions"][DISCONNECT]["on_disconnect"](lambda: called.append("late"))

    async with serving(app) as server:
        async with await server.connect() as stream:
            await stream.send_all(GOOD_REQUEST * 2)
            await read_until(stream, b"ok")
            await read_until(stream, b"ok")
        with trio.fail_after(5):
            await server.wait_at_rest()
    assert called == []
