"""From candidates to values for the engine: every kind at once, every fault told, and what is on disk afterwards."""

import base64
import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import trio
from fetch_servers import Answer, BadServer, bad_server, silent, whole
from media_kit import png, wav

from comfyd.config import MediaConfig
from comfyd.engine import MediaInput, MediaKind
from comfyd.media.fetch import open_fetcher
from comfyd.media.files import InputStore, remove_folder
from comfyd.media.inputs import Candidate, InvalidInputs
from comfyd.media.resolve import Resolver
from comfyd.net import parse_policy
from comfyd.storage import S3Store, StorageFailed
from comfyd.storage.s3_errors import Trouble

PNG = png(8, 8)
OTHER = png(9, 9)
TEXT = base64.b64encode(OTHER).decode()
IMAGE = MediaInput(kind=MediaKind.IMAGE)
FOLDER = MediaInput(kind=MediaKind.IMAGE, is_folder=True)
PATH = MediaInput(kind=MediaKind.IMAGE, wants_path=True)
KEY = "the-job"


@attrs.define(eq=False)
class ScriptedS3:
    """What a resolver asks of an S3Store: objects by key, or an async function in the place of one."""

    objects: dict[str, bytes | Callable[[], Any]]
    asked: list[tuple[str, str, int]] = attrs.field(factory=list)

    async def download(self, bucket: str, key: str, path: Path, *, max_bytes: int) -> int:
        self.asked.append((bucket, key, max_bytes))
        found = self.objects.get(key)
        if found is None:
            raise StorageFailed(bucket, key, Trouble.NO_SUCH_OBJECT, "there is no such object")
        if not isinstance(found, bytes):
            await found()
            pytest.fail("it was to end otherwise")
        return await trio.Path(path).write_bytes(found)


@attrs.define(eq=False)
class Bench:
    resolver: Resolver
    server: BadServer
    s3: ScriptedS3
    input_dir: Path

    async def values(self, *found: Candidate) -> dict[str, str]:
        """Resolve, and return the values by node."""
        resolved = await self.resolver.resolve(found, KEY)
        return {node_id: value for (node_id, _), value in resolved.values.items()}

    async def faults(self, *found: Candidate) -> dict[str, str]:
        with pytest.raises(InvalidInputs) as raised:
            await self.resolver.resolve(found, KEY)
        failure = raised.value.failure
        return {fault.location: fault.message for fault in failure.faults}

    def read(self, value: str) -> bytes:
        return (self.input_dir / value).read_bytes()


@asynccontextmanager
async def bench(
    tmp_path: Path, answers: dict[str, Answer] | None = None, objects: dict[str, Any] | None = None, **limits: Any
) -> AsyncIterator[Bench]:
    store = InputStore.open(tmp_path / "input")
    s3 = ScriptedS3(objects or {})
    config = MediaConfig(**limits)
    with closing(store), trio.fail_after(20):
        async with (
            bad_server(answers or {}) as server,
            open_fetcher(config, parse_policy("guarded", server.allow), store.root / "spool") as fetcher,
        ):
            resolver = Resolver(store=store, fetcher=fetcher, s3=cast("S3Store", s3), limits=config)
            yield Bench(resolver, server, s3, tmp_path / "input")


def one(node_id: str, value: str, media: MediaInput = IMAGE) -> Candidate:
    return Candidate(node_id=node_id, input_name="image", value=value, media=media)


def several(node_id: str, *values: Any, media: MediaInput = FOLDER) -> Candidate:
    return Candidate(node_id=node_id, input_name="directory", value=values, media=media)


async def test_each_kind_of_value_becomes_the_name_of_a_file_or_stays_one(tmp_path: Path) -> None:
    async with bench(tmp_path, {"/a": whole(PNG)}, {"b": wav()}) as b:
        (b.input_dir / "mine.png").write_bytes(b"mine")
        values = await b.values(
            one("url", b.server.url("/a")), one("s3", "s3://bucket/b"), one("text", TEXT), one("name", "mine.png")
        )
        assert [b.read(values[node_id]) for node_id in ("url", "s3", "text")] == [PNG, wav(), OTHER]
        assert [Path(values[node_id]).suffix for node_id in ("url", "s3", "text")] == [".png", ".wav", ".png"]
        assert "name" not in values
        assert {Path(value).parent for value in values.values()} == {
            b.resolver.store.folder(KEY).relative_to(b.input_dir)
        }
        assert b.s3.asked == [("bucket", "b", MediaConfig().max_input_bytes)]


