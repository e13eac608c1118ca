"""An httpx client that connects only where the policy permits, whatever a name resolves to.

Only the TCP connection differs from plain httpx: it goes to an address that was checked, while Host, SNI and the
certificate's name stay the URL's. A second answer of the resolver ("DNS rebinding") is never asked for. Proxies of the
environment are not used: a proxy would do the connecting, to addresses that nobody checked.
"""

import contextlib
import http.cookiejar
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import ip_address
from typing import Any, Final

import httpcore
import httpx
import trio

from comfyd import __version__
from comfyd.net.policy import (
    Address,
    AddressKind,
    UrlPolicy,
    UrlRefused,
    check_parsed,
    display_url,
    literal_address,
    parse_url,
    port_of,
)

MAX_REDIRECTS: Final = 5
DEFAULT_LIMITS: Final = httpx.Limits(max_connections=40, max_keepalive_connections=8, keepalive_expiry=15)
"""httpcore walks its whole pool for each request (335 requests/s with 100 connections, 1650 with 10): keep it small."""

_LOCATION: Final = "comfyd_location"  # of httpx's response extensions
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_STAGGER_S: Final = 0.25  # RFC 8305: after so long the next address is tried beside the one that does not answer
_MAX_ADDRESSES: Final = 8  # tried of one name; more is a name made to keep us busy
_READ_BYTES: Final = 256 * 1024  # 32 downloads of 2 MB: 430 ms of the processor with 64 KiB, 300 ms with this
_RESOLVING_THREADS: Final = 16  # a resolver that does not answer holds its thread for up to 30 s after a cancel

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Gives the addresses of a host name, best first. Raises :class:`socket.gaierror`."""


class ConnectFailed(httpcore.ConnectError):
    """No connection could be made. httpx gives a ``ConnectError`` with the same text, caused by this.

    *reason* is for a message about the URL. *passing*: it may go by itself within a second.
    """

    def __init__(self, reason: str, *, passing: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.passing = passing


class RedirectRefused(UrlRefused):
    """An answer redirects to where we do not follow."""


class GuardedTransport(httpx.AsyncHTTPTransport):
    """The transport of :func:`open_client`: every request, redirected or not, is checked before and on connecting."""

    def __init__(
        self,
        policy: UrlPolicy,
        *,
        limits: httpx.Limits = DEFAULT_LIMITS,
        ssl_context: ssl.SSLContext | None = None,
        resolver: Resolver | None = None,
    ) -> None:
        # SSL_CERT_FILE and SSL_CERT_DIR add an operator's own authority; nothing else of the environment counts.
        context = httpx.create_ssl_context() if ssl_context is None else ssl_context
        super().__init__(verify=context, trust_env=False, limits=limits)
        self._policy = policy
        self._pool = httpcore.AsyncConnectionPool(  # as httpx makes it, but with our way to connect
            ssl_context=context,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=_GuardedBackend(policy, resolver or _SystemResolver()),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send *request*.

        Raises:
            UrlRefused: its URL is not permitted, or resolves to what is not.
        """
        check_parsed(request.url, self._policy)
        response = await super().handle_async_request(request)
        # httpx 0.28 prepares the redirected request although it is not to follow, and fails at a Location that is no
        # URL, before anybody saw the status. So it does not get to see it.
        if (location := response.headers.pop("location", None)) is not None:
            response.extensions[_LOCATION] = location
        return response


def open_client(
    policy: UrlPolicy,
    *,
    limits: httpx.Limits = DEFAULT_LIMITS,
    ssl_context: ssl.SSLContext | None = None,
    resolver: Resolver | None = None,
) -> httpx.AsyncClient:
    """Make a client for URLs that callers name; an async context manager, whose end closes its connections.

    It follows no redirects (httpx reads the body of a redirect whole; use :func:`open_get`), keeps no cookies, knows
    no proxies and no netrc, and asks for bodies as they are. Time-outs are the caller's.
    """
    # A client lives as long as the daemon: a cookie of one job's download must not go out with another's.
    no_cookies = http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
    return httpx.AsyncClient(
        transport=GuardedTransport(policy, limits=limits, ssl_context=ssl_context, resolver=resolver),
        timeout=None,  # noqa: S113  # see the docstring
        trust_env=False,
        follow_redirects=False,
        cookies=no_cookies,
        headers={"User-Agent": f"comfyd/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"},
    )


