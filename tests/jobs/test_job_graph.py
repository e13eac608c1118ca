"""Graphs: what is told of a malformed one, and what becomes of the file name prefixes of a good one."""

import copy
from typing import Any

import pytest
from jobs_kit import CLASSES, graph

from comfyd.engine import NodeClasses, is_link
from comfyd.jobs import graph as graph_module
from comfyd.jobs.graph import (
    check_classes,
    check_shape,
    mark_unlike_cached,
    prepare_graph,
    saves_something,
)

GOOD: dict[str, Any] = {"class_type": "EmptyImage", "inputs": {}}


def places(prompt: dict[str, Any]) -> list[str]:
    return [fault.location for fault in check_shape(prompt)]


# Shape


@pytest.mark.parametrize(
    ("node", "location", "words"),
    [
        (None, "prompt.1", "got null"),
        ([], "prompt.1", "got a list"),
        ("EmptyImage", "prompt.1", 'got "EmptyImage"'),
        (5, "prompt.1", "got 5"),
        (True, "prompt.1", "got true"),
        ({}, "prompt.1.class_type", "must be the name of a node class"),
        ({"inputs": {}}, "prompt.1.class_type", "must be the name of a node class"),
        ({"class_type": None, "inputs": {}}, "prompt.1.class_type", "got null"),
        ({"class_type": "", "inputs": {}}, "prompt.1.class_type", 'got ""'),
        ({"class_type": ["EmptyImage"], "inputs": {}}, "prompt.1.class_type", "got a list"),
        ({"class_type": "A", "inputs": []}, "prompt.1.inputs", "got a list"),
        ({"class_type": "A", "inputs": ""}, "prompt.1.inputs", 'got ""'),
        ({"class_type": "A", "inputs": 0}, "prompt.1.inputs", "got 0"),
        ({"class_type": "A", "inputs": False}, "prompt.1.inputs", "got false"),
        ({"class_type": "A", "inputs": {}, "_meta": "title"}, "prompt.1._meta", 'got "title"'),
        ({"class_type": "A", "inputs": {"image": ["2", 0]}}, "prompt.1.inputs.image", 'node "2", which is not in'),
        ({"class_type": "A", "inputs": {"image": ["2", 1.0]}}, "prompt.1.inputs.image", 'node "2", which is not in'),
    ],
)
def test_a_malformed_node_is_told_at_its_place(node: Any, location: str, words: str) -> None:
    (fault,) = check_shape({"1": node})
    assert fault.location == location
    assert words in fault.message


@pytest.mark.parametrize(
    "node",
    [
        {"class_type": "A"},
        {"class_type": "A", "inputs": None},
        {"class_type": "A", "inputs": {}, "_meta": None},
        {"class_type": "A", "inputs": {"text": ["1", 0]}},  # a loop is ComfyUI's to judge
        {"class_type": "A", "inputs": {"values": ["2", "0"], "more": ["2", 0, 0], "flag": ["2", True], "n": [2, 0]}},
        {"class_type": "A", "inputs": {}, "is_changed": [1], "anything": {"else": None}},
    ],
)
def test_what_is_unusual_but_no_fault_is_taken(node: Any) -> None:
    assert check_shape({"1": node}) == []


def test_every_fault_is_told_at_once() -> None:
    prompt = {"1": None, "2": {"inputs": 3}, "3": {"class_type": "A", "inputs": {"a": ["9", 0], "b": ["8", 1]}}}
    assert places(prompt) == [
        "prompt.1",
        "prompt.2.class_type",
        "prompt.2.inputs",
        "prompt.3.inputs.a",
        "prompt.3.inputs.b",
    ]


def test_an_empty_graph_is_one_fault() -> None:
    (fault,) = check_shape({})
    assert fault.location == "prompt"
    assert "empty" in fault.message


def test_a_graph_of_the_editor_is_recognised() -> None:
    faults = check_shape({"last_node_id": 9, "nodes": [], "links": [], "version": 0.4, "extra": {"ds": 1}})
    hinted = [fault.location for fault in faults if "Export (API)" in fault.message]
    assert hinted == ["prompt.last_node_id", "prompt.nodes", "prompt.links", "prompt.version"]
    assert "prompt.extra.class_type" in [fault.location for fault in faults]


