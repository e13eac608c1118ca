"""Puts the whole OpenAPI 3.1 document together."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from comfyd.errors import FailureKind
from comfyd.http.openapi.answers import answer_schemas
from comfyd.http.openapi.events import webhook_items
from comfyd.http.openapi.operations import fixed_paths
from comfyd.http.openapi.problem_types import problem_responses, problem_schemas
from comfyd.http.openapi.schemas import request_schemas
from comfyd.http.openapi.workflow_paths import workflow_paths
from comfyd.wire import encode_json
from comfyd.workflows import LiveInfo, Workflow

OPENAPI_VERSION: Final = "3.1.0"
_ABOUT: Final = """\
Runs ComfyUI graphs and named workflows: one call, one result.

A call waits for its result, or is answered with a 202: then the result comes by webhook, goes to a storage, or is \
looked up at `/jobs`. Whatever goes wrong is told as a problem document (RFC 9457), whose `type` is one of the slugs \
of `ProblemType`. `null` means absent wherever a member of a request need not be there; an unknown member is refused. \
HEAD is answered wherever GET is."""
_TAGS: Final = (
    ("Run", "Run a graph."),
    ("Workflows", "Named graphs with typed inputs."),
    ("Jobs", "List jobs, follow them, get their files, cancel them."),
    ("Engine", "What ComfyUI has."),
    ("Probes", "For balancers and monitoring."),
    ("Docs", "This document."),
)
_SECURITY_SCHEMES: Final = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "One of `API_KEYS`."},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "One of `API_KEYS`."},
}
_METHODS: Final = frozenset({"get", "post", "delete"})


def build_openapi(
    version: str,
    workflows: Sequence[Workflow],
    live: LiveInfo | None = None,
    *,
    markdown: bool = True,
    api_keys: bool = False,
    metrics: bool = True,
    servers: Sequence[str] = (".",),
) -> dict[str, Any]:
    """Build the document; the same each time for the same arguments.

    Args:
        version: comfyd's.
        workflows: those that are told of.
        live: what the engine has, for the choices of inputs; None where it was not asked.
        markdown: whether each workflow's description has a table of its inputs.
        api_keys: whether a key is asked for.
        metrics: whether ``/metrics`` is on this port.
        servers: base URLs; relative ones are relative to where the document is.
    """
    components = {**request_schemas(), **answer_schemas(), **problem_schemas()}
    paths, inputs = workflow_paths(
        workflows, live if live is not None else LiveInfo(), components["WorkflowRequest"], markdown=markdown
    )
    del components["WorkflowRequest"]  # only what is made of it for each workflow is used
    document: dict[str, Any] = {
        "openapi": OPENAPI_VERSION,
        "info": {
            "title": "comfyd",
            "version": version,
            "description": _ABOUT,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": url} for url in servers],
        "tags": [{"name": name, "description": text} for name, text in _TAGS],
        "paths": _in_reading_order(fixed_paths(metrics=metrics), paths),
        "webhooks": webhook_items(),
        "components": {"schemas": dict(sorted({**components, **inputs}.items()))},
    }
    if api_keys:
        _ask_for_keys(document)
    _share_answers(document)
    return document


def _in_reading_order(fixed: Mapping[str, Any], workflows: Mapping[str, Any]) -> dict[str, Any]:
    """``/prompt`` and the list of workflows, then the workflows, then the rest."""
    first = {path: fixed[path] for path in ("/prompt", "/workflows")}
    return {**first, **workflows, **{path: item for path, item in fixed.items() if path not in first}}


def _ask_for_keys(document: dict[str, Any]) -> None:
    """Say that every operation wants a key, but those that say that they do not."""
    document["components"]["securitySchemes"] = dict(_SECURITY_SCHEMES)
    document["security"] = [{name: []} for name in _SECURITY_SCHEMES]
    refusal = problem_responses([FailureKind.UNAUTHORIZED])
    for item in document["paths"].values():
        for method in _METHODS & item.keys():
            if "security" not in item[method]:
                responses = {**item[method]["responses"], **refusal}
                item[method]["responses"] = {status: responses[status] for status in sorted(responses)}


def _share_answers(document: dict[str, Any]) -> None:
    """Put the answers that several operations have into the components: a hundred workflows have the same ones."""
    places: dict[bytes, list[tuple[dict[str, Any], str]]] = {}
    for item in document["paths"].values():
        for method in sorted(_METHODS & item.keys()):
            responses = item[method]["responses"]
            for status, response in responses.items():
                places.setdefault(encode_json(response), []).append((responses, status))
    shared: dict[str, Any] = {}
    for those in places.values():
        first, status = those[0]
        if len(those) > 1 and "content" in first[status]:
            name = _name_of(first[status], status, shared)
            shared[name] = first[status]
            for responses, each in those:
                responses[each] = {"$ref": f"#/components/responses/{name}"}
    document["components"]["responses"] = dict(sorted(shared.items()))


def _name_of(response: Mapping[str, Any], status: str, taken: Mapping[str, Any]) -> str:
    """Name an answer for its schema, or one that tells of several kinds of problem for its *status*."""
    (media,) = response["content"].values()
    name = media["schema"].get("$ref", f"Problems{status}").rpartition("/")[2]
    number = 1
    while (unique := name if number == 1 else f"{name}{number}") in taken:
        number += 1
    return unique
