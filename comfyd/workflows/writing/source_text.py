"""Python expressions as text, laid out as ``ruff format`` would leave them: a written file is not reformatted at once.

What fits stands on one line. What does not is opened into a line for each item, with a comma after the last one; the
formatter leaves such a thing open.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

WIDTH: Final = 120
"""Columns of a line, as in comfyd itself."""
_INDENT: Final = " " * 4
_PIECE: Final = 100
"""Characters of one line of a text that is too long for any line."""


@attrs.frozen
class Group:
    """Brackets with items. An item's label stands before it: ``ge=``, ``"key": ``, or nothing."""

    opening: str
    items: tuple[tuple[str, "Expression"], ...]
    closing: str


Expression = str | Group
"""What is an atom to the layout, or a group that may be opened."""


def call(function: str, *items: tuple[str, Expression]) -> Group:
    """Call *function*."""
    return Group(f"{function}(", items, ")")


def subscript(name: str, *items: Expression) -> Group:
    """Write ``Name[item, ...]``."""
    return Group(f"{name}[", tuple(("", item) for item in items), "]")


def literal(value: Any) -> Expression:
    """Write a value out of JSON."""
    match value:
        case str():
            return quote(value)
        case Mapping():
            return Group("{", tuple((f"{quote(key)}: ", literal(item)) for key, item in value.items()), "}")
        case list() | tuple():
            return Group("[", tuple(("", literal(item)) for item in value), "]")
        case _:
            return repr(value)


def quote(text: str) -> str:
    """Write a string, in double quotes unless that takes more backslashes."""
    mark = "'" if text.count('"') > text.count("'") else '"'
    inside = "".join(c if c in "'\"" else repr(c)[1:-1] for c in text)
    return mark + inside.replace(mark, f"\\{mark}") + mark


def flat(expression: Expression) -> str:
    """Write it on one line."""
    if isinstance(expression, str):
        return expression
    return expression.opening + ", ".join(label + flat(item) for label, item in expression.items) + expression.closing


def fits(line: str) -> bool:
    """Whether a line is short enough. What is drawn twice as wide (Chinese) counts twice."""
    return len(line) + sum(unicodedata.east_asian_width(c) in "WF" for c in line if ord(c) > 0x10FF) <= WIDTH


def laid_out(before: str, expression: Expression, after: str = "", *, indent: str = "") -> Iterator[str]:
    """Give the lines of an expression with what stands before and after it."""
    line = f"{indent}{before}{flat(expression)}{after}"
    if isinstance(expression, str) or not expression.items or fits(line):
        yield line
        return
    yield f"{indent}{before}{expression.opening}"
    for label, item in expression.items:
        yield from laid_out(label, item, ",", indent=indent + _INDENT)
    yield f"{indent}{expression.closing}{after}"


def annotated_name(name: str, annotation: Expression, default: Expression | None) -> Iterator[str]:
    """Give the lines of a member of a class: its name, its type and, if it has one, its default."""
    value = "" if default is None else f" = {flat(default)}"
    lines = list(laid_out(f"{name}: ", annotation, value, indent=_INDENT))
    if default is None or fits(lines[-1]):
        yield from lines
        return
    *first, last = laid_out(f"{name}: ", annotation, indent=_INDENT)
    yield from first
    if isinstance(default, str) and default[0] in "\"'":
        pieces = [f"{_INDENT * 2}{piece}" for piece in _pieces(default)]
        # The formatter puts a word that is longer than a line into brackets only where others could have been opened.
        if len(pieces) > 1 or fits(pieces[0]) or (isinstance(annotation, Group) and not first):
            yield from (f"{last} = (", *pieces, f"{_INDENT})")
        else:
            yield f"{last} = {default}"
    else:
        yield from laid_out(f"{last.strip()} = ", default, indent=_INDENT)


def _pieces(code: str) -> Sequence[str]:
    if fits(f"{_INDENT * 2}{code}"):
        return [code]
    mark, inside = code[0], code[1:-1]
    pieces = [""]
    for word in inside.replace(" ", " \0").split("\0"):  # a break after each space, never inside an escape
        if pieces[-1] and len(pieces[-1]) + len(word) > _PIECE:
            pieces.append("")
        pieces[-1] += word
    return [f"{mark}{piece}{mark}" for piece in pieces]
