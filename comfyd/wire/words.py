"""How values and kinds are called in messages."""

import difflib
from collections.abc import Iterable
from typing import Any, Final

SHOWN_CHARACTERS: Final = 80
"""So much of a value is shown in a message: enough to know it again, too little to carry a payload."""

KIND_NAMES: Final = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the one of *known* that somebody who wrote *name* most likely meant, or None."""
    if len(name) > 64:  # difflib is quadratic, and no name of ours is that long
        return None
    by_folded = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.7)
    return by_folded[close[0]] if close else None


def quoted(value: Any) -> str:
    """Show *value* in a message as JSON would, in at most 80 characters; lists and objects only by their kind."""
    match value:
        case str():
            cut = value if len(value) <= SHOWN_CHARACTERS - 2 else value[: SHOWN_CHARACTERS - 5] + "..."
            return '"' + "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in cut) + '"'
        case bool() | None:
            return {True: "true", False: "false", None: "null"}[value]
        case int() if value.bit_length() > 256:  # Python refuses to print very large ones at all
            return f"a number of {value.bit_length()} bits"
        case int() | float():
            return repr(value)
        case _:
            return kind(value)


def kind(value: Any) -> str:
    """Name the JSON kind of a value."""
    return KIND_NAMES.get(type(value), type(value).__name__)


def got(value: Any) -> str:
    """Name the kind of a wrong value, and show it where that says more."""
    shown = quoted(value)
    its_kind = kind(value)
    return its_kind if shown in (its_kind, "null") else f"{its_kind} ({shown})"
