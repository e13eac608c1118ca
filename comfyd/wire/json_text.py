"""JSON text to plain values and back, with the refusals in words for people."""

import re
from typing import Any, Final

import msgspec

from comfyd.errors import Fault, InvalidValue

MAX_DEPTH: Final = 100
"""Deepest nesting of JSON that we take. Graphs need about 4; every Python walks 100 levels without a RecursionError."""

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode


def decode_json(data: bytes | bytearray) -> Any:
    """Decode one JSON document into plain Python values.

    Whole numbers of any size that msgspec takes (over 300 digits) are exact; other numbers are IEEE doubles. Of a
    repeated key the last counts, as in JavaScript. NaN and Infinity are not JSON.

    Raises:
        InvalidValue: it is not JSON, with one fault for the document as a whole.
    """
    if not data or data.isspace():
        raise _refused_document("the body is empty, JSON is expected")
    try:
        value = _decode(data)
    except UnicodeDecodeError as exc:  # a ValueError, not a msgspec.DecodeError; its position counts within one string
        raise _refused_document(f"the JSON has a string that is not UTF-8: {exc.reason}") from exc
    except msgspec.ValidationError as exc:  # a number that no double holds (1e999), or of hundreds of digits
        raise _refused_document("the JSON has a number that is out of range") from exc
    except msgspec.DecodeError as exc:
        raise _refused_document(_syntax_text(str(exc), data)) from exc
    except RecursionError as exc:
        raise _refused_document(f"the JSON is nested more than {MAX_DEPTH} levels deep") from exc
    # msgspec's own limit is the interpreter's: about 1,000 levels on Python 3.11 and many more on 3.13, where a value
    # that was decoded could then break whatever walks it.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and (
        type(value) in (dict, list) and _deeper_than(value, MAX_DEPTH)
    ):
        raise _refused_document(f"the JSON is nested more than {MAX_DEPTH} levels deep")
    return value


def encode_json(obj: Any) -> bytes:
    """Encode plain values, attrs instances, enums, paths and datetimes as compact JSON.

    A non-finite float becomes null, as in JavaScript.
    """
    return _encode(obj)


def _refused_document(message: str) -> InvalidValue:
    return InvalidValue((Fault(location="", message=message),))


def _syntax_text(text: str, data: bytes | bytearray) -> str:
    if text != "Input data was truncated":
        return f"not valid JSON: {text.removeprefix('JSON is malformed: ')}"
    if re.search(rb"\\u[dD][89a-fA-F]", data):  # msgspec reports an unpaired surrogate by the same words
        return "not valid JSON: it ends too early, or has an unpaired \\ud800 to \\udfff escape"
    return f"not valid JSON: it ends too early (after {len(data)} bytes)"


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for container in level
            for child in (container.values() if type(container) is dict else container)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return False
    return True
