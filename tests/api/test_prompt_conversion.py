"""``convert_output``: what comes back is what was asked for, or a failure that says why not."""

import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pyvips
from api_support import (
    Graph,
    b64,
    blank,
    faults,
    graph_of,
    images,
    node,
    open_client,
    pixel,
    png,
    prompt,
    saver,
    wait_folders_clean,
)
from convert_kit import (
    avif_subsampling,
    jpeg_is_progressive,
    jpeg_sampling,
    jpeg_tables,
    opened,
    picture,
    png_chunks,
    webp_chunks,
)
from daemon_support import Daemon, problem
from media_kit import png as grey_png

from comfyd.media.sniff import sniff


@pytest.fixture
async def client(shared_daemon: Daemon) -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(shared_daemon) as client:
        yield client
        await wait_folders_clean(shared_daemon)
        shared_daemon.assert_no_bug()


@pytest.fixture(scope="module")
def grainy() -> str:
    """Base64 of a picture on which the options of an encoder show."""
    return b64(picture().pngsave_buffer())


def load(value: str) -> Graph:
    return graph_of(node("1", "LoadImage", image=value), saver("2", "1"))


async def converted(
    client: httpx.AsyncClient, graph: Graph, folder: Path, format_: str, metadata: str | None = None, **options: Any
) -> Path:
    """Run *graph*, which has one output, and write what came of it to a file."""
    wish: dict[str, Any] = {"format": format_}
    if options:
        wish["options"] = options
    if metadata is not None:
        wish["metadata"] = metadata
    response = await prompt(client, graph, convert_output=wish)
    (data,) = images(response)
    (output,) = response.json()["outputs"]
    assert (output["converted"], output["size_bytes"]) == (True, len(data))
    path = folder / str(output["filename"])  # which begins with the job's own id
    path.write_bytes(data)
    return path


FORMATS = {
    "jpeg": "image/jpeg",
    "jpg": "image/jpeg",
    "webp": "image/webp",
    "png": "image/png",
    "avif": "image/avif",
}


@pytest.mark.parametrize("format_", FORMATS)
async def test_each_format_is_what_it_says(client: httpx.AsyncClient, format_: str) -> None:
    graph = graph_of(blank("1", color=0xC86432, size_px=32), saver("2", "1"))
    response = await prompt(client, graph, id=f"as-{format_}", convert_output={"format": format_})
    (data,) = images(response)
    name = f"as-{format_}_x_00001_.{format_}"
    assert response.json()["filenames"] == [name]
    assert response.json()["outputs"] == [
        {
            "filename": name,
            "node_id": "2",
            "media_type": FORMATS[format_],
            "size_bytes": len(data),
            "converted": True,
        }
    ]
    kind = sniff(data)
    assert kind is not None
    assert kind.name == FORMATS[format_]
    decoded = pyvips.Image.new_from_buffer(data, "")
    assert (decoded.width, decoded.height) == (32, 32)
    assert pixel(data) == pytest.approx((200, 100, 50), abs=4)
    assert "convert_output" not in response.json()


async def test_options_reach_the_jpeg_encoder(client: httpx.AsyncClient, tmp_path: Path, grainy: str) -> None:
    plain = await converted(client, load(grainy), tmp_path, "jpeg")
    assert not jpeg_is_progressive(plain)
    assert jpeg_sampling(plain)[0] == (2, 2)
    wished = await converted(client, load(grainy), tmp_path, "jpg", progressive=True, chromaSubsampling="4:4:4")
    assert jpeg_is_progressive(wished)
    assert jpeg_sampling(wished)[0] == (1, 1)
    coarse = await converted(client, load(grainy), tmp_path, "jpeg", quality=20)
    assert sum(jpeg_tables(coarse, 0xDB)) > 2 * sum(jpeg_tables(plain, 0xDB)), "the tables of quality 20 are coarser"


