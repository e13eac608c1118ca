"""A look at Python that a model wrote, before it runs: it may use what a workflow needs, and nothing else.

This keeps out mistakes and plain mischief (the graph, whose texts the model read, may be anybody's). It is no sandbox:
Python has none. What passes still runs in a process of its own, and its user reads it before a daemon does.
"""

import ast
from collections.abc import Iterator
from importlib import import_module
from typing import Final

MODULES: Final = frozenset({"collections.abc", "comfyd.workflow", "enum", "typing"})
"""From these may be imported what they offer; ``math`` as a whole."""
_ALLOWED: Final = f"import math, or from {', '.join(sorted(MODULES))} import ..."
_BUILTINS: Final = frozenset(
    {
        *("__import__", "breakpoint", "compile", "delattr", "eval", "exec", "exit", "getattr", "globals", "help"),
        *("input", "locals", "memoryview", "open", "quit", "setattr", "vars"),
    }
)
"""What may not be named."""
MAX_SOURCE_CHARACTERS: Final = 200_000
"""More than an answer of 16,000 tokens can hold; a bound on what parsing costs."""


def objections(source: str) -> list[str]:
    """Say what *source* may not contain, with its line; nothing if it may run."""
    if len(source) > MAX_SOURCE_CHARACTERS:
        return [f"has {len(source)} characters; at most {MAX_SOURCE_CHARACTERS} are taken"]
    try:
        tree = ast.parse(source)
    except SyntaxError as exc:
        return [f"line {exc.lineno}: {exc.msg}"]
    except (ValueError, RecursionError, MemoryError) as exc:  # a null character; brackets without end
        return [f"is not Python that can be read: {exc}"]
    found = {(line, text) for node in ast.walk(tree) for line, text in _objections(node)}
    return [f"line {line}: {text}" for line, text in sorted(found)]


def _objections(node: ast.AST) -> Iterator[tuple[int, str]]:
    match node:
        case ast.Import(names=names):  # a whole module has its own imports as attributes: typing.sys
            for name in names:
                if name.name != "math":
                    yield node.lineno, f"import {name.name} is not allowed; write {_ALLOWED}"
        case ast.ImportFrom(module=module, level=level, names=names):
            if level or module not in MODULES:
                yield node.lineno, f"the import from {module or 'a neighbour'} is not allowed; write {_ALLOWED}"
                return
            for name in names:
                if name.name not in import_module(module).__all__:
                    yield node.lineno, f"{module} has no {name.name} to import"
        case ast.Name(id=name) if name in _BUILTINS or name.startswith("__"):
            yield node.lineno, f"{name} must not be used"
        case ast.Attribute(attr=name) if name.startswith("_") or name in ("format", "format_map"):
            yield node.lineno, f".{name} must not be used"
        case ast.AnnAssign(annotation=ast.Constant(value=str())) | ast.arg(annotation=ast.Constant(value=str())):
            yield node.lineno, "an annotation must not be a string"
