"""Inputs: what a caller may write into a loader node, what becomes of it, and that a refusal leaves nothing on disk."""

import base64
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import attrs
import pytest
from media_kit import png, png_header, wav

from comfyd.config import MediaConfig
from comfyd.engine import MediaInput, MediaKind, NodeClasses
from comfyd.errors import FailureKind
from comfyd.media import base64text
from comfyd.media.files import InputStore
from comfyd.media.inputs import Candidate, InvalidInputs, candidates, resolve_inputs

ANY = MediaInput(kind=MediaKind.IMAGE)
PNG = png(5, 3)
PNG64 = base64.b64encode(PNG).decode()
WAV64 = base64.b64encode(wav(301)).decode()
JPEG_HEAD = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(range(40, 90))
BMP = b"BM" + bytes(range(90))  # of a type that is not looked into


@attrs.define(eq=False)
class Inputs:
    """A store, and the shortest way to resolve values in it."""

    store: InputStore
    limits: MediaConfig = attrs.field(factory=MediaConfig)

    def resolve(self, *values: str) -> tuple[list[str | None], Path | None]:
        found = tuple(
            Candidate(node_id=str(number), input_name="image", value=value, media=ANY)
            for number, value in enumerate(values)
        )
        resolved, folder = resolve_inputs(found, self.store, "key", self.limits)
        return [resolved.get((str(number), "image")) for number in range(len(values))], folder

    def content(self, value: str) -> tuple[str, bytes]:
        """The name and the bytes of the one file that *value* becomes."""
        (name,), folder = self.resolve(value)
        assert name is not None
        assert folder is not None
        path = self.store.input_dir / name
        assert path.parent == folder
        return path.name, path.read_bytes()

    def refusal(self, value: str) -> str:
        """Why *value* is refused; nothing is left of it."""
        with pytest.raises(InvalidInputs) as caught:
            self.resolve(value)
        failure = caught.value.failure
        assert failure.kind is FailureKind.INVALID_INPUT
        (fault,) = failure.faults
        assert fault.location == "prompt.0.inputs.image"
        assert fault.message == failure.detail
        assert len(fault.message) < 300
        assert str(self.store.input_dir) not in fault.message
        left = [path for path in self.store.root.rglob("*") if path.is_file() and path.name != ".lock"]
        assert left == []
        return fault.message


@pytest.fixture
def inputs(tmp_path: Path) -> Iterator[Inputs]:
    input_dir = tmp_path / "input"
    (input_dir / "sub").mkdir(parents=True)
    for name in ("here.png", "sub/deep.png", "名前.png", "with space.png", "noending"):
        (input_dir / name).write_bytes(PNG)
    (tmp_path / "outside.png").write_bytes(PNG)
    (input_dir / "leads_out.png").symlink_to(tmp_path / "outside.png")
    (input_dir / "folder_out").symlink_to(tmp_path)
    (input_dir / "leads_in.png").symlink_to(input_dir / "here.png")
    (input_dir / "dangling.png").symlink_to(input_dir / "nothing")
    store = InputStore.open(input_dir)
    yield Inputs(store=store)
    store.close()


# Names


@pytest.mark.parametrize(
    "name",
    [
        "here.png",
        "sub/deep.png",
        "./here.png",
        "sub//deep.png",
        "名前.png",
        "with space.png",
        "noending",
        "leads_in.png",
        "here.png [input]",
        "here.png[input]",
        "sub/deep.png [input]",
    ],
)
def test_a_file_of_the_input_folder_keeps_its_name(inputs: Inputs, name: str) -> None:
    assert inputs.resolve(name) == ([None], None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent.png", 'no input file "absent.png"'),
        ("sub", "no input file"),
        ("", "is empty"),
        (" \n", "is empty"),
        (" [input]", "no input file"),
        (".", "no input file"),
        ("dangling.png", "no input file"),
        ("leads_out.png", "no input file"),
        ("folder_out/outside.png", "no input file"),
        ("here.png\0.jpg", "no input file"),
        ("x" * 5000 + ".png", "no input file"),
        ("名前でない.png", 'no input file "名前でない.png"'),
        ("/etc/passwd", "absolute paths and .. are not accepted"),
        ("//etc/passwd", "absolute paths and .. are not accepted"),
        ("../outside.png", "absolute paths and .. are not accepted"),
        ("sub/../here.png", "absolute paths and .. are not accepted"),
        ("..", "absolute paths and .. are not accepted"),
        ("..\\outside.png", "absolute paths and .. are not accepted"),
        ("C:\\x.png", "absolute paths and .. are not accepted"),
        ("/etc/passwd [input]", "absolute paths and .. are not accepted"),
        ("../outside.png [input]", "absolute paths and .. are not accepted"),
        ("here.png [output]", "other folders than INPUT_DIR"),
        ("here.png [temp]", "other folders than INPUT_DIR"),
        ("here.png[output]", "other folders than INPUT_DIR"),
        ("http://example.com/a.png", "http:// is not accepted"),
        ("HTTPS://user:secret@example.com/a.png", "HTTPS:// is not accepted"),
        ("s3://bucket/key", "s3:// is not accepted"),
        ("file:///etc/passwd", "file:// is not accepted"),
        ("iVBORw0KGgo\u2003", "no input file"),
    ],
)
def test_what_is_no_file_of_the_input_folder_is_refused_with_the_reason(inputs: Inputs, name: str, words: str) -> None:
    assert words in inputs.refusal(name)


