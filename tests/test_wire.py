"""The schema layer: what is refused, in which words and at which place; and the schema that says the same."""

import itertools
import math
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from comfyd.errors import InvalidValue
from comfyd.wire import (
    MAX_DEPTH,
    MAX_FAULTS,
    decode_json,
    encode_json,
    json_schema,
    nearest,
    quoted,
    structure,
    unstructure,
    wire_field,
)


class Fit(Enum):
    COVER = "cover"
    CONTAIN = "contain"


@attrs.frozen(kw_only=True)
class Storage:
    bucket: Annotated[str, Meta(min_length=1, description="Where to put it.")]
    prefix: str = ""
    is_async: bool = wire_field("async", default=False)


@attrs.frozen(kw_only=True)
class Conversion:
    format: Literal["jpeg", "webp"]
    quality: Annotated[int, Meta(ge=1, le=100)] = 75
    fit: Fit = Fit.COVER


@attrs.frozen(kw_only=True)
class Order:
    prompt: dict[str, Any]
    id: Annotated[str, Meta(pattern="^[a-z]{1,8}$", extra={"must": "be 1 to 8 letters"})] | None = None
    storage: Storage | None = None
    conversions: list[Conversion] = attrs.field(factory=list)
    tags: tuple[Annotated[str, Meta(max_length=3)], ...] = ()
    timeout_s: Annotated[float, Meta(gt=0, lt=1000)] | None = None
    width: Annotated[int, Meta(multiple_of=8)] = 512
    limits: Mapping[str, Annotated[int, Meta(ge=0)]] = attrs.field(factory=dict)
    source: str | list[str] | None = None
    extra: Any = None


def faults_of(cls: Any, value: Any, location: str = "") -> dict[str, str]:
    with pytest.raises(InvalidValue) as caught:
        structure(cls, value, location=location)
    faults = {fault.location: fault.message for fault in caught.value.faults}
    assert len(faults) == len(caught.value.faults)
    return faults


def told(act: Callable[[], object]) -> list[str]:
    """Return the messages of the faults that *act* is refused with; any other exception is a failure."""
    try:
        act()
    except InvalidValue as exc:
        return [fault.message for fault in exc.faults]
    return []


def message_of(cls: Any, value: Any) -> str:
    faults = faults_of(cls, value)
    assert list(faults) == [""]
    return faults[""]


# -- JSON


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "the body is empty"),
        (b" \n\t", "the body is empty"),
        (b'{"a":', "it ends too early (after 5 bytes)"),
        (b'{"a":1,}', "trailing comma in object (byte 7)"),
        (b"{} x", "trailing characters (byte 4)"),
        (b"{'a':1}", "(byte 1)"),
        (b"\xef\xbb\xbf{}", "(byte 0)"),
        (b"NaN", "(byte 0)"),
        (b"[Infinity]", "(byte 1)"),
        (b'"\xff"', "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'{"a":"\\ud800"}', "unpaired"),
        (b"1e999", "out of range"),
        (b"1" * 5000, "out of range"),
        (b"[" * 100_000, f"more than {MAX_DEPTH} levels"),
        (b'{"a":' * 100_000, f"more than {MAX_DEPTH} levels"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} levels"),
    ],
    ids=map(str, itertools.count()),
)
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_what_is_not_json_is_refused_in_one_sentence(data: bytes, part: str, kind: type) -> None:
    with pytest.raises(InvalidValue) as caught:
        decode_json(kind(data))
    (fault,) = caught.value.faults
    assert fault.location == ""
    assert part in fault.message
    assert len(fault.message) < 120
    assert "\n" not in fault.message


def test_the_deepest_allowed_nesting_is_taken() -> None:
    value = decode_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    depth = 0
    while value is not None:
        depth, value = depth + 1, value[0] if value else None
    assert depth == MAX_DEPTH


def test_a_wide_document_is_not_taken_for_a_deep_one() -> None:
    document = {str(i): {"class_type": "X", "inputs": {"a": [[]]}} for i in range(500)}
    assert decode_json(encode_json(document)) == document


@given(st.integers(min_value=-(10**300), max_value=10**300))
def test_whole_numbers_survive_exactly(number: int) -> None:
    assert decode_json(b"[%d]" % number) == [number]
    assert encode_json([number]) == b"[%d]" % number


@given(st.binary(max_size=60))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    assert len(told(lambda: decode_json(data))) <= 1


