"""What the fault-injection suite shares: a place where daemons live and are killed, and what must hold afterwards.

A :class:`Site` is one installation: its folders and its receiver of webhooks outlive each of its daemons. Jobs are
posted as *promises*; :meth:`Site.check` then holds the site to all of them, whatever was killed in between:

- each promise has exactly one outcome; its receiver was told it, if twice, then by the same ``webhook-id`` and bytes;
- ``GET /jobs/<id>`` tells the same, and what it lists can be fetched;
- below INPUT_DIR and OUTPUT_DIR is nothing but these outputs.
"""

import base64
import contextlib
import hashlib
import os
import signal
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import httpx
import trio
from daemon_support import Daemon, Graph, start_daemon
from webhook_receiver import Received, WebhookReceiver, webhook_receiver

WITHIN_S: Final = 40.0
"""For what takes a second on an idle machine: these tests share two cores with others."""
GONE_WITHIN_S: Final = 10.0
"""For the processes of a killed daemon: nobody is left to end them but the kernel and the engine's guard."""
_PROGRESS: Final = ("position", "percent", "node_id", "node_title", "step", "steps", "eta_s")


@attrs.frozen(kw_only=True)
class Promise:
    """A job that was answered 202, and how it has to end.

    *problem* is the type of its failure; None is success. *told* is how many different webhooks its receiver gets.
    *given_up*: the receiver never takes them, so that they end as dead letters.
    """

    job_id: str
    body: Mapping[str, Any]
    receiver: WebhookReceiver
    problem: str | None = None
    told: int = 1
    given_up: bool = False

    @property
    def end(self) -> str:
        """The state in which it has to end."""
        return {None: "succeeded", "job-cancelled": "cancelled"}.get(self.problem, "failed")


def hook_of(job_id: str) -> str:
    """The path of a job's receiver."""
    return f"/hook/{job_id}"


