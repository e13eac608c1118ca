"""What the tests against real ComfyUI share: a daemon that starts it, and graphs that need no model.

ComfyUI's folder is COMFYUI_DIR, its Python COMFYUI_PYTHON (default: a venv in that folder, else the one that runs us).
"""

import base64
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import httpx
import pyvips
import trio

COMFYUI_DIR: Final = os.environ.get("COMFYUI_DIR", "")

Graph = dict[str, Any]

START_S: Final = 60.0
"""ComfyUI takes 5 to 9 s here; slow disks and cold caches take longer."""
STOP_S: Final = 30.0


def comfyui_python() -> str:
    """Return the interpreter that runs ComfyUI."""
    home = Path(COMFYUI_DIR)
    candidates = (home / "venv/bin/python", home / ".venv/bin/python")
    return os.environ.get("COMFYUI_PYTHON") or next(
        (str(path) for path in candidates if path.is_file()), sys.executable
    )


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@attrs.define(eq=False)
class Daemon:
    """A comfyd in a process of its own, with real ComfyUI as its child. Its log is read for as long as it lives."""

    process: subprocess.Popen[bytes]
    engine_url: str
    input_dir: Path
    output_dir: Path
    url: str = ""
    log: list[dict[str, Any]] = attrs.field(factory=list)
    _said: threading.Condition = attrs.field(factory=threading.Condition)
    _reader: threading.Thread | None = None

    def read_log(self) -> None:
        """Start to follow the daemon's log."""
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def _follow(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            entry = json.loads(line)
            with self._said:
                self.log.append(entry)
                self._said.notify_all()
        with self._said:
            self.log.append({"event": "end of the log"})
            self._said.notify_all()

    def wait_logged(
        self, event: str, *, since: int = 0, where: Callable[[dict[str, Any]], bool] = lambda entry: True
    ) -> dict[str, Any]:
        """Wait for the first *event* from place *since* of the log on. Blocks."""

        def found() -> dict[str, Any] | None:
            for entry in self.log[since:]:
                if entry["event"] == event and where(entry):
                    return entry
            assert self.log[-1:] != [{"event": "end of the log"}], f"the daemon ended without {event}: {self.tail()}"
            return None

        with self._said:
            entry = self._said.wait_for(found, timeout=START_S)
        assert entry is not None, f"no {event} in the log: {self.tail()}"
        return entry

    async def logged(
        self, event: str, *, since: int = 0, where: Callable[[dict[str, Any]], bool] = lambda entry: True
    ) -> dict[str, Any]:
        """Wait for an event of the log without blocking."""
        return await trio.to_thread.run_sync(
            lambda: self.wait_logged(event, since=since, where=where), abandon_on_cancel=True
        )

    def tail(self) -> str:
        """Return the last lines of the log, for messages of failures."""
        return "\n".join(str(entry) for entry in self.log[-25:])

    def wait_ready(self) -> None:
        """Wait until the daemon takes prompts. Blocks."""
        self.url = self.wait_logged("daemon.listening")["url"]
        deadline = time.monotonic() + START_S
        with httpx.Client(base_url=self.url, trust_env=False) as client:
            while client.get("/ready").status_code != 200:
                assert time.monotonic() < deadline, f"not ready in time: {self.tail()}"
                assert self.process.poll() is None, f"the daemon ended: {self.tail()}"
                time.sleep(0.05)  # a probe is there to be polled

    def engine_pid(self) -> int:
        """Return the process id of the engine that was started last."""
        return int([entry for entry in self.log if entry["event"] == "engine.started"][-1]["pid"])

    def stop(self) -> int:
        """Ask the daemon to stop, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait_ended()

    def wait_ended(self) -> int:
        """Wait for the daemon's end and for the end of its log; return its exit code. Blocks."""
        code = self.process.wait(timeout=STOP_S)
        assert self._reader is not None
        self._reader.join(timeout=STOP_S)  # the pipe's other end is open for as long as anything of it lives
        assert not self._reader.is_alive(), "something of the daemon's outlived it"
        return code


@contextmanager
def running_daemon(folder: Path, **variables: str) -> Iterator[Daemon]:
    """Run a ready daemon with real ComfyUI, its files below *folder*."""
    folders = {name: folder / name for name in ("output", "input", "temp", "user", "front")}
    for path in folders.values():
        path.mkdir(parents=True)
    port = free_port()
    command = [
        *(comfyui_python(), str(Path(COMFYUI_DIR) / "main.py")),
        *("--cpu", "--listen", "127.0.0.1", "--port", str(port)),
        *("--front-end-root", str(folders["front"]), "--disable-api-nodes", "--disable-auto-launch"),
        *("--database-url", "sqlite:///:memory:"),
        *("--output-directory", str(folders["output"]), "--input-directory", str(folders["input"])),
        *("--temp-directory", str(folders["temp"]), "--user-directory", str(folders["user"])),
    ]
    environ = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    environ |= {
        "HOST": "127.0.0.1",
        "PORT": "0",
        "CMD": shlex.join(command),
        "COMFY_HOME": COMFYUI_DIR,
        "COMFYUI_PORT_HOST": str(port),
        "BASE": "",
        "INPUT_DIR": str(folders["input"]),
        "OUTPUT_DIR": str(folders["output"]),
        "STATE_DIR": "",
        "STARTUP_CHECK_MAX_TRIES": str(int(START_S)),
        "LOG_FORMAT": "json",
        **variables,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "comfyd", "run"],
        env=environ,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    daemon = Daemon(
        process=process,
        engine_url=f"http://127.0.0.1:{port}",
        input_dir=folders["input"],
        output_dir=folders["output"],
    )
    try:
        daemon.read_log()
        daemon.wait_ready()
        yield daemon
        daemon.stop()
    finally:
        if process.poll() is None:
            process.kill()  # the guard ends ComfyUI when its daemon is gone
            process.wait()
        if process.stderr is not None:
            process.stderr.close()


def files_below(folder: Path) -> list[str]:
    """Return every file below *folder*, hidden ones not, by its path in it."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    )


# --- graphs


def node(class_type: str, /, **inputs: Any) -> dict[str, Any]:
    """Return a node."""
    return {"class_type": class_type, "inputs": inputs}


def empty_image(color: int = 0, *, size_px: int = 16, count: int = 1) -> dict[str, Any]:
    """Return a node that makes *count* square pictures of one colour."""
    return node("EmptyImage", width=size_px, height=size_px, batch_size=count, color=color)


def save_image(source: str, prefix: Any = "ComfyUI") -> dict[str, Any]:
    """Return a node that saves the pictures of node *source* as PNG."""
    return node("SaveImage", images=[source, 0], filename_prefix=prefix)


def picture(color: int = 0, **options: Any) -> Graph:
    """Return the smallest graph that saves a picture."""
    return {"1": empty_image(color, **options), "2": save_image("1")}


def slow_graph(color: int = 0, *, steps: int = 14) -> Graph:
    """Return a graph that takes some 0.7 s for each of its *steps* (two cores), and can be interrupted between them.

    One node that takes long cannot be interrupted in ComfyUI, so the work is spread over several.
    """
    graph: Graph = {"first": empty_image(color, size_px=2048)}
    source = "first"
    for step in range(steps):
        size_px = 2040 if step % 2 else 2048
        graph[f"step{step}"] = scale(source, size_px, "lanczos")
        source = f"step{step}"
    return {**graph, "small": scale(source, 8, "area"), "save": save_image("small", "slow")}


def scale(source: str, size_px: int, method: str) -> dict[str, Any]:
    """Return a node that scales the pictures of node *source* to a square."""
    return node("ImageScale", image=[source, 0], upscale_method=method, width=size_px, height=size_px, crop="disabled")


# --- pictures


def decoded(answer: dict[str, Any]) -> list[bytes]:
    """Return the files of an answer."""
    return [base64.b64decode(text, validate=True) for text in answer["images"]]


def as_base64(data: bytes) -> str:
    """Return *data* as base64 text."""
    return base64.b64encode(data).decode()


def pixels(data: bytes) -> bytes:
    """Return the sRGB pixels of a picture file, row by row, three bytes each."""
    image = pyvips.Image.new_from_buffer(data, "").colourspace("srgb")
    if image.hasalpha():
        image = image.flatten()
    return bytes(image.write_to_memory())


def color_of(data: bytes) -> int:
    """Return the colour (0xRRGGBB) of a picture that has only one."""
    raw = pixels(data)
    assert raw == raw[:3] * (len(raw) // 3), "more than one colour"
    return int.from_bytes(raw[:3], "big")


def checked_pattern() -> bytes:
    """Return a PNG file whose pixels all differ."""
    raw = bytes(value for y in range(12) for x in range(16) for value in (x * 16, y * 20, (x * y) % 256))
    image = pyvips.Image.new_from_memory(raw, 16, 12, 3, "uchar").copy(interpretation="srgb")
    return bytes(image.write_to_buffer(".png"))
