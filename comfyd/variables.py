"""The table of environment variables: name, default, meaning, what is allowed, and where the value goes."""

import ipaddress
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import attrs

from comfyd.net.policy import ALLOW_FORMS, PolicyMode, parse_allow, parse_mode

MEBIBYTE: Final = 1024 * 1024
SYSTEM_META_PREFIX: Final = "SYSTEM_META_"
SYSTEM_EVENTS: Final = (
    "status",
    "progress",
    "progress_state",
    "executing",
    "execution_start",
    "execution_cached",
    "executed",
    "execution_success",
    "execution_interrupted",
    "execution_error",
)


@attrs.frozen(kw_only=True)
class Kind:
    """How a variable's text is read. *parse* raises ValueError, with a text where *allowed* would not be enough."""

    allowed: str
    parse: Callable[[str], Any]
    show: Callable[[Any], str] = str


@attrs.frozen(kw_only=True)
class Variable:
    """One environment variable. *target* is ``group.field`` of :class:`comfyd.config.Config`.

    *default* is text that is read as if it had been given; None is no value, and *default_note* then says in words
    what holds (it may depend on other variables). Empty text counts as unset unless *empty_is_value*.
    """

    name: str
    kind: Kind
    target: str
    meaning: str
    default: str | None = None
    default_note: str = ""
    empty_is_value: bool = False


def whole_number(least: int, most: int, unit: int = 1) -> Kind:
    """Read a whole number; the value is it times *unit*."""

    def parse(text: str) -> int:
        if re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()) is None:
            raise ValueError
        number = int(text)
        if not least <= number <= most:
            raise ValueError
        return number * unit

    return Kind(
        allowed=f"a whole number from {least} to {most}",
        parse=parse,
        show=lambda value: str(value // unit),
    )


def seconds(*, zero: str | None = None, zero_is_none: bool = False, most: float = 86_400.0) -> Kind:
    """Read a duration. Where zero is a choice, *zero* says what it means."""

    def parse(text: str) -> float | None:
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text.strip()) is None:
            raise ValueError
        number = float(text)
        if number > most or (number == 0 and zero is None):
            raise ValueError
        return None if zero_is_none and number == 0 else number

    allowed = f"a number of seconds greater than 0, at most {most:.0f}"
    return Kind(
        allowed=f"{allowed}, or 0 ({zero})" if zero is not None else allowed,
        parse=parse,
        show=lambda value: "0" if value is None else str(value).removesuffix(".0"),
    )


def choice(*words: str) -> Kind:
    """Read one of *words*, in any case."""

    def parse(text: str) -> str:
        word = text.strip().lower()
        if word not in words:
            raise ValueError
        return word

    return Kind(allowed="one of " + ", ".join(word or "(empty)" for word in words), parse=parse)


def _parse_boolean(text: str) -> bool:
    word = text.strip().lower()
    if word in ("true", "1", "yes", "on"):
        return True
    if word in ("false", "0", "no", "off"):
        return False
    raise ValueError


def _parse_folder(text: str) -> Path:
    path = _parse_path(text)
    if path.exists() and not path.is_dir():
        raise ValueError("a folder; a file is there")
    return path


def _parse_file(text: str) -> Path:
    path = _parse_path(text)
    if not path.is_file():
        raise ValueError("the path of a file that exists")
    return path


def _parse_path(text: str) -> Path:
    if "\0" in text:
        raise ValueError
    return Path(text).absolute()


def _parse_host(text: str) -> str:
    host = text.strip()
    try:
        ipaddress.ip_address(host)
    except ValueError:
        labels = host.removesuffix(".").split(".")
        label = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
        is_name = len(host) <= 253 and all(label.fullmatch(each) for each in labels)
        if not is_name or labels[-1].isdigit():  # 1.2.3, 256.0.0.1: meant as an address
            raise ValueError from None
    return host


def _parse_http_url(text: str) -> str:
    url = text.strip()
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.scheme.lower() in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:  # a broken IPv6 host or port; its text may repeat a password
        raise ValueError from None
    if not is_whole or re.search(r"[\s\0]", url):
        raise ValueError
    return url


def _parse_events(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    names = [name for name in names if name]
    unknown = [name for name in names if name not in (*SYSTEM_EVENTS, "all")]
    if unknown:
        raise ValueError
    return SYSTEM_EVENTS if "all" in names else tuple(dict.fromkeys(names))


def _parse_names(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) for name in names):
        raise ValueError
    return tuple(dict.fromkeys(names))


def _comma(values: Iterable[str]) -> str:
    return ",".join(values)


