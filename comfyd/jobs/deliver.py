"""From files that the graph made to what the caller asked for: converted, and put into storage.

All outputs of a job at once, bounded by the converter's and the store's own limits; the first failure stops the rest. A
URL is told only of an object that the store has confirmed.
"""

import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path, PurePosixPath

import attrs
import structlog
import trio

from comfyd.errors import Failure, FailureKind, Fault
from comfyd.jobs.model import Job
from comfyd.media.collect import OutputFile
from comfyd.media.convert import ConversionFailed, Converted, Converter, Unchanged, delivery_names
from comfyd.media.convert_options import ConvertOutput
from comfyd.media.files import InputStore
from comfyd.media.kept import KeptOutputs
from comfyd.storage import S3Store, S3Target, StorageFailed

log = structlog.get_logger("comfyd.jobs")


class DeliveryFailed(Exception):
    """The outputs could not be made what the caller asked for."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


@attrs.define(eq=False)
class Deliverer:
    """Converts and uploads a job's outputs."""

    store: InputStore
    kept: KeptOutputs
    s3: S3Store
    on_uploaded: Callable[[int | None], None] | None = None
    """Hears the size in bytes of each output that was stored, None of one that was not."""
    converter: Converter = attrs.field(factory=Converter)

    async def deliver(self, job: Job, outputs: tuple[OutputFile, ...]) -> tuple[OutputFile, ...]:
        """Do with *outputs* what the job's request asks for; new files lie in the job's own folder, or in the kept one.

        Raises:
            DeliveryFailed: a picture cannot be converted, or an object was not stored.
        """
        conversion = job.request.conversion
        if conversion is not None and outputs:
            began = time.perf_counter()
            outputs = await self._convert(job, outputs, conversion)
            job.clock.collect_s += time.perf_counter() - began
        target = job.request.s3
        if target is not None and outputs:
            began = time.perf_counter()
            outputs = await self._upload(outputs, target)
            job.clock.upload_s += time.perf_counter() - began
        return outputs

    async def _convert(
        self, job: Job, outputs: tuple[OutputFile, ...], conversion: ConvertOutput
    ) -> tuple[OutputFile, ...]:
        home = self.kept if job.request.keeps_outputs else self.store
        folder = home.folder(job.key) / "converted"
        await trio.to_thread.run_sync(_make_anew, folder)
        results: dict[int, Converted | Unchanged] = {}

        async def convert(place: int) -> None:
            output = outputs[place]
            try:
                results[place] = await self.converter.convert(output.path, folder / f"{place:05d}", conversion)
            except ConversionFailed as exc:
                detail = f"the output {output.filename} cannot be converted: {exc.reason}"
                raise DeliveryFailed(_failure(FailureKind.EXECUTION_FAILED, detail, output)) from exc
            except OSError as exc:
                detail = f"the output {output.filename} cannot be converted: {exc.strerror}"
                raise DeliveryFailed(_failure(FailureKind.INTERNAL, detail, output)) from exc

        await _each(len(outputs), convert)
        were = [isinstance(results[place], Converted) for place in range(len(outputs))]
        names = delivery_names([output.filename for output in outputs], were, conversion.format)
        return tuple(_converted(output, results[place], names[place]) for place, output in enumerate(outputs))

    def _tell_uploaded(self, size_bytes: int | None) -> None:
        if self.on_uploaded is not None:
            self.on_uploaded(size_bytes)

    async def _upload(self, outputs: tuple[OutputFile, ...], target: S3Target) -> tuple[OutputFile, ...]:
        outputs = _named_apart(outputs)
        urls: dict[int, str] = {}

        async def upload(place: int) -> None:
            output = outputs[place]
            there = target.place(output.filename)
            try:
                await self.s3.upload(output.path, there.bucket, there.key, output.media_type)
                self._tell_uploaded(output.size_bytes)
                urls[place] = there.url
                if target.presign_s is not None:
                    urls[place] = await self.s3.presign(there.bucket, there.key, target.presign_s)
            except StorageFailed as exc:
                self._tell_uploaded(None)
                log.warning("job.upload_failed", file=output.filename, reason=str(exc))
                raise DeliveryFailed(_failure(FailureKind.STORAGE_FAILED, str(exc), output)) from exc
            except OSError as exc:
                detail = f"the output {output.filename} cannot be read: {exc.strerror}"
                raise DeliveryFailed(_failure(FailureKind.INTERNAL, detail, output)) from exc

        await _each(len(outputs), upload)
        return tuple(
            attrs.evolve(output, object_url=target.place(output.filename).url, url=urls[place])
            for place, output in enumerate(outputs)
        )


def _make_anew(folder: Path) -> None:
    """Make *folder*, without what a daemon has left in it that was killed at the same work: targets have to be new."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _converted(output: OutputFile, result: Converted | Unchanged, name: str) -> OutputFile:
    if isinstance(result, Unchanged):
        return attrs.evolve(output, converted=False)
    return attrs.evolve(
        output,
        path=Path(result.path),
        filename=name,
        media_type=result.media_type,
        size_bytes=result.size_bytes,
        converted=True,
    )


def _named_apart(outputs: tuple[OutputFile, ...]) -> tuple[OutputFile, ...]:
    """Number names that occur again: in OUTPUT_DIR their folders tell files apart, in a bucket only the name does.

    ``a/x.png`` and ``b/x.png`` become ``x.png`` and ``x-2.png``, as :func:`delivery_names` does it.
    """
    taken = {output.filename for output in outputs}
    seen: set[str] = set()
    named: list[OutputFile] = []
    for output in outputs:
        name, number = output.filename, 1
        while name in seen or (number > 1 and name in taken):
            number += 1
            path = PurePosixPath(output.filename)
            name = f"{path.stem}-{number}{path.suffix}"
        seen.add(name)
        named.append(attrs.evolve(output, filename=name))
    return tuple(named)


def _failure(kind: FailureKind, detail: str, output: OutputFile) -> Failure:
    faults = (Fault(location=f"prompt.{output.node_id}", message=detail),)
    return Failure(kind=kind, detail=detail, faults=faults, facts={"node_id": output.node_id})


async def _each(count: int, work: Callable[[int], Awaitable[None]]) -> None:
    """Do *work* for 0 to *count* - 1 at once; the first failure cancels the others and is raised alone."""
    failed: list[DeliveryFailed] = []

    async def guarded(place: int) -> None:
        try:
            await work(place)
        except DeliveryFailed as exc:
            failed.append(exc)
            nursery.cancel_scope.cancel("another output has failed")

    async with trio.open_nursery() as nursery:
        for place in range(count):
            nursery.start_soon(guarded, place)
    if failed:
        raise failed[0]
