"""The constraints of ``msgspec.Meta``, enforced with the texts that a caller sees."""

import re
from collections.abc import Callable
from typing import Any, get_args

import cattrs
import msgspec

from comfyd.wire.shapes import member_kinds
from comfyd.wire.words import quoted


class Refused(ValueError):
    """A value does not fit its type; the text is the fault's message."""


def annotated_hook(annotated: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """Structure the type inside ``Annotated``, then hold the result against every ``Meta`` beside it."""
    base, *notes = get_args(annotated)
    hook = converter.get_structure_hook(base)
    unit = _length_unit(base)
    checks = [check for note in notes if isinstance(note, msgspec.Meta) for check in _checks(note, unit)]

    def structure_annotated(value: Any, _: Any) -> Any:
        result = hook(value, base)
        if result is not None:
            for holds, wanted, show in checks:
                if not holds(result):
                    raise Refused(f"must {wanted}, got {show(value)}")
        return result

    return structure_annotated


def _length_unit(base: Any) -> str:
    kinds = member_kinds(base)
    return "items" if list in kinds else "keys" if dict in kinds else "characters"


Check = tuple[Callable[[Any], bool], str, Callable[[Any], str]]


def _checks(meta: msgspec.Meta, unit: str) -> list[Check]:
    """Turn *meta* into (holds, what the value must do, how to show a wrong one).

    ``Meta(pattern=..., extra={"must": "be a name of letters"})`` words a pattern for people.
    """
    checks: list[Check] = []
    if (ge := meta.ge) is not None:
        checks.append((lambda value: bool(value >= ge), f"be >= {ge}", quoted))
    if (gt := meta.gt) is not None:
        checks.append((lambda value: bool(value > gt), f"be > {gt}", quoted))
    if (le := meta.le) is not None:
        checks.append((lambda value: bool(value <= le), f"be <= {le}", quoted))
    if (lt := meta.lt) is not None:
        checks.append((lambda value: bool(value < lt), f"be < {lt}", quoted))
    if (step := meta.multiple_of) is not None:
        checks.append((lambda value: bool(value % step == 0), f"be a multiple of {step}", quoted))
    if (least := meta.min_length) is not None:
        checks.append((lambda value: len(value) >= least, f"have at least {least} {unit}", _length))
    if (most := meta.max_length) is not None:
        checks.append((lambda value: len(value) <= most, f"have at most {most} {unit}", _length))
    if (pattern := meta.pattern) is not None:
        # In JSON Schema (ECMA-262) a final $ is the end of the text; in Python it would let a newline follow.
        search = re.compile(re.sub(r"(?<!\\)\$\Z", r"\\Z", pattern)).search
        wanted = (meta.extra or {}).get("must", f"match the pattern {pattern}")
        checks.append((lambda value: search(value) is not None, wanted, quoted))
    return checks


def _length(value: Any) -> str:
    return str(len(value))
