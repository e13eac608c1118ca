"""Gives each media input of a job the value by which ComfyUI finds it: all of them at once, before an engine is taken.

What has to be fetched is fetched while the rest is decoded; one download for each distinct URL. Every fault is
collected, so that a caller mends all of them at once.
"""

import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import trio

from comfyd.config import MediaConfig
from comfyd.errors import Fault
from comfyd.media.fetch import Fetcher, InputNotFetched
from comfyd.media.files import InputStore, confined
from comfyd.media.inputs import (
    Candidate,
    InputRefused,
    InvalidInputs,
    check_name,
    check_picture,
    is_content,
    is_remote,
    plain_name,
    resolve_inputs,
    write_content,
)
from comfyd.media.sniff import HEAD_BYTES, sniff
from comfyd.storage import BadS3Url, S3Store, StorageFailed, parse_s3_url

_DECODING_THREADS: Final = 4
"""Decoding is bound by the processor and the disk; more at once would only take memory."""
_MAX_LIST: Final = 10_000
"""Files of one folder: a film of five minutes, picture by picture."""

Place = tuple[str, str]
"""Node id and input name."""


@attrs.frozen(kw_only=True)
class Resolved:
    """*values* are for the engine; *shown* are for the caller, where the engine's are paths of this server."""

    values: dict[Place, str]
    shown: dict[Place, str]


