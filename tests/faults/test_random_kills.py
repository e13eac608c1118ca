"""Daemon and engine killed at random moments under clients that do not give up: each job ends once, as it should.

``FAULT_ROUNDS=50`` runs more rounds than the one of the normal suite, ``FAULT_SEED=n`` begins with that seed; the seed
of a round is in its test's name. The same seed gives the same jobs and the same plan of kills, but not the same race.
"""

import os
import random
import time
from pathlib import Path
from typing import Any, Final

import attrs
import httpx
import pytest
import trio
from api_support import b64, png
from daemon_support import Graph, command, picture, raising
from fault_kit import WITHIN_S, Promise, Site, open_site
from storage_support import NO_SETTINGS, Peer

JOBS: Final = 30
KILLS: Final = 3
"""Of a daemon that was up. A fifth, during the same job, would make this job the suspect."""
SPREAD_S: Final = 5.0
"""Over which clients come; about as long as the daemon is being killed."""
LIVE_S: Final = 1.2
START_S: Final = 1.0
"""About what a start takes until all that the last daemon left goes on."""
ROUNDS: Final = int(os.environ.get("FAULT_ROUNDS", "1"))
RUN: Final = os.environ.get("PYTEST_XDIST_TESTRUNUID", "")
"""Of pytest-xdist: its workers have to find the same tests."""
FIRST_SEED: Final = int(os.environ.get("FAULT_SEED") or (int(RUN[:8], 16) if RUN else time.time()))

# No number of engines lost may make a job or the daemon give up here: who is the cause is known.
PATIENT: Final = {
    "ALWAYS_RESTART_COMFYUI": "true",
    "COMFYUI_RESTART_LIMIT": "100",
    "JOB_MAX_ATTEMPTS": "100",
}


def two_pictures() -> Graph:
    graph = picture(prefix="first")
    graph["4"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "second"}}
    return graph


def brought() -> Graph:
    graph = picture()
    graph["1"] = {"class_type": "LoadImage", "inputs": {"image": b64(png(size_px=64))}}
    return graph


def any_job(site: Site, rng: random.Random, number: int) -> Promise:
    """Make one of the kinds of jobs that differ in what a kill may cut."""
    kinds: tuple[tuple[str, Graph, dict[str, Any]], ...] = (
        ("plain", picture(), {}),
        ("slow", picture(seconds=rng.uniform(0.01, 0.3)), {}),
        ("per-output", two_pictures(), {"hook": "webhook", "told": 2}),
        ("raising", raising(), {"problem": "execution-failed"}),
        ("raising-v1", raising(), {"problem": "execution-failed", "hook": "webhook"}),
        ("brought", brought(), {}),
        ("unreadable", {**picture(), **_loader(b64(b"no picture"))}, {"problem": "invalid-input"}),
        ("converted", picture(size_px=512), {"convert_output": {"format": "webp"}}),
        ("stored", picture(), {"s3": {"bucket": "random", "prefix": f"{number}/"}}),
    )
    kind, graph, options = rng.choice(kinds)
    return site.promise(f"{kind}-{number}", graph, **options)


def _loader(image: str) -> Graph:
    return {"1": {"class_type": "LoadImage", "inputs": {"image": image}}}


@attrs.define(eq=False)
class Clients:
    """Callers who post their job again, with the same id, until they have a 202."""

    site: Site
    up: trio.Event = attrs.field(factory=trio.Event)

    async def insist(self, promise: Promise, after_s: float) -> None:
        await trio.sleep(after_s)
        while not await self.ask(promise):  # noqa: ASYNC110  # as clients do who have no event to wait for
            await trio.sleep(0.05)

    async def ask(self, promise: Promise) -> bool:
        """Post once; False if there was no answer, or it was to come again."""
        await self.up.wait()
        url = f"{self.site.daemon.url}/prompt"
        try:
            # In a thread: httpx leaves generators to the garbage collector where a connection breaks under them.
            answer = await trio.to_thread.run_sync(
                lambda: httpx.post(url, json=promise.body, timeout=WITHIN_S, trust_env=False)
            )
        except httpx.TransportError:
            return False
        assert answer.status_code in (202, 503), answer.text
        if answer.status_code == 202:
            self.site.promises[promise.job_id] = promise
        return answer.status_code == 202


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + ROUNDS))
async def test_whatever_is_killed_whenever_each_job_ends_once(tmp_path: Path, s3_server: Peer, seed: int) -> None:
    rng = random.Random(seed)
    with s3_server.client() as s3:
        s3.create_bucket(Bucket="random")
    async with open_site(
        tmp_path, PATIENT | NO_SETTINGS | s3_server.environment(), cmd=command("flaky_engine")
    ) as site:
        clients = Clients(site)
        clients.up.set()
        jobs = [any_job(site, rng, number) for number in range(JOBS)]
        with trio.fail_after(3 * WITHIN_S):
            async with trio.open_nursery() as nursery:
                for promise in jobs:
                    nursery.start_soon(clients.insist, promise, rng.uniform(0.0, SPREAD_S))
                for _ in range(KILLS):
                    await trio.sleep(rng.uniform(0.0, LIVE_S))  # a moment that nothing announces is what is wanted
                    if rng.random() < 0.5:
                        await site.kill_engine()
                        await trio.sleep(rng.uniform(0.0, LIVE_S))
                    clients.up = trio.Event()
                    await site.kill()
                    if rng.random() < 0.5:
                        await site.start(ready=False)
                        await trio.sleep(rng.uniform(0.0, START_S))
                        await site.kill()
                    await site.start()
                    clients.up.set()
        views = await site.check()
        assert len(views) == JOBS
        assert all([await clients.ask(promise) for promise in jobs]), "what is known is joined, and not run again"
        assert await site.check() == views
