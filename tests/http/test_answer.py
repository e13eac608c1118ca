"""The 200 of ``/prompt``: its bytes, its length, and what happens if a file is not what it was."""

import base64
import json
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
from hypercorn.typing import ASGISendCallable, ASGISendEvent
from jobs_kit import TIMES

from comfyd.http import answer
from comfyd.http.answer import FileChanged, send_success
from comfyd.jobs import Success
from comfyd.jobs.model import Clock
from comfyd.media.collect import OutputFile

GRAPH = {"1": {"class_type": "A", "inputs": {"seed": 2**64 - 1, "text": '名前 "quoted" \\ \n'}}}


@attrs.define(eq=False)
class Sent:
    """An ASGI send that keeps everything, and holds to the protocol: a start, then bodies, nothing after the last."""

    events: list[Any] = attrs.field(factory=list)

    async def __call__(self, event: ASGISendEvent) -> None:
        if self.events:
            assert event["type"] == "http.response.body"
            assert not self.ended, "something after the end"
        else:
            assert event["type"] == "http.response.start"
        self.events.append(event)

    @property
    def ended(self) -> bool:
        return len(self.events) > 1 and not self.events[-1]["more_body"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.events[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(event["body"] for event in self.events[1:])

    @property
    def stated_length(self) -> int:
        return int(self.headers[b"content-length"])


@pytest.fixture(params=["whole", "piece by piece"])
def path_of_answer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of answering, the second with pieces so small that every file has several."""
    if request.param != "whole":
        monkeypatch.setattr(answer, "_WHOLE_BYTES", -1)
        monkeypatch.setattr(answer, "_PIECE_BYTES", 6)
    return str(request.param)


def output(folder: Path, name: str, data: bytes) -> OutputFile:
    (folder / name).write_bytes(data)
    return OutputFile(path=folder / name, filename=name, node_id="9", media_type="image/png", size_bytes=len(data))


def success(*outputs: OutputFile) -> Success:
    return Success(graph=GRAPH, outputs=outputs, stats=Clock().stats(attempts=1, times=TIMES))


async def sent(result: Success) -> Sent:
    capture = Sent()
    await send_success(cast("ASGISendCallable", capture), 'job "1"', result)
    return capture


@pytest.mark.parametrize(
    "files",
    [
        [],
        [b""],
        [b"a"],
        [b"ab"],
        [b"abc"],
        [b"abcdef"],
        [bytes(range(256))],
        [b"first", b"", b"the third file"],
        [b"x" * 5, b"y" * 6, b"z" * 7],
    ],
)
async def test_the_answer_is_json_of_exactly_the_stated_length(
    path_of_answer: str, tmp_path: Path, files: list[bytes]
) -> None:
    outputs = [output(tmp_path, f"名{number}.png", data) for number, data in enumerate(files)]
    capture = await sent(success(*outputs))
    assert capture.events[0]["status"] == 200
    assert capture.headers[b"content-type"].startswith(b"application/json")
    assert capture.ended
    assert len(capture.body) == capture.stated_length
    document = json.loads(capture.body)
    assert list(document) == ["id", "prompt", "images", "filenames", "outputs", "stats"]
    assert document["id"] == 'job "1"'
    assert document["prompt"] == GRAPH
    assert [base64.b64decode(image, validate=True) for image in document["images"]] == files
    assert document["filenames"] == [one.filename for one in outputs]
    assert document["outputs"] == [
        {"filename": one.filename, "node_id": "9", "media_type": "image/png", "size_bytes": one.size_bytes}
        for one in outputs
    ]
    assert document["stats"]["attempts"] == 1
    assert str(tmp_path).encode() not in capture.body


async def test_small_answers_are_one_write_and_large_ones_are_never_in_memory_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "_WHOLE_BYTES", 100)
    monkeypatch.setattr(answer, "_PIECE_BYTES", 30)
    small = await sent(success(output(tmp_path, "a", bytes(40)), output(tmp_path, "b", bytes(60))))
    assert len(small.events) == 2
    large = await sent(success(output(tmp_path, "a", bytes(40)), output(tmp_path, "b", bytes(61))))
    assert len(large.events) > 6
    longest = max(len(event["body"]) for event in large.events[2:-1])
    assert longest == 40, "a piece of 30 bytes as base64"


async def test_the_real_sizes_join_to_the_base64_of_the_whole(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192  # 2 MiB: beyond one write, and not a multiple of a piece
    capture = await sent(success(output(tmp_path, "a.bin", data)))
    assert len(capture.events) > 4
    assert len(capture.body) == capture.stated_length
    (image,) = json.loads(capture.body)["images"]
    assert base64.b64decode(image, validate=True) == data


@pytest.mark.parametrize("change", ["shrunk", "emptied", "vanished", "a folder"])
async def test_a_file_that_is_not_what_it_was_never_makes_a_whole_answer(
    path_of_answer: str, tmp_path: Path, change: str
) -> None:
    outputs = [output(tmp_path, "a.png", b"0123456789"), output(tmp_path, "b.png", b"0123456789")]
    path = outputs[1].path
    if change in ("shrunk", "emptied"):
        path.write_bytes(b"0123456" if change == "shrunk" else b"")
    else:
        path.unlink()
        if change == "a folder":
            path.mkdir()
    capture = Sent()
    with pytest.raises(FileChanged, match=r"^b\.png$"):
        await send_success(cast("ASGISendCallable", capture), "job", success(*outputs))
    if path_of_answer == "whole":
        assert capture.events == [], "there is still time for a 500"
    else:
        assert not capture.ended
        assert len(capture.body) < capture.stated_length


async def test_a_file_that_grew_is_no_whole_answer_or_cut_at_its_stated_size(
    path_of_answer: str, tmp_path: Path
) -> None:
    one = output(tmp_path, "a.png", b"0123456789")
    one.path.write_bytes(b"0123456789 and more")
    if path_of_answer == "whole":
        with pytest.raises(FileChanged):
            await sent(success(one))
    else:
        capture = await sent(success(one))
        assert len(capture.body) == capture.stated_length
        assert base64.b64decode(json.loads(capture.body)["images"][0]) == b"0123456789"
