"""The HTTP routes besides prompts and queue: what there is, files in and out."""

import io
from pathlib import Path
from typing import Any

import pytest
import pyvips
from embedded_kit import Peer, node, open_embedded, picture_graph


def png(width: Any = 4, height: Any = 4, colour: Any = (1, 2, 3), alpha: Any = None) -> Any:
    bands = [*colour] if alpha is None else [*colour, alpha]
    picture = (pyvips.Image.black(width, height, bands=len(bands)) + bands).cast("uchar").copy(interpretation="srgb")
    return picture.pngsave_buffer()


def everything_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


async def upload(peer: Peer, content: Any, name: Any = "a.png", mask: Any = False, **fields: Any) -> Any:
    route = "/upload/mask" if mask else "/upload/image"
    return await peer.http.post(route, files={"image": (name, io.BytesIO(content))}, data=fields)


@pytest.mark.parametrize("prefix", ["", "/api"])
async def test_every_route_is_under_api_too(tmp_path: Path, prefix: Any) -> None:
    async with open_embedded(tmp_path) as peer:
        for path in (
            "/system_stats",
            "/features",
            "/prompt",
            "/queue",
            "/history",
            "/object_info",
            "/models",
            "/extensions",
        ):
            assert (await peer.http.get(prefix + path)).status_code == 200, path
        assert (await peer.http.get(prefix + "/nothing")).status_code == 404
        assert (await peer.http.delete(prefix + "/queue")).status_code == 405