@asynccontextmanager
async def open_get(
    client: httpx.AsyncClient,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    timeout: httpx.Timeout | None = None,  # noqa: ASYNC109  # httpx's: between bytes, which no cancel scope can be
    max_redirects: int = MAX_REDIRECTS,
) -> AsyncIterator[httpx.Response]:
    """GET *url*, following redirects without reading their bodies; the answer's own body is still to be streamed.

    *headers* and the user-info of *url* go to its own origin only. A redirect from https to http is not followed: who
    asked for https would be given what anybody on the way may have written.

    Raises:
        UrlRefused: *url* is not permitted; as :class:`RedirectRefused`, where it leads to is not.
        httpx.TransportError: no answer.
    """
    target, own_headers = parse_url(url), headers
    for redirects in range(max_redirects + 1):
        request = client.build_request("GET", target, headers=own_headers, timeout=timeout)
        try:
            response = await client.send(request, stream=True, follow_redirects=False)
        except UrlRefused as exc:
            if redirects:
                raise RedirectRefused(f"it redirects to {display_url(target)}, but {exc.reason}") from exc
            raise
        try:
            location = response.extensions.get(_LOCATION)
            if response.status_code not in _REDIRECTS or location is None:
                yield response
                return
            following = _redirect_target(target, location)
        finally:
            await response.aclose()
        if not _same_origin(target, following):
            own_headers = None
        target = following
    raise RedirectRefused(f"it redirects more than {max_redirects} times")


