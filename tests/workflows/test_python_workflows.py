"""Workflows written in Python: how they are called, and what becomes of bad input and bad code."""

import threading
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from workflows_kit import live_info, load_one

from comfyd.errors import InvalidValue
from comfyd.workflows import LiveInfo, Workflow, WorkflowFailed
from comfyd.workflows.python_workflow import THREADS_PER_WORKFLOW, PythonWorkflow

ALL_KINDS = '''
"""Everything at once."""
from typing import Annotated, Literal

import attrs

from comfyd.workflow import (
    Checkpoint, Comfy, Field, Graph, Image, InputRefused, Sampler, Seed, inputs, installed_model, models, random_seed,
    warmup_checkpoint,
)


@inputs
class Lora:
    name: Annotated[str, models("loras")]
    strength: Annotated[float, Field(ge=0, le=2)] = 1.0


@inputs
class Input:
    width: Annotated[int, Field(description="Pixels | wide.", ge=16, le=2048, multiple_of=8)] = 512
    prompt: Annotated[str, Field(description="What to paint.", min_length=1)]
    seed: Seed = random_seed()
    sampler_name: Sampler = "euler"
    crop: Literal["disabled", "center"] = "center"
    checkpoint: Checkpoint = warmup_checkpoint()
    refiner: Checkpoint = installed_model("checkpoints", "refiner")
    loras: list[Lora] = attrs.field(factory=list)
    image: Image | None = None


def workflow(given: Input, comfy: Comfy) -> Graph:
    if given.width == 1024:
        raise InputRefused("width", "is more than this model can do")
    graph = Graph()
    loader = graph.node("CheckpointLoaderSimple", ckpt_name=given.checkpoint)
    graph.node("KSampler", model=loader, vae=loader[2], seed=given.seed, known=len(comfy.samplers)).titled("Sample")
    return graph
'''


def with_body(body: str) -> dict[str, str]:
    """A workflow whose function has *body*."""
    head = """
        import trio
        from comfyd.workflow import Graph, inputs

        @inputs
        class Input:
            width: int = 512

        """
    return {"w.py": head + body}


async def build(workflow: Workflow, live: LiveInfo, **given: Any) -> Any:
    return await workflow.build(given, live)


async def refused(workflow: Workflow, live: LiveInfo, **given: Any) -> dict[str, str]:
    with pytest.raises(InvalidValue) as caught:
        await workflow.build(given, live)
    return {fault.location: fault.message for fault in caught.value.faults}


async def failure(workflow: Workflow, live: LiveInfo, **given: Any) -> WorkflowFailed:
    with pytest.raises(WorkflowFailed) as caught:
        await workflow.build(given, live)
    return caught.value


async def test_a_graph_is_built_from_the_input_and_defaults_are_told(tmp_path: Path) -> None:
    workflow = load_one(tmp_path, {"w.py": ALL_KINDS})
    built = await build(workflow, live_info(tmp_path), prompt="x", seed=7)
    assert built.input == {
        "width": 512, "prompt": "x", "seed": 7, "sampler_name": "euler", "crop": "center",
        "checkpoint": "pattern-v1.safetensors", "refiner": "pattern-xl-refiner.safetensors", "loras": [], "image": None,
    }  # fmt: skip
    assert built.prompt == {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "pattern-v1.safetensors"}},
        "2": {
            "class_type": "KSampler",
            "inputs": {"model": ["1", 0], "vae": ["1", 2], "seed": 7, "known": 42},
            "_meta": {"title": "Sample"},
        },
    }


async def test_a_random_default_is_drawn_for_each_request(tmp_path: Path) -> None:
    workflow, live = load_one(tmp_path, {"w.py": ALL_KINDS}), live_info(tmp_path)
    seeds = [(await build(workflow, live, prompt="x")).input["seed"] for _ in range(20)]
    assert len(set(seeds)) == 20
    assert all(0 <= seed < 2**53 for seed in seeds)  # what JavaScript can repeat
    built = await build(workflow, live, prompt="x", seed=2**64 - 1)
    assert built.prompt["2"]["inputs"]["seed"] == 2**64 - 1


