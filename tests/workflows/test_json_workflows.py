"""Workflows without code: what of a graph is offered, under which name and type, and what a sidecar changes."""

from pathlib import Path
from typing import Any

import pytest
from workflows_kit import live_info, load, load_one, node, node_class, reasons, txt2img

from comfyd.errors import InvalidValue
from comfyd.workflows import LiveInfo, Workflow, WorkflowFailed


async def built(workflow: Workflow, live: LiveInfo, **given: Any) -> Any:
    return await workflow.build(given, live)


async def refused(workflow: Workflow, live: LiveInfo, **given: Any) -> dict[str, str]:
    with pytest.raises(InvalidValue) as caught:
        await workflow.build(given, live)
    return {fault.location: fault.message for fault in caught.value.faults}


def names(workflow: Workflow, live: LiveInfo) -> list[str]:
    return [field.name for field in workflow.fields(live)]


async def test_without_a_choice_prompts_seed_steps_size_and_models_are_offered(tmp_path: Path) -> None:
    workflow, live = load_one(tmp_path, {"w.json": txt2img()}), live_info(tmp_path)
    assert names(workflow, live) == ["seed", "steps", "ckpt_name", "width", "height", "prompt", "negative_prompt"]
    call = await built(workflow, live, prompt="a cat", width=768, seed=2**64 - 1)
    assert call.prompt["6"]["inputs"]["text"] == "a cat"
    assert call.prompt["7"]["inputs"]["text"] == "text, watermark"
    assert call.prompt["5"]["inputs"]["width"] == 768
    assert call.prompt["3"]["inputs"]["seed"] == 2**64 - 1
    assert call.prompt["3"]["inputs"]["cfg"] == 8.0
    assert call.input == {
        "seed": 2**64 - 1, "steps": 20, "ckpt_name": "pattern-v1.safetensors", "width": 768, "height": 512,
        "prompt": "a cat", "negative_prompt": "text, watermark",
    }  # fmt: skip


async def test_the_same_is_offered_before_the_engine_was_asked(tmp_path: Path) -> None:
    workflow = load_one(tmp_path, {"w.json": txt2img()})
    assert names(workflow, LiveInfo()) == names(workflow, live_info(tmp_path))
    assert await refused(workflow, LiveInfo(), width="x") == {
        "input.width": 'must be a whole number, got a string ("x")'
    }


async def test_a_seed_that_is_not_given_is_drawn_and_told(tmp_path: Path) -> None:
    workflow, live = load_one(tmp_path, {"w.json": txt2img()}), live_info(tmp_path)
    calls = [await built(workflow, live) for _ in range(10)]
    assert len({call.input["seed"] for call in calls}) == 10
    assert all(call.prompt["3"]["inputs"]["seed"] == call.input["seed"] < 2**53 for call in calls)


async def test_calls_do_not_share_nodes(tmp_path: Path) -> None:
    workflow, live = load_one(tmp_path, {"w.json": txt2img()}), live_info(tmp_path)
    first = await built(workflow, live, prompt="first")
    first.prompt["9"]["inputs"]["filename_prefix"] = "changed"
    second = await built(workflow, live)
    assert second.prompt["6"]["inputs"]["text"] == "a galaxy in a bottle"
    assert second.prompt["9"]["inputs"]["filename_prefix"] == "ComfyUI"


async def test_all_faults_of_a_call_are_told_at_once(tmp_path: Path) -> None:
    workflow, live = load_one(tmp_path, {"w.json": txt2img()}), live_info(tmp_path)
    faults = await refused(
        workflow,
        live,
        width=8,
        height=513,
        steps=True,
        seed=-1,
        prompt=5,
        promt="x",
        ckpt_name="pattern-v2.safetensors",
    )
    assert faults == {
        "input.width": "must be >= 16, got 8",
        "input.height": "must be a multiple of 8, got 513",
        "input.steps": "must be a whole number, got a boolean (true)",
        "input.seed": "must be >= 0, got -1",
        "input.prompt": "must be a string, got a number (5)",
        "input.promt": 'unknown field; did you mean "prompt"?',
        "input.ckpt_name": 'must be one of "pattern-v1.safetensors", "pattern-xl-base.safetensors", '
        '"pattern-xl-refiner.safetensors", got "pattern-v2.safetensors"; the nearest are "pattern-v1.safetensors", '
        '"pattern-xl-base.safetensors", "pattern-xl-refiner.safetensors"',
    }


async def test_a_model_of_the_graph_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    graph = txt2img(**{"4": node("CheckpointLoaderSimple", ckpt_name="pattern-v3.safetensors")})
    workflow, live = load_one(tmp_path, {"w.json": graph}), live_info(tmp_path)
    assert '"pattern-v1.safetensors"' in (await refused(workflow, live))["input.ckpt_name"]
    assert (await built(workflow, live, ckpt_name="pattern-xl-base.safetensors")).prompt["4"]["inputs"]["ckpt_name"]


