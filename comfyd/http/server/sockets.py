"""Listening sockets with the options that keep dead clients from staying."""

import errno
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from urllib.parse import quote

import structlog
import trio

from comfyd.errors import StartupFailed
from comfyd.host.socket_activation import InheritedSocket
from comfyd.http.server.config import HttpServerConfig

log = structlog.get_logger("comfyd.http")

#: A silent peer is asked after 60 s, then each 15 s, and given up after 4 questions: two minutes.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 60, 15, 4


async def open_listeners(config: HttpServerConfig) -> list[trio.SocketListener]:
    """Bind and listen on every address of ``config.host``, on one port.

    Returns:
        At least one listener; the caller closes them.

    Raises:
        StartupFailed: the port is taken, the address is not ours or does not exist.
    """
    with ExitStack() as undo:
        listeners: list[trio.SocketListener] = []
        port = config.port
        for family, address in await _addresses(config):
            try:
                sock = undo.enter_context(_listening_socket(family, address, port, config))
            except OSError as exc:
                raise StartupFailed(
                    f"cannot listen on {config.host}:{config.port}: {exc.strerror or exc}"
                    + (" (is another comfyd running?)" if exc.errno == errno.EADDRINUSE else "")
                ) from exc
            port = sock.getsockname()[1]  # the further addresses get the port that the first one was given
            listeners.append(trio.SocketListener(trio.socket.from_stdlib_socket(sock)))
        undo.pop_all()
        return listeners


def adopt_listeners(inherited: Sequence[InheritedSocket], config: HttpServerConfig) -> list[trio.SocketListener]:
    """Listen on sockets that systemd opened, instead of ``config.host``; the caller closes them.

    TCP ones get the options of our own. They need not be bound to ``config.port``.
    """
    for each in inherited:
        if each.is_tcp:
            _set_tcp_options(each.socket, config)
    return [trio.SocketListener(trio.socket.from_stdlib_socket(each.socket)) for each in inherited]


def base_url(config: HttpServerConfig, listener: trio.SocketListener, *, adopted: bool = False) -> str:
    """The URL under which this machine reaches *listener*, with the real port.

    One that was *adopted* listens where systemd bound it, whatever ``config.host`` says. A Unix socket has no URL that
    everybody knows; ``http+unix`` is what the libraries for it understand.
    """
    if listener.socket.family == socket.AF_UNIX:
        return f"http+unix://{quote(os.fsdecode(listener.socket.getsockname()), safe='')}"
    address, port = listener.socket.getsockname()[:2]
    loopback = {"::": "::1", "0.0.0.0": "127.0.0.1"}.get(address)  # noqa: S104 -- compared, not bound
    host = loopback or (address if adopted else config.host)
    scheme = "http" if config.tls is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


async def _addresses(config: HttpServerConfig) -> list[tuple[socket.AddressFamily, str]]:
    """The families and numeric addresses to bind, in the resolver's order and without repeats."""
    if config.host in {"::", ""}:
        if _has_ipv6():
            return [(socket.AF_INET6, "::")]
        log.warning("http.no_ipv6", host=config.host, instead="0.0.0.0")  # noqa: S104
        return [(socket.AF_INET, "0.0.0.0")]  # noqa: S104 -- "::" asked for every address
    try:
        found = await trio.socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as exc:
        raise StartupFailed(f"cannot listen on {config.host}:{config.port}: {exc.strerror or exc}") from exc
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def _has_ipv6() -> bool:
    """Whether this machine (or container) has IPv6; a kernel may know it and still have it switched off."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind(("::", 0))
    except OSError:
        return False
    return True


def _listening_socket(family: socket.AddressFamily, address: str, port: int, config: HttpServerConfig) -> socket.socket:
    """A bound, listening, non-blocking socket. Linux hands its TCP options on to the connections it accepts."""
    with ExitStack() as undo:
        sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # restart without waiting for TIME_WAIT
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address == "::" else 1)
        _set_tcp_options(sock, config)
        sock.bind((address, port))
        sock.listen(config.backlog)
        undo.pop_all()
        return sock


def _set_tcp_options(sock: socket.socket, config: HttpServerConfig) -> None:
    """Linux hands them on to the connections that are accepted."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # we write whole pieces; Nagle only delays them
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(config.user_timeout_s * 1000))