async def test_the_front_page_says_what_this_is(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        answer = await peer.http.get("/")
        assert answer.status_code == 200
        assert "not diffusion" in answer.text


async def test_system_stats_tell_arguments_memory_and_one_cpu(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        stats = (await peer.http.get("/system_stats")).json()
        assert [(device["name"], device["type"], device["index"]) for device in stats["devices"]] == [
            ("cpu", "cpu", None)
        ]
        system = stats["system"]
        assert isinstance(system["argv"], list)
        assert system["ram_total"] > system["ram_free"] > 0
        assert "not diffusion" in system["pytorch_version"]
        assert system["comfyui_version"].startswith("0.3.64+comfyd")


async def test_object_info_shows_types_bounds_flags_and_both_shapes_of_choices(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        (peer.engine.settings.folders.input / "seen.png").write_bytes(png())
        (peer.engine.settings.folders.input / "notes.txt").write_text("x")
        info = (await peer.http.get("/object_info")).json()
        assert info["LoadImage"]["input"]["required"]["image"] == [["seen.png"], {"image_upload": True}]
        assert info["LoadImageMask"]["input"]["required"]["image"][0] == ["notes.txt", "seen.png"]
        assert info["ImageBlend"]["input"]["required"]["blend_mode"][0] == "COMBO"
        assert "multiply" in info["ImageBlend"]["input"]["required"]["blend_mode"][1]["options"]
        assert info["ImageBlend"]["input"]["required"]["image1"] == ["IMAGE"]
        seed = info["KSampler"]["input"]["required"]["seed"]
        assert (seed[0], seed[1]["max"], seed[1]["control_after_generate"]) == ("INT", 2**64 - 1, True)
        assert info["SaveImage"]["output_node"] is True
        assert info["EmptyImage"]["output_node"] is False
        assert info["SaveImage"]["input"]["hidden"] == {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
        assert info["DualCLIPLoader"]["input_order"]["optional"] == ["device"]
        assert info["GetImageSize"]["output_name"] == ["width", "height", "batch_size"]
        assert "pattern" in info["KSampler"]["display_name"]
        one = (await peer.http.get("/object_info/KSampler")).json()
        assert one == {"KSampler": info["KSampler"]}
        assert (await peer.http.get("/object_info/Nope")).json() == {}


async def test_models_are_pretended_or_listed_from_a_folder(tmp_path: Path) -> None:
    async with open_embedded(tmp_path / "a") as peer:
        assert "checkpoints" in (await peer.http.get("/models")).json()
        assert (await peer.http.get("/models/checkpoints")).json()[0] == "pattern-v1.safetensors"
        assert (await peer.http.get("/models/nope")).status_code == 404
        assert (await peer.http.get("/embeddings")).json() == ["pattern-negative"]
    models = tmp_path / "models"
    (models / "checkpoints" / "sub").mkdir(parents=True)
    (models / "extra").mkdir()
    (models / "checkpoints" / "sub" / "b.safetensors").touch()
    (models / "checkpoints" / "readme.txt").touch()
    async with open_embedded(tmp_path / "b", "--models-directory", str(models)) as peer:
        assert (await peer.http.get("/models/checkpoints")).json() == ["sub/b.safetensors"]
        assert (await peer.http.get("/models/loras")).json() == []
        assert "extra" in (await peer.http.get("/models")).json()
        info = (await peer.http.get("/object_info/CheckpointLoaderSimple")).json()
        choices = info["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]
        assert choices == ["sub/b.safetensors"]


async def test_an_uploaded_picture_can_be_loaded_and_viewed(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        answer = await upload(peer, png(colour=(9, 8, 7)), subfolder="job1")
        assert answer.json() == {"name": "a.png", "subfolder": "job1", "type": "input"}
        graph = {
            "1": node("LoadImage", image="job1/a.png"),
            "2": node("SaveImage", images=["1", 0], filename_prefix="x"),
        }
        entry = await peer.run(graph)
        seen = await peer.http.get("/view", params=entry["outputs"]["2"]["images"][0])
        assert seen.status_code == 200
        assert seen.headers["content-type"] == "image/png"
        assert seen.headers["content-disposition"] == 'filename="x_00001_.png"'
        assert pyvips.Image.new_from_buffer(seen.content, "")(0, 0) == [9, 8, 7]


async def test_an_upload_of_the_same_name_is_kept_apart_unless_equal_or_overwritten(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        assert (await upload(peer, b"one")).json()["name"] == "a.png"
        assert (await upload(peer, b"one")).json()["name"] == "a.png"
        assert (await upload(peer, b"two")).json()["name"] == "a (1).png"
        assert (await upload(peer, b"two")).json()["name"] == "a (1).png"
        assert (await upload(peer, b"three", overwrite="true")).json()["name"] == "a.png"
        folder = peer.engine.settings.folders.input
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.png": b"three", "a (1).png": b"two"}


async def test_an_upload_larger_than_its_memory_arrives_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * 20_000
    async with open_embedded(tmp_path) as peer:
        assert (await upload(peer, content, "big.bin")).status_code == 200
        assert (peer.engine.settings.folders.input / "big.bin").read_bytes() == content


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("../a.png", {}),
        ("a.png", {"subfolder": "../.."}),
        ("a.png", {"subfolder": "/etc"}),
        ("a.png", {"type": "nowhere"}),
    ],
)
async def test_an_upload_outside_the_folder_is_refused(tmp_path: Path, name: Any, fields: Any) -> None:
    async with open_embedded(tmp_path) as peer:
        before = everything_in(tmp_path)
        assert (await upload(peer, b"x", name, **fields)).status_code == 400
        assert everything_in(tmp_path) == before


async def test_an_upload_that_is_no_form_or_has_no_file_is_refused(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        assert (await peer.http.post("/upload/image", content=b"x")).status_code == 400
        assert (await peer.http.post("/upload/image", data={"type": "input"}, files={"other": b"x"})).status_code == 400
        headers = {"content-type": "multipart/form-data; boundary=x"}
        assert (await peer.http.post("/upload/image", content=b"junk", headers=headers)).status_code == 400


async def test_a_body_over_the_limit_is_refused(tmp_path: Path) -> None:
    async with open_embedded(tmp_path, "--max-upload-size", "0.01") as peer:
        assert (await upload(peer, b"x" * 20_000)).status_code == 413
        assert (await peer.submit(picture_graph("x" * 20_000), status=413)).text
        assert (await upload(peer, b"x" * 5_000)).status_code == 200


async def test_a_mask_becomes_the_alpha_of_the_original(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        await upload(peer, png(colour=(10, 20, 30)), "original.png")
        reference = '{"filename": "original.png", "type": "input", "subfolder": ""}'
        answer = await upload(peer, png(alpha=99), "masked.png", mask=True, original_ref=reference)
        assert answer.json()["name"] == "masked.png"
        masked = pyvips.Image.new_from_file(str(peer.engine.settings.folders.input / "masked.png"))
        assert masked(0, 0) == [10, 20, 30, 99]
        outside = '{"filename": "../../x.png", "type": "input"}'
        assert (await upload(peer, png(), "m.png", mask=True, original_ref=outside)).status_code == 403
        assert (await upload(peer, png(), "m.png", mask=True, original_ref="no")).status_code == 400


async def test_view_is_confined(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    async with open_embedded(tmp_path) as peer:
        for params, status in (
            ({"filename": "../secret.txt"}, 400),
            ({"filename": "/etc/hostname"}, 400),
            ({"filename": "secret.txt", "subfolder": ".."}, 403),
            ({"filename": "secret.txt", "subfolder": "/etc"}, 403),
            ({"filename": "secret.txt", "type": "elsewhere"}, 400),
            ({"filename": ""}, 400),
            ({}, 404),
            ({"filename": "nope.png"}, 404),
        ):
            answer = await peer.http.get("/view", params=params)
            assert answer.status_code == status, params
            assert "secret" not in answer.text


async def test_view_shows_smaller_forms_and_single_channels(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        await upload(peer, png(colour=(10, 20, 30), alpha=99))
        for query, kind, first in (
            ({"preview": "webp;80"}, "image/webp", None),
            ({"preview": "jpeg"}, "image/jpeg", None),
            ({"channel": "rgb"}, "image/png", [10, 20, 30]),
            ({"channel": "a"}, "image/png", [0, 0, 0, 99]),
        ):
            answer = await peer.http.get("/view", params={"filename": "a.png", "type": "input", **query})
            assert answer.headers["content-type"] == kind
            picture = pyvips.Image.new_from_buffer(answer.content, "")
            assert first is None or picture(0, 0) == first


async def test_active_content_is_a_download(tmp_path: Path) -> None:
    async with open_embedded(tmp_path) as peer:
        await upload(peer, b"<script>", "a.html")
        answer = await peer.http.get("/view", params={"filename": "a.html", "type": "input"})
        assert answer.headers["content-type"] == "application/octet-stream"
        await upload(peer, b"", "empty.txt")
        answer = await peer.http.get("/view", params={"filename": "empty.txt [input]"})
        assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://evil.example", 403), ("http://127.0.0.1:1", 403), ("http://127.0.0.1", 200), (None, 200)],
)
async def test_a_page_of_another_origin_is_refused(tmp_path: Path, origin: Any, status: Any) -> None:
    async with open_embedded(tmp_path) as peer:
        headers = {} if origin is None else {"origin": origin}
        assert (await peer.http.get("/queue", headers=headers)).status_code == status


async def test_a_large_output_is_streamed_whole(tmp_path: Path) -> None:
    graph = {"1": node("SaveBytes", size_mb=3.0, filename_prefix="big")}
    async with open_embedded(tmp_path) as peer:
        record = (await peer.run(graph))["outputs"]["1"]["images"][0]
        answer = await peer.http.get("/view", params=record)
        assert len(answer.content) == 3 * 1024 * 1024
        assert answer.content[:256] == bytes(range(256))
