"""The outbox with real receivers and a real journal: everything is told, in order, and nobody waits for another."""

import base64
import os
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import trio
from outbox_kit import (
    FAILURE,
    SECRET,
    Desk,
    output,
    running_desk,
    running_outbox,
    success,
    verify,
    wait_empty,
    wait_until,
)
from structlog.testing import LogCapture
from webhook_receiver import Cut, Reply, WebhookReceiver, webhook_receiver

from comfyd.journal import Database, JobRow, Journal, JournalUnavailable, WebhookRow
from comfyd.webhooks import Outbox, retry_policy
from comfyd.webhooks import outbox as outbox_module
from comfyd.webhooks.retry import RetryPolicy

LONG = RetryPolicy(retries=3, first_delay_s=600.0, max_delay_s=600.0)


def events(log: LogCapture, name: str) -> list[dict[str, object]]:
    return [dict(entry) for entry in log.entries if entry["event"] == name]


async def post_failures(
    desk: Desk, outbox: Outbox, receiver: WebhookReceiver, count: int, prefix: str = "job"
) -> list[WebhookRow]:
    """End *count* jobs by a failure, each with one v2 webhook to *receiver*."""
    rows: list[WebhookRow] = []
    for number in range(count):
        rows += await desk.end_job(f"{prefix}-{number}", FAILURE, webhook_v2=receiver.url(f"/{prefix}-{number}"))
    outbox.post(rows)
    return rows


async def test_v1_and_v2_are_told_in_order_signed_and_then_forgotten(tmp_path: Path, log_output: LogCapture) -> None:
    with trio.fail_after(10):
        async with webhook_receiver() as receiver, running_desk(tmp_path / "state") as desk:
            outputs = [output(tmp_path, f"{n}.png", bytes([n]) * (n + 5)) for n in range(3)]
            new, old = SECRET, SECRET[::-1]
            async with running_outbox(desk.journal, secrets=(new, old)) as outbox:
                outcome = success(*outputs)
                outbox.post(
                    await desk.end_job("j", outcome, webhook=receiver.url("/v1"), webhook_v2=receiver.url("/v2"))
                )
                await outbox.wait_drained()
                assert outbox.pending == 0
                assert outbox.attempts == Counter(taken=4, failed=0, dead=0)
                assert await desk.journal.count_webhooks() == (0, 0)
    assert [request.path for request in receiver.received] == ["/v1"] * 3 + ["/v2"]
    for number, request in enumerate(receiver.received[:3]):
        assert request.json["event"] == "output.complete"
        assert request.json["filename"] == f"{number}.png"
        assert base64.b64decode(request.json["image"], validate=True) == outputs[number].path.read_bytes()
    assert receiver.received[3].json["type"] == "prompt.complete"
    assert len({request.headers["webhook-id"] for request in receiver.received}) == 4
    for request in receiver.received:
        verify(request, [new, old])
        assert abs(int(request.headers["webhook-timestamp"]) - time.time()) < 60
        assert request.headers["content-type"] == "application/json"
        assert request.headers["user-agent"].startswith("comfyd/")
        assert int(request.headers["content-length"]) == len(request.body)
    taken = events(log_output, "webhook.taken")
    assert [entry["receiver"] for entry in taken] == [f"127.0.0.1:{receiver.port}"] * 4


async def test_without_a_secret_there_is_no_signature(tmp_path: Path) -> None:
    with trio.fail_after(10):
        async with (
            webhook_receiver() as receiver,
            running_desk(tmp_path) as desk,
            running_outbox(desk.journal) as outbox,
        ):
            await post_failures(desk, outbox, receiver, 1)
            (request,) = await receiver.wait_received(1)
    assert "webhook-signature" not in request.headers
    assert request.headers["webhook-id"].startswith("msg_")


async def test_the_next_of_a_job_goes_only_when_the_one_before_was_taken_or_given_up(tmp_path: Path) -> None:
    with trio.fail_after(10):
        async with webhook_receiver() as receiver, running_desk(tmp_path / "state") as desk:
            outputs = [output(tmp_path, f"{n}.png", b"x") for n in range(4)]
            receiver.script(Reply(cut=Cut.AT_BODY), Reply(status=500), Reply(delay_s=0.1), Reply(status=410))
            async with running_outbox(desk.journal) as outbox:
                outbox.post(await desk.end_job("j", success(*outputs), webhook=receiver.url()))
                await wait_empty(outbox)
                assert outbox.attempts == Counter(taken=3, failed=2, dead=1)
    # A cut and a 500 for the first, which is then taken; the second is gone; the others are taken at once.
    assert [request.json["filename"] for request in receiver.received] == [
        *("0.png", "0.png", "0.png"),
        *("1.png", "2.png", "3.png"),
    ]


