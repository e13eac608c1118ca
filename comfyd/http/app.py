"""The application: Quart's routes, and beside them the plain ASGI endpoints for what is hot or large."""

from functools import partial
from typing import Final

import structlog
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, HTTPScope, LifespanScope, WebsocketScope
from quart import Response
from werkzeug.exceptions import HTTPException, MethodNotAllowed, RequestEntityTooLarge

from comfyd.errors import EngineError, Failure, FailureKind
from comfyd.http import problems
from comfyd.http.asgi import Exchange, by_method, guarded
from comfyd.http.docs import DocsEndpoint, is_docs_path
from comfyd.http.events import EventStreams
from comfyd.http.interrupt import interrupt
from comfyd.http.jobs import JobsEndpoint
from comfyd.http.metrics import MetricsEndpoint
from comfyd.http.probes import PROBES, probe
from comfyd.http.prompt import PromptEndpoint
from comfyd.http.responses import json_response, problem_response
from comfyd.http.server import HardenedQuart
from comfyd.http.workflows import PREFIXES, WorkflowsEndpoint
from comfyd.jobs import JobService
from comfyd.workflows import Workflows
from comfyd.workflows.live_source import LiveSource

log = structlog.get_logger("comfyd.http")

_MODELS_TIMEOUT_S: Final = 30.0
_JOBS: Final = "/jobs"


class ComfydApp(HardenedQuart):
    """Everything that comfyd serves."""

    def __init__(
        self,
        service: JobService,
        workflows: Workflows,
        live: LiveSource,
        metrics: MetricsEndpoint,
        docs: DocsEndpoint,
        *,
        max_body_bytes: int,
    ) -> None:
        super().__init__("comfyd", max_body_bytes=max_body_bytes)
        self._service = service
        self._metrics = metrics
        self._docs = docs
        self._prompt = PromptEndpoint(service, max_body_bytes)
        self._workflows = WorkflowsEndpoint(
            service=service, workflows=workflows, live=live, max_body_bytes=max_body_bytes
        )
        self.events = EventStreams(service)
        self._jobs = JobsEndpoint(service, self.events)
        _add_models(self, service)
        _add_problems(self, max_body_bytes)

    async def __call__(
        self,
        scope: HTTPScope | WebsocketScope | LifespanScope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
    ) -> None:
        """Serve one request, by a plain endpoint if it is one's, by Quart otherwise."""
        if scope["type"] == "http":
            path = scope["path"]
            if path in PROBES:
                await probe(path, scope["method"], self._service, send)
                return
            if path == "/prompt":
                await guarded(send, lambda noted: self._prompt(Exchange(scope, receive, noted)))
                return
            if path == _JOBS or path.startswith(f"{_JOBS}/"):
                await guarded(send, lambda noted: self._jobs(Exchange(scope, receive, noted)))
                return
            if path.startswith(PREFIXES) or path in {"/workflow", "/workflows"}:
                await guarded(send, lambda noted: self._workflows(Exchange(scope, receive, noted)))
                return
            if is_docs_path(path):
                await guarded(send, lambda noted: self._docs(Exchange(scope, receive, noted)))
                return
            if path == "/metrics":
                await guarded(send, lambda noted: self._metrics(Exchange(scope, receive, noted)))
                return
            if path == "/interrupt":
                handlers = {"POST": partial(interrupt, self._service)}
                await guarded(send, lambda noted: by_method(Exchange(scope, receive, noted), handlers))
                return
        await super().__call__(scope, receive, send)


def _add_models(app: HardenedQuart, service: JobService) -> None:
    @app.get("/models")
    async def models() -> Response:
        """File names by model type, from ComfyUI itself."""
        engine = service.engines[0]
        try:
            with trio.fail_after(_MODELS_TIMEOUT_S):
                return json_response(await engine.client.models(), 200)
        except (EngineError, trio.TooSlowError) as exc:
            log.warning("http.models_unanswered", reason=str(exc) or "time ran out")
            return problem_response(
                Failure(kind=FailureKind.NOT_READY, detail="ComfyUI does not answer", retry_after_s=5)
            )


def _add_problems(app: HardenedQuart, max_body_bytes: int) -> None:
    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> Response:
        """Quart's own refusals, as problem documents."""
        if isinstance(error, MethodNotAllowed):
            allowed = ", ".join(sorted(error.valid_methods or ()))
            answer = problem_response(problems.method_not_allowed(allowed))
            answer.headers["allow"] = allowed
            return answer
        if isinstance(error, RequestEntityTooLarge):
            return problem_response(problems.body_too_large(max_body_bytes))
        if error.code == 404:
            return problem_response(problems.not_found("such route"))
        detail = error.description or "the request was not understood"
        kind = FailureKind.INVALID_REQUEST if (error.code or 500) < 500 else FailureKind.INTERNAL
        return problem_response(Failure(kind=kind, detail=detail))

    @app.errorhandler(Exception)
    async def bug(error: Exception) -> Response:
        """A bug of ours: logged once, here, and told without details."""
        log.error("http.bug", exc_info=error)
        return problem_response(problems.INTERNAL)
