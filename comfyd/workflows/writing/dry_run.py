"""Loading a written file as the daemon would, and making its graph once: the proof that it works.

What comfyd writes by itself is proved in this process. What somebody else wrote is code that nobody has read yet:
:func:`prove_apart` looks at it first (:mod:`screen`) and then runs it in a process of its own, which has no secrets in
its environment, may not write, connect or start anything, and is killed when it takes too long.
"""

import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from comfyd.errors import ComfydError, InvalidValue
from comfyd.wire import decode_json, encode_json
from comfyd.workflows.catalogue import load_catalogue
from comfyd.workflows.live import LiveInfo
from comfyd.workflows.model import WorkflowFailed
from comfyd.workflows.writing.same_graph import differences
from comfyd.workflows.writing.screen import objections

APART_TIMEOUT_S: Final = 60.0
"""For the start of Python and comfyd's imports, about a second, and a function that writes a graph in milliseconds."""
_ROUTE: Final = "written"
_CHILD: Final = "from comfyd.workflows.writing.dry_run import dry_run_main; raise SystemExit(dry_run_main())"
_KEPT_VARIABLES: Final = ("LANG", "LC_ALL", "PATH", "PYTHONPATH", "SYSTEMROOT", "TMPDIR", "VIRTUAL_ENV")
_REFUSED_EVENTS: Final = re.compile(
    r"(socket\.(connect|bind|sendto|sendmsg|getaddrinfo|gethostbyname)|subprocess\.|os\.(system|exec|fork|forkpty|spawn"
    r"|posix_spawn|remove|rename|rmdir|mkdir|link|symlink|truncate|chmod|chown|kill|putenv)|pty\.|shutil\.|ctypes\.).*"
)
_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class DryRunFailed(ComfydError):
    """The process that was to run a written file did not answer."""


def prove(source: str, graph: Mapping[str, Any], example: Mapping[str, Any], *, suffix: str = ".py") -> list[str]:
    """Say what is wrong with a written file: it does not load, or does not make *graph* of *example*.

    *source* is Python, or with the *suffix* ``.yaml`` the sidecar of *graph*. Blocks, and runs the file.
    """
    with tempfile.TemporaryDirectory(prefix="comfyd-workflow-") as name:
        folder = Path(name)
        (folder / f"{_ROUTE}{suffix}").write_text(source, encoding="utf-8")
        if suffix != ".py":
            (folder / f"{_ROUTE}.json").write_bytes(encode_json(graph))
        return _prove_loaded(folder, graph, example)


def _prove_loaded(folder: Path, graph: Mapping[str, Any], example: Mapping[str, Any]) -> list[str]:
    catalogue = load_catalogue(folder)
    if catalogue.problems:
        return [problem.message for problem in catalogue.problems]
    (workflow,) = catalogue.workflows
    try:
        # Nothing is known of an engine here: a graph may name models that are not on this machine.
        built = trio.run(partial(workflow.build, dict(example), LiveInfo()))
    except InvalidValue as exc:
        return [f"its input is refused: {fault.location} {fault.message}" for fault in exc.faults]
    except WorkflowFailed as exc:
        return [f"{exc}{_cause(exc)}"]
    return differences(graph, built.prompt)


def _cause(exc: WorkflowFailed) -> str:
    """Add what is known of the error behind, in its author's words: the author reads this, and no caller."""
    cause = exc.__cause__
    if cause is None:
        return ""
    lines = [frame.lineno for frame in traceback.extract_tb(cause.__traceback__) if frame.filename.endswith(".py")]
    ours = [frame.lineno for frame in traceback.extract_tb(cause.__traceback__) if Path(frame.filename).stem == _ROUTE]
    return f" in line {(ours or lines)[-1]}: {cause}" if lines else f": {cause}"


def prove_apart(source: str, graph: Mapping[str, Any], example: Mapping[str, Any]) -> list[str]:
    """Say what is wrong with a Python file that somebody else wrote. Blocks for :data:`APART_TIMEOUT_S` at most.

    Raises:
        DryRunFailed: the process did not come to an answer for another reason than time.
    """
    return objections(source) or run_apart(source, graph, example)


def run_apart(source: str, graph: Mapping[str, Any], example: Mapping[str, Any]) -> list[str]:
    """Be :func:`prove_apart` without the look at the source."""
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    task = encode_json({"source": source, "graph": graph, "example": example})
    try:
        done = subprocess.run(
            # The one-file program has no interpreter to be started so, and no package that could ask Claude either.
            [sys.executable, "-P", "-c", _CHILD],
            input=task,
            capture_output=True,
            env=environment,
            timeout=APART_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [f"it did not make its graph within {APART_TIMEOUT_S:g} s"]
    except OSError as exc:
        raise DryRunFailed(f"the file could not be tried: {exc.strerror}") from exc
    try:
        answer = decode_json(done.stdout)
        return [str(fault) for fault in answer["faults"]]
    except (InvalidValue, TypeError, KeyError):
        last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2][:300]
        raise DryRunFailed(f"the file could not be tried: exit code {done.returncode}, {last}") from None


def dry_run_main() -> int:
    """Be the process of :func:`prove_apart`: a task on stdin, the faults on stdout."""
    task = decode_json(sys.stdin.buffer.read())
    answer_to = os.dup(1)
    os.dup2(2, 1)  # what the file prints is not the answer
    with tempfile.TemporaryDirectory(prefix="comfyd-workflow-") as name:
        folder = Path(name)
        (folder / f"{_ROUTE}.py").write_text(task["source"], encoding="utf-8")
        armed = [True]
        sys.addaudithook(partial(_refuse, armed))
        try:
            faults = _prove_loaded(folder, task["graph"], task["example"])
        finally:
            armed.clear()
    os.write(answer_to, encode_json({"faults": faults}))
    return 0


def _refuse(armed: list[bool], event: str, arguments: tuple[Any, ...]) -> None:
    if not armed:
        return
    if event == "open":
        flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
        refused = bool(flags & _WRITING)
    else:
        refused = _REFUSED_EVENTS.fullmatch(event) is not None
    if refused:
        raise PermissionError(f"a workflow must only write a graph, it tried {event}")
