"""Structured events to one line each on stderr, JSON or text, whoever logged them: comfyd, or a library via logging.

Names of keys are a contract with operators: ``time`` (UTC, ISO 8601, ms), ``level`` (trace, debug, info, warn, error,
fatal: comfyui-api's names), ``event``, ``logger``, ``job_id`` and ``attempt`` inside a job, the event's own
fields, ``traceback``. Logging never raises and never stalls the daemon: a stderr that is broken or stuck loses lines,
and is told how many once it takes some again.
"""

import logging
import os
import re
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from comfyd.host.redaction import redact, redacting, register_secret, register_secrets_of

if TYPE_CHECKING:
    from comfyd.config import LogConfig

__all__ = [
    "bind_job",
    "configure_logging",
    "current_job",
    "redacting",
    "register_secret",
    "register_secrets_of",
]

_TRACE: Final = 5  # below logging.DEBUG; comfyui-api's lowest level, which neither stdlib nor structlog has
_LEVELS: Final = {
    "trace": _TRACE,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
}
_BY_METHOD: Final = {"warning": "warn", "critical": "fatal", "exception": "error", "msg": "info"}

# What these libraries call info is our wire (debug), and their debug is below anything that an operator asked for.
_DEMOTED: Final = ("httpx",)
_NOISY: Final = (
    "httpcore",
    "boto3",
    "botocore",
    "s3transfer",
    "urllib3",
    "hpack",
    "pyvips",
    "trio-websocket",
    "wsproto",
)

_MAX_TEXT: Final = 16 * 1024  # of one field: more is a payload, not a log line; engine output is cut at 8 KiB already
_MAX_TRACEBACK: Final = 64 * 1024  # an exception group of a deep tree has many; the last part names the cause
_MAX_DEPTH: Final = 6  # of nested fields; deeper is a payload, and a cycle must end somewhere
_CHUNK: Final = 4096  # PIPE_BUF: a pipe that polls as writable takes this much without blocking (pipe(7))
_PATIENCE_S: Final = 0.1  # a reader that takes nothing for so long is stuck; lines are then dropped, not waited for

_job: ContextVar[tuple[str, int] | None] = ContextVar("comfyd_job", default=None)
_encode: Final = msgspec.json.Encoder(enc_hook=str, decimal_format="number").encode


@contextmanager
def bind_job(job_id: str, attempt: int) -> Iterator[None]:
    """Add ``job_id`` and ``attempt`` to every line logged inside, also by tasks and threads started there."""
    token = _job.set((job_id, attempt))
    try:
        yield
    finally:
        _job.reset(token)


def current_job() -> tuple[str, int] | None:
    """Id and attempt of the job that this task or thread works for; None outside of :func:`bind_job`."""
    return _job.get()


