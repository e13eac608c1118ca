"""Salad's metadata service is told what deleting this container costs, and gets in nobody's way."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise

import attrs
import pytest
import trio
from structlog.testing import LogCapture
from webhook_receiver import Cut, Received, Reply, WebhookReceiver, webhook_receiver

from comfyd.errors import BadConfiguration
from comfyd.host.salad import SaladConfig, salad_metadata, serve_deletion_cost

SALAD = {"SALAD_MACHINE_ID": "m-1", "SALAD_CONTAINER_GROUP_ID": "g-1"}
INTERVAL_S = 0.05


@attrs.define(eq=False)
class Jobs:
    """A queue with so many jobs."""

    number: int = 0
    looked_at: list[float] = attrs.field(factory=list)
    waiting: int = 0
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def depth(self) -> int:
        self.looked_at.append(trio.current_time())
        return self.number

    @property
    def gaps(self) -> list[float]:
        """Seconds between the looks, one before each request."""
        return [later - earlier for earlier, later in pairwise(self.looked_at)]

    async def wait_changed(self) -> None:
        self.waiting += 1
        await self._changed.wait()

    def become(self, number: int) -> None:
        self.number = number
        self._changed.set()
        self._changed = trio.Event()


def config_of(receiver: WebhookReceiver, *, min_interval_s: float = INTERVAL_S, timeout_s: float = 5.0) -> SaladConfig:
    config = SaladConfig.from_environment({**SALAD, "SALAD_METADATA_URL": receiver.url("")})
    assert config is not None
    return attrs.evolve(config, min_interval_s=min_interval_s, max_delay_s=4 * min_interval_s, timeout_s=timeout_s)


@asynccontextmanager
async def telling(config: SaladConfig, jobs: Jobs) -> AsyncIterator[None]:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve_deletion_cost, config, jobs.depth, jobs.wait_changed))
            yield
            nursery.cancel_scope.cancel("the test is over")


def costs(requests: list[Received]) -> list[int]:
    return [request.json["deletion_cost"] for request in requests]


async def test_the_cost_is_put_as_salad_wants_it_at_first_and_when_it_changes() -> None:
    jobs = Jobs()
    async with webhook_receiver() as receiver, telling(config_of(receiver), jobs):
        (request,) = await receiver.wait_received(1)
        assert (request.method, request.target) == ("PUT", "/v1/deletion-cost")
        assert (request.headers["metadata"], request.headers["content-type"]) == ("true", "application/json")
        assert json.loads(request.body) == {"deletion_cost": 0}
        jobs.become(3)
        assert costs(await receiver.wait_received(2)) == [0, 3]


async def test_the_latest_value_wins_and_one_request_is_under_way_at_a_time() -> None:
    jobs, answered = Jobs(), trio.Event()
    async with webhook_receiver() as receiver, telling(config_of(receiver), jobs):
        receiver.script(Reply(hold=answered))
        await receiver.wait_received(1)
        for number in range(1, 50):
            jobs.become(number)
        await trio.sleep(3 * INTERVAL_S)  # in which nothing may happen
        assert (len(receiver.begun), receiver.open_connections) == (1, 1)
        answered.set()
        assert costs(await receiver.wait_received(2)) == [0, 49]


async def test_values_are_told_no_more_often_than_the_interval_says() -> None:
    jobs = Jobs()
    async with webhook_receiver() as receiver, telling(config_of(receiver, min_interval_s=0.2), jobs):
        for number in range(1, 4):
            await receiver.wait_received(number)
            jobs.become(number)
        await receiver.wait_received(4)
        assert min(jobs.gaps) > 0.15
        assert len(jobs.looked_at) < 10


async def test_an_unchanged_queue_is_neither_told_nor_looked_at_again() -> None:
    jobs = Jobs()
    async with webhook_receiver() as receiver, telling(config_of(receiver), jobs):
        await receiver.wait_received(1)
        while not jobs.waiting:  # noqa: ASYNC110  # it begins to wait when the interval is over
            await trio.sleep(INTERVAL_S / 5)
        looks = len(jobs.looked_at)
        await trio.sleep(4 * INTERVAL_S)
        assert (len(jobs.looked_at), len(receiver.begun)) == (looks, 1)


@pytest.mark.parametrize(
    "answer",
    [Reply(status=500), Reply(status=404), Reply(status=307, headers={"location": "/"}), Reply(cut=Cut.AT_BODY)],
)
async def test_a_refused_value_is_repeated_until_it_is_taken_and_one_warning_tells_of_it(
    answer: Reply, log_output: LogCapture
) -> None:
    jobs = Jobs(number=2)
    async with webhook_receiver() as receiver:
        receiver.script(answer, answer, answer)
        async with telling(config_of(receiver), jobs):
            requests = await receiver.wait_received(4)
            await trio.sleep(3 * INTERVAL_S)
        assert costs(requests) == [2, 2, 2, 2]
        assert len(receiver.begun) == 4, "it was taken"
        assert jobs.gaps[0] > 1.5 * INTERVAL_S
        assert jobs.gaps[1] > 3 * INTERVAL_S, "it backs off"
    failures = [entry for entry in log_output.entries if entry["event"] == "salad.deletion_cost_failed"]
    assert [entry["log_level"] for entry in failures] == ["warning", "debug", "debug"]
    assert all(entry["reason"] for entry in failures)
    assert [entry["log_level"] for entry in log_output.entries if entry not in failures] == ["info"]


async def test_a_service_that_never_answers_is_given_up_and_asked_again(log_output: LogCapture) -> None:
    jobs = Jobs(number=1)
    async with webhook_receiver() as receiver:
        receiver.script(Reply(never=True))
        async with telling(config_of(receiver, timeout_s=0.1), jobs):
            assert costs(await receiver.wait_received(2)) == [1, 1]
    assert log_output.entries[0]["reason"] == "no answer within 0.1 s"


async def test_an_answer_without_an_end_is_not_read() -> None:
    jobs = Jobs()
    async with webhook_receiver() as receiver:
        receiver.script(Reply(endless=True))
        async with telling(config_of(receiver), jobs):
            await receiver.wait_until(lambda: bool(receiver.begun and receiver.begun[0].status))
            jobs.become(1)
            assert costs(await receiver.wait_received(2)) == [0, 1]


async def test_nobody_at_the_address_harms_nobody(log_output: LogCapture) -> None:
    jobs = Jobs(number=1)
    async with webhook_receiver(up=False) as receiver, telling(config_of(receiver), jobs):
        while not log_output.entries:  # noqa: ASYNC110  # a refused connection leaves no other trace
            await trio.sleep(0.01)
        await receiver.go_up()
        assert costs(await receiver.wait_received(1)) == [1]


async def test_a_value_that_may_have_been_taken_is_corrected() -> None:
    """The request with 5 broke off after it was read; back at 0 it must be told again, though 0 was told before."""
    jobs = Jobs()
    async with webhook_receiver() as receiver, telling(config_of(receiver), jobs):
        await receiver.wait_received(1)
        receiver.script(Reply(cut=Cut.AT_BODY))
        jobs.become(5)
        await receiver.wait_received(2)
        jobs.become(0)
        assert costs(await receiver.wait_received(3)) == [0, 5, 0]


@pytest.mark.parametrize("missing", sorted(SALAD))
def test_it_is_salad_only_where_machine_and_group_are_both_set(missing: str) -> None:
    assert SaladConfig.from_environment(SALAD) == SaladConfig(url="http://169.254.169.254")
    assert SaladConfig.from_environment({**SALAD, missing: ""}) is None
    assert SaladConfig.from_environment({name: value for name, value in SALAD.items() if name != missing}) is None


@pytest.mark.parametrize("url", ["169.254.169.254", "ftp://x", "http://", "http://x:0", "http://x/?a", "http://a b"])
def test_an_address_that_is_no_http_url_is_a_fault_of_the_configuration(url: str) -> None:
    with pytest.raises(BadConfiguration, match=r"^SALAD_METADATA_URL: "):
        SaladConfig.from_environment({**SALAD, "SALAD_METADATA_URL": url})
    assert SaladConfig.from_environment({"SALAD_METADATA_URL": url}) is None, "elsewhere it does not count"


def test_the_delay_doubles_to_its_bound_whatever_the_number_of_failures() -> None:
    config = SaladConfig()
    assert [config.delay_s(failures) for failures in (0, 1, 2, 5, 6, 10_000)] == [1, 2, 4, 32, 60, 60]


def test_metadata_are_the_eight_variables_that_are_set() -> None:
    kinds = ("ORGANIZATION", "PROJECT", "CONTAINER_GROUP")
    names = [*(f"{kind}_{what}" for kind in kinds for what in ("NAME", "ID")), "INSTANCE_ID", "MACHINE_ID"]
    environ = {f"SALAD_{name}": name for name in names}
    expected = {f"salad_{name.lower()}": name for name in names}
    assert salad_metadata({**environ, "SALAD_METADATA_URL": "x", "SALAD_OTHER": "x", "HOME": "/"}) == expected
    assert salad_metadata({"SALAD_MACHINE_ID": "m", "SALAD_PROJECT_ID": ""}) == {"salad_machine_id": "m"}