async def test_a_graph_of_another_comfyui_says_which_node_is_missing(tmp_path: Path) -> None:
    graph = txt2img(**{"11": node("KSamplr", seed=1)})
    workflow = load_one(tmp_path, {"w.json": graph})
    with pytest.raises(WorkflowFailed, match=r'node class "KSamplr" \(node "11"\).*the nearest are "KSampler"'):
        await built(workflow, live_info(tmp_path))
    assert (await built(workflow, LiveInfo())).prompt["11"]["class_type"] == "KSamplr"  # nothing is known then


ALL_TYPES = {
    "Custom": node_class(
        whole=["INT", {"min": -5, "max": 10, "tooltip": "How many."}],
        real=["FLOAT", {"min": 0.0, "max": 0.75, "step": 0.1}],
        boundless=["INT", {"min": 0, "max": float("inf"), "step": float("nan")}],
        flag=["BOOLEAN", {"default": True}],
        line=["STRING", {}],
        listed=[["a", "b"], {}],
        combo=["COMBO", {"options": ["a", "b"]}],
        numbers=[[1, 2, 4], {}],
        several=["COMBO", {"options": ["a", "b", "c"], "multiselect": True}],
        unsure=["INT,FLOAT", {}],
        picture=[["there.png"], {"image_upload": True}],
    )
}
ALL_VALUES = {
    "whole": 3,
    "real": 0.5,
    "flag": True,
    "line": "x",
    "listed": "a",
    "combo": "b",
    "numbers": 2,
    "boundless": 1,
    "unsure": 1.5,
    "picture": "there.png",
    "linked": ["2", 0],
    "own": {"on": True},
}


def all_types(tmp_path: Path, **more: Any) -> tuple[Workflow, LiveInfo]:
    graph = {"1": node("Custom", **{**ALL_VALUES, **more}), "2": node("EmptyImage", width=64)}
    workflow = load_one(tmp_path, {"w.json": graph, "w.yaml": {"others": "all"}})
    return workflow, live_info(tmp_path, **ALL_TYPES)


