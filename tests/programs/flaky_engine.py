"""The embedded engine, misbehaving on demand. Run by the tests of the whole daemon, as its CMD.

What concerns the whole engine is on the command line. What concerns one prompt is in the graph itself, as
``"_meta": {"flaky": {...}}`` of any node, members as in :class:`Fault`: so a daemon can be given good and bad prompts
in one queue. The address comes from the environment that comfyd sets for its child.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

import attrs
import hypercorn.trio
import trio
from hypercorn.config import Config

from comfyd.embedded.app import Engine
from comfyd.embedded.asgi import Message, Receive, Scope, Send, empty_answer, json_answer, text_answer
from comfyd.embedded.settings import parse_command_line

LAST: Final = "end"
"""Name of a prompt's last message, ``executing`` with node null."""


@attrs.frozen(kw_only=True)
class Fault:
    """What goes wrong with one prompt. Its messages are counted from 1, all text frames from its POST to its end.

    *times*: only the first so many runs, counted across lives of the engine by files in the working folder.
    """

    times: int = 1_000_000
    key: str = "fault"
    drop_after: int | None = None
    """Close every websocket after that message; 0 is before the engine gets the prompt."""
    drop_each: bool = False
    """Close every websocket after each message."""
    refuse: int = 0
    """Websockets that are closed at once after a drop."""
    die: str | None = None
    """Die when: ``unread`` (before the engine gets the prompt), ``taken`` (it has it, the POST is not answered), or
    after the first message of this type (``end`` for the last)."""
    how: str = "kill"
    """``kill`` by SIGKILL, or the exit code."""
    junk: bool = False
    """Send unreadable and misshapen frames before each message."""
    post: str | None = None
    """Answer the POST with this: ``hang``, ``garbage``, or a status; the engine never gets the prompt. With a ``+``
    before it, the engine gets it all the same."""
    hang: str | None = None
    """Hold up the whole engine, its server too, when the first node begins: ``block`` (wait for nothing), ``burn`` (use
    the CPU), ``read`` (read a file, slowly, from memory: it costs no CPU)."""
    hang_s: float = 3600.0
    say: str | None = None
    """Write this to stderr when the first node begins."""
    history: str | None = None
    """``lost``: the prompt is in no answer of ``/history``. ``bare``: its entry has no status. ``odd``: it has members
    that make no sense beside those that do."""


