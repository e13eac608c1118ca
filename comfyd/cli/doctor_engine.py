"""What ``comfyd doctor`` finds out by starting the engine once, as the supervisor would, and stopping it again."""

import math
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, Final, NoReturn

import attrs
import trio

from comfyd.cli.doctor_machine import port_holder
from comfyd.cli.finding import Finding, doubtful, failed, fine
from comfyd.config import EngineConfig
from comfyd.engine.client import EngineClient
from comfyd.engine.output import OutputLine
from comfyd.engine.process import EngineProcess, EngineStuck, ProcessConfig, open_process
from comfyd.engine.supervisor import refuse_if_taken, wait_answering
from comfyd.errors import EngineError, EngineExited, EnginePortTaken, EngineStartTimeout, StartupFailed
from comfyd.host.environment import MASK, child_environment, mask_urls, secret_values

_TIGHT: Final = 0.7  # of the start-up budget; a cold disk cache doubles the time
_MAX_MODULES: Final = 200  # told of; a thousand broken custom nodes have one cause
_MAX_REASON: Final = 300  # characters
_MAX_CLASSES: Final = 5

# ComfyUI 0.3.64, nodes.py: load_custom_node says why, init_external_custom_nodes and init_extra_nodes sum up.
_REASONS: Final = (
    re.compile(r"Cannot import (?P<module>.+?) module for custom nodes: (?P<reason>.*)"),
    re.compile(r"Error while calling comfy_entrypoint in (?P<module>.+?): (?P<reason>.*)"),
    re.compile(
        r"Skip (?P<module>.+?) module for custom nodes due to (?P<reason>the lack of .*?)(?: \(need one\))?\.?$"
    ),
)
_SUMS: Final = (
    re.compile(r"[0-9.]+ seconds \(IMPORT FAILED\): (?P<module>.+)"),
    re.compile(r"IMPORT FAILED: (?P<module>.+)"),
)


@attrs.define(eq=False)
class ImportFailures:
    """Reads an engine's output for modules of nodes that it could not import: name to reason, which may be empty."""

    modules: dict[str, str] = attrs.field(factory=dict)

    def hear(self, text: str) -> None:
        """Take in one line."""
        for pattern in (*_REASONS, *_SUMS):
            if found := pattern.search(text):
                name = PurePath(found["module"].strip()).name
                reason = found.groupdict().get("reason") or self.modules.get(name, "")
                if name in self.modules or len(self.modules) < _MAX_MODULES:
                    self.modules[name] = reason.strip()[:_MAX_REASON]
                return


@attrs.define(eq=False)
class Trial:
    """How one start went. Times are in seconds; *classes* None: it never came so far as to say them."""

    failure: EngineError | StartupFailed | None = None
    waited_s: float | None = None
    stopped_s: float | None = None
    stats: Mapping[str, Any] = attrs.field(factory=dict)
    classes: frozenset[str] | None = None
    imports: ImportFailures = attrs.field(factory=ImportFailures)
    last_line: str = ""


async def try_engine(config: EngineConfig, environ: Mapping[str, str], *, timeout_s: float) -> Trial:
    """Start the engine, wait at most *timeout_s* until it answers and has told its nodes, and stop it.

    Nothing of it is left behind, also when this is cancelled. What goes wrong with it is in the result.
    """
    trial = Trial()
    port = config.port or _free_port(config.address)
    env = child_environment(environ, config, port=port)
    secrets = sorted({*secret_values(environ), *secret_values(env)}, key=len, reverse=True)

    def hear(line: OutputLine) -> None:
        text = _masked(line.text, secrets)
        trial.imports.hear(text)
        if line.stream == "stderr" or not trial.last_line:
            trial.last_line = text

    process_config = ProcessConfig(argv=config.command(port), env=env, cwd=config.cwd, stop_grace_s=config.stop_grace_s)
    try:
        await refuse_if_taken(config.address, port)
        async with open_process(process_config, hear) as process, EngineClient(config.url(port)) as client:
            await _question(trial, process, client, config, timeout_s)
            stop_asked_at = trio.current_time()
            await process.stop()
            trial.stopped_s = trio.current_time() - stop_asked_at
    except* (EngineError, StartupFailed) as group:
        trial.failure = _telling(group)
    return trial


async def _question(
    trial: Trial, process: EngineProcess, client: EngineClient, config: EngineConfig, timeout_s: float
) -> None:
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_raise_when_exited, process)
        try:
            with trio.fail_after(timeout_s):
                await wait_answering(client, config.identity_arg)
                trial.waited_s = trio.current_time() - began
                trial.stats = await client.system_stats()
                trial.classes = frozenset(await client.object_info())
        except trio.TooSlowError as exc:
            raise EngineStartTimeout(timeout_s) from exc
        nursery.cancel_scope.cancel("it has told all")


