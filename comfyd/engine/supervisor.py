"""Keeps one engine running: process, readiness, listener; again after each failure, waiting longer each time."""

import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from signal import SIGKILL
from typing import Final, NoReturn

import attrs
import structlog
import trio

from comfyd.config import EngineConfig, RestartPolicy
from comfyd.engine.activity import Snapshot, read_oom_kills, read_snapshot
from comfyd.engine.client import EngineClient
from comfyd.engine.engine import Engine
from comfyd.engine.listener import ListenerTimes, serve_listener
from comfyd.engine.object_info import NodeClasses
from comfyd.engine.output import OutputLine
from comfyd.engine.output_level import OutputLevels
from comfyd.engine.process import EngineProcess, EngineStuck, ProcessConfig, open_process
from comfyd.engine.watchdog import WatchdogTimes, WorkerObituary, serve_watchdog, serve_worker_watch
from comfyd.errors import (
    EngineBroken,
    EngineError,
    EngineExited,
    EngineHung,
    EnginePortTaken,
    EngineStartTimeout,
    EngineUnavailable,
    EngineWorkerDied,
    RestartLimitReached,
    StartupFailed,
)
from comfyd.host.environment import secret_values

log = structlog.get_logger("comfyd.engine")
output_log = structlog.get_logger("comfyd.engine.output")

FIRST_LOOK_S: Final = 0.02
MAX_LOOK_S: Final = 0.25
"""How often a starting engine is looked at: a refused connection costs nothing, and a ready engine should not wait."""
LOOK_TIMEOUT_S: Final = 2.0
OBJECT_INFO_TIMEOUT_S: Final = 60.0
"""Building it lists every model and input folder: 0.7 s measured with 20,000 files, more on network disks."""


@attrs.frozen(kw_only=True)
class SupervisorConfig:
    """What a supervisor needs beside the engine's own configuration."""

    engine: EngineConfig
    env: Callable[[int], Mapping[str, str]]
    """The engine's environment, given the port it is to listen on."""
    listener: ListenerTimes = attrs.field(factory=ListenerTimes)
    hang_timeout_s: float = 120.0
    """How long the engine may give no sign of life before it is ended; 0 is for ever."""


