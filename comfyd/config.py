"""Environment variables to one frozen :class:`Config`, with every fault told at once.

:data:`VARIABLES` is the one source: loading, ``comfyd config`` and the table in the docs come from it. Names, defaults
and meanings are comfyui-api's, whose users may keep their environment; its silent misreadings are faults here.
"""

import difflib
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from comfyd.errors import BadConfiguration, InvalidValue
from comfyd.host import ai_dock
from comfyd.host.command import (
    INIT_SCRIPT,
    PORT_PLACEHOLDER,
    EngineCommand,
    EngineFolders,
    NoCommand,
    default_command,
    embedded_command,
    given_command,
)
from comfyd.host.environment import child_environment, shown
from comfyd.host.salad import SaladConfig, salad_metadata
from comfyd.net.policy import UrlPolicy
from comfyd.storage.s3_config import S3Config
from comfyd.variables import MEBIBYTE, SYSTEM_META_PREFIX, VARIABLES
from comfyd.wire import decode_json, quoted

__all__ = [
    "VARIABLES",
    "Config",
    "EngineConfig",
    "HttpConfig",
    "JobsConfig",
    "LogConfig",
    "MediaConfig",
    "RestartPolicy",
    "Setting",
    "WebhooksConfig",
    "WorkflowsConfig",
    "child_environment",
    "describe",
    "load_config",
    "state_dir_of",
    "variables_table",
]

_SHORT_KEY: Final = 16
_MAX_WARMUP_BYTES: Final = 100 * MEBIBYTE  # what a request body may have; a larger file is not a prompt


@attrs.frozen(kw_only=True)
class HttpConfig:
    """Where comfyd listens, and whom it answers. Port 0 is any free port.

    Without *api_keys* every route is open. With *metrics_port* the metrics are there, and not on *port*. The two TLS
    files come together or not at all.
    """

    host: str = "::"
    port: int = 3000
    max_body_bytes: int = 100 * MEBIBYTE
    api_keys: tuple[str, ...] = attrs.field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    metrics_port: int | None = None


@attrs.frozen(kw_only=True)
class RestartPolicy:
    """When to stop restarting, and how long to wait before each restart."""

    max_failures: int = attrs.field(default=10, validator=attrs.validators.ge(1))
    window_s: float = 600.0
    first_delay_s: float = 0.5
    max_delay_s: float = 30.0

    def delay_s(self, failures: int) -> float:
        """Return how long to wait after so many *failures* (1 or more) within the window."""
        doublings = min(failures - 1, 63)  # beyond that the bound holds anyway, and a float would overflow
        return min(self.max_delay_s, self.first_delay_s * 2.0**doublings)


