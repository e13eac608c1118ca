"""The one-file build, where there is no Python: ``make binary``, then ``COMFYD_BINARY=dist/comfyd pytest ...``.

What is tested is what may break by being packed: what was left out, how it is unpacked, and which process is which.
"""

import base64
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import pyvips
import trio
from daemon_support import Daemon, Log, picture, post
from process_support import Family
from storage_support import NO_SETTINGS, Peer

import comfyd

START_S: Final = 1.5
"""To the open port; the figure that is promised. On a busy machine it is measured against the interpreter's start."""
STDLIB: Final = (
    "base64", "collections", "dataclasses", "datetime", "decimal", "difflib", "enum", "fractions", "functools",
    "hashlib", "heapq", "hmac", "html", "http.client", "itertools", "json", "logging", "math", "operator", "pathlib",
    "queue", "random", "re", "secrets", "shelve", "sqlite3", "statistics", "string", "tempfile", "textwrap", "time",
    "tomllib", "typing", "unittest", "urllib.request", "uuid", "xml.etree.ElementTree", "zipfile", "zoneinfo",
)  # fmt: skip
WORKFLOW: Final = f'''
"""Every module that an author may think of."""
{"".join(f"import {module}{chr(10)}" for module in STDLIB)}
from comfyd.workflow import Graph, inputs
from ._sizes import twice


@inputs
class Input:
    width: int = 16


def workflow(given: Input) -> Graph:
    graph = Graph()
    image = graph.node("EmptyImage", width=twice(given.width), height=random.randint(8, 8), batch_size=1, color=255)
    graph.node("SaveImage", images=image, filename_prefix="x")
    return graph
'''

_binary = os.environ.get("COMFYD_BINARY", "")
pytestmark = pytest.mark.skipif(not _binary, reason="needs COMFYD_BINARY, a file that `make binary` made")
BINARY: Final = Path(_binary).absolute()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the file is unpacked for most of the tests."""
    return tmp_path_factory.mktemp("unpacked")


def environment(folder: Path, cache: Path, **more: str) -> dict[str, str]:
    """All that a process of the tests gets to know: nothing of the machine's own PATH, home or libraries."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in NO_SETTINGS.items() if value}
    return {
        **settings,
        "PATH": "/nonexistent",
        "HOME": str(folder),
        "TMPDIR": str(folder / "tmp"),
        "COMFYD_UNPACK_DIR": str(cache),
        **more,
    }


def run(environ: Mapping[str, str], *arguments: str, program: Path = BINARY) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], env=environ, capture_output=True, text=True, timeout=60, check=False)


def start(folder: Path, argv: list[str], environ: Mapping[str, str]) -> Daemon:
    """Start a daemon, as ``daemon_support.start_daemon`` does with the interpreter."""
    family = Family()
    settings = {
        "HOST": "127.0.0.1",
        "PORT": "0",
        "LOG_FORMAT": "json",
        "STATE_DIR": str(folder / "state"),
        "INPUT_DIR": str(folder / "input"),
        "OUTPUT_DIR": str(folder / "output"),
    }
    name, _, mark = family.mark.partition("=")
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**settings, **environ, name: mark},
        cwd=folder,
        start_new_session=True,
    )
    log = Log()
    reader = threading.Thread(target=log.read_from, args=(process.stderr,), daemon=True)
    reader.start()
    return Daemon(process, folder, family, log, reader, os.pidfd_open(process.pid))


@asynccontextmanager
async def opened(folder: Path, environ: Mapping[str, str]) -> AsyncIterator[Daemon]:
    """A daemon of the one file that is ready. It must then end with 0, and leave no process and no temporary file."""
    daemon = start(folder, [str(BINARY), "run", "--embedded"], environ)
    try:
        await trio.to_thread.run_sync(daemon.wait_ready, abandon_on_cancel=True)
        yield daemon
        daemon.signal(signal.SIGTERM)
        assert await daemon.wait_exit() == 0, str(daemon.log)
        daemon.assert_nothing_left()
        assert list((folder / "tmp").iterdir()) == []
    finally:
        daemon.close()


