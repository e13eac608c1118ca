"""The engine's HTTP routes and its websocket, as a raw ASGI application (server.py of ComfyUI 0.3.64).

Every route exists under ``/api`` too. What ComfyUI answers with a 500, this does as well: clients meet those answers.
"""

import ipaddress
import logging
import mimetypes
import os
import sys
import traceback
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import attrs
import msgspec
import trio

from comfyd import __version__
from comfyd.embedded.asgi import (
    Answer,
    BodyTooLarge,
    ClientGone,
    Receive,
    Request,
    Scope,
    Send,
    empty_answer,
    json_answer,
    text_answer,
)
from comfyd.embedded.events import Hub, Socket
from comfyd.embedded.executor import Executor
from comfyd.embedded.files import OutsideFolder, inside
from comfyd.embedded.models import Models
from comfyd.embedded.nodes import NODE_TYPES
from comfyd.embedded.nodes.pictures import as_srgb, vips
from comfyd.embedded.nodes.registry import Library
from comfyd.embedded.prompt_queue import PromptQueue
from comfyd.embedded.settings import Settings
from comfyd.embedded.uploads import BadUpload, Form, store_upload
from comfyd.embedded.validation import error, validate_prompt
from comfyd.http.server import FRAMES_TOGETHER

_log: Final = logging.getLogger(__name__)

# The version whose behaviour this reproduces, with a suffix so that nobody takes it for the original.
COMFYUI_VERSION: Final = f"0.3.64+comfyd.{__version__}"
PATTERNS_NOT_DIFFUSION: Final = (
    "comfyd's embedded engine: image nodes are real; "
    "checkpoints, samplers and encoders are procedural patterns, not diffusion"
)

# Types that a browser would execute are sent as downloads, as ComfyUI does.
_ACTIVE_TYPES: Final = frozenset(
    {"text/html", "text/html-sandboxed", "application/xhtml+xml", "text/javascript", "text/css"}
)

Handler = Callable[[Request], Awaitable[Answer]]


