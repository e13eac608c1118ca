"""``comfyd doctor``: looks at everything that comfyd needs: one line each, and what to do about it."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs

from comfyd.cli.finding import Finding, Verdict, doubtful, failed, fine, skipped

if TYPE_CHECKING:
    from comfyd.config import Config

EXIT_FOUND_FAULTS: Final = 1
EXIT_BAD_CONFIGURATION: Final = 2
EXIT_INTERRUPTED: Final = 130  # as of a program that SIGINT ended

DEFAULT_START_S: Final = 180.0
"""How long the engine may take here. The budget of the daemon is shorter, and the doctor's answer is by how much."""
CHECK_S: Final = 30.0
"""For one look at a disk, a store or a folder of workflows; a network disk that is away does not answer at all."""
ASK_S: Final = 3.0
_CHECK_WIDTH: Final = 13  # of the longest name of a check

Say = Callable[[Finding], None]
T = TypeVar("T")


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line's *subparsers*."""
    parser = subparsers.add_parser(
        "doctor",
        help="look at everything that comfyd needs, and say what to do about it",
        description="Looks at configuration, port, folders, disks, journal, GPU, S3, the receiver of system webhooks, "
        "workflows, and starts ComfyUI once to see how long that takes and which nodes it cannot import. Where a "
        "comfyd runs already, ComfyUI is left alone. One line each; the exit code is 0 if nothing failed, 1 if "
        "something did, 2 if the configuration makes no sense. It reads the environment as the daemon does, so run it "
        "where the daemon runs (docker exec, systemd-run) and as its user.",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument("--no-start", action="store_true", help="do not start ComfyUI")
    parser.add_argument(
        "--start-timeout",
        type=_seconds,
        metavar="S",
        help=f"seconds that ComfyUI may take to answer (default: {DEFAULT_START_S:g}, or the budget if that is more)",
    )
    parser.add_argument("--bucket", metavar="NAME", help="an S3 bucket that is to be there")
    parser.add_argument("--embedded", action="store_true", help="look at what `comfyd run --embedded` needs")


def doctor_command(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Look at everything; return the exit code. Findings are printed as they come, with ``--json`` at the end."""
    from comfyd.config import load_config
    from comfyd.errors import BadConfiguration

    report = Report(as_json=options.json)
    try:
        config = load_config(environ, embedded=options.embedded)
    except BadConfiguration as exc:
        for fault in exc.faults:
            report.say(failed("configuration", fault))
        report.close()
        return EXIT_BAD_CONFIGURATION
    import trio

    interrupted = False
    try:
        trio.run(partial(examine, config, environ, options, report.say))
    except* KeyboardInterrupt:
        interrupted = True
    if interrupted:
        sys.stderr.write("\ncomfyd doctor: stopped\n")
        return EXIT_INTERRUPTED
    report.close()
    return EXIT_FOUND_FAULTS if report.failed else 0


@attrs.define(eq=False, kw_only=True)
class Report:
    """Prints findings and counts them."""

    as_json: bool
    findings: list[Finding] = attrs.field(factory=list)

    @property
    def failed(self) -> int:
        """How many things failed."""
        return sum(finding.verdict is Verdict.FAILED for finding in self.findings)

    def say(self, finding: Finding) -> None:
        """Take in a finding; in text it is printed at once."""
        from comfyd.cli.table import printable

        self.findings.append(finding)
        if not self.as_json:
            what = f"{finding.what}; {finding.advice}" if finding.advice else finding.what
            line = f"{finding.verdict.value:<8} {finding.check:<{_CHECK_WIDTH}}  {what}"
            sys.stdout.write(printable(line) + "\n")
            sys.stdout.flush()

    def close(self) -> None:
        """Print the sum, or with JSON everything."""
        warnings = sum(finding.verdict is Verdict.WARNING for finding in self.findings)
        if self.as_json:
            rows = [{**attrs.asdict(finding), "verdict": finding.verdict.value.lower()} for finding in self.findings]
            document = {"ok": not self.failed, "failed": self.failed, "warnings": warnings, "findings": rows}
            sys.stdout.write(json.dumps(document, indent=2) + "\n")
        else:
            sys.stdout.write(f"{len(self.findings)} looked at, {self.failed} failed, {warnings} warnings\n")


async def examine(config: "Config", environ: Mapping[str, str], options: argparse.Namespace, say: Say) -> None:
    """Look at everything, one after another, and *say* what is found."""
    from comfyd.cli.doctor_machine import check_clock, check_gpu
    from comfyd.cli.doctor_services import check_s3, check_webhook, wants_s3

    given = sum(setting.origin == "environment" for setting in config.settings)
    say(fine("configuration", f"{given} of {len(config.settings)} variables are set"))
    for warning in config.warnings:
        say(doubtful("configuration", warning))
    say(check_clock())
    running = await _examine_daemon(config, environ, say)
    await _examine_folders(config, say)
    if config.embedded:
        say(skipped("gpu", "the embedded engine needs none"))
    else:
        say(await check_gpu(environ))
    if wants_s3(environ, options.bucket):
        await _say_one(say, "s3", partial(check_s3, config.s3, options.bucket))
    else:
        say(skipped("s3", "neither credentials nor an endpoint are configured, and no --bucket is given"))
    say(await check_webhook(config.webhooks))
    needs = await _examine_workflows(config, environ, say)
    if options.no_start:
        say(skipped("engine", "not started, as you wish"))
    elif running is not None:
        say(skipped("engine", f"not started: {running}"))
    else:
        if sys.stderr.isatty():
            sys.stderr.write("(ComfyUI is being started)\n")  # nothing is said for many seconds
        timeout_s = options.start_timeout or max(DEFAULT_START_S, config.engine.start_budget_s)
        await _examine_engine(config, environ, needs, timeout_s, say)


async def _examine_daemon(config: "Config", environ: Mapping[str, str], say: Say) -> str | None:
    """Look for a daemon that runs: on the port and on the journal. Return why its engine is to be left alone, if so."""
    from comfyd.cli.doctor_machine import check_folder, check_journal, check_port, is_locked, port_holder

    locked = False
    state_dir = config.state_dir
    if state_dir is None:
        say(fine("journal", "in memory only: what was accepted with a 202 ends with the daemon"))
    else:
        await _say_one(say, "STATE_DIR", partial(check_folder, "STATE_DIR", state_dir, expected=False))
        locked = await _bounded("journal", is_locked, state_dir) is True
        await _say_one(say, "journal", partial(check_journal, state_dir))
    answer = await _bounded("port", _ask_daemon, environ)
    if isinstance(answer, _Daemon):
        holder = await _bounded("port", port_holder, config.http.port)
        say(fine("port", f"{config.http.port} is the one of comfyd {answer.version}, which runs{_by(holder)}"))
        if answer.ready:
            say(fine("daemon", "ready"))
        else:
            say(doubtful("daemon", f"not ready: {answer.reason}", "see its log"))
        return f"comfyd runs on port {config.http.port}, and ComfyUI with it"
    await _say_one(say, "port", partial(check_port, config.http.host, config.http.port))
    if locked:
        say(doubtful("daemon", "one runs on this STATE_DIR, but not on this PORT", "is this its environment?"))
        return "a comfyd runs on this STATE_DIR"
    return None


async def _examine_folders(config: "Config", say: Say) -> None:
    from comfyd.cli.doctor_machine import check_disks, check_folder

    engine = config.engine
    for name, folder in (("INPUT_DIR", engine.input_dir), ("OUTPUT_DIR", engine.output_dir)):
        await _say_one(say, name, partial(check_folder, name, folder, expected=not config.embedded))
    readable = partial(check_folder, "MODEL_DIR", engine.model_dir, writable=False, expected=not config.embedded)
    await _say_one(say, "MODEL_DIR", readable)
    folders = [engine.input_dir, engine.output_dir, *([config.state_dir] if config.state_dir else [])]
    found = await _bounded("disk", check_disks, folders)
    for finding in [found] if isinstance(found, Finding) else found:
        say(finding)


async def _examine_workflows(
    config: "Config", environ: Mapping[str, str], say: Say
) -> Mapping[str, frozenset[str]]:  # by route, what needs these node classes
    from comfyd.cli.doctor_services import WorkflowCheck, check_workflows

    required = bool(environ.get("WORKFLOW_DIR"))
    found = await _bounded("workflows", partial(check_workflows, config.workflows.folder, required=required))
    if not isinstance(found, WorkflowCheck):
        say(found)
        return {}
    for finding in found.findings:
        say(finding)
    return found.classes


async def _examine_engine(
    config: "Config",
    environ: Mapping[str, str],
    workflows: Mapping[str, frozenset[str]],
    timeout_s: float,
    say: Say,
) -> None:
    from comfyd.cli.doctor_engine import findings_of, missing_classes, try_engine

    trial = await try_engine(config.engine, environ, timeout_s=timeout_s)
    for finding in findings_of(trial, config.engine):
        say(finding)
    if trial.classes is None:
        return
    warmup = config.jobs.warmup_prompt
    if warmup is not None:
        needed = (node["class_type"] for node in warmup.values())
        missing = missing_classes("warm-up", "the prompt in WARMUP_PROMPT_FILE", needed, trial.classes)
        say(missing or fine("warm-up", "this ComfyUI has every node of the prompt in WARMUP_PROMPT_FILE"))
    for route, needs in sorted(workflows.items()):
        missing = missing_classes("workflows", route, needs, trial.classes)
        if missing is not None:
            say(attrs.evolve(missing, verdict=Verdict.WARNING))  # it answers with what is missing; the others work


@attrs.frozen(kw_only=True)
class _Daemon:
    version: str
    ready: bool
    reason: str


def _ask_daemon(environ: Mapping[str, str]) -> _Daemon | None:
    """Ask who listens on PORT whether it is comfyd, by what only comfyd answers."""
    from comfyd.cli.healthcheck import Unreachable, ask, probe_answer, reason_of

    try:
        status, body = ask("/ready", environ, timeout_s=ASK_S)
    except Unreachable:
        return None
    answer = probe_answer(body)
    if answer is None:
        return None
    return _Daemon(version=str(answer["version"]), ready=status == 200, reason=reason_of(answer))


async def _bounded(check: str, function: Callable[..., T], *arguments: object) -> T | Finding:
    """Call what blocks in a thread; a failed finding where it does not come back."""
    import trio

    with trio.move_on_after(CHECK_S):
        # It only looks, and the process ends soon: a thread that hangs in a dead disk may be left there.
        return await trio.to_thread.run_sync(
            partial(function, *arguments), abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
        )
    return failed(check, f"no answer within {CHECK_S:g} s", "is a network disk or a peer away?")


async def _say_one(say: Say, check: str, function: Callable[[], Finding]) -> None:
    say(await _bounded(check, function))


def _by(holder: object) -> str:
    return f" as {holder}" if isinstance(holder, str) else ""


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number <= 86_400:
        raise argparse.ArgumentTypeError("must be a number of seconds greater than 0, at most 86400")
    return number