def test_more_nodes_than_any_real_graph_has_are_not_even_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "MAX_NODES", 3)
    assert check_shape(dict.fromkeys("123", GOOD)) == []
    (fault,) = check_shape(dict.fromkeys("1234"))
    assert fault.message == "must have at most 3 nodes, got 4"


def test_a_message_does_not_carry_the_payload() -> None:
    (fault,) = check_shape({"1": "A" * 10_000_000})
    assert len(fault.message) < 250


@pytest.mark.parametrize(
    ("value", "link"),
    [
        (["1", 0], True),
        (["1", 0.0], True),
        (["", 0], True),
        (["1", True], False),
        (["1", "0"], False),
        (["1", None], False),
        ([1, 0], False),
        (["1"], False),
        (["1", 0, 0], False),
        (("1", 0), False),
        ("1", False),
        ({"1": 0}, False),
        (None, False),
    ],
)
def test_a_link_is_what_comfyui_takes_for_one(value: Any, link: bool) -> None:
    assert is_link(value) is link


# Classes


def test_known_classes_are_no_fault() -> None:
    assert check_classes(graph(), CLASSES) == []


def test_an_unknown_class_is_told_with_the_nearest_one() -> None:
    prompt = {"1": {"class_type": "saveimage"}, "2": {"class_type": "Quux"}, "3": GOOD}
    first, second = check_classes(prompt, CLASSES)
    assert first.location == "prompt.1.class_type"
    assert first.message == 'ComfyUI has no node class "saveimage"; did you mean "SaveImage"?'
    assert second.location == "prompt.2.class_type"
    assert second.message == 'ComfyUI has no node class "Quux"'


@pytest.mark.parametrize(
    ("node", "saves"),
    [
        ({"class_type": "SaveImage"}, True),
        ({"class_type": "SaveImage", "inputs": None}, True),
        ({"class_type": "PreviewImage", "inputs": {}}, False),
        ({"class_type": "Custom", "inputs": {"filename_prefix": "x"}}, True),
        ({"class_type": "Custom", "inputs": {"filename_prefix": ["3", 0]}}, True),
        ({"class_type": "Custom", "inputs": {"filename_prefix": ""}}, False),
        ({"class_type": "Custom", "inputs": None}, False),
    ],
)
def test_a_node_saves_if_its_class_does_or_if_it_has_a_prefix(node: dict[str, Any], saves: bool) -> None:
    assert saves_something({"1": GOOD, "2": node}, CLASSES) is saves


# Prefixes


@pytest.mark.parametrize(
    ("prefix", "rewritten"),
    [
        ("pic", "job_pic"),
        ("", "job_"),
        (5, "job_5"),
        (0.5, "job_0.5"),
        ("folder/pic", "folder/job_pic"),
        ("a/b/pic", "a/b/job_pic"),
        ("folder/", "folder/job_"),
        ("/pic", "/job_pic"),
        ("%width%x", "job_%width%x"),
        ("名前", "job_名前"),
    ],
)
def test_a_prefix_gets_the_id_before_the_files_own_name(prefix: Any, rewritten: str) -> None:
    prepared = prepare_graph(graph(prefix), "job", CLASSES)
    assert prepared.nodes["2"]["inputs"]["filename_prefix"] == rewritten
    assert prepared.prefixes == (rewritten,)


@pytest.mark.parametrize("prefix", [None, ["1", "0"], {"a": 1}])
def test_what_is_no_prefix_stays_as_it_is(prefix: Any) -> None:
    prepared = prepare_graph(graph(prefix), "job", CLASSES)
    assert prepared.nodes == graph(prefix)
    assert prepared.prefixes == ()