async def test_all_faults_are_told_at_once_each_at_its_field(tmp_path: Path) -> None:
    workflow, live = load_one(tmp_path, {"w.py": ALL_KINDS}), live_info(tmp_path)
    faults = await refused(
        workflow, live, width=12, sampler_name="eulr", seed=2**64, wdth=1, checkpoint="pattern-v2.safetensors",
        loras=[{"name": "pattern-bald.safetensors", "strength": 3}, {"strength": "x"}], image=5, crop="left",
    )  # fmt: skip
    assert faults["input.prompt"] == "is required"
    assert faults["input.wdth"] == 'unknown field; did you mean "width"?'
    assert faults["input.width"] == "must be >= 16, got 12"
    assert faults["input.seed"] == "must be <= 18446744073709551615, got 18446744073709551616"
    assert faults["input.sampler_name"].startswith(
        'must be one of the 42 that ComfyUI has, got "eulr"; the nearest are'
    )
    assert faults["input.checkpoint"].endswith(
        'the nearest are "pattern-v1.safetensors", "pattern-xl-base.safetensors", "pattern-xl-refiner.safetensors"'
    )
    assert '"pattern-bold.safetensors"' in faults["input.loras.0.name"]
    assert faults["input.loras.0.strength"] == "must be <= 2, got 3"
    assert faults["input.loras.1.name"] == "is required"
    assert faults["input.loras.1.strength"] == 'must be a number, got a string ("x")'
    assert faults["input.image"] == "must be a string, got a number (5)"
    assert "input.crop" in faults
    assert len(faults) == 12


@pytest.mark.parametrize("raw", [None, [], "x", 3])
async def test_an_input_that_is_no_object_is_refused(tmp_path: Path, raw: Any) -> None:
    workflow = load_one(tmp_path, {"w.py": ALL_KINDS})
    with pytest.raises(InvalidValue, match=r"^input: must be an object"):
        await workflow.build(raw, live_info(tmp_path))


async def test_of_many_wrong_names_only_some_are_told(tmp_path: Path) -> None:
    workflow, live = load_one(tmp_path, {"w.py": ALL_KINDS}), live_info(tmp_path)
    wrong = [{"name": f"wrong-{number}"} for number in range(1000)]
    assert len(await refused(workflow, live, prompt="x", loras=wrong)) == 20


async def test_a_workflow_may_refuse_an_input_itself(tmp_path: Path) -> None:
    workflow = load_one(tmp_path, {"w.py": ALL_KINDS})
    faults = await refused(workflow, live_info(tmp_path), prompt="x", width=1024)
    assert faults == {"input.width": "is more than this model can do"}


async def test_without_a_warm_up_checkpoint_the_input_is_required(tmp_path: Path) -> None:
    workflow = load_one(tmp_path, {"w.py": ALL_KINDS})
    live = attrs.evolve(live_info(tmp_path), warmup_checkpoint=None)
    assert await refused(workflow, live, prompt="x") == {"input.checkpoint": "is required"}
    assert workflow.input_schema(live)["required"] == ["prompt", "checkpoint"]
    assert workflow.input_schema(live_info(tmp_path))["required"] == ["prompt"]


async def test_an_engine_that_was_not_asked_yet_refuses_no_name(tmp_path: Path) -> None:
    workflow = load_one(tmp_path, {"w.py": ALL_KINDS})
    built = await build(workflow, LiveInfo(), prompt="x", sampler_name="mine", checkpoint="a", refiner="b")
    assert built.input["sampler_name"] == "mine"


async def test_a_type_of_model_that_is_empty_refuses_every_name(tmp_path: Path) -> None:
    workflow = load_one(tmp_path, {"w.py": ALL_KINDS})
    live = LiveInfo(models={"checkpoints": ()}, samplers=("euler",))
    faults = await refused(workflow, live, prompt="x", checkpoint="a", refiner="b")
    assert faults["input.checkpoint"] == 'ComfyUI has no checkpoints models at all, got "a"'


