"""The taxonomy of what can go wrong. ``http/problems.py`` maps it to HTTP, once.

Two kinds of thing live here. A job or request that does not succeed ends in a :class:`Failure`, a value that is
stored, logged and told to the caller. An exception derived from :class:`ComfydError` is how our own parts tell each
other; each is named for what happened.
"""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, Final

import attrs

NO_FACTS: Final[Mapping[str, Any]] = MappingProxyType({})


class FailureKind(Enum):
    """Why a request or a job did not succeed. The value is the stable slug that callers see as ``type``."""

    INVALID_REQUEST = "invalid-request"
    NO_OUTPUT_NODE = "no-output-node"
    INVALID_INPUT = "invalid-input"
    INVALID_PROMPT = "invalid-prompt"
    NOT_FOUND = "not-found"
    METHOD_NOT_ALLOWED = "method-not-allowed"
    BODY_TOO_LARGE = "body-too-large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported-media-type"
    RANGE_NOT_SATISFIABLE = "range-not-satisfiable"
    UNAUTHORIZED = "unauthorized"
    ID_CONFLICT = "id-conflict"
    WEBHOOK_PENDING = "webhook-pending"
    JOB_CANCELLED = "job-cancelled"
    QUEUE_FULL = "queue-full"
    NOT_READY = "not-ready"
    DRAINING = "draining"
    EXECUTION_FAILED = "execution-failed"
    WORKFLOW_FAILED = "workflow-failed"
    ENGINE_CRASHED = "engine-crashed"
    STORAGE_FAILED = "storage-failed"
    TIMEOUT = "timeout"
    INTERNAL = "internal-error"


@attrs.frozen(kw_only=True)
class Fault:
    """One thing wrong at one place of what the caller sent.

    *location* is a dotted path such as ``prompt.3.inputs.width``; it is empty for the body as a whole.
    """

    location: str
    message: str


@attrs.frozen(kw_only=True)
class Failure:
    """Why a request or a job did not succeed, as told to the caller.

    *detail* is one sentence without secrets, tracebacks or server paths. *facts* are further members of the problem
    document (``node_id``, ``node_errors``, ...). *retry_after_s* is for the failures that pass by themselves.
    """

    kind: FailureKind
    detail: str
    faults: tuple[Fault, ...] = ()
    facts: Mapping[str, Any] = NO_FACTS
    retry_after_s: float | None = None


class ComfydError(Exception):
    """Base of every error that comfyd raises on purpose."""


class RequestRefused(ComfydError):
    """A request was not taken; nothing was queued and nothing is left behind."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


class InvalidValue(ComfydError):
    """A value does not fit its schema. Carries every fault, not only the first."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        super().__init__("; ".join(f"{f.location}: {f.message}" if f.location else f.message for f in faults))
        self.faults = faults


class BadConfiguration(ComfydError):
    """The configuration makes no sense. *faults* name variable, value and what is allowed; one line each."""

    def __init__(self, faults: tuple[str, ...]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class StartupFailed(ComfydError):
    """comfyd could not begin its work, for a reason that is not its configuration. Exit code 1."""


class EngineError(ComfydError):
    """Base of what goes wrong with an engine, as opposed to a job. *cause* is a stable slug for logs and metrics."""

    cause: str = "failed"


class EngineExited(EngineError):
    """The engine's process ended by itself. *returncode* is negative for a signal, as in :mod:`subprocess`.

    *oom_killed*: the kernel killed somebody for want of memory while this engine lived, and SIGKILL ended it.
    """

    def __init__(self, returncode: int, *, oom_killed: bool = False) -> None:
        if returncode < 0:
            by_whom = ", probably by the kernel's out-of-memory killer" if oom_killed else ""
            super().__init__(f"the engine was ended by signal {-returncode}{by_whom}")
            self.cause = "oom-killed" if oom_killed else "signal"
        else:
            super().__init__(f"the engine exited with code {returncode}")
            self.cause = "exited"
        self.returncode = returncode
        self.oom_killed = oom_killed


class EngineHung(EngineError):
    """The engine, or the prompt in it, gave no sign of life. *evidence* holds what was looked at."""

    cause = "hung"

    def __init__(self, text: str, evidence: Mapping[str, Any]) -> None:
        super().__init__(text)
        self.evidence = evidence


class EngineWorkerDied(EngineError):
    """The thread that executes prompts has ended; the engine answers over HTTP and will never execute any more."""

    cause = "worker-died"

    def __init__(self, last_line: str) -> None:
        super().__init__(f"the engine's worker thread died: {last_line}" if last_line else "the worker thread died")
        self.last_line = last_line


class EngineBroken(EngineError):
    """The engine's connection to its GPU is broken: all that uses the device will fail until the process ends."""

    cause = "cuda-broken"

    def __init__(self, reason: str) -> None:
        super().__init__(f"the engine's GPU context is broken: {reason}")
        self.reason = reason


class EngineStartTimeout(EngineError):
    """The engine did not answer within its start-up budget."""

    cause = "start-timeout"

    def __init__(self, budget_s: float) -> None:
        super().__init__(f"the engine did not answer within {budget_s:g} s")
        self.budget_s = budget_s


class EnginePortTaken(EngineError):
    """Something already answers at the engine's address before our engine was started."""

    cause = "port-taken"

    def __init__(self, address: str) -> None:
        super().__init__(
            f"something already answers at {address}; it is not the engine that comfyd starts. "
            "Stop it, or choose another COMFYUI_PORT_HOST"
        )
        self.address = address


class WarmupFailed(EngineError):
    """The warm-up prompt did not succeed on this engine."""

    cause = "warm-up-failed"


class EngineUnavailable(EngineError):
    """The engine did not answer a request over HTTP, or answered nonsense."""


class EngineLost(EngineError):
    """The engine went away under a job.

    *cause* is the slug of what went wrong with it (``exited``, ``signal``, ``oom-killed``, ``hung``, ``worker-died``,
    ``cuda-broken``, ``stopped``, ``forgotten``, ...). *last_words* are the lines that it wrote to stderr during the
    job, fit to be shown to the caller.
    """

    def __init__(self, reason: str, *, cause: str = "failed", last_words: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.cause = cause
        self.last_words = last_words


class RestartLimitReached(EngineError):
    """The engine failed too often within the window; comfyd gives up."""

    def __init__(self, failures: int, window_s: float) -> None:
        super().__init__(f"the engine failed {failures} times within {window_s:g} s")
        self.failures = failures
        self.window_s = window_s
