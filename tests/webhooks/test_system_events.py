"""ComfyUI's events at a real receiver: their form, their order, and what a bad receiver costs (never a job)."""

import base64
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import attrs
import httpx
import pytest
import trio
import trio.testing
from structlog.testing import LogCapture
from webhook_receiver import Cut, Received, Reply, WebhookReceiver, webhook_receiver

from comfyd.net import UrlRefused
from comfyd.webhooks.event_queue import EventQueue
from comfyd.webhooks.system_events import SystemEvents, SystemEventsConfig, _Receiver, serve_system_events

JOB, PROMPT = "job-1", "0123456789abcdef0123456789abcdef"
TYPES = frozenset(
    {
        "status",
        "progress",
        "progress_state",
        "executing",
        "execution_start",
        "executed",
        "execution_success",
        "execution_error",
    }
)


def config_for(url: str, **changes: Any) -> SystemEventsConfig:
    config = SystemEventsConfig(url=url, events=TYPES, metadata={"batch": "abc"}, first_delay_s=0.01, max_delay_s=0.05)
    return attrs.evolve(config, **changes)


@asynccontextmanager
async def serving(config: SystemEventsConfig) -> AsyncIterator[SystemEvents]:
    async with trio.open_nursery() as nursery:
        yield await nursery.start(serve_system_events, config)
        nursery.cancel_scope.cancel("the test is over")


def publish(events: SystemEvents, kind: str, job_id: str | None = JOB, **data: Any) -> None:
    events.publish(kind, {**data, "prompt_id": PROMPT}, None, job_id, PROMPT)


def labels(received: list[Received]) -> list[Any]:
    return [request.json["data"]["data"].get("node") for request in received]


def logged(output: LogCapture, event: str) -> list[dict[str, Any]]:
    return [dict(entry) for entry in output.entries if entry["event"] == event]


# The form of an event


async def published(kind: str, data: dict[str, Any], job_id: str | None, sid: str | None = None, **changes: Any) -> Any:
    """What the receiver is told of one event."""
    with trio.fail_after(5):
        async with webhook_receiver() as receiver, serving(config_for(receiver.url(), **changes)) as events:
            events.publish(kind, data, sid, job_id, PROMPT if job_id else None)
            await events.wait_drained()
            [request] = receiver.received
            assert request.headers["content-type"] == "application/json"
            return json.loads(request.body)


async def test_an_event_is_told_under_the_requests_id_with_the_metadata() -> None:
    data = {"node": "4", "display_node": "4", "prompt_id": PROMPT}
    assert await published("executing", data, JOB, sid="s1") == {
        "event": "comfy.executing",
        "data": {"type": "executing", "data": {**data, "prompt_id": JOB}, "sid": "s1"},
        "metadata": {"batch": "abc"},
    }
    assert data["prompt_id"] == PROMPT, "the engine's own message is left as it is"


async def test_prompt_ids_of_the_nodes_of_progress_state_are_the_requests_id_too() -> None:
    nodes = {str(n): {"value": n, "max": 9, "node_id": str(n), "prompt_id": PROMPT} for n in range(3)}
    told = await published("progress_state", {"prompt_id": PROMPT, "nodes": nodes}, JOB)
    assert PROMPT not in json.dumps(told)
    assert told["data"]["data"]["nodes"]["2"] == {"value": 2, "max": 9, "node_id": "2", "prompt_id": JOB}
    assert nodes["0"]["prompt_id"] == PROMPT, "the engine's own message is left as it is"


async def test_a_broadcast_is_told_as_it_is() -> None:
    data = {"status": {"exec_info": {"queue_remaining": 3}}}
    assert (await published("status", data, None))["data"] == {"type": "status", "data": data}


async def test_whole_numbers_of_64_bits_arrive_exactly() -> None:
    told = await published("executed", {"output": {"seed": [18446744073709551615]}}, JOB)
    assert told["data"]["data"]["output"]["seed"] == [18446744073709551615]


