"""What kind of type an annotation is, and which JSON kinds its values have."""

import types
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin


def json_kinds(member: Any) -> tuple[type, ...]:
    """Return the Python types that JSON values of one (not union) type decode to."""
    shape = bare(member)
    if shape in (None, type(None)):
        return (type(None),)
    if shape is Any:
        return (type(None), bool, int, float, str, list, dict)
    if is_literal(shape):
        return tuple(dict.fromkeys(type(value) for value in get_args(shape)))
    if is_enum(shape):
        return tuple(dict.fromkeys(type(each.value) for each in shape))
    if shape in (bool, int, float, str):
        return (shape,)
    if shape is Path:
        return (str,)
    if is_list(shape) or is_tuple(shape):
        return (list,)
    return (dict,)


def member_kinds(field_type: Any) -> set[type]:
    """Return the JSON kinds of a type, of all members if it is a union."""
    shape = bare(field_type)
    members = get_args(shape) if is_union(shape) else (shape,)
    return {kind for member in members for kind in json_kinds(member)}


def bare(annotated: Any) -> Any:
    """Take ``Annotated`` off."""
    while get_origin(annotated) is Annotated:
        annotated = get_args(annotated)[0]
    return annotated


def is_annotated(type_: Any) -> bool:
    """Whether constraints or a description are around the type."""
    return get_origin(type_) is Annotated


def is_literal(type_: Any) -> bool:
    """Whether it is one of some given values."""
    return get_origin(type_) is Literal


def is_enum(type_: Any) -> bool:
    """Whether it is an enumeration."""
    return isinstance(type_, type) and issubclass(type_, Enum)


def is_union(type_: Any) -> bool:
    """Whether it is ``A | B`` in either spelling."""
    return get_origin(type_) in (Union, types.UnionType)


def is_list(type_: Any) -> bool:
    """Whether it is a list, of whatever."""
    return type_ is list or get_origin(type_) in (list, Sequence)


def is_tuple(type_: Any) -> bool:
    """Whether it is a tuple, of whatever."""
    return type_ is tuple or get_origin(type_) is tuple


def is_mapping(type_: Any) -> bool:
    """Whether it is a mapping, of whatever."""
    return type_ is dict or get_origin(type_) in (dict, Mapping)
