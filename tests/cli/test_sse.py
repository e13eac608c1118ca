"""Server-Sent Events line by line."""

import pytest

from comfyd.cli.sse import EventParser, ServerEvent
from comfyd.errors import InvalidValue


def parsed(*lines: str) -> list[ServerEvent]:
    parser = EventParser()
    return [event for line in lines if (event := parser.feed(line)) is not None]


def test_an_event_is_complete_at_the_empty_line() -> None:
    parser = EventParser()
    assert parser.feed("event: progress") is None
    assert parser.feed('data: {"percent":50}') is None
    assert parser.feed("") == ServerEvent("progress", {"percent": 50})


def test_events_follow_each_other_and_each_has_a_name_of_its_own() -> None:
    assert parsed("event: a", "data: 1", "", "data: 2", "", "event:b", "data:3", "") == [
        ServerEvent("a", 1),
        ServerEvent("message", 2),
        ServerEvent("b", 3),
    ]


def test_comments_ids_and_empty_lines_are_passed_over() -> None:
    assert parsed(": still here", "", "", "id: 5", "retry: 100", "event: a", ": in between", "data: 1", "") == [
        ServerEvent("a", 1)
    ]


def test_the_id_of_an_event_counts_once_the_event_is_complete_and_until_the_next_id() -> None:
    parser = EventParser()
    for line in ("id: life-1", "event: state", "data: 1"):
        parser.feed(line)
    assert parser.last_id == "", "a stream cut off here must be asked for this event again"
    parser.feed("")
    assert parser.last_id == "life-1"
    for line in ("event: progress", "data: 2", "", "id: life-2", "data: 3"):
        parser.feed(line)
    assert parser.last_id == "life-1"
    parser.feed("")
    assert parser.last_id == "life-2"


@pytest.mark.parametrize(("line", "seconds"), [("retry: 250", 0.25), ("retry: soon", 2.0), ("retry: -1", 2.0)])
def test_the_server_says_when_to_come_back(line: str, seconds: float) -> None:
    parser = EventParser()
    parser.feed(line)
    assert parser.retry_s == seconds


def test_data_on_several_lines_is_one_value() -> None:
    assert parsed("data: {", 'data: "a": [1,', "data: 2]}", "") == [ServerEvent("message", {"a": [1, 2]})]


def test_an_event_that_is_not_complete_is_none() -> None:
    assert parsed("event: a", "data: 1") == []


def test_an_event_without_data_is_none_and_its_name_is_not_the_next_ones() -> None:
    assert parsed("event: a", "", "data: 1", "") == [ServerEvent("message", 1)]


def test_large_integers_survive_exactly() -> None:
    assert parsed("data: 18446744073709551615", "")[0].data == 2**64 - 1


def test_data_that_is_no_json_is_told() -> None:
    with pytest.raises(InvalidValue):
        parsed("data: {", "")