@attrs.frozen(kw_only=True)
class EngineConfig:
    """The engine: what to start, where it answers, and where its files are.

    *argv* is ready to execute but for :data:`PORT_PLACEHOLDER`, which :meth:`command` fills. *port* is 0 only for a
    command that comfyd made itself (*argv_is_ours*): choose a free one then. *identity_arg* is an argument of our own
    command that ``/system_stats`` must report, so that another process at the address is not taken for our engine.
    *extra_env* is what BASE adds to its environment, *env_pass* which of the daemon's secrets it may see.
    """

    argv: tuple[str, ...]
    argv_is_ours: bool = False
    identity_arg: str | None = None
    cwd: Path | None = None
    home: Path
    address: str = "127.0.0.1"
    port: int = 8188
    input_dir: Path
    output_dir: Path
    model_dir: Path
    temp_dir: Path | None = None
    start_interval_s: float = 1.0
    start_max_tries: int = 10
    always_restart: bool = False
    stop_grace_s: float = 5.0
    hang_timeout_s: float = 120.0
    restart: RestartPolicy = attrs.field(factory=RestartPolicy)
    base: Literal["ai-dock", ""] = ""
    extra_env: Mapping[str, str] = attrs.field(factory=dict)
    env_pass: tuple[str, ...] = ()

    @property
    def start_budget_s(self) -> float:
        """How long the engine may take until it answers."""
        return self.start_interval_s * self.start_max_tries

    def command(self, port: int) -> tuple[str, ...]:
        """Return the arguments to execute, with *port* where our own command names it."""
        if not self.argv_is_ours:
            return self.argv
        return tuple(str(port) if argument == PORT_PLACEHOLDER else argument for argument in self.argv)

    def url(self, port: int) -> str:
        """Return ``http://address:port`` without a final slash."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"http://{host}:{port}"


@attrs.frozen(kw_only=True)
class JobsConfig:
    """How many jobs wait, how often and how long one runs. *max_queue_depth* 0 is no limit, for readiness only.

    *warmup_prompt* is the graph in *warmup_file*: node id to ``{"class_type", "inputs", ...}``. The three
    retentions are for jobs that ended without a caller who waits: how long they and their outputs are kept, how much
    the outputs may take together, and how long a webhook that nobody took can be replayed.
    """

    max_queue_depth: int = 0
    max_queued: int = 1000
    max_attempts: int = 2
    timeout_s: float | None = None
    drain_timeout_s: float = 25.0
    retention_s: float = 86_400.0
    retention_bytes: int = 10_240 * MEBIBYTE
    dead_letter_retention_s: float = 604_800.0
    warmup_file: Path | None = None
    warmup_prompt: Mapping[str, Any] | None = None


@attrs.frozen(kw_only=True)
class MediaConfig:
    """Bounds of one input."""

    max_input_bytes: int = 512 * MEBIBYTE
    input_timeout_s: float = 300.0
    max_input_megapixels: int = 268


@attrs.frozen(kw_only=True)
class WebhooksConfig:
    """Webhooks of prompts and of ComfyUI's own events. *retries* counts those after the first attempt."""

    retries: int = 3
    secrets: tuple[bytes, ...] = attrs.field(default=(), repr=False)
    system_url: str | None = attrs.field(default=None, repr=False)  # may carry a password
    system_events: tuple[str, ...] = ()
    system_tracebacks: bool = False
    system_metadata: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class WorkflowsConfig:
    """Where the named workflows are, and how their docs look."""

    folder: Path = Path("/workflows")
    folder_is_given: bool = False
    """Whether somebody named the folder: one that is missing is told of then."""
    markdown_descriptions: bool = True


@attrs.frozen(kw_only=True)
class LogConfig:
    """What is logged, and how it looks."""

    level: Literal["trace", "debug", "info", "warn", "error", "fatal"] = "info"
    format: Literal["json", "text"] = "json"
    loop_stall_ms: int = 0
    """A step of the loop that takes so long is logged with its stack; 0: none is."""


Origin = Literal["environment", "default", "--embedded"]


@attrs.frozen(kw_only=True)
class Setting:
    """One variable's effective value, fit to be shown: secrets are masked."""

    name: str
    value: str
    origin: Origin
    meaning: str


@attrs.frozen(kw_only=True)
class Config:
    """The whole configuration. *state_dir* None is memory only. *warnings* are lines for the daemon's log."""

    http: HttpConfig
    engine: EngineConfig
    jobs: JobsConfig
    media: MediaConfig
    urls: UrlPolicy
    s3: S3Config
    webhooks: WebhooksConfig
    workflows: WorkflowsConfig
    log: LogConfig
    salad: SaladConfig | None
    """What SaladCloud's machine service is told; None on other machines."""
    state_dir: Path | None
    embedded: bool = False
    warnings: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = attrs.field(default=(), repr=False)


def load_config(environ: Mapping[str, str], *, embedded: bool = False, root: Path = Path("/")) -> Config:
    """Read the configuration; nothing is created and nothing is changed.

    With *embedded* the engine is comfyd's own small one: CMD, COMFY_HOME and BASE do not count, folders default to the
    state folder, the engine's port to a free one. *root* is where ai-dock's files are looked for.

    Raises:
        BadConfiguration: with one line for every fault.
    """
    reading = _Reading(environ=environ, embedded=embedded)
    reading.read()
    state_dir = _read_state_dir(reading)
    engine = _read_engine(reading, state_dir, root)
    warmup_prompt = _read_warmup(reading)
    reading.settle("LOG_FORMAT", "text" if _stderr_is_terminal() else "json")
    s3 = _read_s3(reading)
    http = _read_http(reading)
    salad = _read_salad(reading)
    reading.settle("URL_ALLOW", ())
    if reading.faults or engine is None:
        raise BadConfiguration(tuple(reading.faults))
    metadata = {
        name.removeprefix(SYSTEM_META_PREFIX): value
        for name, value in sorted(environ.items())
        if name.startswith(SYSTEM_META_PREFIX) and value
    }
    return Config(
        http=http,
        engine=engine,
        jobs=JobsConfig(**reading.group("jobs"), warmup_prompt=warmup_prompt),
        media=MediaConfig(**reading.group("media")),
        urls=UrlPolicy(mode=reading.values["URL_POLICY"], allow=reading.settle("URL_ALLOW", ())),
        s3=s3,
        webhooks=_webhooks(reading, {**metadata, **salad_metadata(environ)}),
        workflows=WorkflowsConfig(**reading.group("workflows"), folder_is_given=reading.given("WORKFLOW_DIR")),
        log=LogConfig(**reading.group("log")),
        salad=salad,
        state_dir=state_dir,
        embedded=embedded,
        warnings=(*reading.warnings, *_likely_typos(environ)),
        settings=(*reading.settings(), *_metadata_settings(metadata)),
    )


