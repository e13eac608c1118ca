"""Why a submission came to nothing: a problem document like the daemon's own, and the exit code."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from comfyd.errors import ComfydError

EXIT_JOB_FAILED: Final = 1
EXIT_BAD_USE: Final = 2
EXIT_NOT_READY: Final = 3


class SubmitFailed(ComfydError):
    """The submission ends here, with *exit_code*. *document* is the problem, with members as RFC 9457 has them."""

    def __init__(self, document: Mapping[str, Any], exit_code: int) -> None:
        super().__init__(str(document.get("detail", "")))
        self.document = document
        self.exit_code = exit_code


class BadUse(SubmitFailed):
    """The command line, or a file that it names, makes no sense."""

    def __init__(self, detail: str, title: str = "The command makes no sense") -> None:
        super().__init__({"type": "bad-use", "title": title, "detail": detail}, EXIT_BAD_USE)


class Unreachable(SubmitFailed):
    """The daemon does not answer, or not for long enough."""

    def __init__(self, detail: str) -> None:
        super().__init__({"type": "unreachable", "title": "The daemon is not reachable", "detail": detail}, 3)


class NotSaved(SubmitFailed):
    """The job has succeeded, and its outputs are not all here."""

    def __init__(self, detail: str) -> None:
        document = {"type": "not-saved", "title": "An output could not be saved", "detail": detail}
        super().__init__(document, EXIT_JOB_FAILED)


class Refused(SubmitFailed):
    """The daemon did not take the request, or does not know the job."""

    def __init__(self, document: Mapping[str, Any], status: int) -> None:
        super().__init__(document, EXIT_NOT_READY if passes(status) else _exit_code(status))


class JobFailed(SubmitFailed):
    """The job was accepted and has failed, or was cancelled."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        status = document.get("status")
        code = _exit_code(status) if isinstance(status, int) and document.get("type") != "job-cancelled" else 1
        super().__init__(document, code)


def passes(status: int) -> bool:
    """Whether an answer of *status* says that a later request may succeed: of the daemon, or of a proxy before it."""
    return status in {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }


def _exit_code(status: int) -> int:
    return EXIT_BAD_USE if 400 <= status < 500 else EXIT_JOB_FAILED
