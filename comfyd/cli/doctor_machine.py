"""What ``comfyd doctor`` asks of the machine: port, folders, disks, journal, clock, GPU. What blocks is sync."""

import errno
import fcntl
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import trio

import comfyd
from comfyd.cli.finding import Finding, doubtful, failed, fine
from comfyd.errors import ComfydError

LOCK_NAME: Final = "lock"  # journal/database.py
MIN_FREE_BYTES: Final = 5_000_000_000
MIN_FREE_SHARE: Final = 0.1
_PROBE_BYTES: Final = 4096  # a quota or a full disk is found by writing, not by opening
_LISTENING: Final = "0A"  # state of a socket in /proc/net/tcp (TCP_LISTEN, include/net/tcp_states.h)
_NVIDIA_SMI_S: Final = 15.0  # it wakes a sleeping card
_CLOCK_SLACK_S: Final = 86_400.0
"""A package installed a moment ago may be of a machine whose clock is ahead of ours; time zones make a day of it."""


# --- port


def check_port(host: str, port: int) -> Finding:
    """Try to bind *port* as comfyd would, without listening on it."""
    if port == 0:
        return fine("port", "PORT is 0: any free one is taken at the start")
    try:
        addresses = _addresses(host, port)
        for family, address in addresses:
            _bind(family, address, port)
    except socket.gaierror as exc:
        return failed("port", f"HOST {host} cannot be resolved: {exc.strerror}", "set HOST to an address, such as ::")
    except OSError as exc:
        return _cannot_bind(host, port, exc)
    return fine("port", f"{port} is free")


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    """The families and addresses that comfyd binds for HOST (http/server/sockets.py)."""
    if host == "::":
        try:
            _bind(socket.AF_INET6, "::", 0)
        except OSError:
            return [(socket.AF_INET, "0.0.0.0")]  # noqa: S104  # every address was asked for; there is no IPv6
        return [(socket.AF_INET6, "::")]
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def _bind(family: socket.AddressFamily, address: str, port: int) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address == "::" else 1)
        sock.bind((address, port))


def _cannot_bind(host: str, port: int, exc: OSError) -> Finding:
    match exc.errno:
        case errno.EADDRINUSE:
            holder = port_holder(port) or "another process (not to be seen by this user)"
            return failed("port", f"{port} is taken by {holder}", "stop it, or choose another PORT")
        case errno.EADDRNOTAVAIL:
            return failed("port", f"HOST {host} is no address of this machine", "set HOST to one, such as ::")
        case errno.EACCES:
            advice = "choose a PORT of 1024 or more, or grant CAP_NET_BIND_SERVICE"
            return failed("port", f"this user may not listen on {port}", advice)
        case _:
            return failed("port", f"cannot listen on {host} port {port}: {exc.strerror}", "see HOST and PORT")


def port_holder(port: int, proc: Path = Path("/proc")) -> str | None:
    """Name the process of this network namespace that listens on *port*; None if it is not to be seen by this user."""
    inodes = set(_listening_inodes(port, proc))
    if not inodes:
        return None
    links = {f"socket:[{inode}]" for inode in inodes}
    for folder in proc.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            if any(os.readlink(fd) in links for fd in (folder / "fd").iterdir()):
                return f"{(folder / 'comm').read_text(errors='replace').strip()} (pid {folder.name})"
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or another user's
            continue
    return None


def _listening_inodes(port: int, proc: Path) -> Iterator[str]:
    """Rows of ``/proc/net/tcp``: sl, local address:port in hex, remote, state, ..., and the inode in column 9."""
    for name in ("tcp", "tcp6"):
        try:
            rows = (proc / "net" / name).read_text().splitlines()[1:]
        except FileNotFoundError:  # no IPv6
            continue
        for fields in (row.split() for row in rows):
            if len(fields) > 9 and fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]


# --- folders and disks


def check_folder(name: str, folder: Path, *, writable: bool = True, expected: bool = True) -> Finding:
    """Look whether *folder* is there and can be written, by writing a file without a name. It is not created.

    One that is not there fails if it could not be made when it is needed; else it is doubtful if it is *expected*.
    """
    variable = f"see {name}"
    try:
        if not folder.is_dir():
            return _missing_folder(name, folder, writable=writable, expected=expected)
        if not writable:
            next(folder.iterdir(), None)
            return fine(name, f"{folder} can be read")
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(_PROBE_BYTES))
            os.fsync(file.fileno())
    except OSError as exc:
        return failed(name, f"{folder} cannot be {'written' if writable else 'read'}: {exc.strerror}", variable)
    return fine(name, f"{folder} can be written")