async def test_each_attempt_has_the_same_id_and_body_and_its_own_signature(tmp_path: Path) -> None:
    with trio.fail_after(10):
        async with webhook_receiver() as receiver, running_desk(tmp_path / "state") as desk:
            receiver.script(Reply(status=503), Reply(status=400))
            async with running_outbox(desk.journal, secrets=(SECRET,)) as outbox:
                outcome = success(output(tmp_path, "a.png", b"abc"))
                outbox.post(await desk.end_job("j", outcome, webhook_v2=receiver.url()))
                await receiver.wait_received(3)
    assert len({(request.headers["webhook-id"], request.body) for request in receiver.received}) == 1
    for request in receiver.received:
        verify(request, [SECRET])


async def test_after_its_last_retry_a_webhook_is_a_dead_letter(tmp_path: Path, log_output: LogCapture) -> None:
    with trio.fail_after(10):
        async with webhook_receiver(Reply(status=500)) as receiver, running_desk(tmp_path) as desk:
            async with running_outbox(desk.journal) as outbox:
                (row,) = await post_failures(desk, outbox, receiver, 1)
                await wait_empty(outbox)
                assert outbox.dead == 1
                assert outbox.attempts == Counter(taken=0, failed=3, dead=1)
            (dead,) = await desk.journal.dead_webhooks()
    assert len(receiver.received) == 4, "the first attempt and three retries"
    assert (dead.id, dead.attempts, dead.last_error) == (row.id, 4, "it answered 500")
    assert len(events(log_output, "webhook.failed")) == 3
    (entry,) = events(log_output, "webhook.dead")
    assert entry["log_level"] == "error"
    assert entry["reason"] == "it answered 500"


async def test_no_retries_is_one_attempt(tmp_path: Path) -> None:
    with trio.fail_after(10):
        async with (
            webhook_receiver(Reply(status=500)) as receiver,
            running_desk(tmp_path) as desk,
            running_outbox(desk.journal, retry=RetryPolicy(retries=0)) as outbox,
        ):
            await post_failures(desk, outbox, receiver, 1)
            await wait_empty(outbox)
            assert (len(receiver.received), outbox.dead) == (1, 1)


async def test_a_connection_that_the_receiver_closes_between_two_webhooks_costs_no_attempt(tmp_path: Path) -> None:
    """Without retries each webhook has one attempt: it must not be lost to a connection that was kept too long."""
    with trio.fail_after(10):
        async with (
            webhook_receiver() as receiver,
            running_desk(tmp_path) as desk,
            running_outbox(desk.journal, retry=RetryPolicy(retries=0)) as outbox,
        ):
            await post_failures(desk, outbox, receiver, 1, "one")
            await outbox.wait_drained()
            receiver.script(Reply(cut=Cut.AT_BODY))  # on the kept connection: as if it had been closed just then
            await post_failures(desk, outbox, receiver, 1, "two")
            await outbox.wait_drained()
            assert outbox.attempts == Counter(taken=2, failed=0, dead=0)
    assert [request.connection for request in receiver.begun] == [0, 0, 1]


async def test_retry_after_is_obeyed_up_to_its_bound(tmp_path: Path) -> None:
    policy = RetryPolicy(retries=3, first_delay_s=0.001, max_delay_s=0.001, max_retry_after_s=0.3)
    with trio.fail_after(10):
        async with webhook_receiver() as receiver, running_desk(tmp_path) as desk:
            receiver.script(Reply(status=429, headers={"Retry-After": "3600"}))
            async with running_outbox(desk.journal, retry=policy) as outbox:
                await post_failures(desk, outbox, receiver, 1)
                first, second = await receiver.wait_received(2)
    assert second.at - first.at >= 0.3


def test_the_schedule_of_webhooks_doubles_from_a_second_to_five_minutes() -> None:
    policy = retry_policy(20)
    delays = [policy.delay_s(attempt, retry_after_s=None, jitter=lambda: 0.0) for attempt in (1, 2, 3, 20, 21)]
    assert delays == [1.0, 2.0, 4.0, 300.0, None]
    assert policy.delay_s(1, retry_after_s=86_400.0) == 3600.0