async def test_options_reach_the_webp_encoder(client: httpx.AsyncClient, tmp_path: Path, grainy: str) -> None:
    lossy = await converted(client, load(grainy), tmp_path, "webp", quality=30)
    lossless = await converted(client, load(grainy), tmp_path, "webp", lossless=True)
    assert b"VP8 " in dict(webp_chunks(lossy))
    assert b"VP8L" in dict(webp_chunks(lossless))
    assert (opened(lossless) - picture()).abs().max() == 0


async def test_options_reach_the_png_encoder(client: httpx.AsyncClient, tmp_path: Path, grainy: str) -> None:
    plain = await converted(client, load(grainy), tmp_path, "png")
    palette = await converted(client, load(grainy), tmp_path, "png", palette=True, colours=4)
    assert b"PLTE" not in dict(png_chunks(plain))
    assert len(dict(png_chunks(palette))[b"PLTE"]) <= 4 * 3
    assert (opened(plain) - picture()).abs().max() == 0


async def test_options_reach_the_avif_encoder(client: httpx.AsyncClient, tmp_path: Path, grainy: str) -> None:
    plain = await converted(client, load(grainy), tmp_path, "avif", effort=0)
    wished = await converted(client, load(grainy), tmp_path, "avif", effort=0, quality=10, chromaSubsampling="4:2:0")
    assert (avif_subsampling(plain), avif_subsampling(wished)) == ((0, 0), (1, 1))
    assert wished.stat().st_size < 0.6 * plain.stat().st_size


async def test_several_outputs_are_converted_in_their_order_under_names_of_their_own(
    client: httpx.AsyncClient,
) -> None:
    graph = graph_of(
        blank("1", color=0xFF0000, batch_size=2),
        blank("2", color=0x00FF00),
        saver("b", "2", prefix="here/x"),
        saver("a", "1", prefix="there/x"),
    )
    response = await prompt(client, graph, id="several", convert_output={"format": "webp"})
    colours = [pixel(data) for data in images(response)]
    assert [max(range(3), key=colour.__getitem__) for colour in colours] == [1, 0, 0]
    assert response.json()["filenames"] == [
        "several_x_00001_.webp",
        "several_x_00001_-2.webp",
        "several_x_00002_.webp",
    ]
    assert [output["node_id"] for output in response.json()["outputs"]] == ["b", "a", "a"]


FILM = {
    "images": ["3", 0],
    "filename_prefix": "film",
    "fps": 8.0,
    "lossless": True,
    "quality": 80,
    "method": "default",
}


def film() -> Graph:
    return graph_of(
        blank("1", color=0xFF0000),
        blank("2", color=0x0000FF),
        node("12", "ImageBatch", image1=["1", 0], image2=["2", 0]),
        node("3", "ImageBatch", image1=["12", 0], image2=["1", 0]),  # no two in a row are equal: they would be one
        node("4", "SaveAnimatedWEBP", **FILM),
    )


async def test_an_animation_stays_one_as_webp_and_is_its_first_frame_elsewhere(client: httpx.AsyncClient) -> None:
    response = await prompt(client, film(), convert_output={"format": "webp", "options": {"quality": 60}})
    moving = pyvips.Image.new_from_buffer(images(response)[0], "", n=-1)
    assert (moving.get("n-pages"), moving.get("page-height"), moving.get("delay")) == (3, 8, [125] * 3)
    response = await prompt(client, film(), convert_output={"format": "jpeg"})
    still = images(response)[0]
    assert pyvips.Image.new_from_buffer(still, "").height == 8
    assert pixel(still) == pytest.approx((255, 0, 0), abs=4)


async def test_what_is_no_picture_passes_and_is_said_not_to_be_converted(client: httpx.AsyncClient) -> None:
    graph = graph_of(
        blank("1"),
        node("2", "SaveTextFile", text="hello", filename_prefix="note"),
        saver("3", "1"),
        node("4", "SaveBytes", size_mb=0.001, filename_prefix="bytes"),
    )
    response = await prompt(client, graph, id="mixed", convert_output={"format": "jpeg"})
    data = images(response)
    outputs = response.json()["outputs"]
    assert [(o["filename"], o["media_type"], o["converted"]) for o in outputs] == [
        ("mixed_note_00001_.txt", "text/plain", False),
        ("mixed_x_00001_.jpeg", "image/jpeg", True),
        ("mixed_bytes_00001_.bin", "application/octet-stream", False),
    ]
    assert data[0] == b"hello"
    assert data[2] == (bytes(range(256)) * 5)[: len(data[2])]
    assert len(data[2]) == round(0.001 * (1 << 20))


