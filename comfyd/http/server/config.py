"""The limits of the HTTP server, each set on purpose."""

from pathlib import Path

import attrs
from attrs import validators

MIB = 1024 * 1024


@attrs.frozen(kw_only=True)
class TlsFiles:
    """PEM files: the certificate followed by its intermediates, and its key without a passphrase."""

    certificate: Path
    key: Path


@attrs.frozen(kw_only=True)
class HttpServerConfig:
    """Where to listen, and what a client may cost us. Durations are seconds."""

    #: An address or name; ``::`` listens on IPv4 and IPv6.
    host: str
    #: 0 takes any free port.
    port: int = attrs.field(validator=[validators.ge(0), validators.le(65535)])
    #: None: plain HTTP. Else every TCP client must speak TLS. Clients of a Unix socket are on this machine: plain.
    tls: TlsFiles | None = None
    #: How often the files are looked at. Renewals come weeks before the end.
    tls_check_interval_s: float = 60.0
    #: Handshakes under way at once; one more ends the oldest. With 100 ms to the client that is some 1500 new clients
    #: each second, more than one core can sign for.
    max_handshakes: int = attrs.field(default=300, validator=validators.ge(1))
    #: Larger request bodies get 413.
    max_body_bytes: int = attrs.field(validator=validators.ge(0))
    #: How long open requests may still take after the stop; then every connection is closed by force.
    stop_grace_s: float = attrs.field(default=2.0, validator=validators.ge(0))
    #: How long a kept connection may be idle. Longer than the 60 s of usual balancers, so that it is they who close
    #: first: a connection closed by us just as the balancer sends the next request shows as a 502.
    keep_alive_timeout_s: float = 75.0
    #: From the first byte of a request (or the opening of a connection) to the end of its header. Cuts slow-loris.
    #: The TLS handshake, before that, has as long.
    header_timeout_s: float = 10.0
    #: How long an upload may stand still, and what it must keep up with afterwards: each second allowed is earned by
    #: ``min_upload_bytes_per_s`` received, up to ``body_timeout_s``. There is no limit on the total, because an honest
    #: upload of 100 MB over a phone takes minutes; one byte each ten seconds is cut after ``body_timeout_s``. Time in
    #: which *we* do not read (the app is slow) is not counted.
    body_timeout_s: float = 30.0
    min_upload_bytes_per_s: int = attrs.field(default=1024, validator=validators.ge(1))
    #: How long a client may take nothing at all of an answer before its connection is closed.
    send_timeout_s: float = 60.0
    #: ``TCP_USER_TIMEOUT``: the kernel's bound on data without acknowledgement, for what we no longer watch (the rest
    #: in its buffer after our close) and for peers that vanished. As long as ``send_timeout_s``, for the same reason.
    user_timeout_s: float = 60.0
    #: After an answer that came before the end of the request body (413, 404), or after our close, what the client
    #: still sends is dropped for so long. Closing at once would reset the connection, and the client might never see
    #: the answer.
    linger_s: float = 2.0
    #: Once its client left, an app gets ``http.disconnect``; if it does not end by itself, it is cancelled after this.
    disconnect_grace_s: float = 5.0
    #: Start-up and shut-down of the app's lifespan. Start-up may do real work; the shut-down is part of our stop,
    #: which must not take longer than ``stop_grace_s`` plus about a second.
    lifespan_startup_timeout_s: float = 60.0
    lifespan_shutdown_timeout_s: float = 0.8
    #: One header. Balancers add cookies and certificates: 32 KiB is what they themselves allow at most.
    max_header_bytes: int = 32 * 1024
    #: Request bytes parsed but not yet taken by the app, in pieces of up to 64 KiB. Beyond it we stop reading.
    max_queued_pieces: int = attrs.field(default=10, validator=validators.ge(1))
    #: ComfyUI itself allows 100 MB; previews and graphs are far below 16.
    max_websocket_message_bytes: int = 16 * MIB
    #: About 35 KB each while a request waits, so 70 MB. Beyond it the longest idle one is closed, else clients wait in
    #: the backlog.
    max_connections: int = attrs.field(default=2000, validator=validators.ge(1))
    #: Clients that connected and were not accepted yet: a burst of a whole fleet. The kernel caps it at somaxconn.
    backlog: int = 2048
    #: After so many requests a connection is closed, so that balancers even out over several daemons.
    max_requests_per_connection: int = 10_000
