"""``POST /workflow/<name>``: run a named workflow. The same as ``/prompt`` with a graph that is made from an input."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import attrs
import structlog

from comfyd.errors import Failure, FailureKind, InvalidValue, RequestRefused
from comfyd.http.asgi import Exchange, by_method, send_json, wants_async
from comfyd.http.submission import Submission, digest_of, receive_parsed, submit_and_answer
from comfyd.jobs import JobService, Request
from comfyd.jobs.failures import invalid_request
from comfyd.jobs.records import presentable
from comfyd.jobs.request import parse_workflow_request
from comfyd.wire import decode_json, encode_json, nearest, quoted
from comfyd.workflows import Built, Workflow, WorkflowCatalogue, WorkflowFailed, Workflows
from comfyd.workflows.live_source import LiveSource

log = structlog.get_logger("comfyd.http")

PREFIXES: Final = ("/workflow/", "/workflows/")
"""The peer's route, and the one that its README writes."""
_LONGEST_INPUT: Final = 1 << 16
"""Characters of one input that are repeated: prompts are shorter, and pictures longer."""
_STALE_S: Final = 2.0
"""How old what we know of the engine may be before a name is refused as unknown: it may have just been added."""


@attrs.frozen(kw_only=True)
class WorkflowsEndpoint:
    """The endpoints of all workflows. It holds nothing between two requests."""

    service: JobService
    workflows: Workflows
    live: LiveSource
    max_body_bytes: int

    async def __call__(self, exchange: Exchange) -> None:
        """Serve one request."""
        path = exchange.scope["path"]
        await self.workflows.loaded.wait()
        if path in {"/workflow", "/workflows"}:
            await by_method(exchange, {"GET": self._list})
            return
        route = path.removeprefix(next(prefix for prefix in PREFIXES if path.startswith(prefix)))
        # Taken once: a request sees one version of all files, whatever happens to them meanwhile.
        catalogue = self.workflows.current
        handlers = {"POST": partial(self._run, catalogue, route), "GET": partial(self._describe, catalogue, route)}
        await by_method(exchange, handlers)

    async def _list(self, exchange: Exchange) -> None:
        listed = [
            {"name": each.route, "summary": each.summary, "source": each.source}
            for each in self.workflows.current.workflows
        ]
        await send_json(exchange.send, 200, {"workflows": listed})

    async def _describe(self, catalogue: WorkflowCatalogue, route: str, exchange: Exchange) -> None:
        workflow = _named(catalogue, route)
        live = await self.live.get()
        described = {
            "name": workflow.route,
            "summary": workflow.summary,
            "description": workflow.description,
            "source": workflow.source,
            "input": workflow.input_schema(live),
        }
        await send_json(exchange.send, 200, described)

    async def _run(self, catalogue: WorkflowCatalogue, route: str, exchange: Exchange) -> None:
        workflow = _named(catalogue, route)
        parse = partial(_parse, respond_async=wants_async(exchange.scope))
        said = await receive_parsed(exchange, self.max_body_bytes, parse)
        built = await self._build(workflow, said.input)
        # It is told with the result, to webhooks too: a picture of 100 MB and a URL's password are not for them.
        told = presentable(built.input, _LONGEST_INPUT)
        request = attrs.evolve(said.request, prompt=built.prompt, echo={**said.request.echo, "input": told})
        body = None
        if request.detached:
            body = encode_json({**said.fields, "prompt": built.prompt, "input": told})
        submission = Submission(request=request, digest=said.digest, body=body, workflow=workflow.route)
        await submit_and_answer(self.service, exchange, submission)

    async def _build(self, workflow: Workflow, raw_input: Mapping[str, Any]) -> Built:
        """Make the graph.

        Raises:
            RequestRefused: the input does not fit, or the workflow failed.
        """
        live = await self.live.get()
        try:
            try:
                return await workflow.build(raw_input, live)
            except InvalidValue as exc:
                refused = RequestRefused(invalid_request(exc.faults))
            newer = await self.live.get(max_age_s=_STALE_S)
            if newer is live:
                raise refused
            try:
                return await workflow.build(raw_input, newer)
            except InvalidValue as exc:
                raise RequestRefused(invalid_request(exc.faults)) from exc
        except WorkflowFailed as exc:
            log.error("workflow.failed", workflow=exc.route, reason=str(exc), traceback=exc.traceback_text)  # noqa: TRY400  # its own
            kind = FailureKind.TIMEOUT if exc.timed_out else FailureKind.WORKFLOW_FAILED
            raise RequestRefused(Failure(kind=kind, detail=str(exc))) from exc


@attrs.frozen(kw_only=True)
class _Said:
    """What a client sent: a request without a graph, the *input* for one, and the other *fields* as they came."""

    request: Request
    input: Mapping[str, Any]
    fields: Mapping[str, Any]
    digest: bytes


def _parse(body: bytearray, *, respond_async: bool) -> _Said:
    value: Any = decode_json(body)
    body.clear()  # a body can be 100 MB; what it said is in *value*
    request, given = parse_workflow_request(value)
    if respond_async:
        request = attrs.evolve(request, respond_async=True)
    fields = {name: item for name, item in value.items() if name != "input"}
    return _Said(request=request, input=given, fields=fields, digest=digest_of(request, value))


def _named(catalogue: WorkflowCatalogue, route: str) -> Workflow:
    """Find a workflow.

    Raises:
        RequestRefused: there is none of that name.
    """
    workflow = catalogue.get(route)
    if workflow is None:
        like = nearest(route, [each.route for each in catalogue.workflows])
        hint = f"; did you mean {quoted(like)}?" if like else ""
        detail = f"there is no workflow {quoted(route)}{hint}"
        raise RequestRefused(Failure(kind=FailureKind.NOT_FOUND, detail=detail))
    return workflow
