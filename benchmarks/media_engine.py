"""The embedded engine with one node more: ``CopyFile`` saves a file of the input folder as it is.

So an output of 20 MB costs the engine a moment, and what is measured is what becomes of it. ComfyUI's own way from file
to file, LoadImage and SaveImage, takes seconds for a picture of 3000 px, one picture at a time, behind which anything
that happens to the last one could hide.
"""

import os
import sys
from types import MappingProxyType
from typing import Final

import trio

from comfyd.embedded import app
from comfyd.embedded.__main__ import run
from comfyd.embedded.files import place_output
from comfyd.embedded.nodes import NODE_TYPES
from comfyd.embedded.nodes.registry import NodeContext, NodeResult, NodeType, text
from comfyd.embedded.settings import parse_command_line

_TAKES_S: Final = 0.05
"""A server that learns the prompt's id from the answer of ``POST /prompt`` can miss a prompt that has ended by then."""


def copy_file(ctx: NodeContext, *, source: str, filename_prefix: str) -> NodeResult:
    """Give the file *source* of the input folder a second name in the output folder."""
    ctx.pause(_TAKES_S)
    path = ctx.library.folders.locate(source)
    place = place_output(ctx.library.folders.output, filename_prefix)
    name = place.name(0, path.suffix.lstrip("."))
    os.link(path, place.folder / name)
    return NodeResult(ui={"images": [{"filename": name, "subfolder": place.subfolder, "type": "output"}]})


COPY_FILE = NodeType(
    name="CopyFile",
    display_name="Copy File",
    category="testing",
    description="For benchmarks. Not a node of ComfyUI.",
    run=copy_file,
    threaded=True,
    is_output=True,
    inputs=(text("source", ""), text("filename_prefix", "ComfyUI")),
)


if __name__ == "__main__":
    # The engine has no plug-ins, and should not have them for this.
    vars(app)["NODE_TYPES"] = MappingProxyType({**NODE_TYPES, COPY_FILE.name: COPY_FILE})
    trio.run(run, app.Engine(parse_command_line(sys.argv[1:])), trio.Event())
