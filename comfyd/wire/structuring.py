"""Plain values to attrs instances, strictly and with every fault at its path; and back."""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, overload

import attrs
import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from comfyd.errors import Fault, InvalidValue
from comfyd.wire import shapes
from comfyd.wire.constraints import Refused, annotated_hook
from comfyd.wire.hooks import (
    MAX_FAULTS,
    Hook,
    enum_hook,
    list_hook,
    literal_hook,
    mapping_hook,
    structure_any,
    structure_bool,
    structure_float,
    structure_int,
    structure_none,
    structure_path,
    structure_str,
    tuple_hook,
    union_hook,
)
from comfyd.wire.words import SHOWN_CHARACTERS, got, nearest, quoted

T = TypeVar("T")

_WIRE_NAME: Final = "comfyd.wire_name"


def wire_field(name: str, **options: Any) -> Any:
    """An ``attrs.field`` called *name* in JSON, for names that Python does not allow (``async``)."""
    return attrs.field(metadata={_WIRE_NAME: name}, **options)


UnknownKeys = Literal["refuse", "ignore"]


@overload
def structure(cls: type[T], value: Any, *, location: str = "", unknown_keys: UnknownKeys = "refuse") -> T: ...
@overload  # what is no class to a type checker: Annotated, unions, Literal
def structure(cls: Any, value: Any, *, location: str = "", unknown_keys: UnknownKeys = "refuse") -> Any: ...
def structure(cls: Any, value: Any, *, location: str = "", unknown_keys: UnknownKeys = "refuse") -> Any:
    """Make a *cls* from the plain *value*, strictly.

    An int is neither a bool nor ``"7"``; a float may be given as an int; lists come only from lists and objects only
    from objects. *cls* is an attrs class or any type such a class may have as a field. With *unknown_keys* ``"ignore"``
    keys that the class does not know are left out (for ComfyUI's messages, which grow).

    Raises:
        InvalidValue: with every fault (at most :data:`MAX_FAULTS`), each at its path below *location*.
    """
    converter = _STRICT if unknown_keys == "refuse" else _LENIENT
    try:
        return converter.structure(value, cls)
    except (Refused, ClassValidationError, IterableValidationError) as exc:
        faults = list(islice(_faults(exc, location), MAX_FAULTS + 1))
        if len(faults) > MAX_FAULTS:
            more = Fault(location=location, message="there are more faults than are listed here")
            faults = [*faults[:MAX_FAULTS], more]
        # Not "from exc": cattrs' group would keep the whole value alive and print parts of it in a traceback.
        raise InvalidValue(tuple(faults)) from None


def _faults(error: BaseException, location: str) -> Iterable[Fault]:
    """Flatten cattrs' tree of exceptions. One that no rule of ours raised is a bug, and climbs out as it is."""
    match error:
        case ClassValidationError():
            noted, unnoted = error.group_exceptions()
            for exc, note in noted:
                field = getattr(attrs.fields(error.cl), note.name)
                below = _below(location, wire_name(field))
                if isinstance(exc, KeyError) and exc.args == (
                    wire_name(field),
                ):  # how cattrs' generated code finds that a required key is missing
                    yield Fault(location=below, message="is required")
                else:
                    yield from _faults(exc, below)
            for exc in unnoted:
                yield from _faults(exc, location)
        case IterableValidationError():
            items, others = error.group_exceptions()
            for exc, item in items:
                yield from _faults(exc, _below(location, item.index))
            for exc in others:
                yield from _faults(exc, location)
        case ForbiddenExtraKeysError():
            yield from _unknown_keys(error, location)
        case ValueError():  # Refused, or an attrs class that refuses a combination of its fields
            yield Fault(location=location, message=str(error))
        case _:
            raise error


def _unknown_keys(error: ForbiddenExtraKeysError, location: str) -> Iterable[Fault]:
    known = [wire_name(field) for field in attrs.fields(error.cl)]
    for key in sorted(map(str, error.extra_fields))[: MAX_FAULTS + 1]:
        close = nearest(key, known)
        if close is not None:
            message = f"unknown field; did you mean {quoted(close)}?"
        elif len(known) <= 12:
            message = f"unknown field; the known ones are {', '.join(known) or 'none'}"
        else:
            message = "unknown field"
        yield Fault(location=_below(location, key), message=message)


def _below(location: str, key: str | int) -> str:
    key = str(key)
    if len(key) > SHOWN_CHARACTERS:
        key = key[: SHOWN_CHARACTERS - 3] + "..."
    return f"{location}.{key}" if location else key


def wire_name(field: "attrs.Attribute[Any]") -> str:
    """Return what a field is called in JSON."""
    return str(field.metadata.get(_WIRE_NAME, field.name))


def _attrs_hook(cls: Any, converter: cattrs.Converter) -> Hook:
    """Wrap cattrs' generated function: only from an object, and null means absent."""
    attrs.resolve_types(cls)
    fields = attrs.fields(cls)
    renamed = {field.name: override(rename=wire_name(field)) for field in fields if _WIRE_NAME in field.metadata}
    generated = make_dict_structure_fn(cls, converter, **renamed)  # type: ignore[arg-type]  # overrides, not the flags
    null_stays = {
        wire_name(field)
        for field in fields
        if field.default is attrs.NOTHING and type(None) in shapes.member_kinds(field.type)
    }

    def structure_attrs(value: Any, _: Any) -> Any:
        if type(value) is not dict:
            raise Refused(f"must be an object, got {got(value)}")
        if None in value.values():
            value = {key: item for key, item in value.items() if item is not None or key in null_stays}
        return generated(value, cls)

    return structure_attrs


def _make_converter(*, forbid_extra_keys: bool) -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=forbid_extra_keys, detailed_validation=True)
    # Primitives by register_structure_hook: cattrs never asks a predicate about them.
    for type_, hook in (
        (int, structure_int),
        (float, structure_float),
        (str, structure_str),
        (bool, structure_bool),
        (type(None), structure_none),
        (Path, structure_path),
        (Any, structure_any),
    ):
        converter.register_structure_hook(type_, hook)
    factories: tuple[tuple[Callable[[Any], bool], Callable[[Any, cattrs.Converter], Hook]], ...] = (
        (attrs.has, _attrs_hook),
        (shapes.is_list, list_hook),
        (shapes.is_tuple, tuple_hook),
        (shapes.is_mapping, mapping_hook),
        (shapes.is_union, union_hook),
        (shapes.is_literal, literal_hook),
        (shapes.is_enum, enum_hook),
        (shapes.is_annotated, annotated_hook),
    )
    for predicate, factory in factories:
        converter.register_structure_hook_factory(predicate, factory)
    return converter


_STRICT: Final = _make_converter(forbid_extra_keys=True)
_LENIENT: Final = _make_converter(forbid_extra_keys=False)


def unstructure(obj: Any) -> Any:
    """Turn attrs instances, enums, paths and mappings into plain values that :func:`structure` takes again."""
    return _OUT.unstructure(obj)


def _make_unstructure(cls: Any) -> Callable[[Any], Any]:
    attrs.resolve_types(cls)
    renamed = {f.name: override(rename=wire_name(f)) for f in attrs.fields(cls) if _WIRE_NAME in f.metadata}
    return make_dict_unstructure_fn(cls, _OUT, **renamed)  # type: ignore[arg-type]  # overrides, not the flags


_OUT: Final = cattrs.Converter()
_OUT.register_unstructure_hook_factory(attrs.has, _make_unstructure)
_OUT.register_unstructure_hook_func(lambda type_: isinstance(type_, type) and issubclass(type_, Path), str)
