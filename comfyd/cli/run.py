"""``comfyd run``: the daemon."""

import argparse
import faulthandler
import os
import sys
from typing import Any, Final

import structlog
import trio

from comfyd.config import LogConfig, load_config
from comfyd.daemon import EXIT_GAVE_UP, run_daemon
from comfyd.errors import BadConfiguration, StartupFailed
from comfyd.host.logging import configure_logging, register_secrets_of
from comfyd.host.socket_activation import take_inherited_sockets

log = structlog.get_logger("comfyd.daemon")

EXIT_BAD_CONFIGURATION: Final = 2
EXIT_BUG: Final = 70


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line's *subparsers*."""
    parser = subparsers.add_parser("run", help="run the daemon (the default)")
    parser.add_argument(
        "--embedded", action="store_true", help="with the small built-in engine instead of ComfyUI: for trying it out"
    )


def run_command(options: argparse.Namespace) -> int:
    """Run the daemon in this process until it stops; return its exit code."""
    faulthandler.enable()  # a watchdog's SIGABRT then leaves every thread's stack in the log
    try:
        inherited = take_inherited_sockets(os.environ)
    except StartupFailed as exc:
        sys.stderr.write(f"comfyd: {exc}\n")
        return EXIT_GAVE_UP
    environ = dict(os.environ)
    try:
        config = load_config(environ, embedded=options.embedded)
    except BadConfiguration as exc:
        for fault in exc.faults:
            sys.stderr.write(f"comfyd: {fault}\n")
        return EXIT_BAD_CONFIGURATION
    configure_logging(config.log)
    register_secrets_of(environ)
    try:
        return trio.run(run_daemon, config, environ, inherited, instruments=_instruments(config.log))
    except Exception as exc:  # the outermost boundary: what is not a start-up failure is a bug
        failures = _leaves(exc)
        if all(isinstance(failure, StartupFailed) for failure in failures):
            log.error("daemon.start_failed", reason="; ".join(str(failure) for failure in failures))  # noqa: TRY400
            return EXIT_GAVE_UP
        log.exception("daemon.bug")
        return EXIT_BUG


def _instruments(config: LogConfig) -> list[trio.abc.Instrument]:
    if not config.loop_stall_ms:
        return []
    from comfyd.host.stall_guard import StallGuard, StallLimits, log_stall

    limit_s = config.loop_stall_ms / 1000
    return [StallGuard(log_stall, StallLimits(computing_s=limit_s, waiting_s=limit_s))]


def _leaves(exc: BaseException) -> list[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for member in exc.exceptions for leaf in _leaves(member)]
    return [exc]
