"""Metrics: each number is what happened, labels stay few, and no scrape waits for what is slow."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from engine_kit import event
from jobs_kit import request, submit
from metrics_kit import DEVICE, Scene, make_scene, samples
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from comfyd import __version__
from comfyd.engine import ExecutionTimes, NodeTime, Submission
from comfyd.errors import Failure, FailureKind
from comfyd.host import gauges
from comfyd.host.gauges import REFRESH_BUDGET_S, REFRESH_EVERY_S
from comfyd.host.metrics import MAX_LABELS, BoundedLabel, Metrics
from comfyd.http.access_log import Access
from comfyd.jobs import Job, JobState, Success


def run(scene: Scene, job: Job) -> None:
    """An engine takes *job*."""
    assert scene.service.queue.remove(job)
    scene.service.started(job)


def succeed(scene: Scene, job: Job, nodes: dict[str, NodeTime]) -> None:
    job.move(JobState.DELIVERING)
    stats = job.clock.stats(attempts=job.attempts, times=ExecutionTimes(start_ms=0, end_ms=1, nodes=nodes))
    scene.service.finish(job, Success(graph=job.shown_graph, outputs=(), stats=stats), JobState.SUCCEEDED)


def fail(scene: Scene, job: Job, kind: FailureKind, state: JobState = JobState.FAILED) -> None:
    scene.service.finish(job, Failure(kind=kind, detail="it failed"), state)


async def test_a_job_that_succeeds_is_counted_with_its_stages_and_nodes(autojump_clock: trio.testing.MockClock) -> None:
    scene = make_scene()
    job = submit(scene.service)
    await trio.sleep(7)
    run(scene, job)
    job.clock.engine_s, job.clock.collect_s, job.clock.prepare_s, job.clock.upload_s = 3.0, 0.02, 0.3, 12.0
    nodes = {
        "1": NodeTime(start_ms=0, duration_ms=40.0),
        "2": NodeTime(start_ms=0, duration_ms=2000.0),
        "gone": NodeTime(start_ms=0, duration_ms=1.0),
    }
    succeed(scene, job, nodes)
    scene.metrics.job_ended(job)
    found = await scene.scrape()
    assert found['comfyd_jobs_ended_total{outcome="succeeded",workflow=""}'] == 1
    assert found["comfyd_job_attempts_total"] == 1
    assert found['comfyd_job_duration_seconds_count{outcome="succeeded"}'] == 1
    stages = {"prepare": 0.3, "queue": 7.0, "engine": 3.0, "collect": 0.02, "upload": 12.0}
    for stage, seconds in stages.items():
        assert found[f'comfyd_job_stage_seconds_sum{{stage="{stage}"}}'] == pytest.approx(seconds)
    assert found['comfyd_job_stage_seconds_bucket{le="5.0",stage="queue"}'] == 0
    assert found['comfyd_job_stage_seconds_bucket{le="10.0",stage="queue"}'] == 1
    assert found['comfyd_node_seconds_sum{class_type="EmptyImage"}'] == pytest.approx(0.04)
    assert found['comfyd_node_seconds_sum{class_type="SaveImage"}'] == pytest.approx(2.0)
    assert sum(1 for name in found if name.startswith("comfyd_node_seconds_count")) == 2


async def test_failed_jobs_are_counted_by_their_problem_and_workflow() -> None:
    scene = make_scene()
    never_ran = submit(scene.service, "a")
    fail(scene, never_ran, FailureKind.TIMEOUT)
    ran = scene.service.submit(request(), "b", b"", workflow="portrait")
    run(scene, ran)
    fail(scene, ran, FailureKind.JOB_CANCELLED, JobState.CANCELLED)
    for job in (never_ran, ran):
        scene.metrics.job_ended(job)
    found = await scene.scrape()
    assert found['comfyd_jobs_ended_total{outcome="timeout",workflow=""}'] == 1
    assert found['comfyd_jobs_ended_total{outcome="job-cancelled",workflow="portrait"}'] == 1
    assert found['comfyd_job_duration_seconds_count{outcome="failed"}'] == 1
    assert found['comfyd_job_duration_seconds_count{outcome="cancelled"}'] == 1
    assert found['comfyd_job_stage_seconds_count{stage="queue"}'] == 1
    assert 'comfyd_job_stage_seconds_count{stage="upload"}' not in found


async def test_the_daemon_s_own_jobs_and_jobs_without_an_outcome_do_not_count() -> None:
    scene = make_scene()
    job = submit(scene.service)
    before = await scene.scrape()
    scene.metrics.job_ended(job)
    warm_up = scene.service.new_job(job.request, "warm-up", internal=True)
    warm_up.outcome = Failure(kind=FailureKind.INTERNAL, detail="it failed")
    scene.metrics.job_ended(warm_up)
    assert ended(await scene.scrape()) == ended(before)


def ended(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name.startswith("comfyd_job")}


async def test_outcomes_have_a_series_before_the_first_job_so_that_the_first_failure_is_an_increase() -> None:
    found = await make_scene().scrape()
    assert found['comfyd_jobs_ended_total{outcome="engine-crashed",workflow=""}'] == 0
    assert found['comfyd_uploads_total{result="failed"}'] == 0
    assert found['comfyd_downloads_total{result="failed",scheme="https"}'] == 0


async def test_labels_that_callers_choose_are_bounded() -> None:
    scene = make_scene()
    for number in range(MAX_LABELS + 50):
        job = submit(scene.service, f"job-{number}")
        job.workflow = f"workflow-{number}"
        fail(scene, job, FailureKind.TIMEOUT)
        scene.metrics.job_ended(job)
    found = await scene.scrape()
    counted = {name: value for name, value in found.items() if 'outcome="timeout",workflow="' in name}
    assert sum(counted.values()) == MAX_LABELS + 50
    assert counted['comfyd_jobs_ended_total{outcome="timeout",workflow="other"}'] == 50
    assert len(counted) == MAX_LABELS + 2  # with the empty one, which was there from the start


def test_a_label_that_is_known_stays_itself_when_the_bound_is_reached() -> None:
    label = BoundedLabel(2)
    assert [label(value) for value in ("a", "b", "c", "a", "b", "d")] == ["a", "b", "other", "a", "b", "other"]


async def test_transfers_are_counted_by_result_and_size() -> None:
    scene = make_scene()
    for url, size in (("https://h/x", 100), ("HTTPS://h/y", None), ("s3://b/k", 10), ("gopher://x", None)):
        scene.metrics.downloaded(url, size)
    for size in (5, 6, None):
        scene.metrics.uploaded(size)
    found = await scene.scrape()
    assert found['comfyd_downloads_total{result="ok",scheme="https"}'] == 1
    assert found['comfyd_downloads_total{result="failed",scheme="https"}'] == 1
    assert found['comfyd_downloads_total{result="failed",scheme="other"}'] == 1
    assert found['comfyd_download_bytes_total{scheme="https"}'] == 100
    assert found['comfyd_download_bytes_total{scheme="s3"}'] == 10
    assert found['comfyd_uploads_total{result="ok"}'] == 2
    assert found['comfyd_uploads_total{result="failed"}'] == 1
    assert found["comfyd_upload_bytes_total"] == 11


async def test_requests_are_counted() -> None:
    scene = make_scene()
    access = Access(route="/prompt", method="POST", status=200, body_bytes=50, took_s=0.2)
    scene.metrics.request_served(access)
    scene.metrics.request_served(attrs.evolve(access, took_s=0.02))
    found = await scene.scrape()
    assert found['comfyd_http_requests_total{method="POST",route="/prompt",status="200"}'] == 2
    assert found['comfyd_http_request_duration_seconds_bucket{le="0.1",route="/prompt"}'] == 1
    assert found['comfyd_http_response_bytes_total{route="/prompt"}'] == 100


async def test_gauges_are_what_the_live_objects_say_at_that_moment(tmp_path: Path) -> None:
    scene = make_scene(engine_pid=lambda engine: os.getpid(), folders={"output": tmp_path})
    first = submit(scene.service, "a")
    submit(scene.service, "b")
    run(scene, first)
    scene.engine.restarts_by_cause["hung"] += 2
    found = await scene.scrape()
    expected = {
        "comfyd_queue_depth": 2,
        "comfyd_queue_limit": scene.service.config.jobs.max_queued,
        "comfyd_jobs_waiting": 1,
        "comfyd_jobs_running": 1,
        "comfyd_ready": 1,
        "comfyd_draining": 0,
        'comfyd_engine_up{engine="engine-1"}': 1,
        'comfyd_engine_warm{engine="engine-1"}': 1,
        'comfyd_engine_starts_total{engine="engine-1"}': 1,
        'comfyd_engine_restarts_total{cause="hung",engine="engine-1"}': 2,
        'comfyd_engine_vram_size_bytes{device="cuda:0",engine="engine-1"}': 24_000,
        'comfyd_engine_vram_free_bytes{device="cuda:0",engine="engine-1"}': 20_000,
        'comfyd_engine_torch_vram_size_bytes{device="cuda:0",engine="engine-1"}': 3_000,
        'comfyd_engine_torch_vram_free_bytes{device="cuda:0",engine="engine-1"}': 1_000,
        "comfyd_webhooks_pending": 3,
        "comfyd_webhooks_dead": 2,
        'comfyd_webhook_attempts_total{result="taken"}': 7,
        "comfyd_system_events_pending": 4,
        'comfyd_system_events_total{result="dropped"}': 7,
        f'comfyd_build_info{{version="{__version__}"}}': 1,
    }
    assert {name: found.get(name) for name in expected} == expected
    usage = os.statvfs(tmp_path)
    assert found['comfyd_disk_size_bytes{folder="output"}'] == usage.f_blocks * usage.f_frsize
    assert 0 < found['comfyd_disk_free_bytes{folder="output"}'] <= found['comfyd_disk_size_bytes{folder="output"}']
    resident = found['comfyd_engine_resident_memory_bytes{engine="engine-1"}']
    assert resident == pytest.approx(found["process_resident_memory_bytes"], rel=0.1)

    scene.service.begin_drain()
    scene.engine.went_down("it exited")
    found = await scene.scrape()
    assert (found["comfyd_draining"], found["comfyd_ready"]) == (1, 0)
    assert found['comfyd_engine_up{engine="engine-1"}'] == found['comfyd_engine_warm{engine="engine-1"}'] == 0
    assert not any("vram" in name for name in found), "of a process that is gone"


async def test_without_system_events_and_an_engine_process_there_are_no_such_series() -> None:
    found = await make_scene(events=False, engine_pid=lambda engine: 2**22 + 1).scrape()
    assert not any("system_events" in name or "comfyd_engine_resident" in name for name in found)


async def test_the_engine_is_asked_every_ten_seconds_at_most(autojump_clock: trio.testing.MockClock) -> None:
    scene = make_scene()
    for _ in range(5):
        await scene.scrape()
        await trio.sleep(1)
    assert scene.client.asked == 1
    await trio.sleep(REFRESH_EVERY_S)
    scene.client.stats = {"devices": [{**DEVICE, "vram_free": 1}]}
    found = await scene.scrape()
    assert scene.client.asked == 2
    assert found['comfyd_engine_vram_free_bytes{device="cuda:0",engine="engine-1"}'] == 1


async def test_a_silent_engine_costs_a_second_once_and_its_last_answer_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Not on the mock clock: the text is written in a thread, under which it would jump.
    monkeypatch.setattr(gauges, "REFRESH_BUDGET_S", 0.05)
    monkeypatch.setattr(gauges, "REFRESH_EVERY_S", 0.0)
    scene = make_scene()
    with trio.fail_after(10):
        await scene.scrape()
        scene.client.mute = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(execute, scene)
            while not scene.engine.attempts:  # noqa: ASYNC110  # one turn or two
                await trio.lowlevel.checkpoint()
            for _ in range(3):
                found = await scene.scrape()
                assert found['comfyd_engine_vram_free_bytes{device="cuda:0",engine="engine-1"}'] == 20_000
            assert scene.client.asked == 2, "it works and says nothing: it is not asked again"
            scene.engine.received(event("progress", "another", value=1, max=2))
            await scene.scrape()
            assert scene.client.asked == 3, "it gave a sign of life"
            nursery.cancel_scope.cancel("seen")
        scene.engine.went_down("gone")  # nothing is asked of an engine that is down
        await scene.scrape()
    assert scene.client.asked == 3


async def execute(scene: Scene) -> None:
    await scene.engine.execute(Submission(graph={}, extra_data={}), lambda heard: None)


async def test_a_disk_that_hangs_delays_one_scrape_and_holds_one_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gauges, "REFRESH_BUDGET_S", 0.05)
    monkeypatch.setattr(gauges, "REFRESH_EVERY_S", 0.0)
    release, asked = threading.Event(), 0

    def hang(path: Path) -> Any:
        nonlocal asked
        asked += 1
        release.wait(10)
        raise OSError("gone")

    monkeypatch.setattr("comfyd.host.gauges.shutil.disk_usage", hang)
    scene = make_scene(folders={"output": tmp_path})
    try:
        with trio.fail_after(5):
            for _ in range(4):
                found = await scene.scrape()
                assert not any("disk" in name for name in found)
                assert found["comfyd_queue_depth"] == 0
    finally:
        release.set()
    assert asked == 1


@pytest.mark.parametrize(
    "stats",
    [{}, {"devices": None}, {"devices": [None, 3, {"type": "mps"}, {"type": "cpu", "index": None, "vram_free": "x"}]}],
)
async def test_an_engine_that_tells_odd_things_of_its_devices_costs_nothing_else(stats: Any) -> None:
    scene = make_scene()
    scene.client.stats = stats
    found = await scene.scrape()
    assert found["comfyd_ready"] == 1
    assert not any("vram" in name for name in found)


async def test_an_engine_that_fails_when_asked_costs_nothing_else() -> None:
    scene = make_scene()
    scene.client.broken = True
    assert (await scene.scrape())["comfyd_ready"] == 1
    assert scene.client.asked == 1


async def test_scrapes_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    scene = make_scene(folders={"output": tmp_path})
    found: list[dict[str, float]] = []

    async def scrape() -> None:
        found.append(await scene.scrape())

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(scrape)
    assert len(found) == 10
    assert all(each["comfyd_webhooks_pending"] == 3 for each in found)
    assert scene.client.asked == 1


async def test_both_formats_parse_and_say_the_same() -> None:
    scene = make_scene()
    scene.metrics.uploaded(5)
    plain = samples((await scene.metrics.render()).data.decode())
    body = await scene.metrics.render(openmetrics=True)
    families = parse_openmetrics(body.data.decode())  # type: ignore[no-untyped-call]  # prometheus-client 0.26
    open_names = {sample.name for family in families for sample in family.samples}
    assert {name.partition("{")[0] for name in plain} == open_names


async def test_metrics_without_anything_to_watch_are_those_that_are_counted() -> None:
    found = samples((await Metrics().render()).data.decode())
    assert "process_resident_memory_bytes" in found
    assert "comfyd_queue_depth" not in found


def test_budgets_leave_prometheus_its_patience() -> None:
    assert REFRESH_BUDGET_S < 10 / 2  # scrape_timeout is 10 s by default


def test_the_daemon_starts_without_prometheus_client() -> None:
    program = "import sys, comfyd.daemon, comfyd.http.access_log; sys.exit('prometheus_client' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