def test_of_a_repeated_key_the_last_counts() -> None:
    assert decode_json(b'{"a":1,"a":2}') == {"a": 2}


def test_a_float_that_json_cannot_express_is_encoded_as_null() -> None:
    assert encode_json([math.nan, math.inf]) == b"[null,null]"


# -- faults


def test_every_fault_is_told_at_once_at_its_place() -> None:
    body = {
        "id": "A B",
        "storage": {"buket": "x", "async": 1},
        "conversions": [{"format": "jpeg"}, {"format": "gif", "quality": 250, "fit": "stretch"}],
        "tags": ["abcd", 1],
        "timeout_s": 0,
        "width": 513,
        "limits": {"a": 1, "b": -1, "c": None},
        "source": {},
        "promt": {},
    }
    assert faults_of(Order, body, "body") == {
        "body.prompt": "is required",
        "body.id": 'must be 1 to 8 letters, got "A B"',
        "body.storage.bucket": "is required",
        "body.storage.buket": 'unknown field; did you mean "bucket"?',
        "body.storage.async": "must be true or false, got a number (1)",
        "body.conversions.1.format": 'must be one of "jpeg", "webp", got "gif"',
        "body.conversions.1.quality": "must be <= 100, got 250",
        "body.conversions.1.fit": 'must be one of "cover", "contain", got "stretch"',
        "body.tags.0": "must have at most 3 characters, got 4",
        "body.tags.1": "must be a string, got a number (1)",
        "body.timeout_s": "must be > 0, got 0",
        "body.width": "must be a multiple of 8, got 513",
        "body.limits.b": "must be >= 0, got -1",
        "body.limits.c": "must be a whole number, got null",
        "body.source": "must be a string or a list, got an object",
        "body.promt": 'unknown field; did you mean "prompt"?',
    }


@pytest.mark.parametrize("value", [True, "7", 7.0, None, [7], {}])
def test_only_a_whole_number_is_an_int(value: Any) -> None:
    assert message_of(int, value).startswith("must be a whole number, got ")


@pytest.mark.parametrize("value", [True, "7", None, [], math.nan, math.inf, 10**400])
def test_only_a_finite_number_is_a_float(value: Any) -> None:
    message_of(float, value)


def test_a_whole_number_is_a_float_too() -> None:
    result = structure(float, 3)
    assert type(result) is float
    assert result == 3.0


@pytest.mark.parametrize("value", [7, True, None, [], b"x"])
def test_only_a_string_is_a_str(value: Any) -> None:
    assert message_of(str, value).startswith("must be a string, got ")


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_only_true_and_false_are_a_bool(value: Any) -> None:
    assert message_of(bool, value).startswith("must be true or false, got ")


@pytest.mark.parametrize("cls", [list[str], tuple[str, ...], tuple[str, str]])
@pytest.mark.parametrize("value", ["ab", {"a": "b"}, None, 3])
def test_only_a_list_makes_a_list_or_tuple(cls: Any, value: Any) -> None:
    assert message_of(cls, value).startswith("must be a list")


@pytest.mark.parametrize("cls", [dict[str, int], Mapping[str, int], Order])
@pytest.mark.parametrize("value", [[], "ab", [["a", 1]], None, 3])
def test_only_an_object_makes_a_dict_or_a_class(cls: Any, value: Any) -> None:
    assert message_of(cls, value).startswith("must be an object, got ")


def test_a_fixed_tuple_checks_length_and_each_item() -> None:
    assert structure(tuple[str, int], ["a", 1]) == ("a", 1)
    assert message_of(tuple[str, int], ["a"]) == "must be a list of 2 items, got a list"
    assert faults_of(tuple[str, int], [1, "a"]) == {
        "0": "must be a string, got a number (1)",
        "1": 'must be a whole number, got a string ("a")',
    }


def test_a_literal_tells_true_from_one() -> None:
    assert structure(Literal[1, "a"], 1) == 1
    assert message_of(Literal[1, "a"], True) == 'must be one of 1, "a", got true'
    assert message_of(Literal[1, "a"], []) == 'must be one of 1, "a", got a list'


def test_a_path_is_a_string_without_a_nul() -> None:
    assert structure(Path, "/a/b") == Path("/a/b")
    for value in ("", "a\0b", 3):
        assert message_of(Path, value).startswith("must be a path, got ")