@attrs.define(eq=False)
class Engine:
    """The whole engine but its sockets: state, worker and routes. An instance is an ASGI application.

    Whoever starts it runs :meth:`work` beside it and sets *stopping* when it shall end its websockets.
    """

    settings: Settings
    library: Library = attrs.field(init=False)
    hub: Hub = attrs.field(init=False, factory=Hub)
    queue: PromptQueue = attrs.field(init=False)
    executor: Executor = attrs.field(init=False)
    _number: int = attrs.field(init=False, default=0)
    _exact: dict[tuple[str, str], Handler] = attrs.field(init=False)
    _below: dict[tuple[str, str], Callable[[Request, str], Awaitable[Answer]]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.settings.folders.make()
        self.library = Library(folders=self.settings.folders, models=Models(folder=self.settings.models_folder))
        self.queue = PromptQueue(self._queue_changed)
        self.executor = Executor(
            settings=self.settings, library=self.library, node_types=NODE_TYPES, hub=self.hub, queue=self.queue
        )
        self._exact = {
            ("GET", "/"): self._root,
            ("GET", "/prompt"): self._queue_info,
            ("POST", "/prompt"): self._submit,
            ("GET", "/queue"): self._queue,
            ("POST", "/queue"): self._change_queue,
            ("GET", "/history"): self._history,
            ("POST", "/history"): self._change_history,
            ("POST", "/interrupt"): self._interrupt,
            ("POST", "/free"): self._free,
            ("GET", "/system_stats"): self._system_stats,
            ("GET", "/features"): self._features,
            ("GET", "/object_info"): self._object_info,
            ("GET", "/models"): self._model_types,
            ("GET", "/embeddings"): self._embeddings,
            ("GET", "/extensions"): self._extensions,
            ("GET", "/view"): self._view,
            ("POST", "/upload/image"): partial(self._upload, mask=False),
            ("POST", "/upload/mask"): partial(self._upload, mask=True),
        }
        self._below = {
            ("GET", "/history"): self._history_of,
            ("GET", "/object_info"): self._object_info_of,
            ("GET", "/models"): self._models_of,
            ("GET", "/view_metadata"): self._view_metadata,
        }

    async def work(self) -> None:
        """Run prompts until cancelled."""
        await self.executor.run()
        await trio.sleep_forever()  # the worker is dead; as in ComfyUI nobody notices, and the server answers on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection (ASGI)."""
        match scope["type"]:
            case "http":
                await self._http(scope, receive, send)
            case "websocket":
                await self._websocket(scope, receive, send)
            case "lifespan":
                await _lifespan(receive, send)
            case other:
                raise ValueError(f"unknown ASGI scope {other!r}")

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, self.settings.max_upload_bytes)
        try:
            answer = await self._route(request)
        except ClientGone:
            return
        except BodyTooLarge as exc:
            answer = text_answer(str(exc), 413)
        except Exception:  # noqa: BLE001 - the boundary to clients: aiohttp's answer to a handler that raised
            _log.error("Error handling request\n%s", traceback.format_exc())
            answer = text_answer("500 Internal Server Error\n\nServer got itself in trouble", 500)
        await answer.send(send)

    async def _route(self, request: Request) -> Answer:
        if _foreign_origin(request):
            return empty_answer(403)
        path = request.scope["path"].removeprefix("/api") or "/"
        method = request.scope["method"]
        handler = self._exact.get((method, path))
        if handler is not None:
            return await handler(request)
        head, _, tail = path.rpartition("/")
        if below := self._below.get((method, head)):
            return await below(request, tail)
        if below := self._below.get((method, f"/{path.split('/')[1]}")):
            # An id may hold slashes; they arrive percent-encoded, and only the raw path still tells.
            raw = request.scope.get("raw_path", b"").decode("latin-1").partition("?")[0]
            return await below(request, unquote(raw.rpartition("/")[2]))
        if any(known == path for _, known in self._exact):
            return text_answer("405: Method Not Allowed", 405)
        return text_answer("404: Not Found", 404)

    # prompts

    def _exec_info(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": self.queue.remaining()}}

    def _queue_changed(self) -> None:
        self.hub.send("status", {"status": self._exec_info()})

    async def _queue_info(self, _request: Request) -> Answer:
        return json_answer(self._exec_info())

    async def _submit(self, request: Request) -> Answer:
        _log.info("got prompt")
        body = await request.json()
        if "number" in body:
            number = float(body["number"])
        else:
            number = -self._number if body.get("front") else self._number
            self._number += 1
        if "prompt" not in body:
            missing = error("no_prompt", "No prompt provided", "No prompt provided")
            return json_answer({"error": missing, "node_errors": {}}, 400)
        prompt_id = str(body["prompt_id"]) if "prompt_id" in body else str(uuid.uuid4())
        prompt = body["prompt"]
        verdict = validate_prompt(prompt, NODE_TYPES, self.library, body.get("partial_execution_targets"))
        extra_data = body.get("extra_data", {})
        if "client_id" in body:
            extra_data["client_id"] = body["client_id"]
        if verdict.error is not None:
            _log.warning("invalid prompt: %s", verdict.error)
            return json_answer({"error": verdict.error, "node_errors": verdict.node_errors}, 400)
        if verdict.node_errors:
            _log.error(
                "Failed to validate prompt for some outputs; they will be ignored: %s", list(verdict.node_errors)
            )
        self.queue.put((number, prompt_id, prompt, extra_data, list(verdict.outputs)))
        return json_answer({"prompt_id": prompt_id, "number": number, "node_errors": verdict.node_errors})

    async def _queue(self, _request: Request) -> Answer:
        return json_answer(self.queue.snapshot())

    async def _change_queue(self, request: Request) -> Answer:
        body = await request.json()
        if body.get("clear"):
            self.queue.clear()
        for prompt_id in body.get("delete", ()):
            self.queue.delete(prompt_id)
        return empty_answer()

    async def _history(self, request: Request) -> Answer:
        query = request.query
        max_items = int(query["max_items"]) if "max_items" in query else None
        return json_answer(self.queue.history(max_items, int(query.get("offset", -1))))

    async def _history_of(self, _request: Request, prompt_id: str) -> Answer:
        return json_answer(self.queue.history_of(prompt_id))

    async def _change_history(self, request: Request) -> Answer:
        body = await request.json()
        if body.get("clear"):
            self.queue.clear_history()
        for prompt_id in body.get("delete", ()):
            self.queue.delete_history(prompt_id)
        return empty_answer()

    async def _interrupt(self, request: Request) -> Answer:
        try:
            body = await request.json()
        except msgspec.DecodeError:
            body = {}
        prompt_id = body.get("prompt_id")
        running = self.queue.running
        if prompt_id and (running is None or running[1] != prompt_id):
            _log.info("Prompt %s is not currently running, skipping interrupt", prompt_id)
            return empty_answer()
        _log.info(
            "Interrupting prompt %s" if prompt_id else "Global interrupt (%s)", prompt_id or "no prompt_id specified"
        )
        self.executor.interrupted.set()
        return empty_answer()

    async def _free(self, request: Request) -> Answer:
        body = await request.json()
        self.queue.free(
            unload_models=bool(body.get("unload_models", False)), free_memory=bool(body.get("free_memory", False))
        )
        return empty_answer()

    # what there is

    async def _root(self, _request: Request) -> Answer:
        page = f"<!doctype html><title>comfyd</title><p>{PATTERNS_NOT_DIFFUSION}. It has no user interface.</p>"
        return Answer(body=page.encode(), content_type=b"text/html; charset=utf-8")

    async def _features(self, _request: Request) -> Answer:
        return json_answer(self._feature_flags())

    def _feature_flags(self) -> dict[str, Any]:
        return {"supports_preview_metadata": True, "max_upload_size": self.settings.max_upload_bytes}

    async def _object_info(self, _request: Request) -> Answer:
        return await trio.to_thread.run_sync(self._all_node_info)  # it lists the input folder and the models

    def _all_node_info(self) -> Answer:
        return json_answer({name: node.info(self.library) for name, node in NODE_TYPES.items()})

    async def _object_info_of(self, _request: Request, name: str) -> Answer:
        node = NODE_TYPES.get(name)
        if node is None:
            return json_answer({})
        return json_answer({name: await trio.to_thread.run_sync(node.info, self.library)})

    async def _model_types(self, _request: Request) -> Answer:
        return json_answer(await trio.to_thread.run_sync(self.library.models.types))

    async def _models_of(self, _request: Request, kind: str) -> Answer:
        models = self.library.models
        if kind not in await trio.to_thread.run_sync(models.types):
            return empty_answer(404)
        return json_answer(await trio.to_thread.run_sync(models.names, kind))

    async def _embeddings(self, _request: Request) -> Answer:
        names = await trio.to_thread.run_sync(self.library.models.names, "embeddings")
        return json_answer([os.path.splitext(name)[0] for name in names])

    async def _extensions(self, _request: Request) -> Answer:
        return json_answer([])

    async def _view_metadata(self, _request: Request, _kind: str) -> Answer:
        return empty_answer(404)  # pretend models hold no metadata

    async def _system_stats(self, _request: Request) -> Answer:
        total, free = _memory_bytes()
        return json_answer(
            {
                "system": {
                    "os": os.name,
                    "ram_total": total,
                    "ram_free": free,
                    "comfyui_version": COMFYUI_VERSION,
                    "required_frontend_version": "none",
                    "installed_templates_version": None,
                    "required_templates_version": None,
                    "python_version": sys.version,
                    "pytorch_version": f"none ({PATTERNS_NOT_DIFFUSION})",
                    "embedded_python": False,
                    "argv": sys.argv,
                },
                "devices": [
                    {
                        "name": "cpu",
                        "type": "cpu",
                        "index": None,
                        "vram_total": total,
                        "vram_free": free,
                        "torch_vram_total": total,
                        "torch_vram_free": free,
                    }
                ],
            }
        )

    # files

    async def _upload(self, request: Request, *, mask: bool) -> Answer:
        try:
            form = Form.begin(request.header(b"content-type") or "")
            try:
                await request.chunks(form.feed)
                form.feed(None)
                stored = await trio.to_thread.run_sync(partial(store_upload, form, self.settings.folders, mask=mask))
            finally:
                form.close()
        except BadUpload as exc:
            return empty_answer(exc.status)
        return json_answer(stored)

    async def _view(self, request: Request) -> Answer:
        query = request.query
        filename, kind = self.settings.folders.split_annotation(query.get("filename", ""))
        kind = kind or query.get("type", "output")
        base = self.settings.folders.named(kind)
        if "filename" not in query:
            return empty_answer(404)
        if not filename or filename.startswith("/") or ".." in filename or base is None:
            return empty_answer(400)
        try:
            folder = inside(base, query.get("subfolder", ""), kind)
        except OutsideFolder:
            return empty_answer(403)
        return await trio.to_thread.run_sync(_file_answer, folder / Path(filename).name, dict(query))

    # websocket

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        request = Request(scope, receive, 0)
        if _foreign_origin(request) or scope["path"].removeprefix("/api") != "/ws":
            await send({"type": "websocket.close", "code": 1008})  # before accept, it is a 403
            return
        await send({"type": "websocket.accept"})
        sid = request.query.get("clientId") or uuid.uuid4().hex
        socket = self.hub.connect(sid)
        try:
            self.hub.send("status", {"status": self._exec_info(), "sid": sid}, sid)
            if self.executor.client_id == sid and self.executor.node_id is not None:
                self.hub.send("executing", {"node": self.executor.node_id}, sid)
            async with trio.open_nursery() as nursery:
                together = FRAMES_TOGETHER in (scope.get("extensions") or {})
                nursery.start_soon(partial(_write_frames, socket, send, nursery.cancel_scope, together=together))
                await self._read_frames(socket, receive)
                nursery.cancel_scope.cancel("the client closed its websocket")
        finally:
            self.hub.disconnect(sid)

    async def _read_frames(self, socket: Socket, receive: Receive) -> None:
        """Read until the client closes. Only the first message may say which features the client knows."""
        first = True
        while (message := await receive())["type"] != "websocket.disconnect":
            text = message.get("text")
            if text is None:
                continue
            try:
                content = msgspec.json.decode(text)
            except msgspec.DecodeError:
                _log.warning("Invalid JSON received from client %s: %s", socket.sid, text)
                continue
            if first and isinstance(content, dict) and content.get("type") == "feature_flags":
                flags = content.get("data")
                socket.features = flags if isinstance(flags, dict) else {}
                self.hub.send("feature_flags", self._feature_flags(), socket.sid)
            first = False


async def _write_frames(socket: Socket, send: Send, scope: trio.CancelScope, *, together: bool) -> None:
    """Send what is queued for a socket until it is overrun. *together*: the server takes many frames in one message."""
    while frames := await socket.take():
        if together:
            await send({"type": "websocket.send", "frames": frames})
        else:
            for frame in frames:
                await send({"type": "websocket.send", "text" if isinstance(frame, str) else "bytes": frame})
        await trio.lowlevel.checkpoint()  # a server's send() may return at once when the client has gone
    _log.warning("client %s reads too slowly; its websocket is closed", socket.sid)
    await send({"type": "websocket.close", "code": 1013})
    scope.cancel("the client reads too slowly")


async def _lifespan(receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})


