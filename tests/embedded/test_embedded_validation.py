"""What is refused at submission, in ComfyUI's shapes (reference E2)."""

import json
from pathlib import Path
from typing import Any

import pytest
from embedded_kit import node, open_embedded, picture_graph

from comfyd.embedded.files import Folders
from comfyd.embedded.models import Models
from comfyd.embedded.nodes import NODE_TYPES
from comfyd.embedded.nodes.registry import Library
from comfyd.embedded.validation import types_match, validate_prompt


@pytest.fixture
def library(tmp_path: Path) -> Any:
    folders = Folders(
        input=tmp_path / "input", output=tmp_path / "output", temp=tmp_path / "temp", user=tmp_path / "user"
    )
    folders.make()
    return Library(folders=folders, models=Models())


def check(graph: Any, library: Library, only: Any = None) -> Any:
    return validate_prompt(graph, NODE_TYPES, library, only)


def first_error(verdict: Any, node_id: Any = "1") -> Any:
    return verdict.node_errors[node_id]["errors"][0]


def with_empty(**changes: Any) -> Any:
    graph = picture_graph()
    graph["1"]["inputs"].update(changes)
    return graph


@pytest.mark.parametrize(
    ("graph", "kind", "message", "details"),
    [
        (
            {"7": {"inputs": {}}},
            "invalid_prompt",
            "Cannot execute because a node is missing the class_type property.",
            "Node ID '#7'",
        ),
        ({"7": node("Nope")}, "invalid_prompt", "Cannot execute because node Nope does not exist.", "Node ID '#7'"),
        ({"7": node("PrimitiveInt", value=1)}, "prompt_no_outputs", "Prompt has no outputs", ""),
        ({}, "prompt_no_outputs", "Prompt has no outputs", ""),
    ],
)
def test_a_graph_that_cannot_run_at_all_is_refused(
    library: Library, graph: Any, kind: Any, message: Any, details: Any
) -> None:
    assert check(graph, library).error == {"type": kind, "message": message, "details": details, "extra_info": {}}


def test_a_missing_input_is_named(library: Library) -> None:
    graph = picture_graph()
    del graph["2"]["inputs"]["filename_prefix"]
    verdict = check(graph, library)
    assert verdict.error == {
        "type": "prompt_outputs_failed_validation",
        "message": "Prompt outputs failed validation",
        "details": "Required input is missing: filename_prefix",
        "extra_info": {},
    }
    assert verdict.node_errors == {
        "2": {
            "errors": [
                {
                    "type": "required_input_missing",
                    "message": "Required input is missing",
                    "details": "filename_prefix",
                    "extra_info": {"input_name": "filename_prefix"},
                }
            ],
            "dependent_outputs": ["2"],
            "class_type": "SaveImage",
        }
    }


def test_a_fault_upstream_leaves_the_top_level_details_empty(library: Library) -> None:
    verdict = check(with_empty(width=0), library)
    assert verdict.error is not None
    assert verdict.error["details"] == ""
    assert list(verdict.node_errors) == ["1"]
    assert verdict.node_errors["1"]["dependent_outputs"] == ["2"]


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (0, "value_smaller_than_min", "Value 0 smaller than min of 1"),
        (16385, "value_bigger_than_max", "Value 16385 bigger than max of 16384"),
        ("wide", "invalid_input_type", "Failed to convert an input value to a INT value"),
        (None, "invalid_input_type", "Failed to convert an input value to a INT value"),
    ],
)
def test_a_number_out_of_bounds_or_no_number_is_refused(library: Library, value: Any, kind: Any, message: Any) -> None:
    error = first_error(check(with_empty(width=value), library))
    assert (error["type"], error["message"]) == (kind, message)
    assert error["extra_info"]["input_config"] == ["INT", {"default": 512, "min": 1, "max": 16384, "step": 1}]
    assert error["extra_info"]["received_value"] == value


@pytest.mark.parametrize("link", [["1"], ["1", 0, 0], []])
def test_a_link_of_another_length_is_refused(library: Library, link: Any) -> None:
    graph = picture_graph()
    graph["2"]["inputs"]["images"] = link
    error = first_error(check(graph, library), "2")
    assert error["type"] == "bad_linked_input"
    assert error["extra_info"]["received_value"] == link