def configure_logging(config: "LogConfig", *, fd: int = 2, colour: bool | None = None) -> None:
    """Send structlog and :mod:`logging` to *fd* from now on. May be called again.

    *colour* None: for text on a terminal, unless ``NO_COLOR`` is set or ``TERM`` is ``dumb``.
    """
    threshold = _LEVELS[config.level]
    if config.format == "json":
        render: Callable[[dict[str, Any]], bytes] = _render_json
    else:
        render = partial(_render_text, colour=_wants_colour(fd) if colour is None else colour)
    sink = _Sink(fd=fd, render=render)
    # One list for the life of the process, changed in place: loggers that are cached hold it.
    _processors[:] = [partial(_process, sink)]
    structlog.configure(
        processors=_processors,
        wrapper_class=_bound_logger_class(threshold),
        logger_factory=_Named,
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    _configure_stdlib(threshold, sink)


_processors: Final[list[Any]] = []


def _wants_colour(fd: int) -> bool:
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    try:
        return os.isatty(fd)
    except OSError:
        return False


def _bound_logger_class(threshold: int) -> Any:
    """Make structlog's filtering logger, which does nothing below the threshold, and give it ``trace``."""
    base = structlog.make_filtering_bound_logger(logging.NOTSET if threshold == _TRACE else threshold)

    def trace(self: Any, event: str, **fields: Any) -> Any:
        return self._proxy_to_logger("trace", event, **fields)

    def nothing(_self: Any, _event: str, **_fields: Any) -> None:
        return None

    return type("BoundLogger", (base,), {"trace": trace if threshold == _TRACE else nothing})


class _Named:
    """The logger that structlog wraps: a name. Writing is done by the processor, so its methods do nothing."""

    __slots__ = ("name",)

    def __init__(self, name: str = "comfyd", *_: Any) -> None:
        self.name = name

    def _ignore(self, *_: Any, **__: Any) -> None:
        return None

    trace = debug = info = warning = error = critical = exception = fatal = warn = msg = _ignore


def _process(sink: "_Sink", logger: Any, method: str, fields: MutableMapping[str, Any]) -> Any:
    """Structlog's only processor: write the line, then end the call."""
    exc_info = fields.pop("exc_info", None)
    if method == "exception" and exc_info is None:
        exc_info = True
    sink.write(
        level=_BY_METHOD.get(method, method),
        logger=getattr(logger, "name", "comfyd"),
        event=fields.pop("event", ""),
        fields=fields,
        exc_info=exc_info,
    )
    raise structlog.DropEvent


# -- the standard library's loggers -----------------------------------------------------------------------------------


class _Handler(logging.Handler):
    """Gives records of :mod:`logging` the way that our own events take."""

    def __init__(self, sink: "_Sink", threshold: int) -> None:
        super().__init__()
        self._sink = sink
        self._threshold = threshold

    def emit(self, record: logging.LogRecord) -> None:
        level_no = record.levelno
        if record.name.startswith(_DEMOTED) and level_no == logging.INFO:
            level_no = logging.DEBUG
        if level_no < self._threshold:
            return
        try:
            event = record.getMessage()
        except Exception as exc:  # noqa: BLE001  a library's wrong format must not raise where it logs
            event = f"{record.msg} (arguments do not fit: {exc!r})"
        fields: dict[str, Any] = {}
        if record.stack_info:
            fields["stack"] = record.stack_info
        self._sink.write(
            level=_level_name(level_no), logger=record.name, event=event, fields=fields, exc_info=record.exc_info
        )


def _level_name(level_no: int) -> str:
    name = "trace"
    for candidate, threshold in _LEVELS.items():
        if level_no >= threshold:
            name = candidate
    return name


def _configure_stdlib(threshold: int, sink: "_Sink") -> None:
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
    root.addHandler(_Handler(sink, threshold))
    root.setLevel(threshold)
    logging.captureWarnings(True)
    for name in _DEMOTED:
        logging.getLogger(name).setLevel(logging.NOTSET if threshold <= logging.DEBUG else logging.WARNING)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.NOTSET if threshold <= _TRACE else logging.WARNING)


# -- from an event to a line ------------------------------------------------------------------------------------------


class _Sink:
    """Turns events into lines and writes each whole, from any thread. Swallows what stderr does, and counts it."""

    def __init__(self, *, fd: int, render: Callable[[dict[str, Any]], bytes]) -> None:
        self._fd = fd
        self._render = render
        # Reentrant: a finalizer that runs in here may warn, and warnings are logged.
        self._lock = threading.RLock()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._dropped = 0
        self._is_stuck = False
        self._is_mid_line = False

    def write(self, *, level: str, logger: str, event: Any, fields: Mapping[str, Any], exc_info: Any = None) -> None:
        try:
            record = _record(level, logger, event, fields)
            if exc_info:
                record["traceback"] = _clean(_traceback(exc_info), limit=_MAX_TRACEBACK)
            line = self._render(record)
        except Exception as exc:  # noqa: BLE001  whatever a field's __str__ does, its caller goes on
            failed = {"event_type": type(event).__name__, "reason": type(exc).__name__}
            line = self._render(_record("error", logger, "log.unprintable", failed))
        with self._lock:
            self._write_line(line)

    def _write_line(self, line: bytes) -> None:
        if self._dropped and self._is_writable(0.0):
            lost, self._dropped = self._dropped, 0
            if not self._put(self._render(_record("warn", "comfyd.log", "log.lines_dropped", {"lines": lost}))):
                self._dropped = lost
        if not self._put(line):
            self._dropped += 1

    def _put(self, line: bytes) -> bool:
        if self._is_mid_line:
            line = b"\n" + line
        try:
            for start in range(0, len(line), _CHUNK):
                chunk = memoryview(line)[start : start + _CHUNK]
                while chunk:
                    if not self._is_writable(0.0 if self._is_stuck else _PATIENCE_S):
                        self._is_stuck = True
                        return False
                    self._is_stuck = False
                    written = os.write(self._fd, chunk)
                    chunk = chunk[written:]
                    self._is_mid_line = True
        except OSError:  # EPIPE, EBADF, EIO of a terminal that is gone: nobody is left to tell
            return False
        self._is_mid_line = False
        return True

    def _is_writable(self, wait_s: float) -> bool:
        return bool(self._poll.poll(wait_s * 1000))


