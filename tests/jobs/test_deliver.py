"""Outputs on their way to what the caller asked for, with a store that follows a script."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import trio
import trio.testing
from jobs_kit import make_job
from media_kit import png

from comfyd.errors import FailureKind
from comfyd.jobs import Job
from comfyd.jobs.deliver import Deliverer, DeliveryFailed
from comfyd.media.collect import OutputFile
from comfyd.media.convert_options import ConvertOutput, parse_convert
from comfyd.media.files import InputStore
from comfyd.media.kept import KeptOutputs
from comfyd.storage import S3Store, S3Target, StorageFailed
from comfyd.storage.s3_errors import Trouble


@attrs.define(eq=False)
class ScriptedStore:
    """What a deliverer asks of an S3Store. *trouble* may raise for a key; *pace* is waited for before the end."""

    trouble: Callable[[str], None] = lambda _: None
    pace: Callable[[str], Any] | None = None
    uploads: list[tuple[str, str, str, bytes]] = attrs.field(factory=list)
    signed: list[tuple[str, str, int]] = attrs.field(factory=list)
    begun: list[str] = attrs.field(factory=list)
    cancelled: list[str] = attrs.field(factory=list)

    async def upload(self, path: Path, bucket: str, key: str, content_type: str) -> None:
        self.begun.append(key)
        data = await trio.Path(path).read_bytes()
        self.trouble(key)
        try:
            if self.pace is not None:
                await self.pace(key)
        except trio.Cancelled:
            self.cancelled.append(key)
            raise
        self.uploads.append((bucket, key, content_type, data))

    async def presign(self, bucket: str, key: str, expires_s: int) -> str:
        assert (bucket, key) in [upload[:2] for upload in self.uploads], "a URL is made of what is there only"
        self.signed.append((bucket, key, expires_s))
        return f"https://store.test/{key}?signature"


@attrs.frozen
class Bench:
    store: InputStore
    s3: ScriptedStore
    folder: Path

    @property
    def deliverer(self) -> Deliverer:
        return Deliverer(store=self.store, kept=KeptOutputs(root=self.folder / "kept"), s3=cast("S3Store", self.s3))

    def output(self, filename: str, data: bytes = b"data", *, node_id: str = "2", subfolder: str = "") -> OutputFile:
        path = self.folder / subfolder / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        media_type = "image/png" if filename.endswith(".png") else "text/plain"
        return OutputFile(path=path, filename=filename, node_id=node_id, media_type=media_type, size_bytes=len(data))

    def converted_files(self, job: Job) -> list[str]:
        return sorted(path.name for path in self.store.folder(job.key).rglob("*") if path.is_file())


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    store = InputStore.open(tmp_path / "input")
    yield Bench(store, ScriptedStore(), tmp_path / "output")
    store.close()


def job_for(s3: S3Target | None = None, conversion: ConvertOutput | None = None) -> Job:
    job = make_job()
    job.request = attrs.evolve(job.request, s3=s3, conversion=conversion)
    return job


TO_S3 = S3Target(bucket="bucket", prefix="a/")
TO_JPEG = parse_convert({"format": "jpeg"})


async def test_who_asks_for_nothing_gets_the_files_as_they_are(bench: Bench) -> None:
    outputs = (bench.output("a.png"), bench.output("a.png", subfolder="b"))
    job = job_for()
    assert await bench.deliverer.deliver(job, outputs) == outputs
    assert bench.converted_files(job) == []
    assert bench.s3.begun == []
    assert (job.clock.collect_s, job.clock.upload_s) == (0.0, 0.0)


async def test_no_outputs_are_nothing_to_do(bench: Bench) -> None:
    assert await bench.deliverer.deliver(job_for(TO_S3, TO_JPEG), ()) == ()
    assert bench.s3.begun == []


async def test_objects_are_named_by_prefix_and_file_and_carry_the_type(bench: Bench) -> None:
    outputs = (bench.output("a.png", b"one"), bench.output("b.txt", b"two"))
    delivered = await bench.deliverer.deliver(job_for(TO_S3), outputs)
    assert sorted(bench.s3.uploads) == [
        ("bucket", "a/a.png", "image/png", b"one"),
        ("bucket", "a/b.txt", "text/plain", b"two"),
    ]
    assert [(each.filename, each.object_url, each.url) for each in delivered] == [
        ("a.png", "s3://bucket/a/a.png", "s3://bucket/a/a.png"),
        ("b.txt", "s3://bucket/a/b.txt", "s3://bucket/a/b.txt"),
    ]
    assert [each.path for each in delivered] == [each.path for each in outputs]


async def test_the_order_is_that_of_the_outputs_and_not_of_the_uploads(bench: Bench) -> None:
    done = [trio.Event() for _ in range(10)]

    async def after_the_next(key: str) -> None:
        place = int(key.removeprefix("a/").removesuffix(".txt"))
        if place < 9:
            await done[place + 1].wait()
        done[place].set()

    bench.s3.pace = after_the_next
    outputs = tuple(bench.output(f"{number}.txt") for number in range(10))
    with trio.fail_after(10):
        delivered = await bench.deliverer.deliver(job_for(TO_S3), outputs)
    assert [each.url for each in delivered] == [f"s3://bucket/a/{number}.txt" for number in range(10)]
    assert [key for _, key, _, _ in bench.s3.uploads] == [f"a/{number}.txt" for number in reversed(range(10))]


async def test_names_that_occur_again_are_told_apart_and_none_is_taken_twice(bench: Bench) -> None:
    names = ["x.png", "x.png", "x-2.png", "x.png", "y", "y", "z.tar.gz", "z.tar.gz"]
    outputs = tuple(bench.output(name, str(at).encode(), subfolder=str(at)) for at, name in enumerate(names))
    delivered = await bench.deliverer.deliver(job_for(TO_S3), outputs)
    assert [each.filename for each in delivered] == [
        *("x.png", "x-3.png", "x-2.png", "x-4.png"),
        *("y", "y-2", "z.tar.gz", "z.tar-2.gz"),
    ]
    stored = {key: data for _, key, _, data in bench.s3.uploads}
    assert [stored[f"a/{each.filename}"] for each in delivered] == [str(at).encode() for at in range(len(names))]


async def test_a_presigned_url_is_made_after_the_upload_and_of_the_same_object(bench: Bench) -> None:
    target = attrs.evolve(TO_S3, presign_s=60)
    (delivered,) = await bench.deliverer.deliver(job_for(target), (bench.output("a.png"),))
    assert bench.s3.signed == [("bucket", "a/a.png", 60)]
    assert (delivered.object_url, delivered.url) == ("s3://bucket/a/a.png", "https://store.test/a/a.png?signature")


async def test_one_upload_that_fails_ends_the_others_and_tells_no_url(bench: Bench) -> None:
    hanging: list[str] = []
    both_hang = trio.Event()

    async def one_fails_while_two_hang(key: str) -> None:
        if key == "a/1.txt":
            await both_hang.wait()
            raise StorageFailed("bucket", key, Trouble.ACCESS_DENIED, "access denied")
        hanging.append(key)
        if len(hanging) == 2:
            both_hang.set()
        await trio.sleep_forever()

    bench.s3.pace = one_fails_while_two_hang
    outputs = tuple(bench.output(f"{number}.txt", node_id=str(number)) for number in range(3))
    with trio.fail_after(10), pytest.raises(DeliveryFailed) as raised:
        await bench.deliverer.deliver(job_for(TO_S3), outputs)
    failure = raised.value.failure
    assert failure.kind is FailureKind.STORAGE_FAILED
    assert failure.detail == "s3://bucket/a/1.txt: access denied"
    assert [fault.location for fault in failure.faults] == ["prompt.1"]
    assert failure.facts == {"node_id": "1"}
    assert bench.s3.uploads == []
    assert sorted(bench.s3.cancelled) == ["a/0.txt", "a/2.txt"]


async def test_several_uploads_that_fail_are_one_failure(bench: Bench) -> None:
    def trouble(key: str) -> None:
        raise StorageFailed("bucket", key, Trouble.NO_SUCH_BUCKET, "there is no such bucket")

    bench.s3.trouble = trouble
    with pytest.raises(DeliveryFailed, match="there is no such bucket"):
        await bench.deliverer.deliver(job_for(TO_S3), tuple(bench.output(f"{n}.txt") for n in range(5)))


async def test_a_file_that_is_gone_is_a_failure_without_its_path(bench: Bench) -> None:
    output = bench.output("a.png", png(4, 4))
    output.path.unlink()
    for job in (job_for(TO_S3), job_for(conversion=TO_JPEG)):
        with pytest.raises(DeliveryFailed) as raised:
            await bench.deliverer.deliver(job, (output,))
        assert raised.value.failure.kind is FailureKind.INTERNAL
        assert "a.png" in raised.value.failure.detail
        assert str(bench.folder) not in raised.value.failure.detail


async def test_converted_files_lie_in_the_jobs_folder_and_the_others_stay(bench: Bench) -> None:
    outputs = (bench.output("a.png", png(4, 4)), bench.output("b.txt"), bench.output("a.png", png(4, 4), subfolder="c"))
    job = job_for(conversion=TO_JPEG)
    first, second, third = await bench.deliverer.deliver(job, outputs)
    assert [each.filename for each in (first, second, third)] == ["a.jpeg", "b.txt", "a-2.jpeg"]
    assert [each.converted for each in (first, second, third)] == [True, False, True]
    assert second == attrs.evolve(outputs[1], converted=False)
    assert first.path.parent == third.path.parent == bench.store.folder(job.key) / "converted"
    assert (first.media_type, first.size_bytes) == ("image/jpeg", first.path.stat().st_size)
    assert bench.converted_files(job) == sorted([first.path.name, third.path.name])
    assert outputs[0].path.exists(), "the cleaning task removes what the node wrote"
    assert job.clock.collect_s > 0


async def test_what_was_converted_is_what_is_uploaded(bench: Bench) -> None:
    await bench.deliverer.deliver(job_for(TO_S3, TO_JPEG), (bench.output("a.png", png(4, 4)),))
    ((_, key, content_type, data),) = bench.s3.uploads
    assert (key, content_type, data[:3]) == ("a/a.jpeg", "image/jpeg", b"\xff\xd8\xff")


async def test_a_picture_that_cannot_be_converted_names_itself_and_uploads_nothing(bench: Bench) -> None:
    outputs = (bench.output("good.png", png(4, 4)), bench.output("bad.png", png(64, 64)[:-30], node_id="7"))
    job = job_for(TO_S3, TO_JPEG)
    with pytest.raises(DeliveryFailed) as raised:
        await bench.deliverer.deliver(job, outputs)
    assert raised.value.failure.kind is FailureKind.EXECUTION_FAILED
    assert raised.value.failure.detail.startswith("the output bad.png cannot be converted: ")
    assert raised.value.failure.facts == {"node_id": "7"}
    assert bench.s3.begun == []


async def test_a_cancel_during_an_upload_is_passed_on(bench: Bench) -> None:
    async def hang(key: str) -> None:
        await trio.sleep_forever()

    bench.s3.pace = hang
    with trio.move_on_after(0.2) as limit:
        await bench.deliverer.deliver(job_for(TO_S3), (bench.output("a.png"), bench.output("b.png")))
    assert limit.cancelled_caught
    assert sorted(bench.s3.cancelled) == ["a/a.png", "a/b.png"]