BAD: dict[str, tuple[Any, str, str]] = {
    "no format": ({}, "convert_output.format", "is required"),
    "unknown format": ({"format": "gif"}, "convert_output.format", "jpeg"),
    "format null": ({"format": None}, "convert_output.format", ""),
    "no object": ("jpeg", "convert_output", "object"),
    "a list": (["jpeg"], "convert_output", "object"),
    "quality 0": ({"format": "jpeg", "options": {"quality": 0}}, "convert_output.options.quality", "1"),
    "quality 101": ({"format": "webp", "options": {"quality": 101}}, "convert_output.options.quality", "100"),
    "quality a text": ({"format": "avif", "options": {"quality": "80"}}, "convert_output.options.quality", ""),
    "effort 7": ({"format": "webp", "options": {"effort": 7}}, "convert_output.options.effort", "6"),
    "unknown option": ({"format": "png", "options": {"qualty": 5}}, "convert_output.options.qualty", "quality"),
    "other's option": ({"format": "jpeg", "options": {"effort": 3}}, "convert_output.options.effort", ""),
    "metadata": ({"format": "jpeg", "metadata": "all"}, "convert_output.metadata", "strip"),
    "unknown field": ({"format": "jpeg", "option": {}}, "convert_output.option", "options"),
}


@pytest.mark.parametrize(("wish", "location", "words"), BAD.values(), ids=BAD.keys())
async def test_a_bad_wish_is_refused_by_its_place_and_nothing_runs(
    client: httpx.AsyncClient, shared_daemon: Daemon, wish: Any, location: str, words: str
) -> None:
    job_id = f"refused-{abs(hash(location + words))}"
    response = await prompt(client, graph_of(blank("1"), saver("2", "1")), id=job_id, convert_output=wish)
    told = faults(problem(response, 400, "invalid-request"))
    assert list(told) == [location]
    assert words in told[location]
    assert (await client.get(f"/jobs/{job_id}")).status_code == 404
    assert shared_daemon.log.find("job.accepted", job_id=job_id) == []


async def test_every_fault_of_a_wish_is_told_beside_those_of_the_request(client: httpx.AsyncClient) -> None:
    wish = {"format": "webp", "options": {"quality": 0, "effort": 9}}
    response = await prompt(client, graph_of(blank("1"), saver("2", "1")), convert_output=wish, priority="high")
    assert set(faults(problem(response, 400, "invalid-request"))) == {
        "priority",
        "convert_output.options.quality",
        "convert_output.options.effort",
    }


@pytest.mark.parametrize("kind", ["truncated", "corrupt"])
async def test_a_damaged_picture_is_a_failure_that_names_the_file(client: httpx.AsyncClient, kind: str) -> None:
    whole = grey_png(64, 64)
    broken = whole[:-20] if kind == "truncated" else whole.replace(zlib.compress(bytes(65 * 64)), b"\xff" * 20)
    assert broken != whole
    graph = graph_of(
        blank("good"),
        saver("1", "good"),
        node("2", "LoadVideo", file=b64(broken)),  # which passes any file on
        node("3", "SaveVideo", video=["2", 0], filename_prefix="bad", format="auto", codec="auto"),
    )
    job_id = f"damaged-{kind}"
    response = await prompt(client, graph, id=job_id, convert_output={"format": "jpeg"})
    document = problem(response, 500, "execution-failed")
    assert document["node_id"] == "3"
    assert list(faults(document)) == ["prompt.3"]
    assert f"{job_id}_bad_00001_.png" in document["detail"]
    assert "damaged" in document["detail"]
    assert "images" not in document
    assert (await client.get(f"/jobs/{job_id}")).status_code == 404
    response = await prompt(client, graph)
    assert images(response)[1] == broken, "without a conversion it is passed on as it is"