def _record(level: str, logger: str, event: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "time": _now(),
        "level": level,
        "event": _clean(event if type(event) is str else str(event)),
        "logger": logger,
    }
    job = _job.get()
    if job is not None:
        record["job_id"], record["attempt"] = job
    for name, value in fields.items():
        # A field cannot take the place of what every line has; the job's are its own to say.
        key = f"field_{name}" if name in ("time", "level", "logger", "event") else name
        record[key] = value if type(value) in _PLAIN else _clean(value)
    return record


_PLAIN: Final = frozenset({int, float, bool, type(None)})
_second: tuple[int, str] = (0, "")


def _now() -> str:
    """The time as ``2026-01-31T12:00:00.123Z``; the part up to the second is kept, as making it costs most."""
    global _second  # noqa: PLW0603  a cache; one tuple, replaced at once
    now = time.time()
    whole = int(now)
    second, text = _second
    if second != whole:
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))
        _second = (whole, text)
    return f"{text}.{int((now - whole) * 1000):03d}Z"


def _clean(value: Any, *, limit: int = _MAX_TEXT, depth: int = 0) -> Any:
    """Make *value* fit to be logged: plain, bounded, without secrets, and something that UTF-8 can express."""
    if type(value) is str:
        text = redact(value)
        if len(text) > limit:
            text = (
                f"{text[: limit // 4]} ...[{len(text) - limit} characters left out]... {text[-(limit - limit // 4) :]}"
            )
        return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")
    if type(value) in _PLAIN:
        return value
    if depth < _MAX_DEPTH:
        if isinstance(value, Mapping):
            return {_clean(str(key)): _clean(item, depth=depth + 1) for key, item in list(value.items())[:_MAX_ITEMS]}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [_clean(item, depth=depth + 1) for item in list(value)[:_MAX_ITEMS]]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes"
    return _clean(str(value), limit=limit, depth=depth)


_MAX_ITEMS: Final = 100  # of one list or mapping in a field, for the same reason as _MAX_TEXT


def _traceback(exc_info: Any) -> str:
    if exc_info is True:
        exc_info = sys.exc_info()
    exc = exc_info if isinstance(exc_info, BaseException) else exc_info[1]
    return "".join(traceback.format_exception(exc)).rstrip() if exc is not None else ""


def _render_json(record: dict[str, Any]) -> bytes:
    line = _encode(record)
    if not line.isascii():
        text = line.decode()
        if not text.isprintable():  # U+2028 is a line's end to some readers, U+009B begins a terminal's sequence
            line = _NOT_PRINTABLE.sub(_json_escape, text).encode()
    return line + b"\n"


def _json_escape(found: "re.Match[str]") -> str:
    character = found[0]
    if character.isprintable():
        return character
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


_NOT_PRINTABLE: Final = re.compile(r"[^ -~]")  # what may not be: str.isprintable has no pattern


_COLOURS: Final = {"trace": 90, "debug": 90, "info": 32, "warn": 33, "error": 31, "fatal": 35}
_BARE: Final = re.compile(r"[^\s\"'=]+")


def _render_text(record: dict[str, Any], *, colour: bool) -> bytes:
    """Render for people: time of day, level, event, fields; a traceback indented below."""
    moment, level, event, logger = (record.pop(key) for key in ("time", "level", "event", "logger"))
    trace = record.pop("traceback", None)
    fields = " ".join(
        f"{_painted(_printable(key) + '=', 36, colour)}{_text_value(value)}" for key, value in record.items()
    )
    line = " ".join(
        (
            _painted(moment[11:-1], 90, colour),  # the time of day, to the millisecond
            _painted(f"{level:5}", _COLOURS.get(level, 0), colour),
            _painted(f"{_printable(event):28}", 1, colour),
            _painted(_printable(f"{logger:16}"), 90, colour),
            fields,
        )
    ).rstrip()
    if trace:
        line += "".join(f"\n    {_printable(each)}" for each in trace.splitlines())
    return line.encode("utf-8", "backslashreplace") + b"\n"


def _painted(text: str, code: int, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text


def _text_value(value: Any) -> str:
    if type(value) is not str:
        return _printable(_encode(value).decode())
    return value if _BARE.fullmatch(value) and value.isprintable() else _printable(_encode(value).decode())


def _printable(text: str) -> str:
    """Escape what could move a terminal's cursor or forge a line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
