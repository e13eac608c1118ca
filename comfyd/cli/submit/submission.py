"""One submission: posted, followed to its end, its outputs saved; or taken back when the user does not want it."""

import signal
from collections.abc import AsyncIterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import attrs
import trio

from comfyd.cli.submit.body import Body
from comfyd.cli.submit.errors import JobFailed, NotSaved, SubmitFailed
from comfyd.cli.submit.files import OutputFolder
from comfyd.cli.submit.remote import Patience, Remote, open_remote
from comfyd.cli.submit.show import Display


@attrs.frozen(kw_only=True)
class Order:
    """What is to be done: *body*, which names the job *job_id*, goes to *path*. Without a *folder* nobody waits."""

    url: str
    api_key: str | None = attrs.field(repr=False)
    path: str
    body: Body
    job_id: str
    folder: OutputFolder | None
    patience: Patience


class _Phase(Enum):
    POSTING = "posting"
    FOLLOWING = "following"
    SAVING = "saving"


async def run_order(order: Order, display: Display) -> int:
    """Do it, and return the exit code. The first SIGINT or SIGTERM takes the job back, the second leaves at once."""
    code = 128 + signal.SIGINT
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        try:
            async with open_remote(order.url, order.api_key, order.patience, display.note) as remote:
                submission = Submission(order, remote, display)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_obey, signals, submission, nursery.cancel_scope)
                    code = await submission.run()
                    nursery.cancel_scope.cancel("the submission has ended")
        except SubmitFailed as exc:  # before anything was sent; within a submission it is told there
            display.failed(exc)
            return exc.exit_code
    return code


async def _obey(signals: AsyncIterator[int], submission: "Submission", everything: trio.CancelScope) -> None:
    async for number in signals:
        if submission.signal is None:
            submission.take_back(number)
        else:
            everything.cancel("the second signal")


@attrs.define(eq=False)
class Submission:
    """An order being carried out."""

    order: Order
    remote: Remote
    display: Display
    signal: int | None = None
    """The one by which the user took it back."""
    _phase: _Phase = _Phase.POSTING
    _work: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def take_back(self, number: int) -> None:
        """Stop here and cancel the job, because signal *number* came."""
        self.signal = number
        self._work.cancel("a signal came")

    async def run(self) -> int:
        """Do everything; return the exit code. What goes wrong is told."""
        try:
            with self._work:
                await self._run()
                return 0
        except SubmitFailed as exc:
            known = self._phase is not _Phase.POSTING
            self.display.failed(exc, self.order.job_id if known else None)
            if known and not isinstance(exc, JobFailed):
                self.display.note(f"the job is {self.remote.shown}/jobs/{self.order.job_id}")
            return exc.exit_code
        what = await self._take_back()
        document = {"type": "job-cancelled", "title": "Taken back", "detail": f"job {self.order.job_id}: {what}"}
        code = 128 + (self.signal or signal.SIGINT)
        self.display.failed(SubmitFailed(document, code), self.order.job_id)
        return code

    async def _run(self) -> None:
        order = self.order
        await self.remote.post(order.path, order.body)
        self._phase = _Phase.FOLLOWING
        if order.folder is None:
            self.display.submitted(order.job_id, self.remote.shown)
            return
        self.display.note(f"job {order.job_id}")
        result = await self.remote.follow(order.job_id, self.display.watch)
        if not isinstance(result.get("outputs"), list):
            raise JobFailed(_problem_in(result))
        self._phase = _Phase.SAVING
        self.display.finished(result, await self._save(result["outputs"], order.folder))

    async def _save(self, outputs: list[dict[str, Any]], folder: OutputFolder) -> dict[int, Path]:
        """Get every output that the daemon has; those that it stored elsewhere have a URL and stay there."""
        places: dict[int, Path] = {}
        for number, output in enumerate(outputs):
            if isinstance(output.get("href"), str):
                try:
                    places[number] = await self._save_one(output, folder)
                except OSError as exc:
                    raise NotSaved(f"{output.get('filename')} in {folder.path}: {exc.strerror or exc}") from exc
        return places

    async def _save_one(self, output: Mapping[str, Any], folder: OutputFolder) -> Path:
        name, size_bytes = str(output.get("filename")), int(output["size_bytes"])
        with folder.incoming() as (file, path):
            await self.remote.download(
                output["href"],
                size_bytes,
                trio.wrap_file(file),
                lambda done: self.display.saving(name, done, size_bytes),
            )
            file.flush()
            return await trio.to_thread.run_sync(folder.put, path, name)

    async def _take_back(self) -> str:
        """Cancel the job at the daemon; say what came of it."""
        if self._phase is _Phase.SAVING:
            return f"it has succeeded; its outputs are at {self.remote.shown}/jobs/{self.order.job_id}/outputs"
        return await self.remote.cancel(self.order.job_id, perhaps_posted=self._phase is _Phase.POSTING)


def _problem_in(result: Mapping[str, Any]) -> Mapping[str, Any]:
    problem = result.get("problem")
    return problem if isinstance(problem, dict) else {"type": "unexpected-answer", "detail": "no result was told"}
