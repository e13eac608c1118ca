"""Nodes that misbehave on demand: fail, take their time, write much. None of them exists in ComfyUI."""

import time
from typing import Any, Final

from comfyd.embedded.files import place_output
from comfyd.embedded.nodes.registry import (
    NodeContext,
    NodeResult,
    NodeType,
    boolean,
    link,
    number,
    text,
)

_MIB: Final = 1024 * 1024
_CATEGORY: Final = "testing"
_DESCRIPTION: Final = "For tests. Not a node of ComfyUI."


class RaisedOnDemand(Exception):
    """The failure that the Raise node produces."""


def raise_on_demand(ctx: NodeContext, *, message: str, enabled: bool = True, value: Any = None) -> NodeResult:
    """Fail with *message*, or pass *value* through when not enabled."""
    del ctx
    if enabled:
        raise RaisedOnDemand(message)
    return NodeResult(outputs=(value,))


def sleep(ctx: NodeContext, *, seconds: float, uninterruptible: bool = False, value: Any = None) -> NodeResult:
    """Take *seconds* of time, then pass *value* through. An interrupt ends it at once, unless *uninterruptible*."""
    if uninterruptible:
        time.sleep(seconds)
    else:
        ctx.pause(seconds)
    return NodeResult(outputs=(value,))


def save_bytes(ctx: NodeContext, *, size_mb: float, filename_prefix: str) -> NodeResult:
    """Write a file of *size_mb* MiB, a block at a time; it is recorded under ``images``, as SaveVideo does."""
    place = place_output(ctx.library.folders.output, filename_prefix)
    name = place.name(0, "bin")
    left = round(size_mb * _MIB)
    block = bytes(range(256)) * (_MIB // 256)
    with (place.folder / name).open("xb") as file:
        while left > 0:
            ctx.raise_if_interrupted()
            left -= file.write(block[:left])
    return NodeResult(ui={"images": [{"filename": name, "subfolder": place.subfolder, "type": "output"}]})


NODES: Final = (
    NodeType(
        name="Raise",
        display_name="Raise",
        category=_CATEGORY,
        description=_DESCRIPTION,
        run=raise_on_demand,
        inputs=(
            text("message", "raised on demand"),
            boolean("enabled", True, required=False),
            link("value", "*", required=False),
        ),
        outputs=("*",),
    ),
    NodeType(
        name="Sleep",
        display_name="Sleep",
        category=_CATEGORY,
        description=_DESCRIPTION,
        run=sleep,
        threaded=True,
        always_runs=True,
        inputs=(
            number("seconds", 1.0, min=0.0, max=3600.0),
            boolean("uninterruptible", False, required=False),
            link("value", "*", required=False),
        ),
        outputs=("*",),
    ),
    NodeType(
        name="SaveBytes",
        display_name="Save Bytes",
        category=_CATEGORY,
        description=_DESCRIPTION,
        run=save_bytes,
        threaded=True,
        is_output=True,
        inputs=(number("size_mb", 1.0, min=0.0, max=65536.0), text("filename_prefix", "ComfyUI")),
    ),
)
