"""Nodes of plain values, and the output nodes that show or save text."""

import json
import sys
from typing import Any, Final

from comfyd.embedded.files import place_output
from comfyd.embedded.nodes.registry import (
    NodeContext,
    NodeResult,
    NodeType,
    boolean,
    integer,
    link,
    number,
    text,
)


def value_node(ctx: NodeContext, *, value: Any) -> NodeResult:
    """Pass a typed value on."""
    del ctx
    return NodeResult(outputs=(value,))


def concatenate(ctx: NodeContext, *, string_a: str, string_b: str, delimiter: str) -> NodeResult:
    """Join two texts."""
    del ctx
    return NodeResult(outputs=(delimiter.join((string_a, string_b)),))


def preview_any(ctx: NodeContext, *, source: Any = None) -> NodeResult:
    """Show any value as text: as it is, as JSON, or as Python prints it."""
    del ctx
    return NodeResult(ui={"text": [_shown(source)]})


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        return str(value)


def save_text_file(ctx: NodeContext, *, text: str, filename_prefix: str) -> NodeResult:
    """Write a text file; it is recorded under ``text_files``, a key that only this node has."""
    place = place_output(ctx.library.folders.output, filename_prefix)
    name = place.name(0, "txt")
    (place.folder / name).write_text(text, encoding="utf-8")
    return NodeResult(ui={"text_files": [{"filename": name, "subfolder": place.subfolder, "type": "output"}]})


NODES: Final = (
    NodeType(
        name="PrimitiveString",
        display_name="String",
        category="utils/primitive",
        run=value_node,
        inputs=(text("value", multiline=False),),
        outputs=("STRING",),
    ),
    NodeType(
        name="PrimitiveStringMultiline",
        display_name="String (Multiline)",
        category="utils/primitive",
        run=value_node,
        inputs=(text("value", multiline=True),),
        outputs=("STRING",),
    ),
    NodeType(
        name="PrimitiveInt",
        display_name="Int",
        category="utils/primitive",
        run=value_node,
        inputs=(integer("value", min=-sys.maxsize, max=sys.maxsize, control_after_generate=True),),
        outputs=("INT",),
    ),
    NodeType(
        name="PrimitiveFloat",
        display_name="Float",
        category="utils/primitive",
        run=value_node,
        inputs=(number("value", min=-sys.maxsize, max=sys.maxsize),),
        outputs=("FLOAT",),
    ),
    NodeType(
        name="PrimitiveBoolean",
        display_name="Boolean",
        category="utils/primitive",
        run=value_node,
        inputs=(boolean("value"),),
        outputs=("BOOLEAN",),
    ),
    NodeType(
        name="StringConcatenate",
        display_name="Concatenate",
        category="utils/string",
        run=concatenate,
        inputs=(
            text("string_a", multiline=True),
            text("string_b", multiline=True),
            text("delimiter", "", multiline=False),
        ),
        outputs=("STRING",),
    ),
    NodeType(
        name="PreviewAny",
        display_name="Preview Any",
        category="utils",
        run=preview_any,
        is_output=True,
        inputs=(link("source", "*"),),
    ),
    NodeType(
        name="SaveTextFile",
        display_name="Save Text File",
        category="utils/string",
        description="Writes a text into a file of its own. Not a node of ComfyUI.",
        run=save_text_file,
        threaded=True,
        is_output=True,
        inputs=(text("text", multiline=True), text("filename_prefix", "ComfyUI")),
    ),
)