ERROR = {
    "prompt_id": PROMPT,
    "node_id": "4",
    "node_type": "Loader",
    "exception_type": "OSError",
    "exception_message": "no such file: /opt/secret/place/model.bin",
    "traceback": ["File /opt/secret/place/nodes.py"],
    "current_inputs": {"api_key": ["secret"]},
    "current_outputs": ["1"],
}


async def test_an_error_is_told_without_traceback_inputs_and_paths() -> None:
    told = await published("execution_error", ERROR, JOB)
    assert told["data"]["data"] == {
        "prompt_id": JOB,
        "node_id": "4",
        "node_type": "Loader",
        "exception_type": "OSError",
        "exception_message": "no such file: model.bin",
    }


async def test_tracebacks_and_inputs_are_told_if_the_operator_wants_them() -> None:
    told = (await published("execution_error", ERROR, JOB, tracebacks=True))["data"]["data"]
    assert told["traceback"] == ERROR["traceback"]
    assert told["current_inputs"] == ERROR["current_inputs"]
    assert told["exception_message"] == "no such file: model.bin"


async def test_only_the_events_asked_for_are_sent() -> None:
    with trio.fail_after(5):
        async with webhook_receiver() as receiver:
            config = config_for(receiver.url(), events=frozenset({"executed"}))
            async with serving(config) as events:
                publish(events, "executing", node="1")
                publish(events, "executed", node="2")
                await events.wait_drained()
                assert labels(receiver.received) == ["2"]


# Attempts


async def test_each_attempt_is_signed_anew_under_the_same_id() -> None:
    secrets = (b"a" * 24, b"b" * 24)
    before = int(time.time())
    with trio.fail_after(5):
        async with webhook_receiver() as receiver, serving(config_for(receiver.url(), secrets=secrets)) as events:
            receiver.script(Reply(status=503), Reply(status=429))
            publish(events, "executed", node="1")
            publish(events, "executed", node="2")
            await events.wait_drained()
            ids = [request.headers["webhook-id"] for request in receiver.received]
            assert ids[0] == ids[1] == ids[2] != ids[3]
            for request in receiver.received:
                stamp = request.headers["webhook-timestamp"]
                assert before <= int(stamp) <= time.time()
                text = f"{request.headers['webhook-id']}.{stamp}.".encode() + request.body
                wanted = [base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode() for key in secrets]
                assert request.headers["webhook-signature"] == f"v1,{wanted[0]} v1,{wanted[1]}"
            assert (events.sent, events.failed) == (2, 0)


async def test_without_secrets_there_is_no_signature_but_an_id() -> None:
    with trio.fail_after(5):
        async with webhook_receiver() as receiver, serving(config_for(receiver.url())) as events:
            publish(events, "executed")
            [request] = await receiver.wait_received(1)
            assert "webhook-signature" not in request.headers
            assert request.headers["webhook-id"].startswith("evt_")


BAD: dict[str, Reply] = {
    "server error": Reply(status=500),
    "client error": Reply(status=404),
    "redirect": Reply(status=307, headers={"Location": "/elsewhere"}),
    "redirect to no URL": Reply(status=302, headers={"Location": "http://[::::"}),
    "not modified": Reply(status=304),
    "cut at the head": Reply(cut=Cut.AT_HEAD),
    "cut at the body": Reply(cut=Cut.AT_BODY),
    "cut in the answer": Reply(cut=Cut.IN_ANSWER),
    "no answer": Reply(never=True),
    "answer before the body": Reply(status=413, early=True),
}


@pytest.mark.parametrize("reply", BAD.values(), ids=BAD.keys())
async def test_anything_but_success_is_tried_again_and_the_order_is_kept(reply: Reply) -> None:
    with trio.fail_after(10):
        async with webhook_receiver() as receiver:
            config = config_for(receiver.url(), retries=2, attempt_timeout_s=0.3)
            async with serving(config) as events:
                receiver.script(reply, reply)
                for number in range(5):
                    publish(events, "executed", node=number)
                await events.wait_drained()
                assert (events.sent, events.failed, events.dropped, events.pending) == (5, 0, 0, 0)
                assert len(receiver.begun) == 7
                assert {request.path for request in receiver.begun} == {"/hook"}, "a redirect is not followed"
                taken = [request for request in receiver.received if request.status == 200]
                assert labels(taken) == [0, 1, 2, 3, 4]