async def test_a_redirect_is_a_failure_and_its_target_is_not_asked(tmp_path: Path) -> None:
    with trio.fail_after(10):
        async with webhook_receiver() as receiver, running_desk(tmp_path) as desk:
            receiver.script(Reply(status=307, headers={"Location": receiver.url("/elsewhere")}))
            async with running_outbox(desk.journal) as outbox:
                await post_failures(desk, outbox, receiver, 1)
                await wait_empty(outbox)
                assert outbox.attempts == Counter(taken=1, failed=1, dead=0)
    assert [request.path for request in receiver.received] == ["/job-0", "/job-0"]


async def test_one_receiver_that_hangs_delays_none_of_fifty(tmp_path: Path) -> None:
    """500 webhooks to 50 receivers; the hanging one's are the first of every ten."""
    with trio.fail_after(60):
        async with AsyncExitStack() as stack:
            hanging = await stack.enter_async_context(webhook_receiver(Reply(never=True)))
            others = [await stack.enter_async_context(webhook_receiver()) for _ in range(49)]
            desk = await stack.enter_async_context(running_desk(tmp_path))
            rows: list[WebhookRow] = []
            async with trio.open_nursery() as nursery:

                async def end(number: int) -> None:
                    receiver = ([hanging, *others])[number % 50]
                    rows.extend(await desk.end_job(f"job-{number}", FAILURE, webhook_v2=receiver.url()))

                for number in range(500):
                    nursery.start_soon(end, number)
            async with running_outbox(desk.journal, stall_s=30.0) as outbox:
                began = trio.current_time()
                outbox.post(rows)
                await wait_until(outbox, lambda: outbox.attempts["taken"] == 490)
                took_s = trio.current_time() - began
                assert outbox.pending == 10
                assert len(hanging.begun) == 1, "a receiver that has taken nothing yet gets one at a time"
    assert took_s < 10, "no time-out of 30 s was waited for"
    assert all(len(receiver.received) == 10 for receiver in others)


