"""Query parameters, checked like a body is: unknown and wrong ones are refused, all at once, each at its name."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl

from hypercorn.typing import HTTPScope

from comfyd.errors import Fault, InvalidValue, RequestRefused
from comfyd.jobs.failures import invalid_request
from comfyd.wire import nearest, quoted

T = TypeVar("T")

_MAX_PARAMETERS: Final = 32
_DIGITS: Final = re.compile(r"[0-9]{1,18}")  # within 63 bits, and never so many that Python refuses them
_SECONDS: Final = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")


def parse_query(scope: HTTPScope, parameters: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Read the query of a request by *parameters*: to each name what makes its value of the text.

    Raises:
        RequestRefused: a parameter is unknown or comes twice, or its reader raised :class:`InvalidValue`.
    """
    try:
        pairs = parse_qsl(
            scope["query_string"].decode("latin-1"), keep_blank_values=True, max_num_fields=_MAX_PARAMETERS
        )
    except ValueError:  # the only reason for which it raises
        fault = Fault(location="", message=f"the query has more than {_MAX_PARAMETERS} parameters")
        raise RequestRefused(invalid_request((fault,))) from None
    values: dict[str, Any] = {}
    faults: list[Fault] = []
    for name, text in pairs:
        try:
            if name not in parameters:
                raise _wrong(_unknown(name, parameters))
            if name in values:
                raise _wrong("is given twice")
            values[name] = parameters[name](text)
        except InvalidValue as exc:
            faults.extend(Fault(location=name[:80], message=fault.message) for fault in exc.faults)
    if faults:
        raise RequestRefused(invalid_request(tuple(faults)))
    return values


def whole_number(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers from *lowest* to *highest*."""
    bounds = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"

    def read(text: str) -> int:
        if not _DIGITS.fullmatch(text) or not lowest <= int(text) or (highest is not None and int(text) > highest):
            raise _wrong(f"must be a whole number {bounds}, got {quoted(text)}")
        return int(text)

    return read


def seconds(longest_s: float) -> Callable[[str], float]:
    """A reader of seconds, from 0 to *longest_s*."""

    def read(text: str) -> float:
        if not _SECONDS.fullmatch(text) or float(text) > longest_s:
            raise _wrong(f"must be a number of seconds from 0 to {longest_s:g}, got {quoted(text)}")
        return float(text)

    return read


def some_of(choices: Mapping[str, Collection[T]]) -> Callable[[str], frozenset[T]]:
    """A reader of names, separated by commas; to each name what it stands for."""

    def read(text: str) -> frozenset[T]:
        found: set[T] = set()
        faults: list[Fault] = []
        for name in text.split(","):
            if (known := choices.get(name.strip())) is not None:
                found.update(known)
            else:
                faults.append(Fault(location="", message=_not_one_of(name.strip(), choices)))
        if faults:
            raise InvalidValue(tuple(faults[:_MAX_PARAMETERS]))
        return frozenset(found)

    return read


def text_of(longest: int) -> Callable[[str], str]:
    """A reader of texts of at most so many characters."""

    def read(text: str) -> str:
        if len(text) > longest:
            raise _wrong(f"must have at most {longest} characters, got {len(text)}")
        return text

    return read


def _wrong(message: str) -> InvalidValue:
    return InvalidValue((Fault(location="", message=message),))


def _unknown(name: str, known: Collection[str]) -> str:
    if (close := nearest(name, known)) is not None:
        return f"unknown parameter; did you mean {quoted(close)}?"
    return f"unknown parameter; the known ones are {', '.join(known)}" if known else "there are no parameters here"


def _not_one_of(name: str, choices: Collection[str]) -> str:
    message = f"must be one of {', '.join(choices)}, got {quoted(name)}"
    close = nearest(name, choices)
    return message if close is None else f"{message}; did you mean {quoted(close)}?"
