"""Frames of the engine's websocket: what is read of them, and what makes no sense."""

import pytest

from comfyd.engine.messages import UnreadableFrame, parse_event


@pytest.mark.parametrize(
    ("frame", "kind", "prompt_id"),
    [
        ('{"type":"status","data":{"status":{"exec_info":{"queue_remaining":0}},"sid":"x"}}', "status", None),
        ('{"type":"executing","data":{"node":null,"prompt_id":"p"}}', "executing", "p"),
        ('{"type":"executing","data":{"node":"3","prompt_id":"p"},"more":[1]}', "executing", "p"),
        ('{"type":"new kind","data":{}}', "new kind", None),
        ('{"type":"executing","data":{"prompt_id":5}}', "executing", None),
        ('{"type":"executing","data":{"prompt_id":null}}', "executing", None),
        ('{"data":{"prompt_id":""},"type":""}', "", ""),
    ],
)
def test_type_and_prompt_are_read_and_the_rest_is_kept(frame: str, kind: str, prompt_id: str | None) -> None:
    event = parse_event(frame)
    assert (event.type, event.prompt_id) == (kind, prompt_id)


def test_data_is_kept_whole_with_large_integers_exact() -> None:
    event = parse_event('{"type":"executed","data":{"seed":18446744073709551615,"deep":{"a":[1,null,"ä"]}}}')
    assert event.data == {"seed": 2**64 - 1, "deep": {"a": [1, None, "ä"]}}


@pytest.mark.parametrize(
    "frame",
    [
        "",
        "junk",
        "null",
        "[]",
        "5",
        '{"type":"x"}',
        '{"data":{}}',
        '{"type":5,"data":{}}',
        '{"type":"x","data":[]}',
        '{"type":"x","data":null}',
        '{"type":"x","data":{}',
        '{"type":"x","data":{"a":NaN}}',
        '{"type":"x","data":{"a":"\\ud800"}}',
        '{"type":"x","data":' + "[" * 100_000,
        '{"type":"x","data":{"a":' * 100_000,
    ],
)
def test_a_frame_that_makes_no_sense_is_one_kind_of_error(frame: str) -> None:
    with pytest.raises(UnreadableFrame):
        parse_event(frame)


def test_a_text_that_is_no_utf_8_is_such_an_error_too() -> None:
    with pytest.raises(UnreadableFrame):
        parse_event(memoryview(b'{"type":"x","data":{"a":"\xff"}}'))