def test_the_secret_in_a_refused_url_is_not_repeated(inputs: Inputs) -> None:
    assert "secret" not in inputs.refusal("https://user:secret@example.com/a.png")


def test_an_absolute_path_into_the_input_folder_is_refused_too(inputs: Inputs) -> None:
    value = str(inputs.store.input_dir / "here.png")
    with pytest.raises(InvalidInputs, match="1 inputs"):
        inputs.resolve(value)


# Content


@pytest.mark.parametrize(
    "text",
    [
        PNG64,
        PNG64.rstrip("="),
        base64.urlsafe_b64encode(PNG).decode(),
        base64.encodebytes(PNG).decode(),
        base64.encodebytes(PNG).decode().replace("\n", "\r\n"),
        f"\n {PNG64} \n",
        f"data:image/png;base64,{PNG64}",
        f"data:;base64,{PNG64}",
        f"data:image/jpeg;base64,{PNG64}",
        f"DATA:IMAGE/PNG;BASE64,{PNG64}",
        f"data:image/png;charset=utf-8;base64,{PNG64}",
        f"data:image/png;name=a%20b.png;x=y;base64,{PNG64}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode().rstrip('=')}",
        f"data:image/png;base64,{base64.encodebytes(PNG).decode()}",
        f"data:image/png;base64,{quote(PNG64, safe='')}",
        f"data:image/png,{quote(PNG)}",
        f"data:,{quote(PNG)}",
        f"data:image/png;charset=latin1,{quote(PNG)}",
    ],
)
def test_every_spelling_of_a_picture_becomes_the_same_file(inputs: Inputs, text: str) -> None:
    assert inputs.content(text) == ("001.png", PNG)


def test_the_ending_is_that_of_the_content_and_not_of_the_data_url(inputs: Inputs) -> None:
    sound = base64.b64encode(wav()).decode()
    assert inputs.content(f"data:image/png;base64,{sound}") == ("001.wav", wav())


def test_a_type_that_comfyd_does_not_look_into_is_left_to_comfyui(inputs: Inputs) -> None:
    assert inputs.content(base64.b64encode(BMP).decode()) == ("001.bmp", BMP)


def test_base64_of_a_jpeg_is_no_absolute_path(inputs: Inputs) -> None:
    text = base64.b64encode(JPEG_HEAD).decode()
    assert text.startswith("/9j/")
    assert inputs.refusal(text) == "it is damaged, or not the picture that it begins like"


def test_a_large_file_is_written_whole_from_its_pieces(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base64text, "_PIECE_CHARACTERS", 1000)
    sound = wav(100_000)
    assert inputs.content(base64.encodebytes(sound).decode()) == ("001.wav", sound)


def test_the_same_text_in_two_nodes_is_one_file(inputs: Inputs) -> None:
    other = base64.b64encode(png(2, 2)).decode()
    (first, second, third, fourth), folder = inputs.resolve(PNG64, "here.png", other, PNG64)
    assert first == fourth
    assert second is None
    assert third != first
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir()) == ["001.png", "002.png"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("data:", "is not a data: URL"),
        ("data:image/png;base64", "is not a data: URL"),
        ("data:x.png", "is not a data: URL"),
        ("data:,", "is empty"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,   ", "is empty"),
        ("data:text/plain,hello", "no picture, video or sound"),
        ("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>" * 20).decode(), "no picture, video or sound"),
        ("data:image/png;base64,é" + PNG64, "is not base64: character 0 "),
        ("data:image/png;base64," + PNG64[:-5] + "!" + PNG64[-4:], "is not base64"),
        ("data:image/png;base64," + quote(PNG64[:-4] + "é"), "is not base64"),
        (WAV64[:-5] + "!" + WAV64[-4:], "is not base64"),
        (WAV64[:-5] + "é" + WAV64[-4:], "is not base64"),
        (WAV64[:-3], "is not base64: it is cut off"),
        (WAV64 + "=\n" + WAV64, "is not base64"),
        (base64.b64encode(b"plain text that nobody can show as a picture, long").decode(), "no picture, video"),
        (base64.b64encode(PNG[:30]).decode(), "it is damaged"),
        (base64.b64encode(PNG[:8] + b"\0" * 60).decode(), "it is damaged"),
    ],
)
def test_damaged_content_is_refused_with_the_reason(inputs: Inputs, value: str, words: str) -> None:
    assert words in inputs.refusal(value)