def _webhooks(reading: "_Reading", metadata: Mapping[str, str]) -> WebhooksConfig:
    values = reading.group("webhooks")
    return WebhooksConfig(**{**values, "secrets": values["secrets"] or (), "system_metadata": metadata})


def state_dir_of(environ: Mapping[str, str]) -> Path | None:
    """Where the journal is, for commands that need nothing else of the configuration; None: in no file.

    Raises:
        BadConfiguration: STATE_DIR makes no sense.
    """
    variable = next(variable for variable in VARIABLES if variable.name == "STATE_DIR")
    text = environ.get(variable.name)
    if text is None:
        return _default_state_dir(environ)
    try:
        state_dir: Path | None = variable.kind.parse(text)
    except ValueError as exc:
        allowed = str(exc) or variable.kind.allowed
        raise BadConfiguration((f"{variable.name}: {shown(variable.name, text)} is not allowed; {allowed}",)) from None
    return state_dir


def describe(config: Config) -> list[Setting]:
    """List every variable with its effective value and where it came from, secrets masked."""
    return list(config.settings)


def _metadata_settings(metadata: Mapping[str, str]) -> Iterable[Setting]:
    for key, value in metadata.items():
        name = SYSTEM_META_PREFIX + key
        text = shown(name, value, quote=False)
        yield Setting(name=name, value=text, origin="environment", meaning="metadata of system webhooks")


def variables_table() -> str:
    """Give the docs' Markdown table of all variables."""
    rows = [("variable", "default", "meaning", "allowed"), ("---",) * 4]
    for variable in VARIABLES:
        default = f"`{variable.default}`" if variable.default else variable.default_note or "(not set)"
        rows.append((f"`{variable.name}`", default, variable.meaning, variable.kind.allowed))
    meta = "sent in `metadata` of system webhooks, by the rest of the name"
    rows.append((f"`{SYSTEM_META_PREFIX}*`", "(not set)", meta, "any text"))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@attrs.define(eq=False, kw_only=True)
class _Reading:
    """One pass over the environment: effective values and their origins by variable, faults and warnings so far.

    A variable at fault holds its default meanwhile, so that what depends on it is checked all the same; with a fault
    no value of this pass leaves :func:`load_config`.
    """

    environ: Mapping[str, str]
    embedded: bool
    values: dict[str, Any] = attrs.field(factory=dict)
    origins: dict[str, Origin] = attrs.field(factory=dict)
    faults: list[str] = attrs.field(factory=list)
    warnings: list[str] = attrs.field(factory=list)

    def read(self) -> None:
        for variable in VARIABLES:
            text = self.environ.get(variable.name)
            default = None if variable.default is None else variable.kind.parse(variable.default)
            self.values[variable.name], self.origins[variable.name] = default, "default"
            if text is None or (text == "" and not variable.empty_is_value):
                continue
            try:
                self.values[variable.name] = variable.kind.parse(text)
                self.origins[variable.name] = "environment"
            except ValueError as exc:
                self.fault(variable.name, text, str(exc) or variable.kind.allowed)

    def fault(self, name: str, value: str, allowed: str) -> None:
        self.faults.append(f"{name}: {shown(name, value)} is not allowed; {allowed}")

    def given(self, name: str) -> bool:
        return self.origins[name] == "environment"

    def settle(self, name: str, default: Any) -> Any:
        """Return the effective value of a variable whose default only this reading knows."""
        if not self.given(name):
            self.values[name] = default
        return self.values[name]

    def override(self, name: str, value: Any) -> None:
        """Let --embedded decide a variable, whatever the environment says."""
        if self.given(name):
            self.warnings.append(f"{name} does not count with --embedded")
        self.values[name], self.origins[name] = value, "--embedded"

    def group(self, name: str) -> dict[str, Any]:
        """Return the values of one sub-config by field."""
        targets = ((variable, variable.target.split(".")) for variable in VARIABLES)
        return {field: self.values[variable.name] for variable, (group, field) in targets if group == name}

    def settings(self) -> tuple[Setting, ...]:
        rows = []
        for variable in VARIABLES:
            value = self.values[variable.name]
            text = "" if value is None and variable.default is None else variable.kind.show(value)
            rows.append(
                Setting(
                    name=variable.name,
                    value=shown(variable.name, text, quote=False),
                    origin=self.origins[variable.name],
                    meaning=variable.meaning,
                )
            )
        return tuple(rows)