def test_a_link_of_another_type_is_refused(library: Library) -> None:
    graph = picture_graph() | {"3": node("PrimitiveInt", value=1)}
    graph["2"]["inputs"]["images"] = ["3", 0]
    error = first_error(check(graph, library), "2")
    assert error["type"] == "return_type_mismatch"
    assert error["details"] == "images, received_type(INT) mismatch input_type(IMAGE)"
    assert error["extra_info"]["linked_node"] == ["3", 0]


def test_a_link_to_nowhere_is_a_key_error_with_a_traceback(library: Library) -> None:
    graph = picture_graph()
    graph["2"]["inputs"]["images"] = ["404", 0]
    error = first_error(check(graph, library), "2")
    assert (error["type"], error["details"]) == ("exception_during_validation", "'404'")
    assert error["extra_info"]["exception_type"] == "KeyError"
    assert error["extra_info"]["traceback"]


def test_a_fault_behind_a_link_is_reported_at_the_inner_node(library: Library) -> None:
    graph = picture_graph()
    graph["2"]["inputs"]["images"] = ["3", 0]
    graph["3"] = node("ImageInvert", image=["404", 0])
    error = first_error(check(graph, library), "3")
    assert error["type"] == "exception_during_inner_validation"
    assert error["extra_info"]["linked_node"] == ["3", 0]


def test_a_cycle_is_refused(library: Library) -> None:
    graph = {
        "1": node("ImageInvert", image=["2", 0]),
        "2": node("ImageInvert", image=["1", 0]),
        "3": node("PreviewImage", images=["1", 0]),
    }
    assert check(graph, library).error is not None


def test_a_choice_that_is_not_listed_is_refused_with_the_choices(library: Library) -> None:
    graph = picture_graph() | {"3": node("CheckpointLoaderSimple", ckpt_name="real.safetensors")}
    graph["4"] = node("PreviewAny", source=["3", 0])
    error = first_error(check(graph, library), "3")
    assert error["type"] == "value_not_in_list"
    assert error["details"].startswith("ckpt_name: 'real.safetensors' not in ['pattern-v1.safetensors', ")
    assert error["extra_info"]["input_config"][0][0] == "pattern-v1.safetensors"


def test_a_long_list_of_choices_is_left_out_of_the_error(library: Library) -> None:
    inputs = {"model": ["9", 0], "sampler_name": "nope"}
    graph = {"1": node("KSampler", **inputs), "2": node("PreviewAny", source=["1", 0])}
    graph["9"] = node("CheckpointLoaderSimple", ckpt_name="pattern-v1.safetensors")
    errors = check(graph, library).node_errors["1"]["errors"]
    error = next(error for error in errors if error["type"] == "value_not_in_list")
    assert error["details"] == "sampler_name: 'nope' not in (list of length 42)"
    assert error["extra_info"]["input_config"] is None


@pytest.mark.parametrize("name", ["nope.png", "../secret.png", "/etc/hostname", "sub/../../secret.png"])
def test_a_file_that_is_not_there_or_not_inside_is_refused(library: Library, tmp_path: Path, name: Any) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    graph = {"1": node("LoadImage", image=name), "2": node("PreviewImage", images=["1", 0])}
    error = first_error(check(graph, library))
    assert error["type"] == "custom_validation_failed"
    assert error["details"] == f"image - Invalid image file: {name}"


@pytest.mark.parametrize("name", ["a.png", "job1/b.png", "c.png [output]", "a.png [input]"])
def test_a_file_in_a_subfolder_or_another_folder_is_accepted(library: Library, name: Any) -> None:
    folders = library.folders
    (folders.input / "job1").mkdir()
    for path in (folders.input / "a.png", folders.input / "job1" / "b.png", folders.output / "c.png"):
        path.write_bytes(b"x")
    graph = {"1": node("LoadImage", image=name), "2": node("PreviewImage", images=["1", 0])}
    assert check(graph, library).error is None


def test_values_are_converted_in_place(library: Library) -> None:
    graph = with_empty(width="64", height=32.9, color=True)
    graph["2"]["inputs"]["filename_prefix"] = 7
    assert check(graph, library).outputs == ("2",)
    assert graph["1"]["inputs"] == {"width": 64, "height": 32, "batch_size": 1, "color": 1}
    assert graph["2"]["inputs"]["filename_prefix"] == "7"