def _missing_folder(name: str, folder: Path, *, writable: bool, expected: bool) -> Finding:
    if not writable:
        return failed(name, f"{folder} does not exist", f"see {name}") if expected else _not_needed(name, folder)
    above = next((parent for parent in folder.parents if parent.exists()), Path("/"))
    if not os.access(above, os.W_OK | os.X_OK):
        return failed(name, f"{folder} does not exist, and cannot be made by this user", f"create it, or set {name}")
    if expected:
        return doubtful(name, f"{folder} does not exist; it is made when it is needed", f"is {name} what you mean?")
    return fine(name, f"{folder} does not exist yet, and can be made")


def _not_needed(name: str, folder: Path) -> Finding:
    return fine(name, f"{folder} does not exist, and need not")


def check_disks(folders: Iterable[Path]) -> list[Finding]:
    """Look at the free space and inodes of each file system that the *folders* are or would be on."""
    by_device: dict[int, list[Path]] = {}
    for folder in folders:
        there = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
        paths = by_device.setdefault(there.stat().st_dev, [])
        if there not in paths:
            paths.append(there)
    return [_check_disk(paths) for paths in by_device.values()]


def _check_disk(paths: list[Path]) -> Finding:
    status = os.statvfs(paths[0])
    where = " and ".join(map(str, paths[:2])) + (f" and {len(paths) - 2} more" if len(paths) > 2 else "")
    total, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    share = free / total if total else 1.0
    what = f"{share:.0%} of the disk of {where} is free ({free / 1e9:.1f} of {total / 1e9:.1f} GB)"
    if share < MIN_FREE_SHARE or free < MIN_FREE_BYTES:
        return doubtful("disk", what, "make room: outputs, uploads and the journal need it")
    # Some file systems (btrfs) have no fixed number of inodes, and say 0.
    if status.f_files and status.f_favail / status.f_files < MIN_FREE_SHARE:
        return doubtful("disk", f"{status.f_favail} inodes of the disk of {where} are left", "remove small files")
    return fine("disk", what)


# --- journal


def is_locked(state_dir: Path) -> bool:
    """Whether a daemon runs on *state_dir*.

    The lock is tried, shared, and let go of at once: only a daemon that took it within these microseconds would be
    told that there is another. (/proc/locks would not disturb it, but knows no file of overlayfs or NFS by its inode.)
    """
    try:
        lock = (state_dir / LOCK_NAME).open("rb")
    except OSError:
        return False  # there was never a daemon here; or it is another user's, which check_journal tells
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def check_journal(state_dir: Path) -> Finding:
    """Open the journal as ``comfyd webhooks`` does, beside a daemon that runs or without one."""
    from comfyd.journal import Database

    try:
        with Database.open_beside(state_dir) as journal:
            dead = len(journal.list_webhooks(dead_only=True))
    except FileNotFoundError:
        return fine("journal", "there is none yet")
    except ComfydError as exc:
        return failed("journal", str(exc), f"run this as the daemon's user; the journal is in {state_dir}")
    except OSError as exc:
        return failed("journal", f"cannot be opened: {exc.strerror}", "run this as the daemon's user")
    if dead:
        letters = "webhook was" if dead == 1 else "webhooks were"
        return doubtful("journal", f"{dead} {letters} not taken by the receiver", "see `comfyd webhooks list`")
    return fine("journal", "can be read; no dead letters")


# --- clock and GPU


def check_clock(now: float | None = None) -> Finding:
    """Hold the clock against the time at which this package was installed: it cannot be earlier."""
    now = time.time() if now is None else now
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now + _CLOCK_SLACK_S < Path(comfyd.__file__).stat().st_mtime:
        advice = "set it: TLS and S3 refuse a clock that is wrong"
        return failed("clock", f"it is {shown}, before comfyd was installed", advice)
    return fine("clock", shown)


async def check_gpu(environ: Mapping[str, str], dev: Path = Path("/dev")) -> Finding:
    """Ask nvidia-smi for the GPUs, where it is there."""
    devices = sorted(
        name for name in os.listdir(dev) if name.removeprefix("nvidia").isdecimal() and name.startswith("nvidia")
    )
    try:
        with trio.fail_after(_NVIDIA_SMI_S):
            done = await trio.run_process(
                ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
                env=dict(environ),
                capture_stdout=True,
                stderr=subprocess.DEVNULL,
                check=False,
            )
    except trio.TooSlowError:
        return failed("gpu", f"nvidia-smi did not end within {_NVIDIA_SMI_S:g} s", "the driver hangs; see dmesg")
    except OSError:  # it is not there, which is usual in containers
        if devices:
            return fine("gpu", f"{', '.join(devices)} (nvidia-smi is not there to tell more)")
        return doubtful("gpu", "no NVIDIA GPU is to be seen", "in a container: was it started with --gpus all?")
    lines = [line.strip() for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
    if done.returncode or not lines:
        advice = "nvidia-smi fails: do driver and kernel module fit? In a container: was it started with --gpus all?"
        return doubtful("gpu", f"nvidia-smi ended with {done.returncode}", advice)
    return fine("gpu", "; ".join(lines))