@attrs.define(eq=False, kw_only=True)
class Site:
    """Made by :func:`open_site`. *lives* are its daemons, the newest last."""

    folder: Path
    receiver: WebhookReceiver
    environ: dict[str, str]
    cmd: str | None = None
    lives: list[Daemon] = attrs.field(factory=list)
    promises: dict[str, Promise] = attrs.field(factory=dict)

    @property
    def daemon(self) -> Daemon:
        return self.lives[-1]

    @property
    def state_dir(self) -> Path:
        return Path(self.environ.get("STATE_DIR", self.folder / "state"))

    # --- the daemon's life

    async def start(self, *, ready: bool = True, **more: str) -> Daemon:
        """Start a daemon on what the last one left, and wait until it is *ready*. *more* is its environment's alone."""
        daemon = start_daemon(self.folder, cmd=self.cmd, environ={**self.environ, **more})
        self.lives.append(daemon)
        if ready:
            await trio.to_thread.run_sync(daemon.wait_ready, abandon_on_cancel=True)
        return daemon

    async def kill(self) -> None:
        """Kill the daemon, and only it, and wait until everything that it started has ended by itself."""
        self.daemon.signal(signal.SIGKILL)
        assert await self.daemon.wait_exit() == -signal.SIGKILL
        await self.daemon.wait_no_process(GONE_WITHIN_S)

    async def stop(self) -> None:
        """Stop the daemon as systemd would."""
        self.daemon.signal()
        assert await self.daemon.wait_exit() == 0, str(self.daemon.log)
        await self.daemon.wait_no_process(GONE_WITHIN_S)

    async def kill_engine(self) -> None:
        """Kill the newest engine; its supervisor has seen it when this returns."""
        failures = len(self.daemon.log.find("engine.failed"))
        os.kill(self.daemon.engine_pid, signal.SIGKILL)
        await self.daemon.log.wait("engine.failed", count=failures + 1)

    # --- jobs

    def promise(
        self,
        job_id: str,
        graph: Graph,
        *,
        problem: str | None = None,
        told: int = 1,
        given_up: bool = False,
        hook: str = "webhook_v2",
        receiver: WebhookReceiver | None = None,
        **fields: Any,
    ) -> Promise:
        """What would be promised by a 202 to such a job; it is told to the site's receiver, or to another."""
        receiver = receiver or self.receiver
        body = {"prompt": graph, "id": job_id, hook: receiver.url(hook_of(job_id)), **fields}
        return Promise(job_id=job_id, body=body, receiver=receiver, problem=problem, told=told, given_up=given_up)

    async def post(self, job_id: str, graph: Graph, **options: Any) -> Promise:
        """Post a job, with the options of :meth:`promise`; from its 202 on the site is held to it."""
        promise = self.promise(job_id, graph, **options)
        async with self.daemon.client() as client:
            answer = await client.post("/prompt", json=promise.body)
        assert answer.status_code == 202, f"{answer.text}; the log:\n{self.daemon.log}"
        self.promises[job_id] = promise
        return promise

    async def view(self, job_id: str, *, wait_s: float = 0.0) -> dict[str, Any]:
        """Look at a job; with *wait_s* wait for its end."""
        async with self.daemon.client() as client:
            answer = await client.get(f"/jobs/{job_id}", params={"wait": wait_s} if wait_s else {})
        assert answer.status_code == 200, f"{job_id}: {answer.text}; the log:\n{self.daemon.log}"
        document: dict[str, Any] = answer.json()
        return document

    def told(self, job_id: str) -> list[Received]:
        """Everything that the job's receiver has been sent, whatever it answered."""
        return [each for each in self.promises[job_id].receiver.received if each.path == hook_of(job_id)]

    async def wait_told(self, job_id: str, times: int = 1) -> None:
        """Return once the job's receiver was sent so many bodies."""
        with trio.fail_after(WITHIN_S):
            await self.promises[job_id].receiver.wait_until(lambda: len(self.told(job_id)) >= times)

    def owed(self) -> int:
        """Count the webhooks of the journal that are neither taken nor given up."""
        uri = f"file:{self.state_dir / 'journal.sqlite3'}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=WITHIN_S)) as journal:
            return int(journal.execute("SELECT count(*) FROM webhooks WHERE dead_at IS NULL").fetchone()[0])

    async def wait_owed(self, webhooks: int) -> None:
        """Wait until so many webhooks are owed: the journal learns after the receiver that it has taken one."""
        with trio.fail_after(WITHIN_S):
            while self.owed() != webhooks:  # noqa: ASYNC110  # nothing tells another process of it
                await trio.sleep(0.02)

    # --- what must hold

    async def check(self) -> dict[str, dict[str, Any]]:
        """Wait until every promise is kept, and check that each is, once, and that nothing else is left.

        Returns the views of the jobs by their ids, without their progress, which a daemon knows of its own runs only.
        """
        views: dict[str, dict[str, Any]] = {}
        with trio.move_on_after(WITHIN_S) as limit:
            for job_id in self.promises:
                views[job_id] = await self.view(job_id, wait_s=WITHIN_S)
        assert not limit.cancelled_caught, f"not within {WITHIN_S:g} s; the log:\n{self.daemon.log}"
        await self.wait_owed(0)
        kept: Counter[str] = Counter()
        async with self.daemon.client() as client:
            for job_id, promise in self.promises.items():
                view = views[job_id]
                assert view["state"] == promise.end, f"{view}; the log:\n{self.daemon.log}"
                files = await _fetch(client, view)
                self._check_told(promise, view, files)
                kept.update(_sha256(data) for data in files if data is not None)
            listed = (await client.get("/jobs?limit=200")).json()["jobs"]
        assert sorted(job["id"] for job in listed) == sorted(self.promises), "each job is known once, and no other"
        await self.wait_only_files(kept)
        return {
            job_id: {name: value for name, value in view.items() if name not in _PROGRESS}
            for job_id, view in views.items()
        }

    def _check_told(self, promise: Promise, view: dict[str, Any], files: list[bytes | None]) -> None:
        """Compare what a receiver was told with what the daemon says of the job."""
        by_id: dict[str, set[str]] = {}
        for received in self.told(promise.job_id):
            by_id.setdefault(received.headers["webhook-id"], set()).add(received.sha256)
        assert len(by_id) == promise.told, f"{promise.job_id} was told as {by_id}; the log:\n{self.daemon.log}"
        assert all(len(bodies) == 1 for bodies in by_id.values()), f"one event, several bodies: {by_id}"
        taken = {r.headers["webhook-id"] for r in self.told(promise.job_id) if r.status is not None and r.status < 300}
        assert taken == (set() if promise.given_up else set(by_id))
        documents = {r.headers["webhook-id"]: r.json for r in self.told(promise.job_id)}.values()
        if promise.problem is not None:
            (document,) = documents
            assert view["problem"]["type"] == promise.problem
            assert document.get("type", document.get("event")) == "prompt.failed"
            assert document["error"] == view["problem"]["detail"]
        elif "webhook" in promise.body:
            pictures = {document["filename"]: document["image"] for document in documents}
            assert pictures == dict(zip(_names(view), _images(files), strict=True))
        else:
            (document,) = documents
            assert document["type"] == "prompt.complete"
            assert document["filenames"] == _names(view)
            assert document["stats"] == view["stats"]
            if None not in files:
                assert document["images"] == _images(files)

    async def wait_only_files(self, kept: Counter[str]) -> None:
        """Wait until the files of jobs are those with these digests, and no other."""
        with trio.move_on_after(WITHIN_S / 4):
            # The cleaning task is told by nobody that we look.
            while self._digests() != kept:  # noqa: ASYNC110
                await trio.sleep(0.02)
        assert self._digests() == kept, f"{self.daemon.job_files()}; the log:\n{self.daemon.log}"

    def _digests(self) -> Counter[str]:
        digests: Counter[str] = Counter()
        for top in (self.daemon.input_dir, self.daemon.output_dir):
            for folder, _, names in os.walk(top):
                for name in names:
                    if name != ".lock":
                        with contextlib.suppress(FileNotFoundError):  # removed while we looked
                            digests[_sha256(Path(folder, name).read_bytes())] += 1
        return digests

    async def forget_all(self) -> None:
        """Delete every job, after which no file may be left at all."""
        async with self.daemon.client() as client:
            for job_id in self.promises:
                answer = await client.delete(f"/jobs/{job_id}")
                assert answer.status_code == 204, answer.text
        await self.wait_only_files(Counter())

    def assert_no_bug(self) -> None:
        """Check that none of the daemons logged a bug of its own. The last line of a killed one may be torn."""
        for daemon in self.lives:
            bugs = [event for event in daemon.log.events if event["event"].endswith(".bug") or "traceback" in event]
            assert not bugs, bugs