async def test_dead_receivers_do_not_use_up_the_slots_of_others(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with (
            webhook_receiver(up=False) as refusing,
            webhook_receiver(Reply(never=True)) as hanging,
            webhook_receiver() as good,
            running_desk(tmp_path) as desk,
            running_outbox(
                desk.journal,
                at_once=2,
                suspects_at_once=2,
                stall_s=0.2,
                retry=RetryPolicy(retries=100, first_delay_s=0),
            ) as outbox,
        ):
            await post_failures(desk, outbox, refusing, 20, "refusing")
            await post_failures(desk, outbox, hanging, 20, "hanging")
            await wait_until(outbox, lambda: outbox.attempts["failed"] >= 30)
            await post_failures(desk, outbox, good, 20, "good")
            began = trio.current_time()
            await good.wait_received(20)
            assert trio.current_time() - began < 2
            assert outbox.pending >= 40


async def test_a_receiver_that_answers_gets_several_at_once_and_never_more(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with (
            webhook_receiver() as receiver,
            running_desk(tmp_path) as desk,
            running_outbox(desk.journal, per_receiver=3) as outbox,
        ):
            hold = trio.Event()
            receiver.script(Reply())
            receiver.default = Reply(hold=hold)
            await post_failures(desk, outbox, receiver, 8)
            await receiver.wait_begun(4)  # one, and as that was taken three more
            await trio.sleep(0.1)  # nothing else happens that could be waited for
            assert len(receiver.begun) == 4
            hold.set()
            await wait_empty(outbox)
    assert len(receiver.received) == 8


async def test_a_restart_tries_again_at_once_with_the_same_event(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with webhook_receiver(Reply(status=503)) as receiver:
            async with running_desk(tmp_path) as desk, running_outbox(desk.journal, retry=LONG) as outbox:
                await post_failures(desk, outbox, receiver, 1)
                await wait_until(outbox, lambda: outbox.attempts["failed"] == 1)
                assert outbox.pending == 1
            receiver.default = Reply()
            async with running_desk(tmp_path) as desk, running_outbox(desk.journal, retry=LONG) as outbox:
                assert outbox.pending == 1, "known from the start on"
                await wait_empty(outbox)
                assert await desk.journal.count_webhooks() == (0, 0)
    first, second = receiver.received
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body


async def test_attempts_count_on_over_a_restart(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with webhook_receiver(Reply(status=503)) as receiver:
            for _ in range(4):
                async with running_desk(tmp_path) as desk, running_outbox(desk.journal, retry=LONG) as outbox:
                    if desk.journal.next_webhook_sequence() == 1:
                        await post_failures(desk, outbox, receiver, 1)
                    await wait_until(outbox, lambda: outbox.attempts.total() == 1)
            async with running_desk(tmp_path) as desk:
                (dead,) = await desk.journal.dead_webhooks()
    assert (dead.attempts, len(receiver.received)) == (4, 4)


async def test_the_drain_waits_for_what_is_being_sent_and_not_for_a_back_off(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with (
            webhook_receiver() as slow,
            webhook_receiver(Reply(status=500)) as broken,
            running_desk(tmp_path) as desk,
            running_outbox(desk.journal, retry=LONG) as outbox,
        ):
            slow.default = Reply(delay_s=0.2)
            await post_failures(desk, outbox, broken, 1, "broken")
            await post_failures(desk, outbox, slow, 2, "slow")
            await outbox.wait_drained()
            assert (len(slow.received), len(broken.received)) == (2, 1)
            assert outbox.pending == 1
            assert not outbox.busy


async def test_a_journal_in_memory_is_drained_of_back_offs_too_and_says_what_is_lost(log_output: LogCapture) -> None:
    with trio.fail_after(20):
        async with webhook_receiver() as receiver, running_desk(None) as desk:
            async with running_outbox(desk.journal) as outbox:
                receiver.script(Reply(status=500), Reply(status=500))
                await post_failures(desk, outbox, receiver, 1)
                await outbox.wait_drained()
                assert (len(receiver.received), outbox.pending) == (3, 0)
            assert events(log_output, "outbox.lost") == []
            receiver.default = Reply(status=500)
            async with running_outbox(desk.journal, retry=LONG) as outbox:
                await post_failures(desk, outbox, receiver, 2, "more")
                with trio.move_on_after(0.3) as scope:
                    await outbox.wait_drained()
                assert scope.cancelled_caught
    assert [entry["events"] for entry in events(log_output, "outbox.lost")] == [2]


async def test_what_the_command_line_replays_and_drops_is_followed(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with (
            webhook_receiver(Reply(status=410)) as receiver,
            running_desk(tmp_path) as desk,
            running_outbox(desk.journal, retry=LONG) as outbox,
        ):
            (dead,) = await post_failures(desk, outbox, receiver, 1, "dead")
            await wait_empty(outbox)
            receiver.default = Reply(status=500)
            dropped, hastened = await post_failures(desk, outbox, receiver, 2, "late")
            await wait_until(outbox, lambda: outbox.attempts["failed"] >= 2)
            receiver.default = Reply()
            assert (outbox.dead, outbox.pending) == (1, 2)
            assert await desk.journal.count_webhooks() == (2, 1), (
                "the attempts are written before the command line comes"
            )

            def beside() -> None:
                with Database.open_beside(tmp_path) as database:
                    assert database.drop([dropped.id]) == 1
                    assert database.replay([dead.id, hastened.id]) == 2

            await trio.to_thread.run_sync(beside)
            await wait_empty(outbox)
            assert outbox.dead == 0
            assert await desk.journal.count_webhooks() == (0, 0)
    attempts = Counter(request.headers["webhook-id"] for request in receiver.received)
    assert attempts == {dead.id: 2, dropped.id: 1, hastened.id: 2}


async def test_more_events_than_are_held_wait_in_the_journal(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with (
            webhook_receiver() as receiver,
            running_desk(tmp_path) as desk,
            running_outbox(desk.journal, max_pending=4) as outbox,
        ):
            rows: list[WebhookRow] = []
            for number in range(25):
                rows += await desk.end_job(f"job-{number}", FAILURE, webhook_v2=receiver.url())
            for row in rows:
                outbox.post([row])
                assert outbox.pending <= 4
            await receiver.wait_received(25)
            await wait_empty(outbox)
            assert await desk.journal.count_webhooks() == (0, 0)
    assert len({request.headers["webhook-id"] for request in receiver.received}) == 25 == len(receiver.received)


@pytest.mark.parametrize("change", ["gone", "shrunk", "grown"])
async def test_an_output_that_is_not_what_it_was_is_a_dead_letter_said_loudly(
    tmp_path: Path, log_output: LogCapture, change: str
) -> None:
    with trio.fail_after(20):
        async with webhook_receiver() as receiver, running_desk(tmp_path / "state") as desk:
            async with running_outbox(desk.journal) as outbox:
                outputs = [output(tmp_path, f"{n}.png", b"0123456789") for n in range(2)]
                rows = await desk.end_job("j", success(*outputs), webhook=receiver.url())
                if change == "gone":
                    outputs[0].path.unlink()
                else:
                    outputs[0].path.write_bytes(b"012" if change == "shrunk" else b"0123456789 and more")
                outbox.post(rows)
                await wait_empty(outbox)
            (dead,) = await desk.journal.dead_webhooks()
    assert [request.json["filename"] for request in receiver.received] == ["1.png"], "the job's next one goes"
    assert dead.last_error == "the output 0.png is gone or not what it was"
    assert str(tmp_path) not in dead.last_error
    (entry,) = events(log_output, "webhook.dead")
    assert entry["log_level"] == "error"


async def test_an_output_that_cannot_be_read_just_now_is_tried_again(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with webhook_receiver() as receiver, running_desk(tmp_path / "state") as desk:
            async with running_outbox(desk.journal, retry=LONG) as outbox:
                made = output(tmp_path, "a.png", b"abc")
                missing = tmp_path / ("n" * 300)  # ENAMETOOLONG: an error that does not say that the file is not there
                outcome = success(attrs.evolve(made, path=missing))
                outbox.post(await desk.end_job("j", outcome, webhook_v2=receiver.url()))
                await wait_until(outbox, lambda: outbox.attempts.total() == 1)
                assert outbox.attempts == Counter(taken=0, failed=1, dead=0)
            (row,) = await desk.journal.pending_webhooks()
    assert row.last_error == "the output a.png could not be read"
    assert receiver.begun == []


async def test_a_record_that_is_not_there_or_not_readable_is_a_dead_letter_and_no_crash(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with (
            webhook_receiver() as receiver,
            running_desk(tmp_path) as desk,
            running_outbox(desk.journal) as outbox,
        ):
            (row,) = await desk.end_job("j", FAILURE, webhook_v2=receiver.url())
            strange = [
                (attrs.evolve(row, id="msg_1", kind="v3"), "its kind 'v3' is not known to this version"),
                (attrs.evolve(row, id="msg_2", job_id="nobody"), "the record of its job is gone"),
                (attrs.evolve(row, id="msg_3", job_key="other"), "the record of its job is gone"),
                (
                    attrs.evolve(row, id="msg_4", kind="v1-output", place=0),
                    "the record of its job has no such output",
                ),
            ]
            outbox.post([each for each, _ in strange])
            outbox.post([row])
            await wait_empty(outbox)
            assert outbox.attempts == Counter(taken=1, failed=0, dead=4)
    assert len(receiver.received) == 1


async def test_a_refused_url_is_dead_at_once_and_a_name_that_may_resolve_otherwise_is_not(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with running_desk(tmp_path) as desk, running_outbox(desk.journal, retry=LONG) as outbox:
            outbox.post(await desk.end_job("a", FAILURE, webhook_v2="http://169.254.169.254/latest?token=s3cret"))
            outbox.post(await desk.end_job("b", FAILURE, webhook_v2="http://nobody.invalid/"))
            await wait_until(outbox, lambda: outbox.attempts.total() == 2)
            assert outbox.attempts == Counter(taken=0, failed=1, dead=1)
            (dead,) = await desk.journal.dead_webhooks()
            assert dead.attempts == 1
            assert "URL_POLICY=guarded" in dead.last_error
            assert "s3cret" not in dead.last_error


async def test_nothing_of_a_url_but_its_host_is_logged(tmp_path: Path, log_output: LogCapture) -> None:
    with trio.fail_after(20):
        async with webhook_receiver() as receiver, running_desk(tmp_path) as desk:
            receiver.script(Reply(cut=Cut.AT_HEAD), Reply(status=500))
            async with running_outbox(desk.journal) as outbox:
                url = receiver.url("/path-token?query=token", user_info="user:password")
                outbox.post(await desk.end_job("j", FAILURE, webhook_v2=url))
                await wait_empty(outbox)
    expected = "Basic " + base64.b64encode(b"user:password").decode()
    assert {request.headers["authorization"] for request in receiver.received} == {expected}
    assert receiver.received[0].target == "/path-token?query=token"
    assert "@" not in receiver.received[0].headers["host"]
    assert len(log_output.entries) >= 3
    assert not [entry for entry in log_output.entries if "token" in str(entry) or "password" in str(entry)]


async def test_a_journal_that_cannot_be_read_for_a_while_costs_no_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_output: LogCapture
) -> None:
    monkeypatch.setattr(outbox_module, "_JOURNAL_PAUSE_S", 0.01)
    with trio.fail_after(20):
        async with webhook_receiver() as receiver, running_desk(tmp_path) as desk:
            (row,) = await desk.end_job("j", FAILURE, webhook_v2=receiver.url())
            journal = FailingJournal(desk.journal)
            async with running_outbox(cast("Journal", journal), retry=RetryPolicy(retries=0)) as outbox:
                assert outbox.pending == 1
                await wait_empty(outbox)
                assert outbox.attempts == Counter(taken=1, failed=0, dead=0)
    assert [request.headers["webhook-id"] for request in receiver.received] == [row.id]
    assert len(events(log_output, "outbox.journal_unavailable")) == 2
    assert len(events(log_output, "webhook.postponed")) == 2


@attrs.define
class FailingJournal:
    """A journal whose first two reads of each kind fail."""

    journal: Journal
    reads: Counter[str] = attrs.field(factory=Counter)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.journal, name)

    async def pending_webhooks(self) -> list[WebhookRow]:
        self._fail("pending_webhooks")
        return await self.journal.pending_webhooks()

    async def find_job(self, job_id: str) -> JobRow | None:
        self._fail("find_job")
        return await self.journal.find_job(job_id)

    def _fail(self, what: str) -> None:
        self.reads[what] += 1
        if self.reads[what] <= 2:
            raise JournalUnavailable("the disk cannot be read")


@attrs.define(eq=False)
class CancelAtStep(trio.abc.Instrument):
    """Cancels *scope* before the step number *at* of the first attempt; *steps* were taken before."""

    at: int
    scope: trio.CancelScope
    steps: int = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task.name.endswith("Outbox._attempt"):
            self.steps += 1
            if self.steps == self.at:
                self.scope.cancel("the test says so")


async def test_a_cancel_at_any_await_of_an_attempt_loses_nothing_and_leaves_nothing_open(tmp_path: Path) -> None:
    made = output(tmp_path, "a.bin", bytes(700_000))  # several pieces, beyond what is read at once
    cancelled = 0
    with trio.fail_after(60):
        async with webhook_receiver() as receiver, running_desk(tmp_path / "state") as desk:
            for at in range(1, 1000):
                job_id = f"job-{at}"
                await desk.end_job(job_id, success(made), webhook_v2=receiver.url())
                with trio.CancelScope() as scope:
                    canceller = CancelAtStep(at, scope)
                    trio.lowlevel.add_instrument(canceller)
                    try:
                        async with running_outbox(desk.journal, secrets=(SECRET,)) as outbox:
                            await wait_empty(outbox)
                    finally:
                        trio.lowlevel.remove_instrument(canceller)
                assert _open_files(made.path) == 0
                if not scope.cancelled_caught:
                    break
                cancelled += 1
                async with running_outbox(desk.journal) as outbox:
                    await wait_empty(outbox)
                assert job_id in {request.json["id"] for request in receiver.received}, f"lost at step {at}"
                receiver.received.clear()
            assert await desk.journal.count_webhooks() == (0, 0)
    assert cancelled > 20, "an attempt waits at least for the journal, threads, the connection and each piece"


def _open_files(path: Path) -> int:
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(link) == str(path) for link in links)


async def test_a_large_body_is_streamed_and_never_in_memory(tmp_path: Path) -> None:
    size_bytes = 200 * 1024 * 1024
    path = tmp_path / "video.bin"
    with path.open("wb") as file:
        file.truncate(size_bytes)
    with trio.fail_after(120):
        async with (
            webhook_receiver(keep_bytes=0) as receiver,
            running_desk(tmp_path / "state") as desk,
            running_outbox(desk.journal, secrets=(SECRET,)) as outbox,
        ):
            small = output(tmp_path, "small.png", b"warm")
            outbox.post(await desk.end_job("warm", success(small), webhook_v2=receiver.url()))
            await outbox.wait_drained()
            before = most = _rss_bytes()
            large = type(small)(
                path=path, filename="video.bin", node_id="9", media_type="video/mp4", size_bytes=size_bytes
            )
            outbox.post(await desk.end_job("large", success(large), webhook_v2=receiver.url()))
            while outbox.pending:
                await trio.sleep(0.01)
                most = max(most, _rss_bytes())
            assert outbox.attempts["taken"] == 2
    assert receiver.received[1].size_bytes > size_bytes * 4 // 3
    grown = most - before
    assert grown < 16 * 1024 * 1024, (
        f"{grown / 1e6:.1f} MB for a body of {receiver.received[1].size_bytes / 1e6:.0f} MB"
    )


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