def test_a_union_reports_the_faults_of_the_member_that_was_meant() -> None:
    assert faults_of(str | list[int], ["x"]) == {"0": 'must be a whole number, got a string ("x")'}
    assert structure(int | float, 3) == 3


def test_a_union_that_json_cannot_tell_apart_is_our_mistake() -> None:
    with pytest.raises(TypeError, match="two members"):
        structure(Storage | Conversion, {})


@pytest.mark.parametrize("text", ["abc\n", "abcdefghi", "", "ab1"])
def test_a_pattern_covers_the_whole_text_as_in_json_schema(text: str) -> None:
    assert "id" in faults_of(Order, {"prompt": {}, "id": text})


def test_constraints_hold_at_any_depth() -> None:
    nested = dict[str, list[Annotated[Annotated[int, Meta(ge=1)], Meta(le=3)]]]
    assert structure(nested, {"a": [1, 3]}) == {"a": [1, 3]}
    assert faults_of(nested, {"a": [0, 4]}) == {"a.0": "must be >= 1, got 0", "a.1": "must be <= 3, got 4"}


def test_lengths_of_lists_and_objects_are_counted_in_their_own_unit() -> None:
    assert message_of(Annotated[list[int], Meta(max_length=1)], [1, 2]) == "must have at most 1 items, got 2"
    assert message_of(Annotated[dict[str, int], Meta(min_length=1)], {}) == "must have at least 1 keys, got 0"


def test_a_class_that_refuses_a_combination_is_a_fault_of_the_whole() -> None:
    @attrs.frozen(kw_only=True)
    class Range:
        least: int
        most: int

        def __attrs_post_init__(self) -> None:
            if self.least > self.most:
                raise ValueError("least is above most")

    assert faults_of(list[Range], [{"least": 2, "most": 1}]) == {"0": "least is above most"}


def test_a_bug_in_a_class_is_not_taken_for_a_fault() -> None:
    @attrs.frozen
    class Broken:
        value: int

        def __attrs_post_init__(self) -> None:
            raise LookupError("bug")

    with pytest.raises(LookupError, match="bug"):
        structure(Broken, {"value": 1})


# -- null and unknown keys


def test_null_means_absent_where_there_is_a_default() -> None:
    names = ("id", "storage", "conversions", "tags", "width", "limits", "extra")
    body: dict[str, Any] = dict.fromkeys(names)
    assert structure(Order, {"prompt": {}, **body}) == Order(prompt={})


def test_null_for_a_required_field_is_absent_too() -> None:
    assert faults_of(Order, {"prompt": None}) == {"prompt": "is required"}


def test_null_stays_where_a_required_field_allows_it() -> None:
    @attrs.frozen
    class Nullable:
        value: int | None

    assert structure(Nullable, {"value": None}) == Nullable(value=None)
    assert faults_of(Nullable, {}) == {"value": "is required"}


def test_the_caller_s_dict_is_not_changed() -> None:
    body: dict[str, Any] = {"prompt": {}, "id": None}
    structure(Order, body)
    assert body == {"prompt": {}, "id": None}


def test_an_unknown_key_that_is_like_nothing_lists_the_known_ones() -> None:
    assert faults_of(Storage, {"bucket": "b", "zzz": 1}) == {
        "zzz": "unknown field; the known ones are bucket, prefix, async"
    }


def test_unknown_keys_are_ignored_on_request_at_every_level() -> None:
    body = {"prompt": {}, "new": 1, "storage": {"bucket": "b", "newer": 2}}
    assert structure(Order, body, unknown_keys="ignore") == Order(prompt={}, storage=Storage(bucket="b"))
    faults_of(Order, body)


def test_the_python_name_of_a_renamed_field_is_unknown() -> None:
    assert structure(Storage, {"bucket": "b", "async": True}).is_async
    assert "is_async" in faults_of(Storage, {"bucket": "b", "is_async": True})


# -- bounds of what is told


def test_a_hundred_faults_are_told_and_that_there_are_more() -> None:
    with pytest.raises(InvalidValue) as caught:
        structure(list[list[int]], [["x"] * 50_000] * 50)
    assert len(caught.value.faults) == MAX_FAULTS + 1
    assert caught.value.faults[-1].message == "there are more faults than are listed here"


