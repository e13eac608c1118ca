"""Writing workflow files: from a graph by rule, or by Claude, each proved before anybody gets it. Knows no command."""

from comfyd.workflows.writing.checking import CheckedFile, check_folder
from comfyd.workflows.writing.choosing import Chosen, choose
from comfyd.workflows.writing.claude import DEFAULT_MODEL, ClaudeFailed, Question, anthropic_api, write_with_claude
from comfyd.workflows.writing.dry_run import DryRunFailed, prove
from comfyd.workflows.writing.known_nodes import (
    NoNodeClasses,
    ask_engine,
    built_in_classes,
    read_classes,
    unknown_classes,
)
from comfyd.workflows.writing.python_file import CircularGraph, python_input, write_python
from comfyd.workflows.writing.sidecar_file import write_sidecar

__all__ = [
    "DEFAULT_MODEL",
    "CheckedFile",
    "Chosen",
    "CircularGraph",
    "ClaudeFailed",
    "DryRunFailed",
    "NoNodeClasses",
    "Question",
    "anthropic_api",
    "ask_engine",
    "built_in_classes",
    "check_folder",
    "choose",
    "prove",
    "python_input",
    "read_classes",
    "unknown_classes",
    "write_python",
    "write_sidecar",
    "write_with_claude",
]