BOOLEAN: Final = Kind(
    allowed="true, 1, yes, on, false, 0, no or off", parse=_parse_boolean, show=lambda v: str(v).lower()
)
FOLDER: Final = Kind(allowed="the path of a folder", parse=_parse_folder)
FILE: Final = Kind(allowed="the path of a file that exists", parse=_parse_file)
HOST: Final = Kind(allowed="an IP address or a host name", parse=_parse_host)
HTTP_URL: Final = Kind(allowed="an http:// or https:// URL", parse=_parse_http_url)
COMMAND: Final = Kind(allowed="a command line", parse=str)  # split where the engine's PATH is known
EVENTS: Final = Kind(
    allowed=f"a comma separated list of {', '.join(SYSTEM_EVENTS)}; or all", parse=_parse_events, show=_comma
)
NAMES: Final = Kind(allowed="a comma separated list of variable names", parse=_parse_names, show=_comma)
PORT: Final = whole_number(0, 65_535)


def _parse_secrets(text: str) -> tuple[bytes, ...]:
    from comfyd.webhooks.signature import parse_secrets  # only who sets it needs it

    return parse_secrets(text)


SECRETS: Final = Kind(
    allowed="a comma separated list of base64 texts of 16 bytes or more, each with or without whsec_ in front",
    parse=_parse_secrets,
    show=lambda value: "set" if value else "",  # and masked, as the name says that it is a secret
)


URL_MODE: Final = Kind(
    allowed=", ".join(mode.value for mode in PolicyMode), parse=parse_mode, show=lambda mode: str(mode.value)
)
URL_ALLOWED: Final = Kind(
    allowed=ALLOW_FORMS, parse=parse_allow, show=lambda entries: _comma(entry.text for entry in entries)
)


def _state_folder(text: str) -> Path | None:
    return _parse_folder(text) if text else None


STATE_FOLDER: Final = Kind(
    allowed="the path of a folder, or empty for memory only",
    parse=_state_folder,
    show=lambda value: "" if value is None else str(value),
)


def _parse_keys(text: str) -> tuple[str, ...]:
    keys = tuple(key.strip() for key in text.split(","))
    if not all(keys) or not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise ValueError
    return keys


def _parse_origins(text: str) -> tuple[str, ...]:
    from comfyd.http.cors import parse_origin  # only who sets it needs it

    return tuple(dict.fromkeys(parse_origin(origin) for origin in text.split(",") if origin.strip()))


KEYS: Final = Kind(
    allowed="a comma separated list of keys, each of visible ASCII characters without spaces",
    parse=_parse_keys,
    show=lambda value: "set" if value else "",  # and masked, as the name says that it is a secret
)
ORIGINS: Final = Kind(
    allowed="a comma separated list of origins such as https://app.example.com, or *", parse=_parse_origins, show=_comma
)

_BELOW_HOME: Final = "COMFY_HOME/{}; below the state folder with --embedded"