def _read_engine(reading: _Reading, state_dir: Path | None, root: Path) -> EngineConfig | None:
    """Settle folders, port and command. None after a fault that leaves no command."""
    if reading.embedded:
        state = state_dir or _default_state_dir(reading.environ)
        if state is None:
            reading.faults.append("STATE_DIR: is needed with --embedded, as no home folder is known; a folder")
            return None
        reading.override("COMFY_HOME", state / "embedded")
        reading.override("BASE", "")
    home: Path = reading.values["COMFY_HOME"]
    folders = EngineFolders(
        input=reading.settle("INPUT_DIR", home / "input"),
        output=reading.settle("OUTPUT_DIR", home / "output"),
        temp=home / "temp" if reading.embedded else None,
        models=reading.values["MODEL_DIR"] if reading.embedded else None,
    )
    reading.settle("MODEL_DIR", home / "models")
    reading.settle("COMFYUI_PORT_HOST", 0 if reading.embedded else 8188)
    extra_env = _read_base(reading, root)
    try:
        command = _choose_command(reading, home, folders, extra_env)
    except NoCommand as exc:
        if reading.given("CMD"):
            reading.fault("CMD", reading.values["CMD"], str(exc))
        else:
            reading.faults.append(f"CMD: is not set, and {exc}")
        return None
    if reading.values["COMFYUI_PORT_HOST"] == 0 and not command.is_ours:
        reading.fault("COMFYUI_PORT_HOST", "0", "a whole number from 1 to 65535 where CMD is not made by comfyd")
    reading.values["CMD"] = shlex.join(command.argv)
    values = reading.group("engine")
    restart = RestartPolicy(max_failures=values.pop("restart_limit"))
    return EngineConfig(
        **{
            **values,
            "argv": command.argv,
            "argv_is_ours": command.is_ours,
            "identity_arg": str(folders.output) if command.is_ours else None,
            "cwd": command.cwd,
            "temp_dir": folders.temp,
            "restart": restart,
            # ai-dock's init.sh loads that environment by itself, and expects to start without a venv.
            "extra_env": {} if Path(command.argv[0]).name == INIT_SCRIPT else extra_env,
        }
    )


def _choose_command(
    reading: _Reading, home: Path, folders: EngineFolders, extra_env: Mapping[str, str]
) -> EngineCommand:
    address = reading.values["DIRECT_ADDRESS"]
    environ = {**reading.environ, **extra_env}
    if reading.embedded:
        reading.override("CMD", None)
        return embedded_command(address, folders)
    if reading.given("CMD"):
        return given_command(reading.values["CMD"], environ)
    return default_command(home, address, folders, environ)


def _read_base(reading: _Reading, root: Path) -> Mapping[str, str]:
    if reading.values["BASE"] != "ai-dock":
        return {}
    try:
        return ai_dock.environment(reading.environ, root=root)
    except ai_dock.AiDockError as exc:
        reading.faults.append(f"BASE: {exc}; set BASE to empty to start without it")
        return {}


