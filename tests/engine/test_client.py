"""The engine's HTTP side, against a small real server that answers what the test says."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import h11
import msgspec
import pytest
import trio

from comfyd.engine.client import EngineClient, QueueContent, Refusal
from comfyd.errors import EngineUnavailable


@attrs.define(eq=False)
class Server:
    """Answers by path with a status and a body, and keeps what it was asked."""

    answers: dict[str, tuple[int, bytes]] = attrs.field(factory=dict)
    asked: list[tuple[str, str, Any]] = attrs.field(factory=list)
    connections: int = 0

    async def __call__(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        connection = h11.Connection(h11.SERVER)
        while True:
            events = await self._request(connection, stream)
            if not events:
                return
            request = events[0]
            assert isinstance(request, h11.Request)
            body = b"".join(bytes(event.data) for event in events if isinstance(event, h11.Data))
            path = request.target.decode()
            self.asked.append((request.method.decode(), path, msgspec.json.decode(body) if body else None))
            status, answer = self.answers.get(path, (200, b"{}"))
            headers = [("content-length", str(len(answer)))]
            for event in (
                h11.Response(status_code=status, headers=headers),
                h11.Data(data=answer),
                h11.EndOfMessage(),
            ):
                await stream.send_all(connection.send(event) or b"")
            connection.start_next_cycle()

    async def _request(self, connection: h11.Connection, stream: trio.SocketStream) -> list[h11.Event]:
        """The events of one whole request; none if the client has left."""
        events: list[h11.Event] = []
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await stream.receive_some())
            elif isinstance(event, h11.ConnectionClosed):
                return []
            else:
                assert isinstance(event, h11.Event)
                events.append(event)
                if isinstance(event, h11.EndOfMessage):
                    return events


@asynccontextmanager
async def serving(handler: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[EngineClient]:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
            async with EngineClient(f"http://127.0.0.1:{listener.socket.getsockname()[1]}") as client:
                yield client
            nursery.cancel_scope.cancel("the test is over")


async def submit(client: EngineClient, **fields: Any) -> Refusal | None:
    values: dict[str, Any] = {"prompt": {"1": {}}, "prompt_id": "p", "client_id": "c", "extra_data": {"k": "v"}}
    return await client.submit(**{**values, **fields})


# Submitting


async def test_a_prompt_goes_out_whole_with_its_ids_and_large_integers_exact() -> None:
    server = Server({"/prompt": (200, b'{"prompt_id":"p","number":1,"node_errors":{}}')})
    prompt = {"1": {"inputs": {"seed": 2**64 - 1, "text": "名前"}}}
    async with serving(server) as client:
        assert await submit(client, prompt=prompt) is None
    assert server.asked == [
        ("POST", "/prompt", {"prompt": prompt, "prompt_id": "p", "client_id": "c", "extra_data": {"k": "v"}})
    ]


NODE_ERRORS = {"3": {"errors": [{"type": "value_not_in_list"}], "dependent_outputs": ["9"], "class_type": "A"}}


@pytest.mark.parametrize(
    ("status", "answer", "error_type", "node_errors", "may_be_queued"),
    [
        (200, {"node_errors": NODE_ERRORS}, "prompt_outputs_failed_validation", NODE_ERRORS, True),
        (
            400,
            {"error": {"type": "prompt_no_outputs", "message": "m"}, "node_errors": {}},
            "prompt_no_outputs",
            {},
            False,
        ),
        (400, {"error": {"type": "x", "message": "m"}, "node_errors": NODE_ERRORS}, "x", NODE_ERRORS, False),
        (400, {"error": {"type": "x", "message": "m"}, "node_errors": []}, "x", {}, False),
        (400, {"error": "in words", "node_errors": None}, "invalid_prompt", {}, False),
        (400, {}, "invalid_prompt", {}, False),
        (413, "too large", "prompt_too_large", {}, False),
        (500, "500 Internal Server Error", "engine_error", {}, True),
        (503, "", "engine_error", {}, True),
    ],
)
async def test_each_shape_of_a_refusal_is_read(
    status: int, answer: Any, error_type: str, node_errors: Any, may_be_queued: bool
) -> None:
    async with serving(Server({"/prompt": (status, msgspec.json.encode(answer))})) as client:
        refusal = await submit(client)
    assert refusal is not None
    assert refusal.error["type"] == error_type
    assert refusal.error["message"]
    assert refusal.node_errors == node_errors
    assert refusal.may_be_queued is may_be_queued


@pytest.mark.parametrize(
    ("status", "answer"),
    [(200, b"<html>"), (200, b""), (200, b"[]"), (200, b"[" * 100_000), (400, b"not json"), (404, b"{}"), (302, b"")],
)
async def test_an_answer_that_makes_no_sense_means_that_the_engine_is_not_there(status: int, answer: bytes) -> None:
    async with serving(Server({"/prompt": (status, answer)})) as client:
        with pytest.raises(EngineUnavailable):
            await submit(client)


# Asking


async def test_history_is_the_prompts_own_entry_or_nothing() -> None:
    server = Server(
        {
            "/history/p": (200, b'{"p":{"outputs":{},"status":{"status_str":"success"}}}'),
            "/history/q": (200, b"{}"),
            "/history/r": (200, b'{"r":null}'),
            "/history/s": (500, b""),
        }
    )
    async with serving(server) as client:
        assert await client.history("p") == {"outputs": {}, "status": {"status_str": "success"}}
        assert await client.history("q") is None
        assert await client.history("r") is None
        with pytest.raises(EngineUnavailable, match="status 500"):
            await client.history("s")


@pytest.mark.parametrize(
    ("answer", "running", "pending"),
    [
        (b'{"queue_running":[[1,"a",{},{},[]]],"queue_pending":[[2,"b",{}],[3,"c"]]}', {"a"}, {"b", "c"}),
        (b'{"queue_running":[],"queue_pending":[]}', set(), set()),
        (b"{}", set(), set()),
        (b'{"queue_running":null,"queue_pending":{"a":1}}', set(), set()),
        (b'{"queue_running":[[],[1],[1,5],"ab",null,[1,"a"]],"queue_pending":5}', {"a"}, set()),
    ],
)
async def test_the_queue_is_read_down_to_its_ids(answer: bytes, running: set[str], pending: set[str]) -> None:
    async with serving(Server({"/queue": (200, answer)})) as client:
        assert await client.queue() == QueueContent(running=frozenset(running), pending=frozenset(pending))


async def test_models_are_asked_for_each_kind() -> None:
    answers = {"/models": (200, b'["loras","vae"]'), "/models/loras": (200, b'["a"]'), "/models/vae": (200, b"[]")}
    async with serving(Server(answers)) as client:
        assert await client.models() == {"loras": ["a"], "vae": []}


@pytest.mark.parametrize(
    "answers",
    [
        {"/models": (200, b"{}")},
        {"/models": (200, b'["vae"]'), "/models/vae": (200, b"5")},
        {"/models": (200, b'["vae"]'), "/models/vae": (404, b"")},
    ],
)
async def test_models_that_make_no_sense_are_the_engines_fault_and_no_bug(
    answers: dict[str, tuple[int, bytes]],
) -> None:
    async with serving(Server(answers)) as client:
        with pytest.raises(EngineUnavailable):
            await client.models()


async def test_control_calls_have_the_bodies_that_comfyui_reads() -> None:
    server = Server()
    async with serving(server) as client:
        await client.delete_queued("p")
        await client.interrupt("p")
        await client.forget(iter(["a", "b"]))
        await client.free()
        assert await client.system_stats() == {}
        assert await client.object_info() == {}
    assert server.asked == [
        ("POST", "/queue", {"delete": ["p"]}),
        ("POST", "/interrupt", {"prompt_id": "p"}),
        ("POST", "/history", {"delete": ["a", "b"]}),
        ("POST", "/free", {"free_memory": True}),
        ("GET", "/system_stats", None),
        ("GET", "/object_info", None),
    ]
    assert server.connections == 1, "one connection serves them all"


async def test_a_control_call_that_fails_is_told() -> None:
    async with serving(Server({"/interrupt": (500, b"")})) as client:
        with pytest.raises(EngineUnavailable, match="POST /interrupt with status 500"):
            await client.interrupt("p")


# Nobody there


async def test_a_refused_connection_means_that_the_engine_is_not_there() -> None:
    (probe,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = probe.socket.getsockname()[1]
    await probe.aclose()
    with trio.fail_after(10):
        async with EngineClient(f"http://127.0.0.1:{port}") as client:
            with pytest.raises(EngineUnavailable, match="GET /system_stats: "):
                await client.system_stats()


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{", b"SSH-2.0-OpenSSH\r\n"])
async def test_a_connection_that_breaks_off_means_that_the_engine_is_not_there(said: bytes) -> None:
    async def breaks_off(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        if said:
            await stream.send_all(said)
        await stream.aclose()

    async with serving(breaks_off) as client:
        with pytest.raises(EngineUnavailable):
            await client.system_stats()


async def test_time_outs_are_the_callers_and_leave_the_client_usable() -> None:
    server = Server()
    silent = True

    async def handler(stream: trio.SocketStream) -> None:
        if silent:
            await trio.sleep_forever()
        await server(stream)

    async with serving(handler) as client:
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.05):
            await client.system_stats()
        silent = False
        assert await client.system_stats() == {}


async def test_a_client_that_was_closed_says_that_the_engine_is_gone() -> None:
    client = EngineClient("http://127.0.0.1:9")
    async with client:
        pass
    with pytest.raises(EngineUnavailable, match="gone"):
        await client.system_stats()