async def supervise_engine(
    config: SupervisorConfig,
    give_up: Callable[[EngineError | StartupFailed], None],
    *,
    task_status: trio.TaskStatus[Engine] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep one engine running until cancelled.

    ``started()`` gives the engine at once: supervised, not yet up. When the engine is not to be started again
    (``ALWAYS_RESTART_COMFYUI`` is false, the restart limit is reached, or it could not be started in the first place),
    the engine's state says so, *give_up* is called with the reason, and this returns.
    """
    engine = Engine(name="engine-1")
    task_status.started(engine)
    policy = config.engine.restart if config.engine.always_restart else None
    try:
        await keep_running(partial(run_engine, engine, config), policy, engine)
    except (EngineError, StartupFailed) as exc:
        log.error("engine.gave_up", engine=engine.name, reason=str(exc))  # noqa: TRY400  # a reason, not a bug
        engine.went_down(str(exc), cause=_slug(exc), for_good=True)
        give_up(exc)


async def keep_running(
    run_once: Callable[[], Awaitable[NoReturn]], policy: RestartPolicy | None, engine: Engine
) -> NoReturn:
    """Run *run_once* again each time it fails by an :class:`EngineError`, waiting longer after each failure.

    Raises:
        EngineError: the failure, when there is no *policy*, or when it came before the engine was ever started.
        RestartLimitReached: it failed too often within the policy's window.
        StartupFailed: the command could not be executed.
    """
    failed_at: deque[float] = deque()
    while True:
        failure: EngineError | StartupFailed | None = None
        try:
            await run_once()
        except* (EngineError, StartupFailed) as group:
            failure = _cause(group)
        if failure is None:
            raise RuntimeError("an engine's run ends by raising, and it did not")
        engine.went_down(str(failure), cause=_slug(failure))
        hopeless = isinstance(failure, StartupFailed | EnginePortTaken) and not failed_at
        if policy is None or hopeless:
            raise failure
        now = trio.current_time()
        failed_at.append(now)
        while now - failed_at[0] > policy.window_s:
            failed_at.popleft()
        if len(failed_at) > policy.max_failures:
            raise RestartLimitReached(failures=len(failed_at), window_s=policy.window_s) from failure
        delay_s = policy.delay_s(len(failed_at))
        engine.restarts_by_cause[_slug(failure)] += 1
        log.warning(
            "engine.failed", engine=engine.name, cause=_slug(failure), reason=str(failure), restart_in_s=delay_s
        )
        await trio.sleep(delay_s)


async def run_engine(engine: Engine, config: SupervisorConfig) -> NoReturn:
    """Run one engine process. Ends by being cancelled or by raising, never by returning.

    Raises (in an exception group):
        EnginePortTaken: somebody else answers at its address; nothing was started.
        StartupFailed: the command cannot be executed.
        EngineExited: the process ended by itself, before or after it was up. Any code, 0 included.
        EngineStartTimeout: no answer within the start-up budget.
        EngineHung: it gave no sign of life for the time-out, see :mod:`comfyd.engine.watchdog`.
        EngineWorkerDied: the thread that executes prompts has ended.
        EngineError: what :meth:`Engine.condemn` said.
    """
    settings = config.engine
    port = settings.port or _free_port(settings.address)
    await refuse_if_taken(settings.address, port)
    base_url = settings.url(port)
    env = config.env(port)
    process_config = ProcessConfig(
        argv=settings.command(port), env=env, cwd=settings.cwd, stop_grace_s=settings.stop_grace_s
    )
    obituary = WorkerObituary()

    levels = OutputLevels()

    def hear(line: OutputLine) -> None:
        _log_line(line, levels.level(line), engine.running_job)
        engine.last_words.add(line, trio.current_time())
        obituary.hear(line)

    began = trio.current_time()
    oom_kills = read_oom_kills()
    async with (
        open_process(process_config, hear) as process,
        EngineClient(base_url) as client,
        trio.open_nursery() as nursery,
    ):
        engine.launched(secret_values(env), pid=process.pid)
        log.info("engine.started", engine=engine.name, pid=process.pid, port=port)
        # An early death also ends the wait for an answer.
        nursery.start_soon(_raise_when_exited, process, engine, oom_kills)
        sample = partial(_sample, process.pid)
        nursery.start_soon(serve_worker_watch, engine, obituary, sample)
        try:
            with trio.fail_after(settings.start_budget_s):
                await wait_answering(client, settings.identity_arg)
                await nursery.start(serve_listener, f"ws{base_url.removeprefix('http')}/ws", engine, config.listener)
        except trio.TooSlowError as exc:
            raise EngineStartTimeout(settings.start_budget_s) from exc
        engine.went_up(client, await _node_classes(client))
        log.info("engine.up", engine=engine.name, pid=process.pid, waited_s=round(trio.current_time() - began, 3))
        nursery.start_soon(engine.serve_forgetting)
        if config.hang_timeout_s > 0:
            times = WatchdogTimes(hang_timeout_s=config.hang_timeout_s)
            nursery.start_soon(serve_watchdog, engine, client, sample, times)
        await engine.wait_condemned()
    raise RuntimeError("unreachable: wait_condemned always raises")


async def refuse_if_taken(address: str, port: int) -> None:
    """Make sure that nobody answers at the engine's address: a stranger is not our engine.

    Raises:
        EnginePortTaken: somebody does.
    """
    try:
        with trio.move_on_after(LOOK_TIMEOUT_S):
            stream = await trio.open_tcp_stream(address, port)
            await trio.aclose_forcefully(stream)
            raise EnginePortTaken(f"{address} port {port}")
    except OSError:
        return


async def wait_answering(client: EngineClient, identity_arg: str | None) -> None:
    """Wait until the engine answers ``/system_stats``, and is the one whose command line holds *identity_arg*.

    Raises:
        EnginePortTaken: another engine answers.
    """
    pause_s = FIRST_LOOK_S
    while True:
        try:
            with trio.fail_after(LOOK_TIMEOUT_S):
                stats = await client.system_stats()
        except (EngineUnavailable, trio.TooSlowError):
            await trio.sleep(pause_s)
            pause_s = min(pause_s * 1.2, MAX_LOOK_S)
            continue
        system = stats.get("system")
        argv = system.get("argv") if isinstance(system, dict) else None
        if identity_arg is not None and isinstance(argv, list) and identity_arg not in argv:
            raise EnginePortTaken("the engine's address")
        return


async def _node_classes(client: EngineClient) -> NodeClasses:
    try:
        with trio.fail_after(OBJECT_INFO_TIMEOUT_S):
            return NodeClasses.from_object_info(await client.object_info())
    except trio.TooSlowError as exc:
        raise EngineUnavailable(f"no answer to /object_info within {OBJECT_INFO_TIMEOUT_S:g} s") from exc


async def _raise_when_exited(process: EngineProcess, engine: Engine, oom_kills: int | None) -> NoReturn:
    """Raise when the process has ended; *oom_kills* is how many the kernel had counted when it was started."""
    returncode = await process.wait()
    now = read_oom_kills() if returncode == -SIGKILL else None
    oom_killed = now is not None and oom_kills is not None and now > oom_kills
    # The engine is down at once: stopping what it left behind may take the grace period.
    raise engine.failed(EngineExited(returncode, oom_killed=oom_killed))


async def _sample(pid: int) -> Snapshot:
    """Read what the engine's processes have done, in a thread: a machine may have thousands of processes."""
    # A limiter of its own: there is never more than one sample of an engine at a time, and it must not wait for others.
    return await trio.to_thread.run_sync(read_snapshot, pid, limiter=trio.CapacityLimiter(1))


def _log_line(line: OutputLine, level: str, job: tuple[str, int] | None) -> None:
    fields = {} if job is None else {"job_id": job[0], "attempt": job[1]}
    getattr(output_log, level)("engine.output", stream=line.stream, text=line.text, **fields)


def _free_port(address: str) -> int:
    """Find a port that is free now.

    Another process may take it before the engine does; the engine then exits, and the next start chooses another.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


_TELLING: Final = (EngineExited, EngineHung, EngineWorkerDied, EngineBroken)
"""What explains others: an exit why an answer did not come, a hang why the process could not be stopped."""


def _cause(group: BaseExceptionGroup[BaseException]) -> EngineError | StartupFailed:
    """The failure that says most."""
    leaves: list[EngineError | StartupFailed] = []
    pending: list[BaseException] = [group]
    while pending:
        exc = pending.pop()
        if isinstance(exc, BaseExceptionGroup):
            pending.extend(exc.exceptions)
        elif isinstance(exc, EngineError | StartupFailed):
            leaves.append(exc)
    leaves.sort(key=lambda exc: isinstance(exc, EngineStuck))  # which is about the end of one that failed before
    return next((exc for kind in _TELLING for exc in leaves if isinstance(exc, kind)), leaves[0])


def _slug(failure: EngineError | StartupFailed) -> str:
    return failure.cause if isinstance(failure, EngineError) else "start-failed"