def texts(path: Path) -> dict[bytes, bytes]:
    """The text chunks of a PNG: keyword to text."""
    parts = (data.partition(b"\0") for kind, data in png_chunks(path) if kind == b"tEXt")
    return {keyword: text for keyword, _, text in parts}


EXTRA = {"extra_pnginfo": {"workflow": {"nodes": ["a-workflow"]}}}


async def test_without_a_conversion_the_bytes_are_those_that_the_node_wrote(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    response = await prompt(client, graph_of(blank("1"), saver("2", "1")), id="as-it-is", extra_data=EXTRA)
    path = tmp_path / "a.png"
    path.write_bytes(images(response)[0])
    assert b"as-it-is_x" in texts(path)[b"prompt"]
    assert b"a-workflow" in texts(path)[b"workflow"]
    assert "converted" not in response.json()["outputs"][0]
    for kind, data in png_chunks(path):
        assert zlib.crc32(kind + data) == struct.unpack(">I", _crc_of(path, kind, data))[0]


def _crc_of(path: Path, kind: bytes, data: bytes) -> bytes:
    raw = path.read_bytes()
    at = raw.index(kind + data) + 4 + len(data)
    return raw[at : at + 4]


async def test_a_conversion_strips_the_workflow_unless_told_to_keep_it(client: httpx.AsyncClient) -> None:
    graph = graph_of(blank("1", size_px=16), saver("2", "1"))
    for format_ in ("png", "webp"):  # the two in which ComfyUI's page looks for it
        wish = {"format": format_}
        response = await prompt(client, graph, extra_data=EXTRA, convert_output=wish)
        fields = pyvips.Image.new_from_buffer(images(response)[0], "").get_fields()
        assert [field for field in fields if field.startswith(("png-comment", "exif"))] == []
        wish = {"format": format_, "metadata": "keep"}
        response = await prompt(client, graph, extra_data=EXTRA, convert_output=wish)
        assert b"a-workflow" in images(response)[0]


@pytest.mark.parametrize("format_", ["png", "jpeg", "webp", "avif"])
async def test_a_conversion_strips_what_a_camera_wrote_unless_told_to_keep_it(
    client: httpx.AsyncClient, format_: str
) -> None:
    photo = picture().copy()
    photo.set_type(pyvips.GValue.gstr_type, "exif-ifd0-ImageDescription", "where-we-live")
    source = photo.jpegsave_buffer()
    assert b"where-we-live" in source
    graph = graph_of(
        node("1", "LoadVideo", file=b64(source)),  # which passes any file on
        node("2", "SaveVideo", video=["1", 0], filename_prefix="x", format="auto", codec="auto"),
    )
    told = {}
    for metadata in ("strip", "keep"):
        response = await prompt(client, graph, convert_output={"format": format_, "metadata": metadata})
        told[metadata] = pyvips.Image.new_from_buffer(images(response)[0], "").get_typeof("exif-ifd0-ImageDescription")
    assert told["strip"] == 0
    assert told["keep"] != 0


async def test_transparency_shows_the_background_that_was_asked_for(client: httpx.AsyncClient) -> None:
    clear = pyvips.Image.black(16, 16, bands=4).copy(interpretation="srgb").cast("uchar").pngsave_buffer()
    graph = graph_of(
        node("1", "LoadVideo", file=b64(clear)),
        node("2", "SaveVideo", video=["1", 0], filename_prefix="x", format="auto", codec="auto"),
    )
    wish = {"format": "jpeg", "options": {"background": "#ff8000", "quality": 95}}
    response = await prompt(client, graph, convert_output=wish)
    assert pixel(images(response)[0]) == pytest.approx((255, 128, 0), abs=4)


async def test_the_same_wish_is_made_of_the_same_pixels(client: httpx.AsyncClient) -> None:
    graph = graph_of(node("1", "LoadImage", image=b64(png(colour=(9, 8, 7)))), saver("2", "1"))
    first, second = [images(await prompt(client, graph, convert_output={"format": "webp"})) for _ in range(2)]
    assert first == second