def test_the_schema_has_bounds_defaults_and_live_choices_in_the_authors_order(tmp_path: Path) -> None:
    workflow, live = load_one(tmp_path, {"w.py": ALL_KINDS}), live_info(tmp_path)
    schema = workflow.input_schema(live)
    properties = schema["properties"]
    assert list(properties)[:3] == ["width", "prompt", "seed"]
    assert properties["width"] == {
        "description": "Pixels | wide.", "type": "integer", "minimum": 16, "maximum": 2048, "multipleOf": 8,
        "default": 512,
    }  # fmt: skip
    assert properties["seed"] == {
        "type": "integer", "minimum": 0, "maximum": 2**64 - 1, "x-comfyd-default": "random",
    }  # fmt: skip
    assert properties["sampler_name"]["enum"] == list(live.samplers)
    assert properties["checkpoint"]["default"] == "pattern-v1.safetensors"
    assert properties["loras"]["default"] == []
    lora = properties["loras"]["items"]["properties"]["name"]  # no $ref: the schema stands for itself
    assert lora["enum"] == ["pattern-bold.safetensors", "pattern-fine.safetensors"]
    assert schema["additionalProperties"] is False
    assert "$ref" not in str(schema)
    assert schema == workflow.input_schema(live_info(tmp_path))
    assert schema == load_one(tmp_path, {"w.py": ALL_KINDS}).input_schema(live)


def test_a_custom_sampler_of_the_engine_is_a_choice(tmp_path: Path) -> None:
    info = live_info(tmp_path)
    sampler = dict(info.object_info["KSampler"])
    required = {**sampler["input"]["required"], "sampler_name": [["euler", "mine"], {}]}
    live = LiveInfo.from_object_info({"KSampler": {"input": {"required": required}}})
    workflow = load_one(tmp_path, {"w.py": ALL_KINDS})
    assert workflow.input_schema(live)["properties"]["sampler_name"]["enum"] == ["euler", "mine"]


def test_the_fields_of_a_table_tell_what_is_required(tmp_path: Path) -> None:
    fields = {field.name: field for field in load_one(tmp_path, {"w.py": ALL_KINDS}).fields(live_info(tmp_path))}
    assert fields["prompt"].required
    assert fields["prompt"].default == ""
    assert fields["prompt"].bounds == "at least 1 characters"
    assert fields["width"].bounds == ">= 16, <= 2048, a multiple of 8"
    assert fields["seed"].default == "random"
    assert fields["image"].type == "image"
    assert fields["loras"].type == "list of object"
    assert fields["sampler_name"].type.endswith("and 30 more")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def workflow(given: Input):\n            open('/a/secret/path')", "raised FileNotFoundError"),
        ("def workflow(given: Input):\n            raise SystemExit(3)", "raised SystemExit"),
        ("async def workflow(given: Input):\n            raise KeyError('x')", "raised KeyError"),
        ("def workflow(given: Input):\n            return None", "returned NoneType in the place of a graph"),
        ("def workflow(given: Input):\n            return [1]", "returned list in the place of a graph"),
        (
            "def workflow(given: Input):\n            return {}",
            "returned what is not a graph: prompt the graph is empty",
        ),
        ("def workflow(given: Input):\n            return {'1': {'inputs': {}}}", "prompt.1.class_type must be"),
        (
            "def workflow(given: Input):\n            return {'1': {'class_type': 'A', 'inputs': {'x': ['2', 0]}}}",
            'links to node "2", which is not in the graph',
        ),
        (
            "def workflow(given: Input):\n            return {'1': {'class_type': 'A', 'inputs': {'x': object()}}}",
            "returned a graph that is not JSON",
        ),
        (
            "def workflow(given: Input):\n            return {'1': {'class_type': 'A', 'inputs': {'x': float('nan')}}}",
            "nan is no number in JSON",
        ),
        (
            "def workflow(given: Input):\n            return {1.5: {'class_type': 'A'}}",
            "it has a key that is a float",
        ),
        (
            "def workflow(given: Input):\n            a = {}\n            a['1'] = a\n            return a",
            "returned a graph that is not JSON",
        ),
    ],
)
async def test_a_workflow_that_raises_or_returns_rubbish_fails_and_tells_no_path(
    tmp_path: Path, body: str, said: str
) -> None:
    workflow = load_one(tmp_path, with_body(body))
    failed = await failure(workflow, live_info(tmp_path))
    assert str(failed).startswith("the workflow w ")
    assert said in str(failed)
    assert "/" not in str(failed).replace("the workflow w", "")
    assert not failed.timed_out
    if "raised" in said:
        assert failed.traceback_text is not None
        assert "w.py" in failed.traceback_text