async def test_the_same_value_in_several_nodes_is_one_file_and_one_question(tmp_path: Path) -> None:
    async with bench(tmp_path, {"/a": whole(PNG)}, {"b": PNG}) as b:
        found = [
            one(f"{kind}-{n}", value)
            for n in range(5)
            for kind, value in (("url", b.server.url("/a")), ("s3", "s3://x1y/b"), ("text", TEXT))
        ]
        values = await b.values(*found)
        assert len(values) == 15
        assert len(set(values.values())) == 3
        assert len(b.server.requests) == len(b.s3.asked) == 1


async def test_names_alone_need_no_folder(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        (b.input_dir / "mine.png").write_bytes(b"mine")
        assert await b.values(one("1", "mine.png")) == {}
        assert not b.resolver.store.folder(KEY).exists()


async def test_a_list_becomes_a_folder_whose_names_sort_as_the_list(tmp_path: Path) -> None:
    async with bench(tmp_path, {"/a": whole(PNG)}, {"b": png(3, 3)}) as b:
        (b.input_dir / "mine.jpg").write_bytes(b"mine")
        members = [TEXT, b.server.url("/a"), "mine.jpg", "s3://bucket/b", TEXT, *[b.server.url("/a")] * 6]
        values = await b.values(several("1", *members))
        folder = b.input_dir / values["1"]
        names = sorted(os.listdir(folder))
        assert [Path(name).suffix for name in names][:5] == [".png", ".png", ".jpg", ".png", ".png"]
        contents = [(folder / name).read_bytes() for name in names]
        assert contents == [OTHER, PNG, b"mine", png(3, 3), OTHER, *[PNG] * 6]
        assert len(b.server.requests) == 1
        assert (b.input_dir / "mine.jpg").read_bytes() == b"mine"


async def test_a_named_file_is_copied_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    async with bench(tmp_path, {"/a": whole(PNG)}) as b:
        (b.input_dir / "mine.png").write_bytes(b"mine")
        monkeypatch.setattr(os, "link", no_links)
        values = await b.values(several("1", "mine.png", b.server.url("/a")))
        folder = b.input_dir / values["1"]
        assert [(folder / name).read_bytes() for name in sorted(os.listdir(folder))] == [b"mine", PNG]


async def test_faults_come_in_the_order_of_the_request_those_of_members_by_their_index(tmp_path: Path) -> None:
    async with bench(tmp_path, {"/gone": whole(b"", "410 Gone"), "/a": whole(PNG)}) as b:
        gone = b.server.url("/gone")
        found = (
            one("z", "missing.png"),
            several("list", *[TEXT, "missing.png"] * 6, gone, 5, b.server.url("/a"), "s3://bucket/missing"),
            one("good", TEXT),
            several("empty"),
            one("a", gone),
            several("other", None),
        )
        faults = await b.faults(*found)
    assert list(faults) == [
        "prompt.z.inputs.image",
        *(f"prompt.list.inputs.directory.{place}" for place in (1, 3, 5, 7, 9, 11, 12, 13, 15)),
        "prompt.empty.inputs.directory",
        "prompt.a.inputs.image",
        "prompt.other.inputs.directory.0",
    ]
    assert "410 Gone" in faults["prompt.a.inputs.image"]
    assert faults["prompt.a.inputs.image"] == faults["prompt.list.inputs.directory.12"]
    assert "must be a text" in faults["prompt.other.inputs.directory.0"]
    assert "must have 1 to" in faults["prompt.empty.inputs.directory"]
    assert faults["prompt.list.inputs.directory.15"].endswith("there is no such object")


async def test_a_list_has_a_longest_length(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        faults = await b.faults(several("1", *["x"] * 10_001))
        assert list(faults) == ["prompt.1.inputs.directory"]
        assert "got 10001" in faults["prompt.1.inputs.directory"]


async def test_a_path_is_absolute_for_the_engine_and_a_name_for_the_caller(tmp_path: Path) -> None:
    async with bench(tmp_path, {"/a": whole(PNG)}) as b:
        (b.input_dir / "mine.png").write_bytes(b"mine")
        (b.input_dir / "mine").mkdir()
        by_path = attrs.evolve(PATH, is_folder=True)
        found = (
            one("url", b.server.url("/a"), PATH),
            one("name", "mine.png", PATH),
            several("list", TEXT, media=by_path),
            one("folder", "mine", by_path),
            one("plain", TEXT),
        )
        resolved = await b.resolver.resolve(found, KEY)
        values = {node_id: value for (node_id, _), value in resolved.values.items()}
        shown = {node_id: value for (node_id, _), value in resolved.shown.items()}
        assert values["name"] == str(b.input_dir / "mine.png")
        assert shown["name"] == "mine.png"
        assert values["folder"] == str(b.input_dir / "mine")
        assert set(shown) == {"url", "name", "list", "folder"}
        assert all(values[node_id] == str(b.input_dir / shown[node_id]) for node_id in shown)
        assert b.read(values["url"]) == PNG
        assert os.listdir(values["list"]) == ["00000.png"]
        assert not values["plain"].startswith("/")


async def test_an_annotated_name_is_the_file_that_it_names(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        (b.input_dir / "mine.png").write_bytes(b"mine")
        found = (one("path", "mine.png [input]", PATH), several("list", "mine.png [input]"))
        values = await b.values(*found)
        assert values["path"] == str(b.input_dir / "mine.png")
        assert [b.read(f"{values['list']}/{name}") for name in os.listdir(b.input_dir / values["list"])] == [b"mine"]


async def test_an_object_that_does_not_come_is_given_up(tmp_path: Path) -> None:
    async with bench(tmp_path, {"/": silent()}, {"b": trio.sleep_forever}, input_timeout_s=0.2) as b:
        faults = await b.faults(one("1", "s3://bucket/b"), one("2", b.server.url("/")))
    assert faults["prompt.1.inputs.image"] == "s3://bucket/b did not arrive within 0.2 s (INPUT_TIMEOUT_S)"
    assert "0.2 s (INPUT_TIMEOUT_S)" in faults["prompt.2.inputs.image"]


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "is empty"),
        (b"<html>", "is no picture, video or sound that we know"),
        (PNG[:20], "damaged"),
        (png(2000, 2000), "has 2000 x 2000 pixels, more than 1 million (MAX_INPUT_MEGAPIXELS)"),
    ],
)
async def test_an_object_is_looked_at_like_any_other_input(tmp_path: Path, data: bytes, cause: str) -> None:
    async with bench(tmp_path, objects={"b": data}, max_input_megapixels=1) as b:
        (message,) = (await b.faults(one("1", "s3://bucket/b"))).values()
        assert message.startswith("s3://bucket/b ")
        assert cause in message


