"""The loaders for trying and testing: what they find, in which order, and where they stop."""

import threading
from pathlib import Path
from typing import Any

import pytest
import pyvips
from embedded_kit import Graph, node, open_embedded

from comfyd.embedded.files import OutsideFolder
from comfyd.embedded.models import Models
from comfyd.embedded.nodes import NODE_TYPES
from comfyd.embedded.nodes.registry import Interrupted, Library, NodeContext, Progress
from comfyd.embedded.settings import parse_command_line


@pytest.fixture
def context(tmp_path: Path) -> NodeContext:
    settings = parse_command_line(["--base-directory", str(tmp_path)])
    settings.folders.make()
    return NodeContext(
        node_id="1",
        prompt_id="p",
        prompt={},
        extra_data={},
        settings=settings,
        library=Library(folders=settings.folders, models=Models()),
        interrupted=threading.Event(),
        progress=Progress(),
    )


@pytest.fixture
def folder(context: NodeContext) -> Path:
    """A folder of three pictures and a text below the input folder."""
    folder = context.library.folders.input / "films" / "one"
    folder.mkdir(parents=True)
    for name, colour in (("b.png", (0, 250, 0)), ("a.png", (250, 0, 0)), ("c.webp", (0, 0, 250))):
        write(folder / name, colour)
    (folder / "notes.txt").write_text("no picture")
    return folder


def write(path: Path, colour: tuple[int, ...], *, size_px: int = 8) -> None:
    picture = (pyvips.Image.black(size_px, size_px, bands=len(colour)) + list(colour)).cast("uchar")
    picture.copy(interpretation="srgb").write_to_file(
        str(path), **({"lossless": True} if path.suffix == ".webp" else {})
    )


def run(context: NodeContext, name: str, **inputs: Any) -> Any:
    return NODE_TYPES[name].run(context, **inputs)


def colours(images: Any) -> list[str]:
    return ["rgb"[max(range(3), key=picture(0, 0).__getitem__)] for picture in images.pictures]


@pytest.mark.parametrize("name", ["VHS_LoadImages", "VHS_LoadImagesPath"])
def test_a_folder_is_a_batch_by_the_order_of_names(context: NodeContext, folder: Path, name: str) -> None:
    directory = "films/one" if name == "VHS_LoadImages" else str(folder)
    images, masks, count = run(context, name, directory=directory).outputs
    assert (colours(images), len(masks), count) == (["r", "g", "b"], 3, 3)
    images, _, count = run(context, name, directory=directory, skip_first_images=1, image_load_cap=1).outputs
    assert (colours(images), count) == (["g"], 1)
    images, _, count = run(context, name, directory=directory, select_every_nth=2).outputs
    assert (colours(images), count) == (["r", "b"], 2)


def test_a_picture_of_another_size_is_made_to_fit_most(context: NodeContext, folder: Path) -> None:
    write(folder / "a.png", (250, 0, 0), size_px=32)
    images, _, _ = run(context, "VHS_LoadImages", directory="films/one").outputs
    assert (images.width_px, images.height_px) == (8, 8)
    assert colours(images) == ["r", "g", "b"]


def test_a_folder_without_pictures_is_refused_when_it_runs_and_one_without_files_before(
    context: NodeContext, folder: Path
) -> None:
    for path in folder.glob("*.*g"):
        path.unlink()
    (folder / "c.webp").unlink()
    with pytest.raises(FileNotFoundError, match="No files in directory 'one'"):
        run(context, "VHS_LoadImages", directory="films/one")
    check = NODE_TYPES["VHS_LoadImages"].by_name["directory"].check
    assert check is not None
    assert check(context.library, "films/one") is None
    (folder / "notes.txt").unlink()
    assert check(context.library, "films/one") == "No files in directory 'films/one'."
    assert check(context.library, "../output") == "Directory '../output' cannot be found."


