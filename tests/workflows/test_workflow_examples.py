"""The shipped examples: each runs to its picture on the embedded engine."""

from pathlib import Path
from typing import Any, Final

import pytest
import pyvips
from embedded_kit import open_embedded
from workflows_kit import WARMUP

from comfyd.workflows import LiveInfo, load_catalogue

EXAMPLES: Final = Path(__file__).parents[2] / "workflows"
ROUTES: Final = {
    "flux/img2img": "python",
    "flux/txt2img": "python",
    "sd1.5/img2img": "python",
    "sd1.5/txt2img": "python",
    "sd1.5/txt2img-lora": "json",
    "sdxl/img2img": "python",
    "sdxl/txt2img": "python",
    "sdxl/txt2img-with-refiner": "python",
}
MODELS: Final = {"lora": "pattern-bold.safetensors", "checkpoint": "pattern-v1.safetensors"}


def test_all_examples_load() -> None:
    catalogue = load_catalogue(EXAMPLES)
    assert catalogue.problems == ()
    assert {workflow.route: workflow.source for workflow in catalogue.workflows} == ROUTES
    assert all(workflow.summary and workflow.description for workflow in catalogue.workflows)


@pytest.mark.parametrize("route", ROUTES)
async def test_an_example_makes_a_picture_of_the_size_asked_for(tmp_path: Path, route: str) -> None:
    workflow = load_catalogue(EXAMPLES).get(route)
    assert workflow is not None
    async with open_embedded(tmp_path) as peer:
        picture = peer.engine.settings.folders.input / "cat.png"
        pyvips.Image.black(64, 96, bands=3).write_to_file(str(picture))
        object_info = (await peer.http.get("/object_info")).json()
        live = LiveInfo.from_object_info(object_info, warmup_prompt=WARMUP)
        given: dict[str, Any] = {"prompt": "a cat", "width": 80, "height": 64, "steps": 2}
        names = {field.name for field in workflow.fields(live)}
        given |= {"image": "cat.png"} if "image" in names else {}
        given |= {"base_steps": 1} if "base_steps" in names else {}
        given |= MODELS if workflow.source == "json" else {}
        built = await workflow.build(given, live)
        history = await peer.run(built.prompt)
        assert history["status"]["status_str"] == "success"
        saver = next(node_id for node_id, node in built.prompt.items() if node["class_type"] == "SaveImage")
        (file,) = peer.saved(history, saver)
        image = pyvips.Image.new_from_file(str(file))
        assert (image.width, image.height) == (80, 64)
    assert all(built.input[name] == value for name, value in given.items())
    assert isinstance(built.input["seed"], int)


async def test_the_refiner_refuses_more_base_steps_than_steps(tmp_path: Path) -> None:
    workflow = load_catalogue(EXAMPLES).get("sdxl/txt2img-with-refiner")
    assert workflow is not None
    given = {"prompt": "x", "steps": 3, "base_steps": 4, "base_checkpoint": "a", "refiner_checkpoint": "b"}
    with pytest.raises(Exception, match=r"input\.base_steps: must be <= steps \(3\), got 4"):
        await workflow.build(given, LiveInfo())


@pytest.mark.parametrize("route", ROUTES)
def test_every_input_of_an_example_is_described_or_named_by_itself(tmp_path: Path, route: str) -> None:
    workflow = load_catalogue(EXAMPLES).get(route)
    assert workflow is not None
    schema = workflow.input_schema(LiveInfo())
    assert "prompt" in schema["required"]
    if workflow.source == "python":
        assert all(field.description for field in workflow.fields(LiveInfo()))