async def test_one_event_is_given_up_after_its_retries_and_the_next_has_its_own() -> None:
    with trio.fail_after(5):
        async with webhook_receiver() as receiver, serving(config_for(receiver.url(), retries=2)) as events:
            receiver.script(*[Reply(status=500)] * 5)
            for number in range(3):
                publish(events, "executed", node=number)
            await events.wait_drained()
            assert labels(receiver.received) == [0, 0, 0, 1, 1, 1, 2]
            assert (events.sent, events.failed) == (2, 1)


async def test_gone_ends_an_event_at_once(log_output: LogCapture) -> None:
    with trio.fail_after(5):
        async with webhook_receiver() as receiver, serving(config_for(receiver.url())) as events:
            receiver.script(Reply(status=410), Reply(status=410))
            for number in range(3):
                publish(events, "executed", node=number)
            await events.wait_drained()
            assert labels(receiver.received) == [0, 1, 2]
            assert (events.sent, events.failed) == (1, 2)
    [line] = logged(log_output, "system_events.not_delivered")
    assert (line["log_level"], line["reason"], line["attempts"]) == ("warning", "status 410", 1)


async def test_the_answers_body_is_not_what_decides() -> None:
    """One without an end or too long is not waited for; a short one is read, and the connection used again."""
    with trio.fail_after(5):
        async with webhook_receiver() as receiver, serving(config_for(receiver.url())) as events:
            endless, long, short = Reply(endless=True), Reply(body=b"x" * 70_000), Reply(body=b"x" * 50_000)
            receiver.script(endless, long, short, Reply(status=204))
            for number in range(5):
                publish(events, "executed", node=number)
            await events.wait_drained()
            assert (events.sent, events.failed) == (5, 0)
            assert [request.connection for request in receiver.received] == [0, 1, 2, 2, 2]


async def test_events_share_one_connection_one_at_a_time() -> None:
    with trio.fail_after(5):
        async with webhook_receiver() as receiver, serving(config_for(receiver.url())) as events:
            for number in range(200):
                publish(events, "executed", node=number)
            assert events.pending == 200
            await events.wait_drained()
            assert labels(receiver.received) == list(range(200))
            assert receiver.connections == 1


async def test_credentials_of_the_url_become_a_header_and_reach_no_log(
    log_output: LogCapture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with trio.fail_after(5):
        async with webhook_receiver() as receiver:
            url = receiver.url("/hook?token=t0ken", user_info="o%40p:p%3Ass-w0rd")
            config = config_for(url, retries=0)
            assert "w0rd" not in repr(config)
            async with serving(config) as events:
                receiver.script(Reply(status=500))
                publish(events, "executed")
                publish(events, "executed")
                await events.wait_drained()
                encoded = base64.b64encode(b"o@p:p:ss-w0rd").decode()
                assert {request.headers["authorization"] for request in receiver.received} == {f"Basic {encoded}"}
                assert {request.target for request in receiver.received} == {"/hook?token=t0ken"}
                assert {request.headers["host"] for request in receiver.received} == {f"127.0.0.1:{receiver.port}"}
    assert logged(log_output, "system_events.not_delivered")[0]["receiver"] == receiver.url()
    for secret in ("w0rd", "t0ken", encoded):
        assert secret not in str(log_output.entries)
        assert secret not in caplog.text


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "http://", "http://u:pa55@[::::/x"])
async def test_a_url_that_nothing_can_be_sent_to_ends_the_start(url: str) -> None:
    with pytest.raises(UrlRefused) as caught:
        await serve_system_events(config_for(url))
    assert "pa55" not in str(caught.value)


# A receiver that is slow, or away