async def test_every_widget_can_be_offered_with_the_engines_type(tmp_path: Path) -> None:
    workflow, live = all_types(tmp_path)
    properties = workflow.input_schema(live)["properties"]
    assert properties == {
        "whole": {"type": "integer", "minimum": -5, "maximum": 10, "default": 3, "description": "How many."},
        "real": {"type": "number", "minimum": 0, "maximum": 0.75, "default": 0.5},
        "flag": {"type": "boolean", "default": True},
        "line": {"type": "string", "default": "x"},
        "listed": {"type": "string", "enum": ["a", "b"], "default": "a"},
        "combo": {"type": "string", "enum": ["a", "b"], "default": "b"},
        "numbers": {"enum": [1, 2, 4], "default": 2},
        "boundless": {"type": "integer", "minimum": 0, "default": 1},
        "unsure": {"type": "number", "default": 1.5},
        "picture": {"type": "string", "minLength": 1, "x-comfyd-media": "image", "default": "there.png"},
        "width": properties["width"],
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"whole": 11}, "must be <= 10, got 11"),
        ({"whole": 1.0}, "must be a whole number, got a number (1.0)"),
        ({"real": 1.5}, "must be <= 0.75, got 1.5"),
        ({"real": "0.5"}, 'must be a number, got a string ("0.5")'),
        ({"flag": 1}, "must be true or false, got a number (1)"),
        ({"line": 1}, "must be a string, got a number (1)"),
        ({"listed": "c"}, 'must be one of "a", "b", got "c"'),
        ({"combo": ["a"]}, 'must be one of "a", "b", got a list'),
        ({"numbers": True}, "must be one of 1, 2, 4, got true"),
        ({"numbers": "2"}, 'must be one of 1, 2, 4, got "2"'),
        ({"picture": ""}, "must have at least 1 characters, got 0"),
        ({"picture": ["a.png"]}, "must be a string, got a list"),
    ],
)
async def test_a_value_of_the_wrong_type_or_out_of_range_is_refused(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    workflow, live = all_types(tmp_path)
    (name,) = given
    assert await refused(workflow, live, **given) == {f"input.{name}": message}


async def test_media_are_taken_as_they_come_and_required_where_the_graphs_own_is_not_there(tmp_path: Path) -> None:
    workflow, live = all_types(tmp_path)
    url = "https://example.com/x.png"
    assert (await built(workflow, live, picture=url)).prompt["1"]["inputs"]["picture"] == url
    workflow, live = all_types(tmp_path, picture="only-at-home.png")
    assert await refused(workflow, live) == {"input.picture": "is required"}
    assert workflow.input_schema(live)["required"] == ["picture"]


async def test_a_choice_of_several_is_wrapped_so_that_comfyui_takes_no_list_for_a_link(tmp_path: Path) -> None:
    graph = {"1": node("Custom", several=["a", "b"]), "2": node("EmptyImage", width=64)}
    workflow = load_one(tmp_path, {"w.json": graph, "w.yaml": "inputs: {several: 1.several}"})
    live = live_info(tmp_path, **ALL_TYPES)
    call = await built(workflow, live, several=["c"])
    assert call.prompt["1"]["inputs"]["several"] == {"__value__": ["c"]}
    assert call.input == {"several": ["c"]}
    assert (await refused(workflow, live, several=["d"]))["input.several"] == 'must be one of "a", "b", "c", got "d"'


async def test_a_sidecar_may_set_what_the_graph_leaves_out(tmp_path: Path) -> None:
    graph = {"1": {"class_type": "Custom", "inputs": None}, "2": node("EmptyImage", width=64)}
    workflow = load_one(tmp_path, {"w.json": graph, "w.yaml": "inputs: {whole: {target: 1.whole, default: 4}}"})
    live = live_info(tmp_path, **ALL_TYPES)
    assert (await built(workflow, live)).prompt["1"]["inputs"] == {"whole": 4}
    assert await refused(workflow, live, whole=11) == {"input.whole": "must be <= 10, got 11"}


async def test_null_means_absent(tmp_path: Path) -> None:
    workflow, live = load_one(tmp_path, {"w.json": txt2img()}), live_info(tmp_path)
    assert (await built(workflow, live, width=None)).input["width"] == 512


def test_nodes_that_are_titled_as_inputs_are_the_only_ones_offered(tmp_path: Path) -> None:
    graph = txt2img()
    graph["6"]["_meta"] = {"title": "input: What to paint"}
    graph["3"]["_meta"] = {"title": "Input: (seed, steps)"}
    graph["5"]["_meta"] = {"title": "input: size (width)"}
    workflow = load_one(tmp_path, {"w.json": graph})
    assert names(workflow, live_info(tmp_path)) == ["seed", "steps", "size", "what_to_paint"]


def test_titles_of_the_authors_give_names(tmp_path: Path) -> None:
    graph = txt2img()
    graph["6"]["_meta"] = {"title": "Hauptmotiv"}
    graph["7"]["_meta"] = {"title": "nicht"}
    assert names(load_one(tmp_path, {"w.json": graph}), live_info(tmp_path))[-2:] == ["hauptmotiv", "nicht"]


def test_texts_that_both_ends_use_are_not_called_prompt(tmp_path: Path) -> None:
    graph = txt2img()
    graph["3"]["inputs"]["negative"] = ["6", 0]
    del graph["7"]
    assert names(load_one(tmp_path, {"w.json": graph}), live_info(tmp_path))[-1] == "text"


SIDECAR = """
    summary: Paint
    description: Paints a picture.
    tags: [pictures]
    inputs:
      prompt:
        target: 6.text
        description: What to paint.
        required: true
      seed: 3.seed
      model: {target: Load Checkpoint.ckpt_name, group: Models, choices: [pattern-v1.safetensors]}
      size:
        target: [5.width, 5.height]
        min: 256
        max: 1024
        step: 128
        default: 384
        group: Size
      fixed: {target: 3.steps, random: false}
"""


async def test_a_sidecar_chooses_renames_groups_and_bounds(tmp_path: Path) -> None:
    workflow, live = load_one(tmp_path, {"w.json": txt2img(), "w.yaml": SIDECAR}), live_info(tmp_path)
    assert (workflow.summary, workflow.description, workflow.tags) == ("Paint", "Paints a picture.", ("pictures",))
    schema = workflow.input_schema(live)
    assert schema["required"] == ["prompt"]
    assert schema["properties"]["size"] == {
        "type": "integer", "minimum": 256, "maximum": 1024, "multipleOf": 128, "default": 384, "x-comfyd-group": "Size",
    }  # fmt: skip
    assert schema["properties"]["model"]["enum"] == ["pattern-v1.safetensors"]
    call = await built(workflow, live, prompt="x", seed=1)
    assert call.prompt["5"]["inputs"] == {"width": 384, "height": 384, "batch_size": 1}
    assert await refused(workflow, live, size=400, model="pattern-xl-base.safetensors") == {
        "input.prompt": "is required",
        "input.size": "must be a multiple of 128, got 400",
        "input.model": 'must be one of "pattern-v1.safetensors", got "pattern-xl-base.safetensors"; the nearest are '
        '"pattern-v1.safetensors"',
    }


def test_a_sidecar_hides_and_adds_the_usual_ones(tmp_path: Path) -> None:
    sidecar = "inputs: {cfg: 3.cfg}\nothers: default\nhide: [4.ckpt_name, 3.steps]"
    workflow = load_one(tmp_path, {"w.json": txt2img(), "w.yml": sidecar})
    live = live_info(tmp_path)
    assert names(workflow, live) == ["cfg", "seed", "width", "height", "prompt", "negative_prompt"]


def test_a_name_that_a_sidecar_took_is_not_given_twice(tmp_path: Path) -> None:
    sidecar = "inputs: {width: 5.height}\nothers: default"
    workflow = load_one(tmp_path, {"w.json": txt2img(), "w.yml": sidecar})
    live = live_info(tmp_path)
    assert sorted(names(workflow, live))[-2:] == ["width", "width_2"]


async def test_a_seed_with_a_default_in_the_sidecar_is_not_drawn(tmp_path: Path) -> None:
    files = {"w.json": txt2img(), "w.yaml": "inputs: {seed: {target: 3.seed, default: 42}}"}
    assert (await built(load_one(tmp_path, files), live_info(tmp_path))).input == {"seed": 42}


@pytest.mark.parametrize(
    ("sidecar", "said"),
    [
        ("inputs: [", "not valid YAML"),
        ("[1, 2]", "must be an object, got a list"),
        ("input: {a: 3.seed}", 'input: unknown field; did you mean "inputs"?'),
        ("inputs: {1: 3.seed}", "inputs.1: a name must be a string of 1 to 64 characters"),
        ("inputs: {a: 2026-99-99}", "not valid YAML"),
        ("inputs: {a: {target: 3.steps, default: 2026-11-22}}", "inputs.a.default: must be a number"),
        ("inputs: {a: 3.5}", "inputs.a: must be an object, got a number (3.5)"),
        ("inputs: {a: 99.seed}", '"99" is no node\'s id or title'),
        ("inputs: {a: Load Checkpiont.ckpt_name}", 'did you mean "Load Checkpoint"?'),
        ("inputs: {a: CLIP Text Encode (Prompt).text}", "titles 2 nodes; use the id of one"),
        ("inputs: {a: seed}", 'must be "node.widget", such as "3.seed"'),
        ("inputs: {a: 3.model}", "is linked to another node"),
        ("inputs: {a: 3.sede}", 'the node has no widget "sede"; did you mean "seed"?'),
        ("inputs: {a: 3.seed, b: 3.seed}", "3.seed is set by a already"),
        ("inputs: {a: {target: 3.steps, min: 5, max: 1}}", "inputs.a.min: must be <= max (1), got 5"),
        ("inputs: {a: {target: 3.steps, max: 5, default: 9}}", "inputs.a.default: must be <= 5, got 9"),
        ("inputs: {a: {target: 3.steps, choices: [1], default: 9}}", "inputs.a.default: must be one of the choices"),
        ("inputs: {a: {target: 3.steps, chioces: [5]}}", 'inputs.a.chioces: unknown field; did you mean "choices"?'),
        ("inputs: {a: {target: 3.steps, step: 0}}", "inputs.a.step: must be > 0, got 0"),
        ("inputs: {a: {target: 3.steps, default: many}}", "inputs.a.default: must be a number like the graph's own"),
        ("inputs: {a: {target: 6.text, default: 3}}", "inputs.a.default: must be a string like the graph's own"),
        ("hide: [3.model]", "hide.0: "),
    ],
)
def test_a_wrong_sidecar_is_told_of_with_the_place(tmp_path: Path, sidecar: str, said: str) -> None:
    catalogue = load(tmp_path, {"w.json": txt2img(), "w.yaml": sidecar})
    assert catalogue.workflows == ()
    assert said in reasons(catalogue)["w.yaml"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"nodes": [], "links": [], "last_node_id": 3, "version": 0.4}, "choose Workflow > Export (API)"),
        ({"prompt": txt2img()}, "is a whole request"),
        ([1], "must be an object of nodes, is a list"),
        ({}, "the graph is empty"),
        ({"1": {"inputs": {}}}, "class_type must be the name of a node class"),
        ('{"1": ', "not valid JSON"),
        ("", "the body is empty"),
    ],
)
def test_a_file_that_is_no_graph_is_told_of(tmp_path: Path, content: Any, said: str) -> None:
    catalogue = load(tmp_path, {"w.json": content})
    assert catalogue.workflows == ()
    assert said in reasons(catalogue)["w.json"]


async def test_another_answer_of_the_engine_is_noticed(tmp_path: Path) -> None:
    workflow, live = load_one(tmp_path, {"w.json": txt2img()}), live_info(tmp_path)
    await built(workflow, live)
    changed = node_class(ckpt_name=[["new.safetensors"], {}])
    newer = live_info(tmp_path, CheckpointLoaderSimple=changed)
    assert "input.ckpt_name" in await refused(workflow, newer)
    await built(workflow, newer, ckpt_name="new.safetensors")