def _foreign_origin(request: Request) -> bool:
    """Whether a page of another host asks a server on loopback; ComfyUI refuses that with 403 (server.py)."""
    origin = request.header(b"origin")
    if origin is None:
        return False
    host = urlsplit(f"//{request.header(b'host') or ''}")
    asking = urlsplit(origin)
    try:
        loopback = host.hostname == "localhost" or ipaddress.ip_address(host.hostname or "").is_loopback
    except ValueError:
        return False
    if not loopback or asking.hostname is None:
        return False
    # A port that one side leaves out is not compared.
    same_port = asking.port == host.port or asking.port is None or host.port is None
    return asking.hostname != host.hostname or not same_port


def _memory_bytes() -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")


def _file_answer(path: Path, query: dict[str, str]) -> Answer:
    """Answer with a file as it is, or with a smaller or partial form of it as ``/view`` is asked for; blocking."""
    if not path.is_file():
        return empty_answer(404)
    shown = ((b"content-disposition", f'filename="{path.name}"'.encode("utf-8", "replace")),)
    channel = query.get("channel", "rgba")
    if "preview" in query:
        kind, _, quality = query["preview"].partition(";")
        wants_jpeg = kind == "jpeg" and "a" not in query.get("channel", "")
        picture = vips().Image.new_from_file(str(path))
        options = {"Q": int(quality) if quality.isdecimal() else 90, "keep": "none"}
        if wants_jpeg:
            return Answer(body=as_srgb(picture).jpegsave_buffer(**options), content_type=b"image/jpeg", headers=shown)
        return Answer(body=picture.webpsave_buffer(**options), content_type=b"image/webp", headers=shown)
    if channel in ("rgb", "a"):
        picture = vips().Image.new_from_file(str(path))
        if channel == "rgb":
            png = as_srgb(picture).pngsave_buffer(keep="none")
        else:
            alpha = picture.extract_band(picture.bands - 1) if picture.hasalpha() else picture.extract_band(0) * 0 + 255
            black = vips().Image.black(picture.width, picture.height, bands=3)
            png = black.bandjoin(alpha.cast("uchar")).copy(interpretation="srgb").pngsave_buffer(keep="none")
        return Answer(body=png, content_type=b"image/png", headers=shown)
    content_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    if content_type in _ACTIVE_TYPES:
        content_type = "application/octet-stream"
    return Answer(
        content_type=content_type.encode(), headers=shown, file=trio.Path(path), file_bytes=path.stat().st_size
    )
