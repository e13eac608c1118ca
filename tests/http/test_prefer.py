"""``Prefer: respond-async``, in all the ways that RFC 7240 lets it be written."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.http.asgi import split_outside_quotes, wants_async


def scope(*values: str, name: bytes = b"prefer") -> Any:
    return {"type": "http", "headers": [(b"host", b"x"), *((name, value.encode("latin-1")) for value in values)]}


@pytest.mark.parametrize(
    "values",
    [
        ["respond-async"],
        ["Respond-ASYNC"],
        ["  respond-async\t"],
        ["respond-async, wait=10"],
        ["wait=10,respond-async"],
        ["respond-async; a=b; c"],
        ["respond-async;"],
        ['respond-async=""'],
        ["respond-async ="],
        ["return=minimal", "respond-async"],
        ['foo="a, b", respond-async'],
        ['foo="a \\" b", respond-async'],
        ['foo; bar="x,y;z", respond-async'],
        [",, ,respond-async,"],
    ],
)
def test_it_is_wanted(values: list[str]) -> None:
    assert wants_async(scope(*values))


@pytest.mark.parametrize(
    "values",
    [
        [],
        [""],
        ["wait=10"],
        ["respond-async2"],
        ["xrespond-async"],
        ["respond_async"],
        ["respond-async=1"],
        ['foo="a, respond-async"'],
        ['foo="a, respond-async'],
        ['foo="\\", respond-async'],
        ["foo; respond-async"],
        ["foo=respond-async"],
        ["respond-async=no, respond-async"],
        ["respond async"],
        ["réspond-async"],
    ],
)
def test_it_is_not_wanted(values: list[str]) -> None:
    assert not wants_async(scope(*values))


def test_the_name_of_the_header_may_be_in_any_case_and_no_other_header_counts() -> None:
    assert wants_async(scope("respond-async", name=b"Prefer"))
    assert not wants_async(scope("respond-async", name=b"preference-applied"))


@given(st.text(st.characters(codec="latin-1")), st.sampled_from(",;"))
def test_splitting_loses_nothing(text: str, separator: str) -> None:
    assert separator.join(split_outside_quotes(text, separator)) == text


@given(st.text(st.characters(codec="latin-1"), max_size=300))
def test_any_header_is_read(text: str) -> None:
    assert wants_async(scope(text)) in {True, False}
    assert wants_async(scope("respond-async", text))