@asynccontextmanager
async def open_body(response: httpx.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """Stream the body of *response* as it came, encoded as it may be; the block may be left before its end.

    httpx and httpcore have five async generators on top of each other. Left in the middle, those inside are found by
    the garbage collector later (trio warns of each). So the connection is closed, and they are driven to their end:
    what was received already is thrown away, and the next read fails in all of them.
    """
    pieces = response.aiter_raw()
    try:
        yield pieces
    finally:
        if not response.is_closed:  # else it was read to the end, and its connection may serve again
            with trio.move_on_after(5, shield=True):  # nothing here waits for the peer
                await response.extensions["network_stream"].aclose()
                with contextlib.suppress(httpx.TransportError):
                    async for _ in pieces:
                        pass


def _redirect_target(current: httpx.URL, location: str) -> httpx.URL:
    try:
        target = parse_url(str(current.join(parse_url(location))))
    except (httpx.InvalidURL, ValueError, UrlRefused):
        raise RedirectRefused("it redirects to something that is no URL") from None
    if target.scheme not in ("http", "https"):
        raise RedirectRefused(f"it redirects to {target.scheme}://, and only http:// and https:// are accepted")
    if current.scheme == "https" and target.scheme == "http":
        raise RedirectRefused("it redirects from https to http")
    if not target.userinfo and _same_origin(current, target):
        target = target.copy_with(userinfo=current.userinfo)
    return target


def _same_origin(one: httpx.URL, other: httpx.URL) -> bool:
    return (one.scheme, one.raw_host, port_of(one)) == (other.scheme, other.raw_host, port_of(other))


class _SystemResolver:
    """The operating system's resolver, in threads of its own: the shared ones must not be used up by a dead one."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(_RESOLVING_THREADS)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        answers = await trio.to_thread.run_sync(
            partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM),
            limiter=self._limiter,
            abandon_on_cancel=True,  # a harmless read
        )
        return [str(sockaddr[0]) for *_, sockaddr in answers]


class _GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that the policy permits, and to nothing else."""

    def __init__(self, policy: UrlPolicy, resolver: Resolver) -> None:
        self._policy = policy
        self._resolver = resolver
        self._tcp = httpcore.TrioBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's interface
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            with trio.fail_after(float("inf") if timeout is None else timeout):
                addresses = await self._permitted(host, port)
                connect = partial(
                    self._tcp.connect_tcp, port=port, local_address=local_address, socket_options=socket_options or ()
                )
                return _Stream(await _connect_first([str(each) for each in addresses], connect))
        except trio.TooSlowError:
            raise httpcore.ConnectTimeout("no connection in time") from None

    async def _permitted(self, host: str, port: int) -> list[Address]:
        """Resolve *host* once, and give the addresses that may be connected to."""
        literal = literal_address(host)
        if literal is not None:
            found = [literal]
        else:
            try:
                texts = await self._resolver(host, port)
            except (OSError, UnicodeError) as exc:
                passing = isinstance(exc, socket.gaierror) and exc.errno == socket.EAI_AGAIN
                reason = "its name server does not answer" if passing else "its host name does not resolve"
                raise ConnectFailed(reason, passing=passing) from exc
            # The zone says by which interface; only link-local addresses have one.
            found = [ip_address(text.partition("%")[0]) for text in dict.fromkeys(texts)]
        permitted: list[Address] = []
        refused: AddressKind | None = None
        for address in found:
            if kind := self._policy.refusal(host, port, address):
                refused = refused or kind
            else:
                permitted.append(address)
        if permitted:
            return permitted[:_MAX_ADDRESSES]
        if refused is None:
            raise ConnectFailed("its host name has no address", passing=False)
        verb = "is" if literal is not None else "resolves to"
        raise UrlRefused(f"{host} {verb} {self._policy.why(refused)}")


async def _connect_first(
    addresses: Sequence[str], connect: Callable[[str], Awaitable[httpcore.AsyncNetworkStream]]
) -> httpcore.AsyncNetworkStream:
    """Connect to the first of *addresses* that takes it, each beginning a moment after the one before (RFC 8305)."""
    won: list[httpcore.AsyncNetworkStream] = []
    errors: list[Exception] = []

    async def attempt(address: str, failed: trio.Event) -> None:
        try:
            stream = await connect(address)
        except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
            errors.append(exc)
            failed.set()
        else:
            won.append(stream)
            nursery.cancel_scope.cancel("connected")

    try:
        async with trio.open_nursery() as nursery:
            for address in addresses:
                failed = trio.Event()
                nursery.start_soon(attempt, address, failed)
                with trio.move_on_after(_STAGGER_S):
                    await failed.wait()
    except BaseException:
        with trio.move_on_after(1, shield=True):  # closes at once; the bound is for a surprise
            for stream in won:
                await stream.aclose()
        raise
    if not won:
        raise ConnectFailed(_connect_reason(errors[0]), passing=True) from errors[0]
    for loser in won[1:]:
        await loser.aclose()
    return won[0]


def _connect_reason(error: Exception) -> str:
    for cause in _causes(error):
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused"
        if isinstance(cause, OSError) and cause.strerror and not isinstance(cause, ssl.SSLError):
            return cause.strerror.lower()
    return "no connection"


def _causes(error: BaseException) -> Iterable[BaseException]:
    """Walk from *error* to what it came from, through exception groups (trio has one error for each address)."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        if isinstance(seen, BaseExceptionGroup):
            yield from _causes(seen.exceptions[0])
        seen = seen.__cause__ or seen.__context__


class _Stream(httpcore.AsyncNetworkStream):
    """A connection whose TLS handshake tells what went wrong, and leaves no socket open when it is cancelled."""

    def __init__(self, inner: httpcore.AsyncNetworkStream) -> None:
        self._inner = inner

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109  # httpcore's
        # httpcore asks for 64 KiB at a time, each of which goes through five generators. It takes what it is given.
        return await self._inner.read(max(max_bytes, _READ_BYTES), timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109  # httpcore's
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's interface
    ) -> httpcore.AsyncNetworkStream:
        try:
            return _Stream(await self._inner.start_tls(ssl_context, server_hostname, timeout))
        except httpcore.ConnectError as exc:
            for cause in _causes(exc):
                if isinstance(cause, ssl.SSLCertVerificationError):
                    raise ConnectFailed(
                        f"its certificate is not accepted: {cause.verify_message}", passing=False
                    ) from exc
                if isinstance(cause, ssl.SSLError):
                    raise ConnectFailed("TLS failed: it does not speak it as we do", passing=False) from exc
            raise ConnectFailed("TLS failed: the connection was closed", passing=True) from exc
        except BaseException:  # httpcore 1.0.9 closes it for errors, not for a cancel
            await self._inner.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
