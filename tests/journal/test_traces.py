"""The traces of files that a killed daemon may have left."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import LogCapture

from comfyd.journal import Trace, Traces

KILLED = """
import os, signal, sys
from pathlib import Path
from comfyd.journal import Traces
traces = Traces.open(Path(sys.argv[1]))
traces.begin("key-1", "job-1", ["one/a", "one/b"])
traces.begin("key-2", "job-2", ["two"])
traces.end("key-1")
traces.begin("key-3", "job-3", [])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def traces(tmp_path: Path) -> Iterator[Traces]:
    traces = Traces.open(tmp_path)
    yield traces
    traces.close()


def left(folder: Path) -> list[str]:
    traces = Traces.open(folder)
    traces.close()
    return [trace.job_id for trace in traces.left]


def test_what_was_begun_and_not_ended_is_known_after_sigkill(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "state"], check=False, timeout=30)
    assert done.returncode == -signal.SIGKILL
    traces = Traces.open(tmp_path / "state")
    assert traces.left == (
        Trace(key="key-2", job_id="job-2", prefixes=("two",)),
        Trace(key="key-3", job_id="job-3", prefixes=()),
    )
    traces.end("key-2")  # its files have been removed
    traces.close()
    assert left(tmp_path / "state") == ["job-3"]
    assert left(tmp_path / "state") == ["job-3"]  # until somebody says that they are gone


def test_when_nothing_is_open_the_file_is_empty(tmp_path: Path, traces: Traces) -> None:
    for key in ("a", "b"):
        traces.begin(key, "job", ["x"])
    for key in ("a", "b"):
        assert (tmp_path / "traces").stat().st_size > 0
        traces.end(key)
    assert (tmp_path / "traces").stat().st_size == 0
    traces.end("never begun")
    traces.begin("c", "job-c", ["x"])
    assert left(tmp_path) == ["job-c"]


@pytest.mark.parametrize("umask", [0o000, 0o277])
def test_it_is_the_owners_only(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        traces = Traces.open(tmp_path)
    finally:
        os.umask(before)
    traces.begin("a", "job", [])
    traces.close()
    assert (tmp_path / "traces").stat().st_mode & 0o777 == 0o600


def test_lines_that_are_torn_or_rubbish_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "traces").write_bytes(
        b'{"key":"a","job_id":"job-a","prefixes":["x"]}\n'
        b'\xff\x00rubbish\n{"key":5}\n[]\n\n{"job_id":"x"}\n'
        b'{"key":"b","job_id":"job-b","prefixes":["x"]}\n'
        b'{"key":"a"}\n'
        b'{"key":"c","job_id":"job-c","pre'
    )
    assert left(tmp_path) == ["job-b"]
    assert (tmp_path / "traces").read_bytes() == b'{"key":"b","job_id":"job-b","prefixes":["x"]}\n'


def test_it_does_not_grow_for_ever_beside_a_job_that_stays(tmp_path: Path, traces: Traces) -> None:
    traces.begin("stays", "job-stays", ["s"])
    largest = 0
    for number in range(8000):
        traces.begin(f"key-{number}", f"job-{number}", ["some/long/prefix" * 10])
        largest = max(largest, (tmp_path / "traces").stat().st_size)
        traces.end(f"key-{number}")
    assert 1 << 20 < largest < 1_100_000
    assert left(tmp_path) == ["job-stays"]


def test_in_memory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    traces = Traces.open(None)
    traces.begin("a", "job", ["x"])
    traces.end("a")
    traces.close()
    assert traces.left == ()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told_once_and_never_raised(tmp_path: Path, log_output: LogCapture) -> None:
    (tmp_path / "file").touch()
    traces = Traces.open(tmp_path / "file")
    for key in ("a", "b", "c"):
        traces.begin(key, "job", ["x"])
        traces.end(key)
    traces.close()
    told = [(entry["event"], entry["reason"]) for entry in log_output.entries]
    assert told[-1] == ("traces.not_written", os.strerror(errno.EEXIST))
    assert [event for event, _ in told].count("traces.not_written") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_told_once_and_what_follows_is_written_when_there_is_space_again(
    tmp_path: Path, traces: Traces, log_output: LogCapture
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    disk = os.dup(traces._fd)
    traces.begin("a", "job-a", ["x"])
    os.dup2(full, traces._fd)
    for key in ("b", "c"):
        traces.begin(key, f"job-{key}", ["x"])
    os.dup2(disk, traces._fd)
    traces.begin("d", "job-d", ["x"])
    assert left(tmp_path) == ["job-a", "job-d"]
    assert [entry["event"] for entry in log_output.entries] == ["traces.not_written"]
    os.close(full)
    os.close(disk)


def test_a_line_that_a_full_disk_tore_takes_none_of_the_next_with_it(
    tmp_path: Path, traces: Traces, log_output: LogCapture
) -> None:
    traces.begin("a", "job-a", ["x"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "traces").stat().st_size + 10, limits[1]))
    try:
        traces.begin("b", "job-b", ["x"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "traces").read_bytes().endswith(b'\n{"key":"b"')
    traces.begin("c", "job-c", ["x"])
    assert left(tmp_path) == ["job-a", "job-c"]
    assert [entry["event"] for entry in log_output.entries] == ["traces.not_written"]