@asynccontextmanager
async def open_site(
    folder: Path, environ: Mapping[str, str] | None = None, *, cmd: str | None = None
) -> AsyncIterator[Site]:
    """Make a site and start its first daemon.

    At the end, what the last daemon knows is deleted and it is stopped; then no file, process or bug may be left.
    """
    async with webhook_receiver() as receiver:
        allowed = {"URL_ALLOW": "127.0.0.1", "PROMPT_WEBHOOK_RETRIES": "20"}
        site = Site(folder=folder, receiver=receiver, environ={**allowed, **(environ or {})}, cmd=cmd)
        try:
            await site.start()
            yield site
            await site.forget_all()
            await site.stop()
            site.daemon.assert_nothing_left()
            site.assert_no_bug()
        finally:
            for daemon in site.lives:
                daemon.close()


async def _fetch(client: httpx.AsyncClient, view: dict[str, Any]) -> list[bytes | None]:
    """Fetch a job's outputs in their order; None is one that a storage has."""
    files: list[bytes | None] = []
    for output in view.get("outputs", ()):
        if "href" not in output:
            files.append(None)
            continue
        answer = await client.get(output["href"])
        assert answer.status_code == 200, answer.text
        assert len(answer.content) == output["size_bytes"] > 0
        files.append(answer.content)
    return files


def _names(view: dict[str, Any]) -> list[str]:
    return [output["filename"] for output in view["outputs"]]


def _images(files: list[bytes | None]) -> list[str]:
    return [base64.b64encode(data or b"").decode() for data in files]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