@attrs.define(eq=False)
class Resolver:
    """Resolves inputs of any kind."""

    store: InputStore
    fetcher: Fetcher
    s3: S3Store
    limits: MediaConfig
    on_fetched: Callable[[str, int | None], None] | None = None
    """Hears the URL and the size in bytes of each object that was fetched from S3, None of one that was not."""
    _limiter: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(_DECODING_THREADS))

    async def resolve(self, found: tuple[Candidate, ...], folder_key: str) -> Resolved:
        """Resolve all of *found*. What is written lies in the job's folder, which the caller removes.

        Raises:
            InvalidInputs: some cannot be used.
            OSError: the disk is full or gone.
        """
        work = _Work(faults=[], values={}, disk_error=None)
        local = tuple(c for c in found if isinstance(c.value, str) and not is_remote(c.value))
        remote: dict[str, list[Candidate]] = {}
        for candidate in found:
            if isinstance(candidate.value, str) and is_remote(candidate.value):
                remote.setdefault(candidate.value, []).append(candidate)
        folder = self.store.folder(folder_key)
        if len(local) < len(found):
            await trio.to_thread.run_sync(self.store.new_folder, folder_key, limiter=self._limiter)
        async with trio.open_nursery() as nursery:
            if local:
                nursery.start_soon(self._resolve_local, local, folder_key, work)
            for number, (url, users) in enumerate(remote.items(), start=1):
                nursery.start_soon(self._resolve_remote, url, users, folder, f"url-{number:03d}", work)
            for number, candidate in enumerate(found, start=1):
                if not isinstance(candidate.value, str):
                    nursery.start_soon(self._resolve_list, candidate, folder / f"list-{number:03d}", work)
        if work.disk_error is not None:
            raise work.disk_error
        if work.faults:
            order = {location: place for place, location in enumerate(_locations(found))}
            faults = sorted(work.faults, key=lambda fault: order.get(fault.location, len(order)))
            raise InvalidInputs(tuple(faults), folder)
        return self._told(found, work.values)

    def _told(self, found: tuple[Candidate, ...], values: dict[Place, str]) -> Resolved:
        shown: dict[Place, str] = {}
        for candidate in found:
            place = (candidate.node_id, candidate.input_name)
            if candidate.media.wants_path:
                shown[place] = values.get(place) or plain_name(str(candidate.value))
                values[place] = os.fspath(self.store.input_dir.absolute() / shown[place])
        return Resolved(values=values, shown=shown)

    async def _resolve_local(self, found: tuple[Candidate, ...], folder_key: str, work: "_Work") -> None:
        try:
            values, _ = await trio.to_thread.run_sync(
                resolve_inputs, found, self.store, folder_key, self.limits, limiter=self._limiter
            )
            work.values.update(values)
        except InvalidInputs as exc:
            work.faults.extend(exc.failure.faults)
        except OSError as exc:
            work.disk_error = exc

    async def _resolve_remote(self, url: str, users: list[Candidate], folder: Path, stem: str, work: "_Work") -> None:
        async def fetch() -> None:
            path = await self._fetch(url, folder, stem)
            for user in users:
                work.values[user.node_id, user.input_name] = self.store.name_for_comfyui(path)

        await work.attempt([user.location for user in users], fetch)

    async def _resolve_list(self, candidate: Candidate, folder: Path, work: "_Work") -> None:
        """Make a folder of the members of a list, in their order."""

        async def make() -> None:
            if not candidate.value or len(candidate.value) > _MAX_LIST:
                raise InputRefused(f"must have 1 to {_MAX_LIST} members, got {len(candidate.value)}")
            await trio.to_thread.run_sync(folder.mkdir, limiter=self._limiter)
            work.values[candidate.node_id, candidate.input_name] = self.store.name_for_comfyui(folder)

        if not await work.attempt([candidate.location], make):
            return
        async with trio.open_nursery() as nursery:
            for place, member in enumerate(candidate.value):
                where = [f"{candidate.location}.{place}"]
                nursery.start_soon(work.attempt, where, partial(self._member, member, folder, f"{place:05d}"))

    async def _member(self, value: str, folder: Path, stem: str) -> None:
        if not isinstance(value, str):
            raise InputRefused("must be a text: a URL, base64, or the name of an input file")
        if is_remote(value):
            await self._fetch(value, folder, stem)
        elif is_content(value):
            await trio.to_thread.run_sync(write_content, value, folder / stem, self.limits, limiter=self._limiter)
        else:
            await trio.to_thread.run_sync(self._link, value, folder, stem, limiter=self._limiter)

    def _link(self, name: str, folder: Path, stem: str) -> None:
        check_name(name, self.store.input_dir)
        source = confined(self.store.input_dir, plain_name(name))
        if source is None:
            raise InputRefused("must lie in INPUT_DIR")
        target = folder / f"{stem}{source.suffix}"
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, target)

    async def _fetch(self, url: str, folder: Path, stem: str) -> Path:
        if url[:5].lower() != "s3://":
            return await self.fetcher.fetch(url, folder, stem)
        source = parse_s3_url(url)
        target = folder / stem
        size_bytes: int | None = None
        try:
            with trio.fail_after(self.limits.input_timeout_s):
                size_bytes = await self.s3.download(
                    source.bucket, source.key, target, max_bytes=self.limits.max_input_bytes
                )
        except trio.TooSlowError as exc:
            raise InputRefused(
                f"{source.url} did not arrive within {self.limits.input_timeout_s:g} s (INPUT_TIMEOUT_S)"
            ) from exc
        finally:
            if self.on_fetched is not None:
                self.on_fetched(source.url, size_bytes)
        return await trio.to_thread.run_sync(self._name_by_content, target, source.url, limiter=self._limiter)

    def _name_by_content(self, path: Path, url: str) -> Path:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        media_type = sniff(head)
        if media_type is None:
            raise InputRefused(f"{url} is empty" if not head else f"{url} is no picture, video or sound that we know")
        try:
            check_picture(path, media_type, self.limits)
        except InputRefused as exc:
            raise InputRefused(f"{url} {exc}") from exc
        return path.rename(path.with_name(path.name + media_type.ending))


@attrs.define
class _Work:
    """What the tasks of one job have found out."""

    faults: list[Fault]
    values: dict[Place, str]
    disk_error: OSError | None

    async def attempt(self, locations: list[str], work: Callable[[], Awaitable[None]]) -> bool:
        """Do *work*; note what is wrong with the inputs at *locations* instead of raising it. True if nothing is."""
        try:
            await work()
        except (InputRefused, InputNotFetched, StorageFailed, BadS3Url) as exc:
            self.faults.extend(Fault(location=location, message=str(exc)) for location in locations)
        except OSError as exc:
            self.disk_error = exc
        else:
            return True
        return False


def _locations(found: tuple[Candidate, ...]) -> Iterator[str]:
    """Every place that a fault can have, in the order of the request."""
    for candidate in found:
        yield candidate.location
        if not isinstance(candidate.value, str):
            yield from (f"{candidate.location}.{place}" for place in range(len(candidate.value)))