async def test_a_slow_receiver_gets_all_state_changes_and_costs_the_publisher_nothing() -> None:
    with trio.fail_after(20):
        async with webhook_receiver(Reply(delay_s=0.05)) as receiver, serving(config_for(receiver.url())) as events:
            began = time.perf_counter()
            publish(events, "execution_start", node="start")
            for node in range(10):
                publish(events, "executing", node=f"begin {node}")
                for value in range(1, 301):
                    publish(events, "progress", node=f"step {node}", value=value, max=300)
            publish(events, "execution_success", node="end")
            took_s = time.perf_counter() - began
            assert took_s < 0.5, "3,000 events of some microseconds each"
            await events.wait_drained()
            assert receiver.begun[-1].at - receiver.begun[0].at >= 0.05 * (len(receiver.begun) - 1), "it was slow"
    states = [label for label in labels(receiver.received) if not str(label).startswith("step")]
    assert states == ["start", *(f"begin {node}" for node in range(10)), "end"]
    steps = [request.json["data"]["data"] for request in receiver.received if request.json["event"] == "comfy.progress"]
    assert [(data["node"], data["value"]) for data in steps] == [(f"step {node}", 300) for node in range(10)]
    assert (events.failed, events.dropped) == (0, 0)


async def test_progress_while_one_is_sent_arrives_in_order_and_ends_with_the_last() -> None:
    with trio.fail_after(10):
        async with webhook_receiver() as receiver, serving(config_for(receiver.url())) as events:
            for value in range(2000):
                publish(events, "progress", node="1", value=value)
                if value % 20 == 0:
                    await trio.testing.wait_all_tasks_blocked()
            await events.wait_drained()
            values = [request.json["data"]["data"]["value"] for request in receiver.received]
            assert all(one < other for one, other in pairwise(values))
            assert values[-1] == 1999
            assert len(values) > 50, "what was taken in time is not coalesced"


async def test_a_receiver_that_comes_back_gets_what_waited_in_order(log_output: LogCapture) -> None:
    with trio.fail_after(10):
        async with webhook_receiver(up=False) as receiver, serving(config_for(receiver.url(), retries=3)) as events:
            for number in range(50):
                publish(events, "executed", node=number)
            while events.failed < 3:  # noqa: ASYNC110  # nothing tells of an event that is given up
                await trio.sleep(0.005)
            lost = events.failed
            assert events.pending == 50 - lost
            await receiver.go_up()
            await events.wait_drained()
            assert labels(receiver.received) == list(range(50))[-events.sent :], "the first ones are lost, none later"
            assert events.sent + events.failed == 50
            assert events.failed <= lost + 1
            [down] = logged(log_output, "system_events.not_delivered")
            assert (down["reason"], down["attempts"]) == ("connection refused", 4)
            [up] = logged(log_output, "system_events.delivered_again")
            assert up["lost"] == events.failed


async def test_a_receiver_that_restarts_between_two_events_costs_a_retry_and_no_event() -> None:
    with trio.fail_after(10):
        async with webhook_receiver() as receiver, serving(config_for(receiver.url(), retries=8)) as events:
            publish(events, "executed", node=0)
            await events.wait_drained()
            await receiver.go_down()
            publish(events, "executed", node=1)
            publish(events, "executed", node=2)
            await trio.testing.wait_all_tasks_blocked()
            await receiver.go_up()
            await events.wait_drained()
            assert labels(receiver.received) == [0, 1, 2]
            assert (events.sent, events.failed) == (3, 0)


async def test_drained_means_that_the_last_one_was_taken() -> None:
    hold = trio.Event()
    with trio.fail_after(5):
        async with webhook_receiver() as receiver, serving(config_for(receiver.url())) as events:
            await events.wait_drained()  # at once
            receiver.script(Reply(hold=hold))
            publish(events, "executed")
            await receiver.wait_received(1)
            with trio.move_on_after(0.05) as waited:
                await events.wait_drained()
            assert waited.cancelled_caught
            assert events.pending == 1
            hold.set()
            await events.wait_drained()
            assert (events.pending, events.sent) == (0, 1)


# Time, with a transport of our own: delays without waiting for them