def decoded(answer: object) -> pyvips.Image:
    assert isinstance(answer, str)
    return pyvips.Image.new_from_buffer(base64.b64decode(answer), "")


# --- what comfyd does


def test_it_says_its_version(tmp_path: Path, cache: Path) -> None:
    done = run(environment(tmp_path, cache), "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("comfyd ")


def test_the_demo_makes_its_picture(tmp_path: Path, cache: Path) -> None:
    done = run(environment(tmp_path, cache), "demo", "--output", str(tmp_path / "demo"))
    assert done.returncode == 0, done.stderr
    (made,) = (path for path in (tmp_path / "demo").iterdir() if path.suffix != ".log")
    assert pyvips.Image.new_from_file(str(made)).width > 100
    assert list((tmp_path / "tmp").iterdir()) == []


def test_bad_configuration_exits_with_2_and_names_the_variable(tmp_path: Path, cache: Path) -> None:
    done = run(environment(tmp_path, cache, PORT="http"), "run", "--embedded")
    assert done.returncode == 2
    assert "PORT" in done.stderr


async def test_a_workflow_file_may_import_the_standard_library_and_its_neighbours(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "workflows"
    folder.mkdir()
    (folder / "small.py").write_text(WORKFLOW)
    (folder / "_sizes.py").write_text("def twice(size: int) -> int:\n    return 2 * size\n")
    async with opened(tmp_path, environment(tmp_path, cache, WORKFLOW_DIR=str(folder))) as daemon:
        async with daemon.client() as client:
            answer = await client.post("/workflow/small", json={"input": {"width": 20}})
        assert answer.status_code == 200, answer.text
        made = decoded(answer.json()["images"][0])
        assert (made.width, made.height) == (40, 8)


@pytest.mark.parametrize("suffix", ["png", "webp", "jpeg", "avif"])
async def test_it_converts(tmp_path: Path, cache: Path, suffix: str) -> None:
    async with opened(tmp_path, environment(tmp_path, cache)) as daemon, daemon.client() as client:
        answer = await post(client, picture(size_px=64), convert_output={"format": suffix})
        assert answer.status_code == 200, answer.text
        assert decoded(answer.json()["images"][0]).width == 64
        assert answer.json()["filenames"][0].endswith((suffix, suffix.replace("jpeg", "jpg")))


async def test_it_uploads_with_what_is_left_of_botocore(tmp_path: Path, cache: Path, s3_server: Peer) -> None:
    with s3_server.client() as s3:
        s3.create_bucket(Bucket="binary")
        environ = environment(tmp_path, cache, **s3_server.environment(AWS_REGION="us-east-1"))
        async with opened(tmp_path, environ) as daemon, daemon.client() as client:
            answer = await post(client, picture(), s3={"bucket": "binary", "prefix": "made"})
            assert answer.status_code == 200, answer.text
        (stored,) = s3.list_objects_v2(Bucket="binary")["Contents"]
        assert stored["Key"].startswith("made")


def test_what_lies_beside_the_modules_is_in_it(tmp_path: Path, cache: Path) -> None:
    """The demo's picture, the pages of the docs: whatever a part of comfyd opens."""
    assert run(environment(tmp_path, cache), "--version").returncode == 0
    source = Path(comfyd.__file__).parent
    beside = {path.relative_to(source) for path in source.rglob("*") if path.suffix not in {".py", ".pyc"}}
    files = {path for path in beside if (source / path).is_file()}
    assert Path("embedded/demo/input.jpg") in files
    assert [path for path in files if not (unpacked_in(cache) / "_internal/comfyd" / path).is_file()] == []


# --- processes


async def test_it_is_one_process_beside_the_guard_and_the_engine(tmp_path: Path, cache: Path) -> None:
    """The pid that was started does the work: signals, systemd's MAINPID and SIGKILL meet the right one."""
    async with opened(tmp_path, environment(tmp_path, cache)) as daemon:
        assert os.readlink(f"/proc/{daemon.pid}/exe") == str(unpacked_in(cache) / "comfyd")
        commands = sorted(line.split()[1] for line in daemon.processes().values())
        assert commands == ["__embedded__", "__guard__"]


async def test_when_it_is_killed_the_engine_is_gone_too_and_nothing_is_in_tmp(tmp_path: Path, cache: Path) -> None:
    daemon = start(tmp_path, [str(BINARY), "run", "--embedded"], environment(tmp_path, cache))
    try:
        await trio.to_thread.run_sync(daemon.wait_ready, abandon_on_cancel=True)
        assert len(daemon.processes()) == 2
        daemon.process.kill()
        await daemon.wait_no_process(within_s=5)
        assert list((tmp_path / "tmp").iterdir()) == []
    finally:
        daemon.close()


async def test_an_engine_of_the_operators_sees_no_trace_of_the_bundle(tmp_path: Path, cache: Path) -> None:
    """Above all not our libraries' path: ComfyUI's Python would load our libcrypto and libstdc++."""
    script = f"export -p > {shlex.quote(str(tmp_path / 'seen'))}; exit 3"
    environ = environment(tmp_path, cache, CMD=shlex.join(["/bin/sh", "-c", script]), LD_LIBRARY_PATH="/the/operators")
    daemon = start(tmp_path, [str(BINARY), "run"], environ)
    try:
        assert await daemon.wait_exit() == 1, str(daemon.log)
    finally:
        daemon.close()
    seen = (tmp_path / "seen").read_text()
    assert "LD_LIBRARY_PATH='/the/operators'\n" in seen
    names = [line.removeprefix("export ").partition("=")[0] for line in seen.splitlines()]
    assert not [name for name in names if name.startswith(("_PYI", "_MEI")) or name.endswith("_ORIG")]


# --- how long it takes


def until_listening_s(folder: Path, argv: list[str], environ: Mapping[str, str]) -> float:
    """Start a daemon, and stop it when it listens; return how long that took."""
    folder.mkdir()
    began = time.monotonic()
    daemon = start(folder, argv, environ)
    try:
        daemon.log.wait_for("daemon.listening")
        took_s = time.monotonic() - began
        assert daemon.stop() == 0, str(daemon.log)
    finally:
        daemon.close()
    return took_s


@pytest.mark.parametrize(("first", "ratio"), [(True, 2.0), (False, 1.5)], ids=["unpacking", "unpacked"])
def test_it_listens_in_time(
    tmp_path: Path, cache: Path, first: bool, ratio: float, record_property: Callable[[str, object], None]
) -> None:
    """In START_S; on a machine that is too busy for that, in *ratio* times what the interpreter takes there."""
    run(environment(tmp_path, cache), "--version")
    ours, interpreters = [], []
    for number in range(5):
        environ = environment(tmp_path, tmp_path / f"unpacked-{number}" if first else cache)
        ours.append(until_listening_s(tmp_path / f"ours-{number}", [str(BINARY), "run", "--embedded"], environ))
        argv = [sys.executable, "-m", "comfyd", "run", "--embedded"]
        interpreters.append(until_listening_s(tmp_path / f"interpreters-{number}", argv, environ))
    record_property("until_listening_s", min(ours))
    record_property("interpreter_until_listening_s", min(interpreters))
    print(f"\nlistening after {min(ours):.2f} s, with the interpreter after {min(interpreters):.2f} s")
    assert min(ours) < max(START_S, ratio * min(interpreters))


# --- unpacking


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A cache in which nothing is unpacked yet."""
    return tmp_path / "own"


def unpacked_in(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


def test_many_first_starts_at_once_unpack_one_folder(tmp_path: Path, own: Path) -> None:
    environ = environment(tmp_path, own)
    with_pipe = {"env": environ, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    starts = [subprocess.Popen([BINARY, "--version"], **with_pipe) for _ in range(6)]  # type: ignore[call-overload]
    said = [process.communicate(timeout=60)[0] for process in starts]
    assert [process.returncode for process in starts] == [0] * 6, said
    assert unpacked_in(own).is_dir()


@pytest.mark.parametrize("damage", ["shorter", "missing", "a link"])
def test_a_damaged_folder_is_unpacked_again(tmp_path: Path, own: Path, damage: str) -> None:
    environ = environment(tmp_path, own)
    assert run(environ, "--version").returncode == 0
    library = next((unpacked_in(own) / "_internal").glob("libpython*"))
    whole = library.read_bytes()
    if damage == "shorter":
        os.truncate(library, 1000)
    else:
        library.unlink()
        if damage == "a link":
            library.symlink_to("/etc/hostname")
    assert run(environ, "--version").returncode == 0
    assert next((unpacked_in(own) / "_internal").glob("libpython*")).read_bytes() == whole


def test_other_versions_are_removed_unless_they_run_and_nothing_else_is(tmp_path: Path, own: Path) -> None:
    idle, running, unfinished, strange = own / ("0" * 32), own / ("1" * 32), own / ("2" * 32 + ".1a"), own / "notes"
    for folder in (idle, running, unfinished, strange):
        (folder / "_internal").mkdir(parents=True)
        (folder / "_internal" / "file").touch()
    descriptor = os.open(running, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        assert run(environment(tmp_path, own), "--version").returncode == 0
    finally:
        os.close(descriptor)
    assert [path for path in (idle, running, unfinished, strange) if path.exists()] == [running, strange]
    assert len(list(own.iterdir())) == 3


async def test_what_runs_holds_its_folder(tmp_path: Path, own: Path) -> None:
    async with opened(tmp_path, environment(tmp_path, own)):
        descriptor = os.open(unpacked_in(own), os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)


@pytest.fixture
def readable_copy(tmp_path: Path) -> Iterator[Path]:
    """A copy of the file to spoil."""
    copy = tmp_path / "copy"
    shutil.copy(BINARY, copy)
    yield copy
    copy.unlink()


def test_a_folder_into_which_others_may_write_is_not_used(tmp_path: Path, own: Path) -> None:
    own.mkdir()
    own.chmod(0o777)
    done = run(environment(tmp_path, own), "--version")
    assert done.returncode == 1
    assert f"{own}: others may write there" in done.stderr
    assert list(own.iterdir()) == []


def test_where_nothing_can_be_written_it_says_which_variable_helps(tmp_path: Path) -> None:
    done = run(environment(tmp_path, Path("/proc/self")), "--version")
    assert done.returncode == 1
    assert "COMFYD_UNPACK_DIR" in done.stderr


def test_without_a_chosen_folder_it_takes_the_users_cache_and_else_the_temporary_folder(tmp_path: Path) -> None:
    environ = environment(tmp_path, tmp_path, COMFYD_UNPACK_DIR="")
    assert run(environ, "--version").returncode == 0
    assert unpacked_in(tmp_path / ".cache/comfyd").is_dir()
    assert run({**environ, "XDG_CACHE_HOME": str(tmp_path / "xdg")}, "--version").returncode == 0
    assert unpacked_in(tmp_path / "xdg/comfyd").is_dir()
    assert run({**environ, "CACHE_DIRECTORY": str(tmp_path / "systemd")}, "--version").returncode == 0
    assert unpacked_in(tmp_path / "systemd").is_dir()


@pytest.mark.parametrize("where", ["cut off", "in the contents", "in the index"])
def test_a_file_that_was_damaged_on_its_way_is_not_run(
    tmp_path: Path, own: Path, readable_copy: Path, where: str
) -> None:
    size = readable_copy.stat().st_size
    if where == "cut off":
        os.truncate(readable_copy, size // 2)
    else:
        with readable_copy.open("r+b") as file:
            file.seek(size // 2 if where == "in the contents" else size - 1000)
            file.write(bytes(200))
    done = run(environment(tmp_path, own), "--version", program=readable_copy)
    assert done.returncode == 1
    assert "download or build it again" in done.stderr
    assert not own.exists() or list(own.iterdir()) == []


def test_it_holds_the_licences_that_it_is_passed_on_under(tmp_path: Path, cache: Path) -> None:
    assert run(environment(tmp_path, cache), "--version").returncode == 0
    folder = unpacked_in(cache) / "_internal" / "licenses"
    assert "libvips" in (folder / "comfyd/NOTICE").read_text()
    assert {"comfyd", "python", "trio", "boto3", "pyvips-binary"} <= {path.name for path in folder.iterdir()}
    assert [path for path in unpacked_in(cache).rglob("*") if "readline" in path.name or "gdbm" in path.name] == []