def test_a_path_is_looked_for_from_the_working_folder_and_below_the_input_folder_only(
    context: NodeContext, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = run(context, "VHS_LoadImagePath", image=str(folder / "b.png")).outputs
    assert colours(images) == ["g"]
    check = NODE_TYPES["VHS_LoadImagePath"].by_name["image"].check
    assert check is not None
    assert check(context.library, str(folder / "b.png")) is None
    assert check(context.library, "films/one/b.png") is not None
    with pytest.raises(OutsideFolder):
        run(context, "VHS_LoadImagePath", image="films/one/b.png")
    outside = context.library.folders.output / "b.png"
    write(outside, (1, 2, 3))
    assert check(context.library, str(outside)) is not None
    monkeypatch.chdir(context.library.folders.input)
    assert check(context.library, "films/one/b.png") is None


def test_transparency_of_a_picture_at_a_path_is_its_mask(context: NodeContext, folder: Path) -> None:
    write(folder / "clear.png", (1, 2, 3, 55))
    _, mask = run(context, "VHS_LoadImagePath", image=str(folder / "clear.png")).outputs
    assert mask.pictures[0](0, 0) == [200]


def test_an_interrupt_ends_the_reading_of_a_folder(context: NodeContext, folder: Path) -> None:
    context.interrupted.set()
    with pytest.raises(Interrupted):
        run(context, "VHS_LoadImages", directory="films/one")


@pytest.mark.parametrize("cheap", [True, False])
@pytest.mark.parametrize("name", ["VHS_LoadImages", "VHS_LoadImagesPath"])
def test_a_folder_whose_files_changed_is_another_one_for_the_cache(
    context: NodeContext, folder: Path, name: str, cheap: bool
) -> None:
    fingerprint = NODE_TYPES[name].fingerprint
    assert fingerprint is not None
    _, fingerprint_of = fingerprint
    directory = "films/one" if name == "VHS_LoadImages" else str(folder)
    before = fingerprint_of(context.library, directory, cheap)
    assert fingerprint_of(context.library, directory, cheap) == before
    (folder / "a.png").unlink()
    write(folder / "a.png", (7, 7, 7), size_px=9)
    assert fingerprint_of(context.library, directory, cheap) != before


def test_a_sound_and_a_film_are_copied(context: NodeContext) -> None:
    (context.library.folders.input / "a.wav").write_bytes(b"sound")
    (context.library.folders.input / "b").write_bytes(b"film")
    (sound,) = run(context, "LoadAudio", audio="a.wav").outputs
    (film,) = run(context, "LoadVideo", file="b").outputs
    assert run(context, "SaveAudio", audio=sound, filename_prefix="audio/x").ui == {
        "audio": [{"filename": "x_00001_.wav", "subfolder": "audio", "type": "output"}]
    }
    assert run(context, "SaveVideo", video=film, filename_prefix="y", format="auto", codec="auto").ui == {
        "images": [{"filename": "y_00001_.bin", "subfolder": "", "type": "output"}],
        "animated": [True],
    }
    output = context.library.folders.output
    assert (output / "audio" / "x_00001_.wav").read_bytes() == b"sound"
    assert (output / "y_00001_.bin").read_bytes() == b"film"


def test_object_info_says_what_a_loader_takes(context: NodeContext, folder: Path) -> None:
    write(context.library.folders.input / "p.png", (1, 2, 3))

    def shown(name: str, key: str) -> Any:
        return NODE_TYPES[name].info(context.library)["input"]["required"][key]

    assert shown("CustomLoader", "picture") == [["p.png"], {"image_upload": True}]
    assert shown("LoadAudio", "audio") == [["p.png"], {"audio_upload": True}]
    assert shown("LoadVideo", "file") == [["p.png"], {"video_upload": True}]
    assert shown("VHS_LoadImages", "directory") == [["films"]]
    assert shown("VHS_LoadImagePath", "image")[0] == "STRING"
    assert shown("TextNode", "image")[0] == "STRING"
    names = ("VHS_LoadImages", "VHS_LoadImagesPath", "VHS_LoadImagePath", "CustomLoader", "TextNode", "SaveAudio")
    assert all("trying and testing" in NODE_TYPES[name].description for name in names)


@pytest.mark.parametrize("flags", [(), ("--cost", "none")])
async def test_they_run_in_a_graph_whatever_it_costs(tmp_path: Path, flags: tuple[str, ...]) -> None:
    async with open_embedded(tmp_path, *flags) as peer:
        input_dir = peer.engine.settings.folders.input
        (input_dir / "folder").mkdir(parents=True)
        for name in ("folder/a.png", "folder/b.png", "p.png"):
            write(input_dir / name, (250, 0, 0))
        graph: Graph = {
            "1": node("VHS_LoadImages", directory="folder"),
            "2": node("VHS_LoadImagesPath", directory=str(input_dir / "folder"), image_load_cap=1),
            "3": node("VHS_LoadImagePath", image=str(input_dir / "p.png")),
            "4": node("CustomLoader", picture="p.png"),
            **{f"s{n}": node("SaveImage", images=[f"{n}", 0], filename_prefix=f"s{n}") for n in range(1, 5)},
            "5": node("TextNode", image="just words"),
            "6": node("PreviewAny", source=["5", 0]),
        }
        entry = await peer.run(graph)
        assert [len(peer.saved(entry, f"s{n}")) for n in range(1, 5)] == [2, 1, 1, 1]
        assert entry["outputs"]["6"] == {"text": ["just words"]}
        refused = {
            "1": node("VHS_LoadImagesPath", directory="folder"),
            "2": node("SaveImage", images=["1", 0], filename_prefix="x"),
        }
        answer = await peer.submit(refused, "refused", status=400)
        (error,) = answer.json()["node_errors"]["1"]["errors"]
        assert error["type"] == "custom_validation_failed"