async def _raise_when_exited(process: EngineProcess) -> NoReturn:
    raise EngineExited(await process.wait())


def findings_of(trial: Trial, config: EngineConfig) -> list[Finding]:
    """Put a trial into words: the engine in one line, then one for each module that was not imported."""
    return [_engine_finding(trial, config), *_node_findings(trial)]


def missing_classes(check: str, what: str, needed: Iterable[str], classes: frozenset[str]) -> Finding | None:
    """Tell which of the *needed* node classes the engine does not have; None if it has them all."""
    missing = sorted(set(needed) - classes)
    if not missing:
        return None
    shown = ", ".join(missing[:_MAX_CLASSES]) + (f" and {len(missing) - _MAX_CLASSES} more" if missing[5:] else "")
    return failed(check, f"{what} needs node classes that this ComfyUI does not have: {shown}", "install their nodes")


def _engine_finding(trial: Trial, config: EngineConfig) -> Finding:
    match trial.failure:
        case None:
            return _answered(trial, config)
        case EnginePortTaken():
            holder = port_holder(config.port) if config.port else None
            by_whom = f"{config.address} port {config.port}" + (f" is taken by {holder}" if holder else " is taken")
            return failed("engine", f"not started: {by_whom}", "stop it, or choose another COMFYUI_PORT_HOST")
        case StartupFailed():
            return failed("engine", str(trial.failure), "see CMD and COMFY_HOME")
        case EngineStuck():
            return failed("engine", str(trial.failure), "restart the machine: the driver holds them")
        case _:
            said = f"; it said: {trial.last_line}" if trial.last_line else ""
            return failed("engine", f"{trial.failure}{said}", "start it by hand with `comfyd config`'s CMD to see more")


def _answered(trial: Trial, config: EngineConfig) -> Finding:
    waited_s, budget_s = trial.waited_s or 0.0, config.start_budget_s
    tries = math.ceil(2 * waited_s / config.start_interval_s)
    advice = f"set STARTUP_CHECK_MAX_TRIES to {tries} or more"
    if waited_s > budget_s:
        what = f"answers after {waited_s:.1f} s, and comfyd would give it up after {budget_s:g} s"
        return failed("engine", what, advice)
    what = f"{_name(trial.stats)} answers after {waited_s:.1f} s (budget {budget_s:g} s)"
    if trial.stopped_s is not None:
        what += f" and stops within {trial.stopped_s:.1f} s"
    what += f"; {len(trial.classes or ())} node classes{_devices(trial.stats)}"
    return doubtful("engine", what, advice) if waited_s > _TIGHT * budget_s else fine("engine", what)


def _node_findings(trial: Trial) -> list[Finding]:
    advice = "install what it needs into ComfyUI's Python, or remove it"
    found = [
        doubtful("nodes", f"{name} was not imported{f': {reason}' if reason else ''}", advice)
        for name, reason in sorted(trial.imports.modules.items())
    ]
    if not found and trial.classes is not None:
        found.append(fine("nodes", "all modules of nodes were imported"))
    return found


def _name(stats: Mapping[str, Any]) -> str:
    """``/system_stats`` has ``system.comfyui_version`` since 0.3.5; CMD may be anything that speaks the protocol."""
    system = stats.get("system")
    version = system.get("comfyui_version") if isinstance(system, dict) else None
    return f"ComfyUI {version}" if isinstance(version, str) else "it"


def _devices(stats: Mapping[str, Any]) -> str:
    devices = stats.get("devices")
    names = [
        str(device["name"]) for device in (devices if isinstance(devices, list) else ()) if isinstance(device, dict)
        and "name" in device
    ]  # fmt: skip
    return f"; on {', '.join(names)}" if names else ""


def _telling(group: BaseExceptionGroup[BaseException]) -> EngineError | StartupFailed:
    """The failure that explains the others: an exit why no answer came, and a hang at the end nothing else."""
    leaves: list[EngineError | StartupFailed] = []
    waiting: list[BaseException] = [group]
    while waiting:
        exc = waiting.pop(0)
        if isinstance(exc, BaseExceptionGroup):
            waiting.extend(exc.exceptions)
        elif isinstance(exc, EngineError | StartupFailed):
            leaves.append(exc)
    return min(leaves, key=lambda exc: (isinstance(exc, EngineStuck), not isinstance(exc, EngineExited)))


def _masked(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    return mask_urls(text)


def _free_port(address: str) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