async def test_a_url_of_s3_that_makes_no_sense_is_told(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        faults = await b.faults(one("1", "s3://"), one("2", "s3://bucket"), one("3", "s3://a/key"))
        assert ["bucket" in message or "object" in message for message in faults.values()] == [True] * 3
        assert b.s3.asked == []


async def test_a_disk_that_fails_is_no_fault_of_the_caller(tmp_path: Path) -> None:
    async def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with bench(tmp_path, objects={"b": full}) as b:
        for found in (one("1", "s3://bucket/b"), several("1", "s3://bucket/b")):
            with pytest.raises(OSError, match="No space left"):
                await b.resolver.resolve((found, one("2", "missing.png")), KEY)
            remove_folder(b.resolver.store.folder(KEY))  # as the cleaning task does at the end of the job


async def test_a_cancel_stops_what_is_under_way(tmp_path: Path) -> None:
    async with bench(tmp_path, {"/": silent()}, {"b": trio.sleep_forever}) as b:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(b.resolver.resolve, (one("1", b.server.url("/")), several("2", "s3://xyz/b")), KEY)
                await b.server.asked.wait()
                while not b.s3.asked:  # noqa: ASYNC110  # a list of calls tells nobody
                    await trio.sleep(0.001)
                scope.cancel("the job was cancelled")
        assert scope.cancelled_caught
        await b.server.all_closed.wait()