VARIABLES: Final[tuple[Variable, ...]] = (
    Variable(
        name="HOST",
        kind=HOST,
        target="http.host",
        default="::",
        meaning="address that comfyd listens on; :: is IPv6 and IPv4",
    ),
    Variable(
        name="PORT",
        kind=PORT,
        target="http.port",
        default="3000",
        meaning="port that comfyd listens on; 0 is any free one",
    ),
    Variable(
        name="MAX_BODY_SIZE_MB",
        kind=whole_number(1, 10_240, MEBIBYTE),
        target="http.max_body_bytes",
        default="100",
        meaning="largest request body, in MiB",
    ),
    Variable(
        name="API_KEYS",
        kind=KEYS,
        target="http.api_keys",
        default_note="(none: every route is open)",
        meaning="keys, one of which every route but the probes and the metrics wants",
    ),
    Variable(
        name="CORS_ORIGINS",
        kind=ORIGINS,
        target="http.cors_origins",
        default_note="(none: no other origin's pages)",
        meaning="origins whose pages may call comfyd from a browser",
    ),
    Variable(
        name="TLS_CERT_FILE",
        kind=FILE,
        target="http.tls_cert_file",
        default_note="(none: plain HTTP)",
        meaning="certificate chain (PEM): comfyd speaks HTTPS then; with TLS_KEY_FILE",
    ),
    Variable(
        name="TLS_KEY_FILE",
        kind=FILE,
        target="http.tls_key_file",
        default_note="(none)",
        meaning="the certificate's key (PEM, not encrypted)",
    ),
    Variable(
        name="METRICS_PORT",
        kind=PORT,
        target="http.metrics_port",
        default_note="(none: on PORT)",
        meaning="port of its own for /metrics, with the probes, in plain HTTP; 0 is any free one",
    ),
    Variable(
        name="CMD",
        kind=COMMAND,
        target="engine.argv",
        default_note="`init.sh`; if that is not on PATH, `COMFY_HOME/main.py` with the right flags",
        meaning="command that starts ComfyUI; quotes work, there is no shell",
    ),
    Variable(
        name="COMFY_HOME",
        kind=FOLDER,
        target="engine.home",
        default="/opt/ComfyUI",
        meaning="ComfyUI's folder",
    ),
    Variable(
        name="DIRECT_ADDRESS",
        kind=HOST,
        target="engine.address",
        default="127.0.0.1",
        meaning="address where ComfyUI answers",
    ),
    Variable(
        name="COMFYUI_PORT_HOST",
        kind=PORT,
        target="engine.port",
        default_note="`8188`; `0` with --embedded",
        meaning="port where ComfyUI answers; 0 is a free one, only without CMD",
    ),
    Variable(
        name="INPUT_DIR",
        kind=FOLDER,
        target="engine.input_dir",
        default_note=_BELOW_HOME.format("input"),
        meaning="ComfyUI's input folder",
    ),
    Variable(
        name="OUTPUT_DIR",
        kind=FOLDER,
        target="engine.output_dir",
        default_note=_BELOW_HOME.format("output"),
        meaning="ComfyUI's output folder",
    ),
    Variable(
        name="MODEL_DIR",
        kind=FOLDER,
        target="engine.model_dir",
        default_note=_BELOW_HOME.format("models"),
        meaning="ComfyUI's model folder",
    ),
    Variable(
        name="BASE",
        kind=choice("ai-dock", ""),
        target="engine.base",
        default="ai-dock",
        empty_is_value=True,
        meaning="image whose environment the engine gets; ai-dock counts only where its files exist",
    ),
    Variable(
        name="STARTUP_CHECK_INTERVAL_S",
        kind=seconds(),
        target="engine.start_interval_s",
        default="1",
        meaning="seconds between two looks whether ComfyUI answers",
    ),
    Variable(
        name="STARTUP_CHECK_MAX_TRIES",
        kind=whole_number(1, 1_000_000),
        target="engine.start_max_tries",
        default="10",
        meaning="looks before the start has failed; times the interval it is the start-up budget",
    ),
    Variable(
        name="ALWAYS_RESTART_COMFYUI",
        kind=BOOLEAN,
        target="engine.always_restart",
        default="false",
        meaning="restart ComfyUI when it ends; otherwise comfyd exits with it",
    ),
    Variable(
        name="COMFYUI_RESTART_LIMIT",
        kind=whole_number(1, 10_000),
        target="engine.restart_limit",
        default="10",
        meaning="failures within 10 minutes after which comfyd gives up",
    ),
    Variable(
        name="COMFYUI_STOP_GRACE_S",
        kind=seconds(zero="SIGKILL at once", most=3600.0),
        target="engine.stop_grace_s",
        default="5",
        meaning="seconds from SIGTERM to SIGKILL for ComfyUI",
    ),
    Variable(
        name="COMFYUI_HANG_TIMEOUT_S",
        kind=seconds(zero="off"),
        target="engine.hang_timeout_s",
        default="120",
        meaning="seconds without any sign of life (HTTP, events, CPU) after which ComfyUI is killed and restarted",
    ),
    Variable(
        name="CHILD_ENV_PASS",
        kind=NAMES,
        target="engine.env_pass",
        default="",
        default_note="(none)",
        meaning="secrets of comfyd that ComfyUI may see all the same",
    ),
    Variable(
        name="MAX_QUEUE_DEPTH",
        kind=whole_number(0, 1_000_000),
        target="jobs.max_queue_depth",
        default="0",
        meaning="jobs waiting and running from which on the readiness probe answers 503; 0 is no limit",
    ),
    Variable(
        name="MAX_QUEUED_JOBS",
        kind=whole_number(1, 1_000_000),
        target="jobs.max_queued",
        default="1000",
        meaning="jobs that may wait; one more is refused with 429",
    ),
    Variable(
        name="JOB_MAX_ATTEMPTS",
        kind=whole_number(1, 100),
        target="jobs.max_attempts",
        default="2",
        meaning="runs of a job under which ComfyUI died, before it is given up as the cause",
    ),
    Variable(
        name="JOB_RETENTION_S",
        kind=seconds(most=31_536_000.0),
        target="jobs.retention_s",
        default="86400",
        meaning="seconds that an ended job with a 202, and the outputs that comfyd keeps of it, can be asked for",
    ),
    Variable(
        name="JOB_RETENTION_MB",
        kind=whole_number(1, 104_857_600, MEBIBYTE),
        target="jobs.retention_bytes",
        default="10240",
        meaning="most that such outputs take, in MiB; beyond it the oldest go before their time",
    ),
    Variable(
        name="DEAD_LETTER_RETENTION_S",
        kind=seconds(most=31_536_000.0),
        target="jobs.dead_letter_retention_s",
        default="604800",
        meaning="seconds that a webhook which nobody took, and what its body is built of, can be replayed",
    ),
    Variable(
        name="JOB_TIMEOUT_S",
        kind=seconds(zero="no limit", zero_is_none=True, most=2_592_000.0),
        target="jobs.timeout_s",
        default="0",
        meaning="seconds from submission to result, where a job does not say",
    ),
    Variable(
        name="DRAIN_TIMEOUT_S",
        kind=seconds(zero="do not wait"),
        target="jobs.drain_timeout_s",
        default="25",
        meaning="seconds from SIGTERM to cancelling what is in flight",
    ),
    Variable(
        name="WARMUP_PROMPT_FILE",
        kind=FILE,
        target="jobs.warmup_file",
        meaning="JSON file with a prompt that runs before the daemon is ready",
    ),
    Variable(
        name="MAX_INPUT_SIZE_MB",
        kind=whole_number(1, 1_048_576, MEBIBYTE),
        target="media.max_input_bytes",
        default="512",
        meaning="largest single input, in MiB",
    ),
    Variable(
        name="INPUT_TIMEOUT_S",
        kind=seconds(),
        target="media.input_timeout_s",
        default="300",
        meaning="seconds that fetching one input may take",
    ),
    Variable(
        name="MAX_INPUT_MEGAPIXELS",
        kind=whole_number(1, 10_000),
        target="media.max_input_megapixels",
        default="268",
        meaning="largest input picture, in millions of pixels",
    ),
    Variable(
        name="URL_POLICY",
        kind=URL_MODE,
        target="urls.mode",
        default="guarded",
        meaning="which addresses a URL of a caller may lead to",
    ),
    Variable(
        name="URL_ALLOW",
        kind=URL_ALLOWED,
        target="urls.allow",
        default_note="(none)",
        meaning="hosts, host:port and networks that are allowed whatever the policy",
    ),
    Variable(
        name="PROMPT_WEBHOOK_RETRIES",
        kind=whole_number(0, 1000),
        target="webhooks.retries",
        default="3",
        meaning="retries of a webhook after its first attempt",
    ),
    Variable(
        name="WEBHOOK_SECRET",
        kind=SECRETS,
        target="webhooks.secrets",
        default_note="(none: webhooks are not signed)",
        meaning="keys that sign webhooks; several while they are rotated",
    ),
    Variable(
        name="SYSTEM_WEBHOOK_URL",
        kind=HTTP_URL,
        target="webhooks.system_url",
        meaning="receiver of ComfyUI's own events",
    ),
    Variable(
        name="SYSTEM_WEBHOOK_EVENTS",
        kind=EVENTS,
        target="webhooks.system_events",
        default="",
        default_note="(none)",
        meaning="events that it gets",
    ),
    Variable(
        name="SYSTEM_WEBHOOK_TRACEBACKS",
        kind=BOOLEAN,
        target="webhooks.system_tracebacks",
        default="false",
        meaning="send tracebacks and inputs of nodes that raised; they hold paths, and may hold secrets",
    ),
    Variable(
        name="WORKFLOW_DIR",
        kind=FOLDER,
        target="workflows.folder",
        default="/workflows",
        meaning="folder of the named workflows",
    ),
    Variable(
        name="MARKDOWN_SCHEMA_DESCRIPTIONS",
        kind=BOOLEAN,
        target="workflows.markdown_descriptions",
        default="true",
        meaning="describe workflow inputs as Markdown tables in the docs",
    ),
    Variable(
        name="STATE_DIR",
        kind=STATE_FOLDER,
        target="config.state_dir",
        default_note="`$STATE_DIRECTORY`, else `$XDG_STATE_HOME/comfyd`, else `~/.local/state/comfyd`",
        empty_is_value=True,
        meaning="journal of accepted jobs and webhooks; empty is memory only",
    ),
    Variable(
        name="LOG_LEVEL",
        kind=choice("trace", "debug", "info", "warn", "error", "fatal"),
        target="log.level",
        default="info",
        meaning="least important level that is logged",
    ),
    Variable(
        name="LOOP_STALL_MS",
        kind=whole_number(0, 60_000),
        target="log.loop_stall_ms",
        default="0",
        meaning="for debugging: milliseconds from which a step of comfyd's own loop is logged with its stack; 0 is off",
    ),
    Variable(
        name="LOG_FORMAT",
        kind=choice("json", "text"),
        target="log.format",
        default_note="`text` on a terminal, else `json`",
        meaning="how log lines look",
    ),
)