async def test_a_default_factory_that_raises_fails_like_the_workflow(tmp_path: Path) -> None:
    source = """
        import attrs
        from comfyd.workflow import inputs

        def draw() -> int:
            return 1 // 0

        @inputs
        class Input:
            seed: int = attrs.field(factory=draw)

        def workflow(given: Input):
            return {}
        """
    failed = await failure(load_one(tmp_path, {"w.py": source}), live_info(tmp_path))
    assert "raised ZeroDivisionError" in str(failed)


async def test_plain_dicts_with_numbers_and_tuples_are_a_graph_and_are_copied(tmp_path: Path) -> None:
    body = """
        TEMPLATE = {1: {"class_type": "A", "inputs": {}}, 2: {"class_type": "B", "inputs": {"a": ("1", 0)}}}

        def workflow(given: Input):
            return TEMPLATE
        """
    workflow, live = load_one(tmp_path, with_body(body)), live_info(tmp_path)
    first, second = await build(workflow, live), await build(workflow, live)
    assert first.prompt["2"]["inputs"] == {"a": ["1", 0]}
    first.prompt["1"]["inputs"]["x"] = 1
    assert second.prompt["1"]["inputs"] == {}


async def test_an_async_workflow_that_hangs_is_given_up(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    workflow = load_one(
        tmp_path, with_body("async def workflow(given: Input):\n            await trio.sleep_forever()")
    )
    failed = await failure(workflow, live_info(tmp_path))
    assert failed.timed_out
    assert trio.current_time() == pytest.approx(30.0, abs=0.01)


async def test_an_async_workflow_may_wait(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    body = """
        async def workflow(given: Input):
            await trio.sleep(5)
            return {"1": {"class_type": "A"}}
        """
    built = await build(load_one(tmp_path, with_body(body)), live_info(tmp_path))
    assert built.prompt == {"1": {"class_type": "A"}}


async def test_a_workflow_that_blocks_is_given_up_and_hangs_no_other_one(tmp_path: Path) -> None:
    body = """
        import threading
        gate = threading.Event()

        def workflow(given: Input):
            gate.wait()
            return {"1": {"class_type": "A"}}
        """
    loaded = load_one(tmp_path, with_body(body))
    assert isinstance(loaded, PythonWorkflow)
    gate: threading.Event = loaded.function.__globals__["gate"]
    workflow, live = attrs.evolve(loaded, timeout_s=0.05), live_info(tmp_path)
    other = load_one(
        tmp_path / "other", with_body("def workflow(given: Input):\n            return {'1': {'class_type': 'A'}}")
    )
    failures: list[WorkflowFailed] = []

    async def call() -> None:
        failures.append(await failure(workflow, live))

    try:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for _ in range(THREADS_PER_WORKFLOW + 3):
                    nursery.start_soon(call)
            await build(other, live)
        assert all(failed.timed_out for failed in failures)
        assert workflow.threads.borrowed_tokens == THREADS_PER_WORKFLOW
    finally:
        gate.set()
    with trio.fail_after(10):  # as soon as a thread is free again
        patient = attrs.evolve(workflow, timeout_s=10)
        assert (await build(patient, live)).prompt == {"1": {"class_type": "A"}}


async def test_a_cancelled_caller_is_not_a_failure_of_the_workflow(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    workflow = load_one(
        tmp_path, with_body("async def workflow(given: Input):\n            await trio.sleep_forever()")
    )
    with trio.move_on_after(1) as scope:
        await build(workflow, live_info(tmp_path))
    assert scope.cancelled_caught