@attrs.define(eq=False)
class FlakyEngine:
    """The ASGI application around the engine's. One prompt is in the engine at a time, as comfyd submits them."""

    engine: Engine
    options: argparse.Namespace
    _faults: dict[str, Fault] = attrs.field(factory=dict)
    _current: str = ""
    _messages: list[str] = attrs.field(factory=list)
    _sockets: set[trio.CancelScope] = attrs.field(factory=set)
    _refuse: int = 0

    def __attrs_post_init__(self) -> None:
        self._refuse = self.options.refuse_websockets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
            return
        if scope["type"] == "http":
            path, method = scope["path"], scope["method"]
            if (method, path) == ("POST", "/prompt"):
                await self._prompt(scope, receive, send)
                return
            if method == "GET" and path.startswith("/history/"):
                prompt_id = path.rpartition("/")[2]
                if self._fault(prompt_id).history is not None:
                    await self._history(prompt_id, send)
                    return
            if path in self.options.answer:
                await answer_badly(self.options.answer[path], send)
                return
        await self.engine(scope, receive, send)

    # --- prompts

    async def _prompt(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(receive)
        request = json.loads(body)
        prompt_id = request["prompt_id"]
        fault = first_fault(request["prompt"])
        self._current, self._messages = prompt_id, []
        self._faults[prompt_id] = fault
        if fault.drop_after == 0:
            self._drop(fault)
            await trio.lowlevel.checkpoint()
        if fault.die == "unread":
            die(fault.how)
        if fault.post is not None and not fault.post.startswith("+"):
            await answer_badly(fault.post, send)
            return

        async def receive_again() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def answer(message: Message) -> None:
            if fault.die == "taken":
                die(fault.how)
            if fault.post is None:
                await send(message)

        await self.engine(scope, receive_again, answer)
        if fault.post is not None:
            await answer_badly(fault.post.removeprefix("+"), send)

    def _fault(self, prompt_id: str) -> Fault:
        return self._faults.get(prompt_id, Fault())

    async def _history(self, prompt_id: str, send: Send) -> None:
        entry = self.engine.queue.history_of(prompt_id)
        if self._fault(prompt_id).history == "lost":
            entry = {}
        elif prompt_id in entry:
            outputs = entry[prompt_id]["outputs"]
            status = None
            if self._fault(prompt_id).history == "odd":
                outputs = {**outputs, "1": 5, "4": {"images": 7}, "5": {"images": [None, {"filename": 8}]}}
                status = {"status_str": 9, "messages": [1, [], ["execution_error"], ["execution_success", None]]}
            entry = {prompt_id: {"prompt": [], "outputs": outputs, "status": status}}
        await json_answer(entry).send(send)

    # --- websockets

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._refuse > 0:
            self._refuse -= 1
            say("websocket refused")
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": 1013})
            return
        with trio.CancelScope() as life, self._listed(life):

            async def send_flaky(message: Message) -> None:
                if message["type"] == "websocket.send" and message.get("text") is not None:
                    await self._message(message, send)
                else:
                    await send(message)

            await self.engine(scope, receive, send_flaky)
        if life.cancelled_caught:
            await send({"type": "websocket.close", "code": 1001})

    @contextmanager
    def _listed(self, life: trio.CancelScope) -> Iterator[None]:
        self._sockets.add(life)
        try:
            yield
        finally:
            self._sockets.discard(life)

    async def _message(self, message: Message, send: Send) -> None:
        if not self._current:
            await send(message)
            return
        fault = self._fault(self._current)
        frame = json.loads(message["text"])
        is_last = frame["type"] == "executing" and frame["data"]["node"] is None
        name = LAST if is_last else frame["type"]
        self._messages.append(name)
        if fault.junk:
            for kind, junk in junk_frames(self._current):
                await send({"type": "websocket.send", kind: junk})
        await send(message)
        count = len(self._messages)
        if is_last:
            say(f"prompt {self._current} had {count} messages: {' '.join(self._messages)}")
            self._current = ""
        if name == "executing" and self._messages.count(name) == 1:
            if fault.say is not None:
                os.write(2, fault.say.encode())
            if fault.hang is not None:
                hang(fault.hang, fault.hang_s)
        if fault.die == name:
            die(fault.how)
        if fault.drop_each or count == fault.drop_after:
            say(f"websockets dropped after message {count}, {name}")
            self._drop(fault)
            await trio.lowlevel.checkpoint()  # this socket is one of them

    def _drop(self, fault: Fault) -> None:
        self._refuse = fault.refuse
        for life in self._sockets:
            life.cancel("dropped on demand")


def first_fault(graph: dict[str, Any]) -> Fault:
    """Read the prompt's fault, if it has one that is still to happen."""
    for node in graph.values():
        wish = (node.get("_meta") or {}).get("flaky")
        if wish is not None:
            fault = Fault(**wish)
            for number in range(fault.times):
                try:
                    Path(f"flaky-{fault.key}-{number}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                return fault
    return Fault()


def junk_frames(prompt_id: str) -> Iterator[tuple[str, str | bytes]]:
    """Make what no listener may stumble over: what is no JSON, what is no message, and what has the wrong members."""
    for text in ("", "no JSON", "{", "[]", "null", "7", '"text"', "[" * 100_000, "NaN", '{"type":"status"}'):
        yield "text", text
    for text in ('{"type":7,"data":{}}', '{"type":"executing","data":null}', '{"data":{}}', '{"type":"a","data":[]}'):
        yield "text", text
    yield "text", '{"type":"status","data":{"a":"\\ud800"}}'
    yield "text", json.dumps({"type": "logs", "data": {"text": "x" * 2_000_000}})
    yield "text", json.dumps({"type": "executed", "data": {"prompt_id": "of somebody else", "node": "1", "output": {}}})
    for kind, members in (
        ("executed", {"node": {}, "output": 5}),
        ("executed", {}),
        ("executing", {"node": ["1"]}),
        ("execution_start", {"timestamp": "yesterday"}),
        ("execution_cached", {"nodes": 7}),
        ("execution_cached", {"nodes": [{}, None]}),
        ("progress", {"value": "a", "max": None, "node": 3}),
        ("progress", {"value": 1, "max": 0, "node": "1"}),
        ("progress", {}),
        ("progress_state", {"nodes": [1, 2]}),
        ("progress_state", {"nodes": {"1": None, "unknown": {"state": 3, "value": "x", "max": []}}}),
        ("progress_state", {}),
        ("an_event_of_the_future", {"nodes": {}}),
    ):
        yield "text", json.dumps({"type": kind, "data": {"prompt_id": prompt_id, **members}})
    data = f'{{"prompt_id":"{prompt_id}","value":1e999,"max":1e999,"node":"1"}}'  # more than a float holds
    yield "text", f'{{"type":"progress","data":{data}}}'
    for binary in (b"", b"\0", b"\xff" * 1000, b"\0\0\0\4\xff\xff\xff\xff{", b"\0\0\0\3\0\0\0\x09ab"):
        yield "bytes", binary


async def answer_badly(wish: str, send: Send) -> None:
    """Answer with a status, with a body that makes no sense, or never."""
    if wish == "hang":
        await trio.sleep_forever()
    elif wish == "garbage":
        await text_answer("<html>this is no JSON").send(send)
    else:
        await empty_answer(int(wish)).send(send)


async def read_body(receive: Receive) -> bytes:
    """Receive a whole body."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    return body


def hang(how: str, seconds: float) -> None:
    """Keep this thread for so long."""
    end = time.monotonic() + seconds
    with Path("/dev/zero").open("rb", buffering=0) as file:
        while (left := end - time.monotonic()) > 0:
            if how == "block":
                time.sleep(left)
            elif how == "read":
                file.read(1 << 18)
                time.sleep(0.02)


def die(how: str) -> NoReturn:
    """End this process at once, nothing flushed and nobody told."""
    say(f"dying ({how})")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(int(how))


def say(text: str) -> None:
    """Write a line that the daemon logs as the engine's."""
    os.write(2, f"flaky: {text}\n".encode())


def start_grandchildren() -> None:
    """Start a child, and a grandchild in a session of its own whose parent ends, as custom nodes may."""
    sleeper = "import time; time.sleep(1000)"
    subprocess.Popen([sys.executable, "-S", "-c", sleeper])
    orphan = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {sleeper!r}], start_new_session=True)"
    )
    subprocess.run([sys.executable, "-S", "-c", orphan], check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--answer", action="append", default=[], metavar="PATH=HOW", help="hang, garbage or a status")
    parser.add_argument("--refuse-websockets", type=int, default=0, metavar="N", help="close the first N at once")
    parser.add_argument("--listen-after", metavar="FILE", help="listen only once this file exists (a FIFO is opened)")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--grandchildren", action="store_true")
    options, engines = parser.parse_known_args()
    options.answer = dict(wish.split("=") for wish in options.answer)
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.grandchildren:
        start_grandchildren()
    if options.listen_after:
        say("not listening yet")
        Path(options.listen_after).read_bytes()
    folders = itertools.chain.from_iterable(
        (f"--{kind}-directory", os.environ[f"{kind.upper()}_DIR"]) for kind in ("input", "output")
    )
    settings = parse_command_line([*folders, "--base-directory", str(Path.cwd() / "engine"), *engines])
    trio.run(serve, FlakyEngine(Engine(settings), options))


async def serve(flaky: FlakyEngine) -> None:
    """Serve and work until the process is ended."""
    config = Config()
    config.bind = [f"{os.environ['DIRECT_ADDRESS']}:{os.environ['COMFYUI_PORT_HOST']}"]
    config.loglevel = "ERROR"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flaky.engine.work)
        await hypercorn.trio.serve(flaky, config)  # type: ignore[arg-type]  # our ASGI types are looser than hypercorn's
        nursery.cancel_scope.cancel("stopped")


if __name__ == "__main__":
    main()