def test_content_over_the_limit_is_refused_before_it_is_decoded(inputs: Inputs) -> None:
    inputs.limits = MediaConfig(max_input_bytes=1 << 20)
    fits = wav((1 << 20) - 100)
    assert inputs.content(base64.b64encode(fits).decode()) == ("001.wav", fits)
    inputs.store.root.joinpath("key", "001.wav").unlink()
    inputs.store.root.joinpath("key").rmdir()
    over = base64.b64encode(wav(1 << 20)).decode()
    words = "is larger than 1 MB (MAX_INPUT_SIZE_MB)"
    assert inputs.refusal(over) == words
    inputs.store.root.joinpath("key").rmdir()
    assert inputs.refusal(f"data:;base64,{over[:-4]}!!!!") == words, "not even looked at"
    inputs.store.root.joinpath("key").rmdir()
    assert inputs.refusal("data:," + quote(bytes((1 << 20) + 1))) == words


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(inputs: Inputs) -> None:
    bomb = png(100_000, 100_000)
    assert bomb.startswith(png_header(100_000, 100_000))
    assert len(bomb) < 100
    message = inputs.refusal(base64.b64encode(bomb).decode())
    assert message == "has 100000 x 100000 pixels, more than 268 million (MAX_INPUT_MEGAPIXELS)"


def test_the_limit_of_pixels_is_the_configured_one(inputs: Inputs) -> None:
    inputs.limits = MediaConfig(max_input_megapixels=1)
    assert inputs.content(base64.b64encode(png(1000, 1000)).decode())[0] == "001.png"
    inputs.store.root.joinpath("key", "001.png").unlink()
    inputs.store.root.joinpath("key").rmdir()
    assert "1000 x 1001 pixels" in inputs.refusal(base64.b64encode(png(1000, 1001)).decode())


def test_every_fault_is_told_at_once_and_what_was_written_is_named_for_removal(inputs: Inputs) -> None:
    with pytest.raises(InvalidInputs) as caught:
        inputs.resolve(PNG64, "absent.png", "here.png", "/etc/passwd")
    failure = caught.value.failure
    assert [fault.location for fault in failure.faults] == ["prompt.1.inputs.image", "prompt.3.inputs.image"]
    assert failure.detail == "2 inputs cannot be used"
    assert caught.value.folder == inputs.store.root / "key"


@pytest.mark.parametrize("value", ["data:" + ";a" * 1_000_000, "data:" + "a" * 2_000_000, "[" * 1_000_000 + "[input]"])
def test_a_hostile_text_is_refused_in_linear_time(inputs: Inputs, value: str) -> None:
    began = time.perf_counter()
    inputs.refusal(value)
    assert time.perf_counter() - began < 2


# Which inputs are looked at


def test_candidates_are_the_texts_in_media_inputs_that_comfyui_does_not_list() -> None:
    media = {
        "Load": {"image": MediaInput(kind=MediaKind.IMAGE, listed=frozenset({"a.png"})), "mask": ANY},
        "Other": {"file": ANY},
    }
    classes = NodeClasses(names=frozenset(media), saving=frozenset(), media=media)
    graph = {
        "1": {"class_type": "Load", "inputs": {"image": "a.png", "mask": "b.png", "text": "c.png"}},
        "2": {"class_type": "Load", "inputs": {"image": ["1", 0], "mask": 5}},
        "3": {"class_type": "Unknown", "inputs": {"image": "x.png"}},
        "4": {"class_type": "Other", "inputs": {"file": "d.png"}},
        "5": {"class_type": "Load", "inputs": {}},
    }
    found = list(candidates(graph, classes))
    assert [(one.location, one.value) for one in found] == [
        ("prompt.1.inputs.mask", "b.png"),
        ("prompt.4.inputs.file", "d.png"),
    ]