class Script(httpx.AsyncBaseTransport):
    """Answers by a function of the number of the request; notes when they came."""

    def __init__(self, answers: Callable[[int], httpx.Response]) -> None:
        self.at: list[float] = []
        self._answers = answers

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await trio.lowlevel.checkpoint()
        self.at.append(trio.current_time())
        return self._answers(len(self.at) - 1)


def answer(status: int = 200, headers: dict[str, str] | None = None) -> httpx.Response:
    return httpx.Response(status, headers=headers, stream=httpx.ByteStream(b""))


@asynccontextmanager
async def sending(transport: Script, queue: EventQueue | None = None, **changes: Any) -> AsyncIterator[SystemEvents]:
    config = attrs.evolve(config_for("http://x/", first_delay_s=0.5, max_delay_s=30.0), **changes)
    events = SystemEvents(config=config, receiver_name="x", queue=queue or EventQueue())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(events.send_all, _Receiver(config, transport))
        yield events
        nursery.cancel_scope.cancel("the test is over")


async def test_retries_wait_longer_each_time_up_to_thirty_seconds(autojump_clock: trio.testing.MockClock) -> None:
    transport = Script(lambda _: answer(500))
    async with sending(transport, retries=8) as events:
        publish(events, "executed")
        await events.wait_drained()
    assert len(transport.at) == 9
    for (one, other), whole_s in zip(pairwise(transport.at), [0.5, 1, 2, 4, 8, 16, 30, 30], strict=True):
        assert whole_s / 2 - 1e-6 <= other - one <= whole_s + 1e-6


async def test_retry_after_is_obeyed_in_seconds_and_as_a_date(autojump_clock: trio.testing.MockClock) -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 40))
    headers = [{"retry-after": "7"}, {"retry-after": date}, {"retry-after": "86400"}]
    transport = Script(lambda number: answer(503, headers[number]) if number < 3 else answer())
    async with sending(transport, retries=3) as events:
        publish(events, "executed")
        await events.wait_drained()
        assert events.sent == 1
    seconds, until_date, longest = (other - one for one, other in pairwise(transport.at))
    assert 7 <= seconds < 7.1
    assert 30 < until_date <= 40
    assert 600 <= longest < 600.1


async def test_an_outage_is_one_line_however_many_events_it_costs(
    autojump_clock: trio.testing.MockClock, log_output: LogCapture
) -> None:
    transport = Script(lambda number: answer(500 if number < 40 else 200))
    async with sending(transport, retries=1) as events:
        for number in range(25):
            publish(events, "executed", node=number)
        await events.wait_drained()
        assert (events.sent, events.failed) == (5, 20)
    assert len(logged(log_output, "system_events.not_delivered")) == 1
    [line] = logged(log_output, "system_events.delivered_again")
    assert line["lost"] == 20
    assert 20 * 0.25 < line["lasted_s"] < 20 * 0.5


async def test_drops_at_the_bound_are_counted_and_told_once_a_minute(
    autojump_clock: trio.testing.MockClock, log_output: LogCapture
) -> None:
    config = config_for("http://x/")
    events = SystemEvents(config=config, receiver_name="x", queue=EventQueue(max_events=10))
    for second in range(121):
        publish(events, "executed", node=second)
        await trio.sleep(1)
    assert (events.pending, events.dropped) == (10, 111)
    lines = logged(log_output, "system_events.dropped")
    assert [(line["dropped"], line["total"]) for line in lines] == [(1, 1), (60, 61)]
    events.tell_end()
    [end] = logged(log_output, "system_events.ended")
    assert (end["unsent"], end["dropped"]) == (10, 111)


async def test_what_is_no_json_is_dropped_and_raises_nothing() -> None:
    events = SystemEvents(config=config_for("http://x/"), receiver_name="x")
    events.publish("executed", {"output": object()}, None, JOB, PROMPT)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    events.publish("executed", {"output": deep}, None, JOB, PROMPT)
    assert (events.pending, events.dropped) == (0, 2)
    while deep:  # let go of it level by level: the interpreter's own way may not be
        deep = deep[0]


