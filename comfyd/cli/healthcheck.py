"""``comfyd healthcheck``: asks this machine's daemon how it is. For containers, whose images have no curl.

It runs every few seconds beside a machine that works hard, so it imports next to nothing: neither the configuration
(half a second) nor Trio. It reads the four variables that it needs as ``variables.py`` does.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import http.client
    import ssl

EXIT_UNHEALTHY: Final = 1
"""For everything that is wrong: Docker reserves the other codes (Dockerfile reference, HEALTHCHECK)."""
DEFAULT_TIMEOUT_S: Final = 5.0
_DEFAULT_PORT: Final = 3000
_EVERY_ADDRESS: Final = frozenset({"", "::", "0.0.0.0", "0:0:0:0:0:0:0:0", "[::]"})  # noqa: S104  # compared only
_LOOPBACK: Final = "127.0.0.1"
"""Also of a daemon that listens on ``::``: its socket takes both families, and it is 0.0.0.0 where IPv6 is missing."""
_MAX_BODY_BYTES: Final = 64 * 1024  # ours are a hundred bytes; whoever else answers is not read to the end


class Unreachable(Exception):
    """No daemon answered; the text says why, in a few words."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line's *subparsers*."""
    parser = subparsers.add_parser(
        "healthcheck",
        help="ask the daemon on this machine whether it is healthy",
        description="Asks GET /health of the daemon that HOST, PORT and TLS_CERT_FILE in the environment tell of. "
        "The exit code is 0 if it is healthy, else 1, with the reason on stderr.",
    )
    parser.add_argument("--ready", action="store_true", help="ask GET /ready: may more work be sent to it?")
    parser.add_argument(
        "--timeout", type=_seconds, default=DEFAULT_TIMEOUT_S, metavar="S", help="seconds (default: %(default)g)"
    )


def healthcheck_command(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Ask the daemon; return the exit code: 0 if it is well, 1 for everything else."""
    path = "/ready" if options.ready else "/health"
    try:
        status, body = ask(path, environ, timeout_s=options.timeout)
    except Unreachable as exc:
        return _unhealthy(str(exc))
    answer = probe_answer(body)
    if answer is None:
        return _unhealthy(f"GET {path} answered {status}, and not as comfyd does: is somebody else on PORT?")
    return 0 if status == 200 else _unhealthy(f"GET {path} answered {status}: {reason_of(answer)}")


def ask(path: str, environ: Mapping[str, str], *, timeout_s: float) -> tuple[int, bytes]:
    """``GET`` *path* from the daemon that *environ* tells of; return the status and the body, which is cut at 64 KiB.

    Blocks, for *timeout_s* at most in each of connecting, TLS, and waiting for the answer.

    Raises:
        Unreachable: no daemon answered.
    """
    import http.client

    host, port = address_of(environ)
    connection = _connection(host, port, environ, timeout_s)
    try:
        connection.request("GET", path, headers={"Host": "localhost", "Connection": "close"})
        response = connection.getresponse()
        return response.status, response.read(_MAX_BODY_BYTES)
    except TimeoutError:
        raise Unreachable(f"no answer on port {port} within {timeout_s:g} s") from None
    except OSError as exc:
        raise Unreachable(f"port {port} of {host}: {exc.strerror or exc}") from exc
    except UnicodeError as exc:  # of the resolver, for a name that cannot be one
        raise Unreachable("HOST is neither an address nor a name") from exc
    except http.client.HTTPException as exc:
        raise Unreachable(f"what answers on port {port} speaks no HTTP{_tls_hint(environ)}") from exc
    finally:
        connection.close()


def address_of(environ: Mapping[str, str]) -> tuple[str, int]:
    """Return where the daemon of *environ* is reached from its own machine.

    Raises:
        Unreachable: HOST or PORT do not say it.
    """
    host = environ.get("HOST", "").strip()
    text = environ.get("PORT", "").strip() or str(_DEFAULT_PORT)
    if not (text.isascii() and text.lstrip("+").isdecimal() and len(text) <= 6 and int(text) <= 65_535):
        raise Unreachable("PORT is not a whole number from 0 to 65535")
    if int(text) == 0:
        raise Unreachable("PORT is 0, any free one, so the daemon's is not known here; give it a number")
    if not host.isprintable() or " " in host:
        raise Unreachable("HOST is neither an address nor a name")
    return _LOOPBACK if host in _EVERY_ADDRESS else host, int(text)


def probe_answer(body: bytes) -> dict[str, Any] | None:
    """Return what a probe of comfyd answered (``http/probes.py``); None if it is the answer of somebody else."""
    import json

    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    is_ours = isinstance(answer, dict) and {"version", "status"} <= answer.keys()
    return answer if is_ours else None


def reason_of(answer: Mapping[str, Any]) -> str:
    """Return why a probe's answer is not a good one, on one line."""
    reason = str(answer.get("reason") or answer["status"])
    return "".join(c if c.isprintable() else " " for c in reason)[:500]


def _connection(
    host: str, port: int, environ: Mapping[str, str], timeout_s: float
) -> "http.client.HTTPConnection | http.client.HTTPSConnection":
    import http.client

    certificate = environ.get("TLS_CERT_FILE", "")
    if not certificate:
        return http.client.HTTPConnection(host, port, timeout=timeout_s)
    return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=_tls(host, certificate))


def _tls(host: str, certificate: str) -> "ssl.SSLContext":
    """Trust whoever answers on loopback, and elsewhere only the daemon's own certificate, whatever its name.

    The certificate is for the name that callers use, which is not the address here. On loopback nobody is between us;
    where HOST is another address of this machine, the certificate in the file must be the one that is shown.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if host.startswith("127.") or host in ("::1", "localhost"):
        context.verify_mode = ssl.CERT_NONE
        return context
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # a leaf is enough, without its authority
    try:
        context.load_verify_locations(certificate)
    except OSError as exc:  # SSLError is one
        raise Unreachable(f"TLS_CERT_FILE cannot be read: {exc.strerror or 'it is no PEM certificate'}") from exc
    return context


def _tls_hint(environ: Mapping[str, str]) -> str:
    return "" if environ.get("TLS_CERT_FILE") else "; does it speak TLS? TLS_CERT_FILE is not set here"


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number <= 3600:
        raise argparse.ArgumentTypeError("must be a number of seconds greater than 0, at most 3600")
    return number


def _unhealthy(reason: str) -> int:
    sys.stderr.write(f"comfyd healthcheck: {reason}\n")
    return EXIT_UNHEALTHY
