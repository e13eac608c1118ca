"""Listening sockets that systemd opened for us: no request is refused while comfyd is restarted.

The protocol is sd_listen_fds(3)'s: ``LISTEN_FDS`` descriptors from number 3 on, meant for process ``LISTEN_PID``, with
names in ``LISTEN_FDNAMES``. The sockets outlive us: clients that connect while nobody runs wait in the backlog.
"""

import os
import socket
import stat
from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Final

import attrs

from comfyd.errors import StartupFailed
from comfyd.host.notify import meant_for_us

FIRST_FD: Final = 3
MAX_FDS: Final = 64
"""More listening sockets than any service has: a wrong number must not make us mark thousands of descriptors."""
_VARIABLES: Final = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


@attrs.frozen(kw_only=True)
class InheritedSocket:
    """A listening stream socket (TCP or Unix), non-blocking, that no child inherits. *name* is the unit's."""

    name: str
    socket: socket.socket

    @property
    def is_tcp(self) -> bool:
        """Whether TCP's options make sense for it."""
        return self.socket.family in (socket.AF_INET, socket.AF_INET6)


def take_inherited_sockets(
    environ: MutableMapping[str, str], *, first_fd: int = FIRST_FD
) -> tuple[InheritedSocket, ...]:
    """Take over the sockets that were passed to this process, and remove the variables from *environ*.

    Call it once, before anything else opens descriptors or starts processes. The caller closes the sockets. Empty if
    there are none or if they are meant for another process; its descriptors are then left alone.

    Raises:
        StartupFailed: what was passed is no listening stream socket. Nothing is closed then; comfyd is to exit.
    """
    count, pid, names = (environ.pop(name, "") for name in _VARIABLES)
    if not count or not meant_for_us(pid):
        return ()
    if not (count.isascii() and count.isdigit() and int(count) <= MAX_FDS):
        raise StartupFailed(f"LISTEN_FDS={count!r} is not a number of sockets from 0 to {MAX_FDS}")
    fds = range(first_fd, first_fd + int(count))
    for fd in fds:  # all of them first: one that is wrong must not leave the others to our children
        _keep_from_children(fd)
    with ExitStack() as undo:
        given = names.split(":") if names else []
        sockets = tuple(
            InheritedSocket(name=given[i] if i < len(given) else "unknown", socket=_listening_socket(fd, undo))
            for i, fd in enumerate(fds)
        )
        undo.pop_all()
    return sockets


def _keep_from_children(fd: int) -> None:
    try:
        os.set_inheritable(fd, False)
    except OSError as exc:
        raise StartupFailed(f"LISTEN_FDS counts descriptor {fd}, which is not open") from exc


def _listening_socket(fd: int, undo: ExitStack) -> socket.socket:
    """Make a socket of *fd*. On failure *undo* lets go of the descriptor without closing it: it may be anything."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise StartupFailed(f"descriptor {fd}, passed by LISTEN_FDS, is not a socket")
    sock = socket.socket(fileno=fd)
    undo.callback(sock.detach)
    if sock.family not in _FAMILIES or sock.type != socket.SOCK_STREAM:
        raise StartupFailed(
            f"descriptor {fd}, passed by LISTEN_FDS, is not a TCP or Unix stream socket; the socket unit needs"
            " ListenStream="
        )
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise StartupFailed(
            f"descriptor {fd}, passed by LISTEN_FDS, does not listen; the socket unit needs ListenStream= and Accept=no"
        )
    sock.setblocking(False)
    return sock
