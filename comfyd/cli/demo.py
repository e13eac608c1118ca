"""``comfyd demo``: the whole way once, on this machine, for real.

A daemon is started as anybody would start it, with the embedded engine as its child; a prompt goes in over HTTP and the
picture comes back in the answer; then everything is stopped again.
"""

import argparse
import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import httpx
import trio

from comfyd.cli.progress_bar import ProgressBar
from comfyd.cli.sse import EventParser

_START_S: Final = 60.0
_PROMPT_S: Final = 300.0
_STOP_S: Final = 40.0


class DemoFailed(Exception):
    """The demo did not come to its picture; the text says why."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line's *subparsers*."""
    parser = subparsers.add_parser("demo", help="run a real prompt end to end on the built-in engine")
    parser.add_argument(
        "-o",
        "--output",
        default="demo-output",
        metavar="DIR",
        help="where the picture and the daemon's log are put (default: %(default)s)",
    )


def demo_command(options: argparse.Namespace) -> int:
    """Run the demo; return the exit code."""
    try:
        return trio.run(_demo, Path(options.output))
    except* DemoFailed as group:
        for exc in group.exceptions:
            sys.stderr.write(f"comfyd demo: {exc}\n")
    except* KeyboardInterrupt:
        sys.stderr.write("\ncomfyd demo: stopped\n")
    return 1


async def _demo(output: Path) -> int:
    await trio.Path(output).mkdir(parents=True, exist_ok=True)
    log_path = output / "comfyd.log"
    with tempfile.TemporaryDirectory(prefix="comfyd-demo-") as state, log_path.open("wb") as log_file:
        print("1. starting comfyd, which starts the embedded engine as its child")
        began = trio.current_time()
        async with _daemon(state, log_file, log_path) as url, _client(url) as client:
            await _wait_ready(client)
            print(f"   ready at {url} after {trio.current_time() - began:.1f} s")
            print("2. POST /prompt: a photograph, to be painted over in brush strokes")
            began = trio.current_time()
            answer = await _prompt_with_progress(client, _demo_prompt())
            took_s = trio.current_time() - began
            picture = output / answer["filenames"][0]
            await trio.Path(picture).write_bytes(base64.b64decode(answer["images"][0]))
            print(f"3. painted in {took_s:.1f} s (engine {_engine_s(answer):.1f} s); stopping comfyd")
    print(f"\n   the picture:  {picture.resolve()}\n   the log:      {log_path.resolve()}")
    return 0


@asynccontextmanager
async def _daemon(state: str, log_file: Any, log_path: Path) -> AsyncIterator[str]:
    """Run the daemon; the value is its URL. Leaving asks it to stop and waits for it."""
    environ = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LANG", "TMPDIR"}}
    environ |= {"HOST": "127.0.0.1", "PORT": "0", "STATE_DIR": state, "LOG_FORMAT": "json"}
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [*_comfyd(), "run", "--embedded"],
                env=environ,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
                start_new_session=True,  # Ctrl-C is ours to pass on: once, and as a wish to stop
            )
        )
        try:
            with trio.fail_after(_START_S):
                url: str = await nursery.start(_follow_log, process, log_file, log_path)
            yield url
        except trio.TooSlowError as exc:
            raise DemoFailed(f"no answer in time; see {log_path}") from exc
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            with trio.move_on_after(_STOP_S, shield=True):
                await process.wait()
        nursery.cancel_scope.cancel("the daemon has stopped")


def _comfyd() -> list[str]:
    return [sys.executable] if getattr(sys, "frozen", False) else [sys.executable, "-m", "comfyd"]


async def _follow_log(
    process: trio.Process,
    log_file: Any,
    log_path: Path,
    *,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep the daemon's log in a file; started() gives the URL that it says it listens at."""
    if process.stderr is None:
        raise RuntimeError("the daemon was started without a pipe for its log")
    listening = False
    rest = b""
    async with aclosing(process.stderr):
        async for data in process.stderr:
            log_file.write(data)
            log_file.flush()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines if not listening else ():
                if b'"daemon.listening"' in line:
                    listening = True
                    task_status.started(json.loads(line)["url"])
    if not listening:
        raise DemoFailed(f"comfyd ended before it listened; see {log_path}")


def _client(url: str) -> httpx.AsyncClient:
    # No time-outs of its own: they are set around each step. No proxy: the daemon is on this machine.
    return httpx.AsyncClient(base_url=url, timeout=None, trust_env=False)  # noqa: S113  # see above


async def _wait_ready(client: httpx.AsyncClient) -> None:
    with trio.fail_after(_START_S):
        while (await client.get("/ready")).status_code != 200:  # noqa: ASYNC110  # a probe is there to be polled
            await trio.sleep(0.05)


async def _prompt_with_progress(client: httpx.AsyncClient, prompt: Mapping[str, Any]) -> Any:
    job_id = f"demo-{uuid.uuid4().hex[:8]}"
    bar = ProgressBar()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_show_progress, client, job_id, bar)
        with trio.fail_after(_PROMPT_S):
            response = await client.post("/prompt", json={"id": job_id, "prompt": prompt})
        nursery.cancel_scope.cancel("answered")
    if response.status_code == 200:
        bar.update(100, "done")
    bar.close()
    if response.status_code != 200:
        raise DemoFailed(f"the prompt ended with status {response.status_code}: {response.text[:500]}")
    return response.json()


async def _show_progress(client: httpx.AsyncClient, job_id: str, bar: ProgressBar) -> None:
    while True:
        async with client.stream("GET", f"/jobs/{job_id}/events") as response:
            if response.status_code == 200:
                parser = EventParser()
                async for line in response.aiter_lines():
                    event = parser.feed(line)
                    if event is not None and event.name == "progress":
                        bar.update(event.data["percent"], event.data["node_title"] or event.data["state"])
                return
        await trio.sleep(0.02)  # the prompt has not arrived yet


def _demo_prompt() -> Any:
    """The demo's graph, with its photograph in it as a ``data:`` URL."""
    folder = files("comfyd.embedded") / "demo"
    prompt = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
    picture = base64.b64encode((folder / "input.jpg").read_bytes()).decode()
    for node in prompt.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = f"data:image/jpeg;base64,{picture}"
    return prompt


def _engine_s(answer: Mapping[str, Any]) -> float:
    return float(answer["stats"]["comfy_execution"]["duration"]) / 1000