async def test_progress_of_two_prompts_that_are_no_jobs_is_not_mixed_up() -> None:
    events = SystemEvents(config=config_for("http://x/"), receiver_name="x")
    for prompt_id in ("one", "two", "one", "two"):
        events.publish("progress", {"node": "1", "prompt_id": prompt_id}, None, None, prompt_id)
    assert events.pending == 2


# Ending


async def test_at_the_end_the_log_says_what_was_not_sent(log_output: LogCapture) -> None:
    with trio.fail_after(5):
        async with webhook_receiver(Reply(never=True)) as receiver:
            async with serving(config_for(receiver.url())) as events:
                for number in range(3):
                    publish(events, "executed", node=number)
                await receiver.wait_received(1)
            await receiver.wait_until(lambda: receiver.open_connections == 0)
    [line] = logged(log_output, "system_events.ended")
    assert line["unsent"] == 3


async def test_an_end_with_nothing_left_is_silent(log_output: LogCapture) -> None:
    with trio.fail_after(5):
        async with webhook_receiver() as receiver, serving(config_for(receiver.url())) as events:
            publish(events, "executed")
            await events.wait_drained()
    assert not log_output.entries


async def test_a_cancel_while_the_answer_is_waited_for_ends_it_at_once() -> None:
    with trio.fail_after(5):
        async with webhook_receiver(Reply(never=True)) as receiver:
            async with serving(config_for(receiver.url())) as events:
                publish(events, "executed")
                await receiver.wait_received(1)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert (events.pending, events.sent) == (1, 0)
            await receiver.wait_until(lambda: receiver.open_connections == 0)


async def test_a_cancel_in_back_off_ends_it_at_once() -> None:
    with trio.fail_after(5):
        async with webhook_receiver(Reply(status=503, headers={"Retry-After": "60"})) as receiver:
            async with serving(config_for(receiver.url())) as events:
                publish(events, "executed")
                await receiver.wait_until(lambda: [request.status for request in receiver.begun] == [503])
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert (events.pending, events.failed) == (1, 0)
            await receiver.wait_until(lambda: receiver.open_connections == 0)


async def test_a_cancel_while_the_answers_body_is_read_ends_it_at_once() -> None:
    with trio.fail_after(5):
        async with webhook_receiver(Reply(endless=True)) as receiver:
            began = trio.current_time()
            async with serving(config_for(receiver.url())) as events:
                publish(events, "executed")
                await receiver.wait_until(lambda: [request.status for request in receiver.begun] == [200])
                for _ in range(100):  # it is never at rest: the body has no end
                    await trio.lowlevel.checkpoint()
                assert (events.pending, events.sent) == (1, 0)
            await receiver.wait_until(lambda: receiver.open_connections == 0)
            assert trio.current_time() - began < 0.9, "not because the second for the body was over"


async def test_a_cancel_at_any_step_leaves_no_connection_and_no_task(log_output: LogCapture) -> None:
    with trio.fail_after(20):
        async with webhook_receiver() as receiver:
            most = await _steps(receiver)
            assert most > 15, "resolving, connecting, sending, receiving and all that"
            for steps in range(most + 2):
                await _steps(receiver, steps)
                await receiver.wait_until(lambda: receiver.open_connections == 0)
            assert trio.lowlevel.current_statistics().tasks_living < 15


async def _steps(receiver: WebhookReceiver, cancel_after: int | None = None) -> int:
    """Send some events, cancelled after so many turns of the scheduler; return how many it took."""
    steps = 0
    receiver.script(Reply(body=b"x"), Reply(status=500, body=b"y" * 100_000))
    async with trio.open_nursery() as nursery:
        config = config_for(receiver.url(), first_delay_s=0.0)
        events = await nursery.start(serve_system_events, config)
        for number in range(3):
            publish(events, "executed", node=number)
        while events.pending and steps != cancel_after:
            await trio.lowlevel.checkpoint()
            steps += 1
        nursery.cancel_scope.cancel("the test wants it")
    receiver._scripts.clear()
    return steps