def test_a_wrapped_list_is_a_value(library: Library) -> None:
    graph = {"1": node("PreviewAny", source={"__value__": [1, 2]})}
    assert check(graph, library).error is None
    assert graph["1"]["inputs"]["source"] == [1, 2]


def test_only_nodes_upstream_of_an_output_are_looked_at(library: Library) -> None:
    graph = picture_graph() | {"9": node("EmptyImage", width=-1), "8": {"class_type": "ImageInvert"}}
    verdict = check(graph, library)
    assert verdict.error is None
    assert verdict.node_errors == {}


def test_only_the_wanted_outputs_are_checked_and_run(library: Library) -> None:
    graph = picture_graph() | {"3": node("PreviewImage", images=["404", 0])}
    assert check(graph, library, ["2"]).outputs == ("2",)
    assert check(graph, library, ["1"]).error["type"] == "prompt_no_outputs"


@pytest.mark.parametrize(
    ("received", "wanted", "match"),
    [
        ("IMAGE", "IMAGE", True),
        ("IMAGE", "MASK", False),
        ("IMAGE", "*", True),
        ("*", "IMAGE", True),
        ("INT,FLOAT", "FLOAT, STRING", True),
        ("INT", "FLOAT,STRING", False),
        ("STRING", ["a", "b"], False),
    ],
)
def test_types_match_as_in_comfyui(received: Any, wanted: Any, match: Any) -> None:
    assert types_match(received, wanted) is match


async def test_one_good_output_is_enough_and_the_bad_one_is_skipped_in_silence(tmp_path: Path) -> None:
    graph = picture_graph() | {"3": node("PreviewImage", images=["4", 0]), "4": node("ImageInvert")}
    async with open_embedded(tmp_path) as peer, peer.listening() as listener:
        answer = await peer.submit(graph)
        assert list(answer.json()["node_errors"]) == ["4"]
        assert answer.json()["node_errors"]["4"]["dependent_outputs"] == ["3"]
        await listener.until_ended("p")
        entry = await peer.history("p")
        assert entry["status"]["completed"] is True
        assert list(entry["outputs"]) == ["2"]


@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b'{"prompt": {"1": null}}', b'{"prompt": [1]}', b""])
async def test_malformed_requests_are_answered_with_500(tmp_path: Path, body: Any) -> None:
    async with open_embedded(tmp_path) as peer:
        answer = await peer.http.post("/prompt", content=body)
        assert answer.status_code == 500
        assert answer.headers["content-type"].startswith("text/plain")


async def test_a_body_without_prompt_is_no_prompt(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        answer = await peer.http.post("/prompt", json={"client_id": "me"})
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "no_prompt"
        assert answer.json()["node_errors"] == {}


@pytest.mark.parametrize("seed", [2**53 + 1, 2**63, 2**64 - 1])
async def test_a_64_bit_seed_survives_exactly(tmp_path: Path, seed: Any) -> None:
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="pattern-v1.safetensors"),
        "2": node("CLIPTextEncode", text="", clip=["1", 1]),
        "3": node("EmptyLatentImage", width=16, height=16, batch_size=1),
        "4": node(
            "KSamplerAdvanced",
            model=["1", 0],
            add_noise="enable",
            noise_seed=seed,
            steps=1,
            cfg=1,
            sampler_name="euler",
            scheduler="normal",
            positive=["2", 0],
            negative=["2", 0],
            latent_image=["3", 0],
            start_at_step=0,
            end_at_step=1,
            return_with_leftover_noise="disable",
        ),
        "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
        "6": node("SaveImage", images=["5", 0], filename_prefix="s"),
    }
    async with open_embedded(tmp_path) as peer:
        entry = await peer.run(graph)
        assert entry["status"]["completed"] is True
        assert entry["prompt"][2]["4"]["inputs"]["noise_seed"] == seed
        saved = peer.saved(entry, "6")[0].read_bytes()
        assert f'"noise_seed": {seed}'.encode() in saved


async def test_a_seed_beyond_64_bits_is_refused(tmp_path: Path) -> None:
    graph = {"1": node("KSampler", seed=2**64), "2": node("PreviewAny", source=["1", 0])}
    async with open_embedded(tmp_path) as peer:
        body = json.dumps({"prompt": graph})
        answer = await peer.http.post("/prompt", content=body)
        assert answer.status_code == 400
        types = [error["type"] for error in answer.json()["node_errors"]["1"]["errors"]]
        assert "value_bigger_than_max" in types
