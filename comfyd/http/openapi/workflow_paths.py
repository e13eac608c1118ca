"""The operations of workflows: to each its own path, with its own input."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Final
from urllib.parse import quote

from comfyd.errors import FailureKind
from comfyd.http.openapi import examples
from comfyd.http.openapi.operations import ACCEPTED, JSON, PREFER, RUN_FAILURES, answer, operation
from comfyd.http.openapi.schemas import Schema, as_accepted, described, ref, workflow_request
from comfyd.workflows import InputField, LiveInfo, Workflow
from comfyd.workflows.fields import fields_of

_FAILURES: Final = (*RUN_FAILURES, FailureKind.NOT_FOUND, FailureKind.WORKFLOW_FAILED)
_COLUMNS: Final = ("Field", "Type", "Required", "Default", "Description")


def workflow_paths(
    workflows: Sequence[Workflow], live: LiveInfo, base: Mapping[str, Any], *, markdown: bool
) -> tuple[dict[str, Any], dict[str, Schema]]:
    """The paths of all *workflows*, and the component schemas of their inputs and requests.

    *base* is the schema of ``WorkflowRequest``. With *markdown* each description ends with a table of the inputs.
    """
    names = operation_names([workflow.route for workflow in workflows])
    paths: dict[str, Any] = {}
    components: dict[str, Schema] = {}
    for workflow in workflows:
        name = names[workflow.route]
        given = workflow.input_schema(live)
        required = given.get("required", [])
        text = f"What the workflow {workflow.route} is given."
        components[f"Input_{name}"] = as_accepted(described(given, given.get("description") or text))
        request = workflow_request(
            base, f"A request of the workflow {workflow.route}.", ref(f"Input_{name}"), required=required
        )
        components[f"Request_{name}"] = request
        paths[f"/workflow/{quote(workflow.route)}"] = {
            "post": _run(workflow, name, given, markdown=markdown),
            "get": _describe(workflow, name, given),
        }
    return paths, components


def operation_names(routes: Sequence[str]) -> dict[str, str]:
    """To each route a name for code: ``sd1.5/txt2img`` is ``sd1_5_txt2img``.

    It depends on the route alone, so that clients made from the document stay; but where two routes would have one
    name, each gets a mark of its own.
    """
    plain = {route: re.sub(r"[^A-Za-z0-9]+", "_", route).strip("_") or "workflow" for route in routes}
    shared = {name for name, count in Counter(plain.values()).items() if count > 1}
    return {
        route: f"{name}_{blake2b(route.encode(), digest_size=3).hexdigest()}" if name in shared else name
        for route, name in plain.items()
    }


def input_table(fields: Sequence[InputField]) -> str:
    """The inputs of a workflow as a Markdown table."""
    rows = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for field in fields:
        kind = f"{field.type}, {field.bounds}" if field.bounds else field.type
        default = f"`{field.default}`" if field.default else "-"
        cells = (f"`{field.name}`", kind, "yes" if field.required else "no", default, field.description)
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _run(workflow: Workflow, name: str, given: Mapping[str, Any], *, markdown: bool) -> dict[str, Any]:
    parts = [workflow.description]
    if markdown and given.get("properties"):
        parts.append(input_table(fields_of(given)))
    inputs = examples.example_inputs(given)
    media: dict[str, Any] = {"schema": ref(f"Request_{name}")}
    if inputs:
        media["examples"] = inputs
    return operation(
        f"runWorkflow_{name}",
        "Workflows",
        workflow.summary,
        "\n\n".join(part for part in parts if part),
        {
            "200": answer("What the workflow made.", ref("WorkflowResult"), example=examples.WORKFLOW_RESULT),
            "202": ACCEPTED,
        },
        failures=_FAILURES,
        parameters=[PREFER],
        requestBody={"required": bool(given.get("required")), "content": {JSON: media}},
    )


def _describe(workflow: Workflow, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    example = {
        "name": workflow.route,
        "summary": workflow.summary,
        "description": workflow.description,
        "source": workflow.source,
        "input": dict(given),
    }
    return operation(
        f"describeWorkflow_{name}",
        "Workflows",
        f"Describe {workflow.route}",
        "The workflow in words, and the JSON Schema of its input with what the engine has now.",
        {"200": answer("The workflow.", ref("WorkflowDescription"), example=example)},
        failures=(FailureKind.NOT_FOUND,),
    )