def _read_warmup(reading: _Reading) -> Mapping[str, Any] | None:
    path: Path | None = reading.values["WARMUP_PROMPT_FILE"]
    if path is None:
        return None
    graph: Any = None
    try:
        if path.stat().st_size > _MAX_WARMUP_BYTES:
            problem: str | None = f"it has more than {_MAX_WARMUP_BYTES // MEBIBYTE} MiB"
        else:
            graph = _unwrapped(decode_json(path.read_bytes()))
            problem = _problem_of(graph)
    except OSError as exc:
        problem = exc.strerror or type(exc).__name__
    except InvalidValue as exc:
        problem = str(exc)
    if problem is not None:
        reading.fault("WARMUP_PROMPT_FILE", str(path), f"a JSON file with a prompt in API format ({problem})")
        return None
    prompt: dict[str, Any] = {node_id: {"inputs": {}, **node} for node_id, node in graph.items()}
    return prompt


def _unwrapped(document: Any) -> Any:
    """Take the graph out of ``{"prompt": graph, ...}``, the body of a request; a bare graph is left as it is."""
    inner = document.get("prompt") if isinstance(document, dict) else None
    return inner if isinstance(inner, dict) and "class_type" not in inner else document


def _problem_of(graph: Any) -> str | None:
    if not isinstance(graph, dict) or not graph:
        return "it is not an object of nodes"
    if isinstance(graph.get("nodes"), list):
        return 'it is a workflow of the editor; export it with "Export (API)"'
    for node_id, node in graph.items():
        if not isinstance(node, dict) or not isinstance(node.get("class_type"), str):
            return f"node {quoted(node_id)} has no class_type"
        if not isinstance(node.get("inputs", {}), dict):
            return f"the inputs of node {quoted(node_id)} are not an object"
    return None


def _read_s3(reading: _Reading) -> S3Config:
    try:
        return S3Config.from_environment(reading.environ)
    except BadConfiguration as exc:
        reading.faults.extend(exc.faults)
        return S3Config()


def _read_http(reading: _Reading) -> HttpConfig:
    values = reading.group("http")
    for one, other in (("TLS_CERT_FILE", "TLS_KEY_FILE"), ("TLS_KEY_FILE", "TLS_CERT_FILE")):
        if reading.given(one) and not reading.given(other):
            reading.faults.append(f"{other}: is not set, and {one} is; both, or neither")
    if values["metrics_port"] and values["metrics_port"] == values["port"]:
        reading.fault("METRICS_PORT", str(values["metrics_port"]), "another port than PORT, or leave it unset")
    short = sum(1 for key in values["api_keys"] or () if len(key) < _SHORT_KEY)
    if short:
        reading.warnings.append(f"{short} of API_KEYS have under {_SHORT_KEY} characters: they can be guessed")
    return HttpConfig(**{**values, "api_keys": values["api_keys"] or (), "cors_origins": values["cors_origins"] or ()})


def _read_salad(reading: _Reading) -> SaladConfig | None:
    try:
        return SaladConfig.from_environment(reading.environ)
    except BadConfiguration as exc:
        reading.faults.extend(exc.faults)
        return None


def _read_state_dir(reading: _Reading) -> Path | None:
    default = None if reading.given("STATE_DIR") else _default_state_dir(reading.environ)
    state_dir: Path | None = reading.settle("STATE_DIR", default)
    if state_dir is None and not reading.given("STATE_DIR"):
        reading.warnings.append("no home folder is known and STATE_DIR is not set: accepted jobs are in memory only")
    return state_dir


def _default_state_dir(environ: Mapping[str, str]) -> Path | None:
    """Return systemd's state folder (the first of a list), else the user's by the XDG rules, else None."""
    if systemd := environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(systemd)
    xdg = environ.get("XDG_STATE_HOME", "")
    if xdg.startswith("/"):  # the XDG specification: a relative path is to be ignored
        return Path(xdg) / "comfyd"
    home = environ.get("HOME", "")
    return Path(home) / ".local/state/comfyd" if home.startswith("/") else None


def _likely_typos(environ: Mapping[str, str]) -> Iterable[str]:
    """Warn of variables that nobody knows but that look much like one of ours."""
    known = [variable.name for variable in VARIABLES if len(variable.name) >= 8]  # PORTS, HOSTS: somebody else's
    names = {variable.name for variable in VARIABLES}
    for name in sorted(environ):
        if name not in names and not name.startswith(SYSTEM_META_PREFIX) and len(name) <= 64:
            close = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.87)
            if close:
                yield f"{name} is not a variable of comfyd; did you mean {close[0]}?"


def _stderr_is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False
