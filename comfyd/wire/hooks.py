"""One strict cattrs hook for each kind of type. A value that does not fit raises :class:`Refused` with the words."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, get_args

import cattrs
from cattrs.errors import IterableValidationError, IterableValidationNote

from comfyd.wire.constraints import Refused
from comfyd.wire.shapes import bare, json_kinds
from comfyd.wire.words import KIND_NAMES, got, nearest, quoted

Hook = Callable[[Any, Any], Any]

MAX_FAULTS: Final = 100
"""So many faults are told of one value. Nobody reads more, and a 100 MB list of wrong items must not cost gigabytes."""


def structure_int(value: Any, _: Any) -> int:
    """Take a whole number of any size; true and 1.0 are none."""
    if type(value) is not int:
        raise Refused(f"must be a whole number, got {got(value)}")
    return value


def structure_float(value: Any, _: Any) -> float:
    """Take a finite number; a whole one is converted."""
    if type(value) is not float and type(value) is not int:
        raise Refused(f"must be a number, got {got(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise Refused(f"is too large, got {quoted(value)}") from None
    if not math.isfinite(number):
        raise Refused(f"must be a finite number, got {quoted(value)}")
    return number


def structure_str(value: Any, _: Any) -> str:
    """Take a string."""
    if type(value) is not str:
        raise Refused(f"must be a string, got {got(value)}")
    return value


def structure_bool(value: Any, _: Any) -> bool:
    """Take true or false."""
    if type(value) is not bool:
        raise Refused(f"must be true or false, got {got(value)}")
    return value


def structure_none(value: Any, _: Any) -> None:
    """Take null."""
    if value is not None:
        raise Refused(f"must be null, got {got(value)}")


def structure_path(value: Any, _: Any) -> Path:
    """Take a string as the path of a file."""
    if type(value) is not str or not value or "\0" in value:
        raise Refused(f"must be a path, got {got(value)}")
    return Path(value)


def structure_any(value: Any, _: Any) -> Any:
    """Take whatever it is."""
    return value


def _items(pairs: Iterable[tuple[Any, Any]], hook: Hook, item_type: Any, name: str) -> list[tuple[Any, Any]]:
    """Structure the values of *pairs* (index or key, value); of faulty ones collect at most MAX_FAULTS + 1."""
    done: list[tuple[Any, Any]] = []
    errors: list[Exception] = []
    for key, value in pairs:
        try:
            done.append((key, hook(value, item_type)))
        except Exception as exc:  # noqa: BLE001 cattrs' protocol: noted and grouped; _faults raises what is not a fault
            exc.__notes__ = [
                *getattr(exc, "__notes__", ()),
                IterableValidationNote(f"at {key}", key, item_type),
            ]
            errors.append(exc)
            if len(errors) > MAX_FAULTS:
                break
    if errors:
        raise IterableValidationError(f"While structuring {name}", errors, item_type)
    return done


def list_hook(list_type: Any, converter: cattrs.Converter) -> Hook:
    """Take a list of what the type says."""
    (item_type,) = get_args(list_type) or (Any,)
    item_hook = converter.get_structure_hook(item_type)

    def structure_list(value: Any, _: Any) -> list[Any]:
        if type(value) is not list:
            raise Refused(f"must be a list, got {got(value)}")
        return [item for _, item in _items(enumerate(value), item_hook, item_type, "a list")]

    return structure_list


def tuple_hook(tuple_type: Any, converter: cattrs.Converter) -> Hook:
    """Take a list as a tuple: of any length (``tuple[T, ...]``), or item by item."""
    arguments = get_args(tuple_type) or (Any, ...)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        structure_list = list_hook(list[arguments[0]], converter)  # type: ignore[valid-type]  # a runtime type
        return lambda value, _: tuple(structure_list(value, None))
    hooks = [converter.get_structure_hook(argument) for argument in arguments]

    def structure_fixed(value: Any, _: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) != len(hooks):
            raise Refused(f"must be a list of {len(hooks)} items, got {got(value)}")

        def item(pair: Any, _: Any) -> Any:
            hook, argument, given = pair
            return hook(given, argument)

        triples = zip(hooks, arguments, value, strict=True)
        return tuple(done for _, done in _items(enumerate(triples), item, Any, "a list"))

    return structure_fixed


def mapping_hook(mapping_type: Any, converter: cattrs.Converter) -> Hook:
    """Take an object as a dict. One with values of any kind is passed on as it is, not copied."""
    key_type, value_type = get_args(mapping_type) or (str, Any)
    if bare(key_type) not in (str, Any):
        raise TypeError(f"{mapping_type}: the keys of a JSON object are strings")
    value_hook = converter.get_structure_hook(value_type)

    def structure_mapping(value: Any, _: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise Refused(f"must be an object, got {got(value)}")
        if value_type is Any:
            return value
        return dict(_items(value.items(), value_hook, value_type, "an object"))

    return structure_mapping


def _choice_hook(choices: Mapping[Any, Any]) -> Hook:
    """Take one of the keys of *choices* and give its value. The type counts too: 1 is not true."""
    by_typed = {(type(key), key): result for key, result in choices.items()}
    allowed = ", ".join(quoted(key) for key in choices)
    words = [key for key in choices if isinstance(key, str)]

    def structure_choice(value: Any, _: Any) -> Any:
        try:
            return by_typed[type(value), value]
        except (KeyError, TypeError):  # TypeError: a list or an object has no hash
            close = nearest(value, words) if isinstance(value, str) and len(words) > 8 else None
            hint = f"; did you mean {quoted(close)}?" if close is not None else ""
            raise Refused(f"must be one of {allowed}, got {quoted(value)}{hint}") from None

    return structure_choice


def literal_hook(literal: Any, _: cattrs.Converter) -> Hook:
    """Take one of a ``Literal``'s values."""
    return _choice_hook({value: value for value in get_args(literal)})


def enum_hook(enum: Any, _: cattrs.Converter) -> Hook:
    """Take the value of one of an enumeration's members."""
    return _choice_hook({member.value: member for member in enum})


def union_hook(union: Any, converter: cattrs.Converter) -> Hook:
    """Choose the member of *union* by the JSON kind of the value, so its faults are those of one member."""
    hooks: dict[type, tuple[Hook, Any]] = {}
    for member in get_args(union):
        hook = converter.get_structure_hook(member)
        for kind in json_kinds(member):
            if kind in hooks:
                raise TypeError(f"{union}: two members are {KIND_NAMES[kind]} in JSON")
            hooks[kind] = (hook, member)
    if float in hooks and int not in hooks:
        hooks[int] = hooks[float]
    wanted = " or ".join(dict.fromkeys(KIND_NAMES[kind] for kind in hooks if kind is not type(None)))

    def structure_union(value: Any, _: Any) -> Any:
        try:
            hook, member = hooks[type(value)]
        except KeyError:
            raise Refused(f"must be {wanted}, got {got(value)}") from None
        return hook(value, member)

    return structure_union