def test_a_thousand_unknown_keys_are_bounded_too() -> None:
    with pytest.raises(InvalidValue) as caught:
        structure(Storage, {"bucket": "b"} | {f"key {i}" * 100: 1 for i in range(1000)})
    assert len(caught.value.faults) == MAX_FAULTS + 1
    assert all(len(fault.location) <= 80 for fault in caught.value.faults)


@pytest.mark.parametrize(
    "value",
    ["x" * 1_000_000, "\x1b[2J\n" * 100, 10**5000, -(10**5000), ["x" * 1_000_000], {"a": "b" * 1000}, 1.5, True],
    ids=map(str, itertools.count()),
)
def test_a_shown_value_is_short_and_harmless(value: Any) -> None:
    text = quoted(value)
    assert len(text) <= 80
    assert text.isprintable()


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5))
def test_whatever_is_given_the_answer_is_an_order_or_faults(value: Any) -> None:
    for body in (value, {"prompt": {}, "source": value}, {"prompt": value, "tags": value, "limits": value}):
        assert all(0 < len(message) < 250 for message in told(partial(structure, Order, body)))


def test_the_nearest_name_is_found_whatever_its_case() -> None:
    assert nearest("ksampler", ["KSampler", "SaveImage"]) == "KSampler"
    assert nearest("zzz", ["KSampler"]) is None
    assert nearest("K" * 1_000_000, ["KSampler"]) is None


# -- the way back, and the schema


def test_what_is_unstructured_can_be_structured_again() -> None:
    order = Order(
        prompt={"1": {"class_type": "X"}},
        storage=Storage(bucket="b", is_async=True),
        conversions=[Conversion(format="webp", fit=Fit.CONTAIN)],
        tags=("a", "b"),
        limits={"a": 1},
    )
    plain = unstructure(order)
    assert plain["storage"] == {"bucket": "b", "prefix": "", "async": True}
    assert structure(Order, decode_json(encode_json(plain))) == order


def test_a_path_is_unstructured_as_text() -> None:
    @attrs.frozen
    class Place:
        folder: Path

    assert unstructure(Place(folder=Path("/a"))) == {"folder": "/a"}


def test_the_schema_refers_to_nested_classes_that_it_defines() -> None:
    (schema,), components = json_schema(Order)
    assert schema == {"$ref": "#/components/schemas/Order"}
    order = components["Order"]["properties"]
    assert order["storage"]["anyOf"] == [{"$ref": "#/components/schemas/Storage"}, {"type": "null"}]
    assert order["conversions"]["items"] == {"$ref": "#/components/schemas/Conversion"}
    assert set(components) == {"Order", "Storage", "Conversion", "Fit"}
    assert components["Order"]["required"] == ["prompt"]


def test_the_schema_says_what_structure_enforces() -> None:
    _, components = json_schema(Order)
    assert components["Conversion"]["properties"]["quality"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 100,
        "default": 75,
    }
    storage = components["Storage"]
    assert storage["additionalProperties"] is False
    assert list(storage["properties"]) == ["bucket", "prefix", "async"]
    assert storage["required"] == ["bucket"]
    assert storage["properties"]["bucket"]["description"] == "Where to put it."


def test_a_required_renamed_field_is_required_by_its_wire_name() -> None:
    @attrs.frozen
    class Renamed:
        class_: str = wire_field("class")

    _, components = json_schema(Renamed)
    assert components["Renamed"]["required"] == ["class"]
    assert faults_of(Renamed, {}) == {"class": "is required"}


def test_two_classes_of_one_name_are_refused() -> None:
    def make() -> type:
        @attrs.frozen
        class Twin:
            value: int

        return Twin

    with pytest.raises(TypeError, match="Twin"):
        json_schema(make(), list[make()])  # type: ignore[misc]  # a runtime type


def test_a_constraint_around_an_optional_has_no_schema() -> None:
    """Why constraints go inside: msgspec refuses them outside of the None."""

    @attrs.frozen
    class Outside:
        value: Annotated[int | None, Meta(ge=1)] = None

    assert faults_of(Outside, {"value": 0}) == {"value": "must be >= 1, got 0"}
    with pytest.raises(TypeError):
        json_schema(Outside)


def test_msgspec_takes_attrs_instances_as_they_are() -> None:
    assert msgspec.json.decode(encode_json(Conversion(format="jpeg"))) == {
        "format": "jpeg",
        "quality": 75,
        "fit": "cover",
    }
