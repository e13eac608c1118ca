"""Accepting connections, and ending them all."""

import errno
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING

import structlog
import trio
from hypercorn.config import Config
from hypercorn.typing import ASGIFramework

from comfyd.host.socket_activation import InheritedSocket
from comfyd.http.server.certificate import Certificate
from comfyd.http.server.config import HttpServerConfig
from comfyd.http.server.connection import Connection, Service
from comfyd.http.server.lifespan import open_lifespan
from comfyd.http.server.sockets import adopt_listeners, base_url, open_listeners
from comfyd.http.server.tls import Handshakes

if TYPE_CHECKING:
    from quart import Quart

log = structlog.get_logger("comfyd.http")

#: No descriptor or memory for one more connection: pause, others will close meanwhile.
SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
SHORTAGE_PAUSE_S = 0.1
#: At the limit of connections with all of them busy: how soon to look again for one that has become idle.
AT_LIMIT_PAUSE_S = 0.05
#: A client that has just connected is not idle: its first request is on the way.
NEWCOMER_S = 1.0


async def serve_http(
    app: "ASGIFramework | Quart",
    config: HttpServerConfig,
    stop: trio.Event,
    *,
    inherited: Sequence[InheritedSocket] = (),
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve *app* until *stop* is set, then finish what was asked for ``config.stop_grace_s`` and close the rest.

    Returns within the grace period, the lifespan's end and a few milliseconds, whatever clients do. ``started()`` gets
    the base URL with the real port once connections are taken. Cancelling it closes every connection at once.

    An app hears ``http.disconnect`` as soon as its client leaves, also when that has only shut down its sending side.
    Bodies over ``config.max_body_bytes`` get 413 here, unless the app says by an attribute ``bounds_bodies = True``
    that it does so itself, as :class:`HardenedQuart` does; a dispatcher in front of one should say the same.

    Args:
        app: what answers.
        config: where to listen, with or without TLS, and what a client may cost.
        stop: ends it.
        inherited: sockets to listen on in place of ``config.host`` and ``config.port``; closed at the end.
        task_status: gets the base URL.

    Raises:
        StartupFailed: the address cannot be had, the certificate is no good, or the app's lifespan did not start.
    """
    async with AsyncExitStack() as stack:
        listeners = adopt_listeners(inherited, config) if inherited else await open_listeners(config)
        for listener in listeners:
            stack.callback(listener.socket.close)
        certificate = await Certificate.load(config.tls) if config.tls is not None else None
        state = await stack.enter_async_context(open_lifespan(app, config))
        service = Service(
            app=app,
            config=config,
            hypercorn=_hypercorn_config(config),
            state=state,
            app_bounds_bodies=bool(getattr(app, "bounds_bodies", False)),
            certificate=certificate,
            handshakes=Handshakes(config.max_handshakes),
        )
        connections = Connections(service)
        async with trio.open_nursery() as nursery:
            with ExitStack() as at_exit:
                at_exit.callback(connections.cut)  # also when cancelled: it ends even waits that are shielded
                with trio.CancelScope() as accepting:
                    async with trio.open_nursery() as accept_nursery:
                        if certificate is not None:
                            accept_nursery.start_soon(certificate.keep_current, config.tls_check_interval_s)
                        for listener in listeners:
                            accept_nursery.start_soon(connections.accept, listener, nursery)
                        url = base_url(config, listeners[0], adopted=bool(inherited))
                        log.debug("http.serving", url=url, host=None if inherited else config.host)
                        task_status.started(url)
                        await stop.wait()
                        accepting.cancel("stop")
                for listener in listeners:
                    listener.socket.close()
                await connections.drain(config.stop_grace_s)


class Connections:
    """The living connections of a server."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._living: set[Connection] = set()
        self._changed = trio.Event()
        self._short = False

    async def accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        """Take connections for ever, and serve each in *nursery*."""
        while True:
            await self._wait_for_room(listener)
            try:
                stream = await listener.accept()
            except OSError as exc:
                if exc.errno not in SHORTAGES:
                    raise
                if not self._short:  # once per shortage, as each client retries many times a second
                    log.error("http.accept_failed", reason=exc.strerror, connections=len(self._living))  # noqa: TRY400 -- no traceback: it says nothing more
                self._short = True
                await trio.sleep(SHORTAGE_PAUSE_S)
                continue
            self._short = False
            connection = Connection(self._service, stream)
            self._living.add(connection)
            nursery.start_soon(self._serve, connection)

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.run()
        finally:
            self._living.discard(connection)
            self._changed.set()
            self._changed = trio.Event()

    async def _wait_for_room(self, listener: trio.SocketListener) -> None:
        """Return when there is room for one more, making some once a client waits for it."""
        limit = self._service.config.max_connections
        while len(self._living) >= limit:
            await trio.lowlevel.wait_readable(listener.socket)
            newest = trio.current_time() - NEWCOMER_S
            idle = [c for c in self._living if c.idle and (c.requests or c.idle_since < newest)]
            idle.sort(key=lambda connection: connection.idle_since)
            evicted = next((connection for connection in idle if connection.close_if_idle()), None)
            log.debug("http.at_limit", connections=len(self._living), evicted=evicted is not None)
            with trio.move_on_after(AT_LIMIT_PAUSE_S):
                await self._changed.wait()

    async def drain(self, grace_s: float) -> None:
        """Let the connections finish what they do, for at most *grace_s*."""
        for connection in tuple(self._living):
            connection.drain()
        with trio.move_on_after(grace_s) as grace:
            while self._living:
                await self._changed.wait()
        if grace.cancelled_caught:
            log.warning("http.drain_timeout", cut=len(self._living), grace_s=grace_s)

    def cut(self) -> None:
        """Close every connection now."""
        for connection in tuple(self._living):
            connection.cut()


def _hypercorn_config(config: HttpServerConfig) -> Config:
    """What Hypercorn's streams look at."""
    hypercorn = Config()
    hypercorn.accesslog = hypercorn.errorlog = None  # we log, in our own words
    hypercorn.include_server_header = False  # no need to tell whom to attack
    hypercorn.websocket_max_message_size = config.max_websocket_message_bytes
    hypercorn.websocket_ping_interval = None  # TCP keep-alive and TCP_USER_TIMEOUT find dead peers
    return hypercorn
