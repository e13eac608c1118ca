"""The names that widgets get, for any graph."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from workflows_kit import node, txt2img

from comfyd.workflows.widgets import MAX_NAME_CHARACTERS, named, slug, widgets_of

_TEXT = st.text("aAbB12 _-.:()é文İßǆ²①\N{COMBINING ACUTE ACCENT}", max_size=90)  # what slugs may trip over
_TITLES = st.one_of(st.none(), st.sampled_from(["A", "a", "A b", "input: a", "2nd", "文字", "", "seed"]), _TEXT)
_NAMES = st.one_of(st.sampled_from(["text", "seed", "width", "value", "image"]), _TEXT)
_VALUES = st.one_of(st.sampled_from(["", "x"]), st.integers(), st.booleans(), st.just(["1", 0]))
_GRAPHS = st.dictionaries(
    st.one_of(st.integers(0, 30).map(str), st.sampled_from(["1:2", "1_2", "x"])),
    st.builds(
        lambda kind, title, inputs: node(kind, title, **{f"{name}": value for name, value in inputs.items()}),
        st.sampled_from(["KSampler", "CLIPTextEncode", "_", "ü"]),
        _TITLES,
        st.dictionaries(_NAMES.filter(lambda name: name not in {"class_type", "title"}), _VALUES, max_size=4),
    ),
    max_size=6,
)


def by_name(graph: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {name: widget.place for name, widget in named(widgets_of(graph)).items()}


@given(_GRAPHS)
def test_every_widget_has_a_name_of_its_own_that_is_a_word(graph: dict[str, Any]) -> None:
    names = by_name(graph)
    widgets = [
        (node_id, name)
        for node_id, each in graph.items()
        for name, value in each["inputs"].items()
        if not isinstance(value, list)
    ]
    assert sorted(names.values()) == sorted(widgets)
    for name in names:
        assert name == slug(name) or name.strip("_") == name
        assert not name[0].isdigit()
        assert len(name) <= MAX_NAME_CHARACTERS + 4  # a number after a name that was cut
        assert "." not in name


@given(_GRAPHS, st.randoms(use_true_random=False))
def test_names_do_not_depend_on_the_order_of_the_nodes(graph: dict[str, Any], chance: random.Random) -> None:
    shuffled = list(graph.items())
    chance.shuffle(shuffled)
    assert list(by_name(dict(shuffled)).items()) == list(by_name(graph).items())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("CLIP Text Encode (Prompt)", "clip_text_encode_prompt"),
        ("  a--b  ", "a_b"),
        ("Größe", "grösse"),
        ("提示词", "提示词"),
        ("...", ""),
    ],
)
def test_a_slug_is_words_of_any_script(text: str, name: str) -> None:
    assert slug(text) == name


def test_two_samplers_keep_their_seeds_apart_by_title_then_by_id() -> None:
    graph = {
        "1": node("KSampler", "First pass", seed=1, steps=2),
        "2": node("KSampler", "Second pass", seed=1, steps=2),
        "3": node("KSampler", "KSampler", seed=1, cfg=1),
        "10": node("KSampler", "KSampler", seed=1, cfg=1),
    }
    assert by_name(graph) == {
        "first_pass_seed": ("1", "seed"),
        "first_pass_steps": ("1", "steps"),
        "second_pass_seed": ("2", "seed"),
        "second_pass_steps": ("2", "steps"),
        "ksampler_seed_3": ("3", "seed"),
        "ksampler_cfg_3": ("3", "cfg"),
        "ksampler_seed_10": ("10", "seed"),
        "ksampler_cfg_10": ("10", "cfg"),
    }


def test_prompts_are_found_through_the_nodes_between_text_and_sampler() -> None:
    graph = txt2img()
    graph["3"]["inputs"]["positive"] = ["20", 0]
    graph["20"] = node("FluxGuidance", conditioning=["6", 0], guidance=3.5)
    names = by_name(graph)
    assert names["prompt"] == ("6", "text")
    assert names["negative_prompt"] == ("7", "text")


def test_links_in_a_circle_end() -> None:
    graph = {"1": node("A", text="x", a=["2", 0]), "2": node("A", text="y", a=["1", 0])}
    assert len(by_name(graph)) == 2
