"""The words of JSON Schema that the document is written in, and the schemas of requests from the classes that validate.

Answers are written down with :func:`record`; requests are not written down at all: they come from the attrs classes by
which bodies are checked, and are only brought into the shape that reads best here.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from comfyd.http.interrupt import InterruptRequest
from comfyd.jobs.graph import MAX_NODES
from comfyd.jobs.request import PromptRequest, WorkflowRequest
from comfyd.media.convert_options import convert_schema
from comfyd.wire import json_schema

Schema = dict[str, Any]

BOOLEAN: Final[Mapping[str, Any]] = {"type": "boolean"}
INTEGER: Final[Mapping[str, Any]] = {"type": "integer"}
NUMBER: Final[Mapping[str, Any]] = {"type": "number"}
STRING: Final[Mapping[str, Any]] = {"type": "string"}
TIME: Final[Mapping[str, Any]] = {"type": "string", "format": "date-time"}

_URLS: Final = ("webhook", "webhook_v2")
_DEPRECATED: Final = frozenset({"webhook"})


def ref(name: str) -> Schema:
    """A reference to the component schema *name*."""
    return {"$ref": f"#/components/schemas/{name}"}


def described(schema: Mapping[str, Any], text: str) -> Schema:
    """*schema* with a description; beside a ``$ref`` it is allowed since OpenAPI 3.1."""
    return {**schema, "description": text}


def list_of(schema: Mapping[str, Any]) -> Schema:
    """An array of whatever *schema* describes."""
    return {"type": "array", "items": dict(schema)}


def record(
    text: str, members: Mapping[str, Mapping[str, Any]], *, optional: Mapping[str, Mapping[str, Any]] | None = None
) -> Schema:
    """An object of an answer: *members* are always there, *optional* ones where they have something to say.

    It is open: a later version may tell more, and who reads an answer strictly should not break by that.
    """
    return {
        "type": "object",
        "description": text,
        "properties": {name: dict(schema) for name, schema in {**members, **(optional or {})}.items()},
        "required": list(members),
    }


def nullable(schema: Mapping[str, Any]) -> Schema:
    """*schema* or null."""
    if accepts_null(schema):
        return dict(schema)
    if "enum" in schema:
        types = {"type": [schema["type"], "null"]} if isinstance(schema.get("type"), str) else {}
        return {**schema, **types, "enum": [*schema["enum"], None]}
    if isinstance(schema.get("type"), str) and "const" not in schema:
        return {**schema, "type": [schema["type"], "null"]}
    if "anyOf" in schema and "$ref" not in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    beside = {key: schema[key] for key in ("description", "default") if key in schema}
    inside = {key: value for key, value in schema.items() if key not in beside}
    return {**beside, "anyOf": [inside, {"type": "null"}]}


def accepts_null(schema: Mapping[str, Any]) -> bool:
    """Whether null fits *schema*, as far as its own words say; a reference is never followed."""
    kind = schema.get("type")
    if kind is not None:
        fits = kind == "null" or (isinstance(kind, list) and "null" in kind)
    elif "anyOf" in schema:
        fits = any(accepts_null(member) for member in schema["anyOf"])
    else:
        fits = not any(key in schema for key in ("$ref", "enum", "const", "oneOf", "allOf"))
    return fits and None in schema.get("enum", (None,))


def as_accepted(schema: Any) -> Any:
    """Bring the *schema* of something that is sent to us into the shape of this document.

    Null means absent wherever a member need not be there (``comfyd.wire``), so each such member takes null as well.
    ``T or null`` is told by the type alone where it can be, and a default of null, which says nothing, is left out.
    """
    if isinstance(schema, list):
        return [as_accepted(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy: Schema = {key: value if key in {"enum", "default"} else as_accepted(value) for key, value in schema.items()}
    if isinstance(copy.get("description"), str):
        copy["description"] = copy["description"].partition("\n\n")[0].replace("``", "`")
    if "properties" in schema and isinstance(schema.get("properties"), dict):
        required = frozenset(schema.get("required", ()))
        copy["properties"] = {
            name: member if name in required else _optional(member) for name, member in copy["properties"].items()
        }
        if not required:
            copy.pop("required", None)
    return copy


def _optional(member: Schema) -> Schema:
    if member.get("default", ...) is None:
        del member["default"]
    members = member.get("anyOf", ())
    if len(members) == 2 and {"type": "null"} in members:
        (other,) = (each for each in members if each != {"type": "null"})
        if isinstance(other.get("type"), str):
            beside = {key: value for key, value in member.items() if key != "anyOf"}
            return nullable({**other, **beside})
    return nullable(member)


def request_schemas() -> dict[str, Schema]:
    """The component schemas of all that is sent to us, by name."""
    _, classes = json_schema(PromptRequest, WorkflowRequest, InterruptRequest)
    conversion, conversions = convert_schema()
    components: dict[str, Schema] = {
        name: as_accepted(schema) for name, schema in sorted({**classes, **conversions}.items())
    }
    components["ConvertOutput"] = {
        "description": "What pictures become; each format has its own options.",
        **conversion,
    }
    for name in ("PromptRequest", "WorkflowRequest"):
        properties = components[name]["properties"]
        described_as = properties["convert_output"]["description"]
        properties["convert_output"] = {
            "description": described_as,
            "anyOf": [ref("ConvertOutput"), {"type": "null"}],
        }
        for field in _URLS:
            properties[field]["format"] = "uri"
            if field in _DEPRECATED:
                properties[field]["deprecated"] = True
    components["PromptRequest"]["properties"]["prompt"] = described(
        ref("Graph"), components["PromptRequest"]["properties"]["prompt"]["description"]
    )
    components["Graph"] = _GRAPH
    components["Node"] = _NODE
    return components


def workflow_request(base: Mapping[str, Any], text: str, given: Schema, *, required: Iterable[str]) -> Schema:
    """The request of one workflow: the class that all share (*base*), with what *given* says of its ``input``."""
    properties = {**base["properties"], "input": given if required else nullable(given)}
    schema = {**base, "description": text, "properties": {"input": properties.pop("input"), **properties}}
    schema.pop("title", None)
    return {**schema, "required": ["input"]} if required else schema


_GRAPH: Final[Schema] = {
    "type": "object",
    "description": "A graph in ComfyUI's API format (in its editor: Export (API)): to each node's id the node.",
    "minProperties": 1,
    "maxProperties": MAX_NODES,
    "additionalProperties": ref("Node"),
}
_NODE: Final[Schema] = {
    "type": "object",
    "description": "A node of a graph. Members that are not listed here are passed on to ComfyUI.",
    "properties": {
        "class_type": {"type": "string", "minLength": 1, "description": "The name of the node's class."},
        "inputs": {
            "type": ["object", "null"],
            "description": "To each input its value, or a link: the id of another node and the number of its output. "
            "Where a node takes a file, the value may be a file name, a URL (http, https, s3, data) or base64.",
        },
        "_meta": {
            "type": ["object", "null"],
            "description": "The editor's; its `title` is shown in progress.",
        },
    },
    "required": ["class_type"],
}