def test_a_linked_prefix_is_joined_with_the_id_by_a_node_of_ours() -> None:
    text = {"class_type": "PrimitiveString", "inputs": {"value": "pic"}}
    prepared = prepare_graph(graph(["3", 0], **{"3": text}), "job", CLASSES)
    assert prepared.nodes["2"]["inputs"]["filename_prefix"] == ["2_prefix", 0]
    joined = prepared.nodes["2_prefix"]
    assert joined["class_type"] == "StringConcatenate"
    assert joined["inputs"] == {"string_a": "job_", "string_b": ["3", 0], "delimiter": ""}
    assert prepared.nodes["3"] == text
    assert prepared.prefixes == ("job_",)
    assert check_shape(prepared.nodes) == []


def test_a_linked_prefix_stays_where_the_engine_cannot_join_strings() -> None:
    classes = NodeClasses(names=CLASSES.names - {"StringConcatenate"}, saving=CLASSES.saving, media={})
    prompt = graph(["3", 0], **{"3": {"class_type": "PrimitiveString", "inputs": {}}})
    prepared = prepare_graph(prompt, "job", classes)
    assert prepared.nodes == prompt
    assert prepared.prefixes == ()


def test_the_node_of_ours_never_takes_the_place_of_a_callers_node() -> None:
    taken = {name: {"class_type": "PrimitiveString", "inputs": {"value": name}} for name in ("2_prefix", "2_prefix_")}
    prepared = prepare_graph(graph(["2_prefix", 0], **taken), "job", CLASSES)
    assert {name: prepared.nodes[name] for name in taken} == taken
    assert prepared.nodes["2"]["inputs"]["filename_prefix"] == ["2_prefix__", 0]
    assert prepared.nodes["2_prefix__"]["inputs"]["string_b"] == ["2_prefix", 0]


def test_several_saving_nodes_each_get_the_id_in_the_order_of_the_graph() -> None:
    text = {"class_type": "PrimitiveString", "inputs": {}}
    more = {"class_type": "SaveImage", "inputs": {"filename_prefix": "sub/other"}}
    linked = {"class_type": "SaveImage", "inputs": {"filename_prefix": ["5", 0]}}
    prepared = prepare_graph(graph("pic", **{"3": more, "4": linked, "5": text}), "job", CLASSES)
    assert prepared.prefixes == ("job_pic", "sub/job_other", "job_")
    assert list(prepared.nodes) == ["1", "2", "3", "4", "5", "4_prefix"]


def test_preparing_leaves_the_callers_graph_untouched() -> None:
    prompt = graph(["3", 0], **{"3": {"class_type": "PrimitiveString"}, "4": {"class_type": "A", "inputs": None}})
    before = copy.deepcopy(prompt)
    prepared = prepare_graph(prompt, "job", CLASSES)
    mark_unlike_cached(prepared.nodes, ["1", "2", "3", "4"], "mark")
    prepared.nodes["1"]["inputs"]["width"] = 99
    assert prompt == before


def test_every_node_has_inputs_afterwards_and_unknown_keys_pass_through() -> None:
    node = {"class_type": "A", "_meta": {"title": "t"}, "is_changed": [1], "comfyd": None}
    prepared = prepare_graph({"1": node, "2": {"class_type": "B", "inputs": None}}, "job", CLASSES)
    assert prepared.nodes == {"1": {**node, "inputs": {}}, "2": {"class_type": "B", "inputs": {}}}


def test_large_integers_survive_exactly() -> None:
    seed = 2**64 - 1
    prepared = prepare_graph({"1": {"class_type": "A", "inputs": {"seed": seed}}}, "job", CLASSES)
    assert prepared.nodes["1"]["inputs"]["seed"] == seed


# Running again


def test_only_the_named_nodes_are_marked_and_each_mark_is_another_graph() -> None:
    nodes = prepare_graph(graph(), "job", CLASSES).nodes
    before = copy.deepcopy(nodes)
    mark_unlike_cached(nodes, ["2", "not there"], "first")
    assert nodes["1"] == before["1"]
    first = copy.deepcopy(nodes)
    assert first["2"]["inputs"] == {**before["2"]["inputs"], "comfyd_run": "first"}
    mark_unlike_cached(nodes, ["2"], "second")
    assert nodes != first
    assert list(nodes) == ["1", "2"]
