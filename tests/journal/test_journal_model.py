"""Any sequence of calls, outages, kills and starts, against a dict."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import attrs
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from comfyd.journal import Database, JobFilter, JobRow, WebhookRow, statements
from comfyd.journal.changes import Change, JobChange, Unsaved, WebhookChange
from comfyd.journal.turn import Acceptance, TurnResult, take_turn

IDS = st.sampled_from(["a", "b", "c", "d"])
HOOKS = st.sampled_from([f"w{number}" for number in range(1, 9)])
STATES = st.sampled_from(["accepted", "queued", "running", "delivering", "succeeded", "failed"])


@attrs.define
class Model:
    """What the journal has to know: jobs by id, webhooks by id."""

    jobs: dict[str, JobRow] = attrs.field(factory=dict)
    webhooks: dict[str, WebhookRow] = attrs.field(factory=dict)

    def copy(self) -> "Model":
        return Model(dict(self.jobs), dict(self.webhooks))


class JournalMachine(RuleBasedStateMachine):
    """Each rule is one turn of the writer, or what happens between two turns."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.model = Model()
        self.on_disk = Model()
        self.unsaved = Unsaved()
        self.out = False
        self.sequence = 0
        self.hook_sequence = 0

    @initialize()
    def start(self) -> None:
        self.database = Database.open(self.folder)

    def teardown(self) -> None:
        self.database.close()
        shutil.rmtree(self.folder)

    def turn(self, accepted: tuple[JobRow, ...] = (), changes: tuple[Change, ...] = ()) -> list[Acceptance]:
        acceptances = [Acceptance(row=row, done=lambda _: None) for row in accepted]
        result: TurnResult = take_turn(
            self.database,
            unsaved=self.unsaved,
            accepted=acceptances,
            changes=changes,
            questions=(),
            erase=False,
            probe=False,
        )
        self.unsaved = result.unsaved
        return acceptances

    def settle(self) -> None:
        if not self.out:
            assert len(self.unsaved) == 0
            self.on_disk = self.model.copy()

    @rule(ids=st.lists(IDS, min_size=1, max_size=4), size=st.integers(0, 9000))
    def accept(self, ids: list[str], size: int) -> None:
        rows = []
        for job_id in ids:
            self.sequence += 1
            rows.append(
                JobRow(
                    id=job_id,
                    key=f"key-{self.sequence}",
                    sequence=self.sequence,
                    accepted_at=1.0,
                    deadline_at=None,
                    digest=b"",
                    workflow="w" if self.sequence % 2 else "",
                    request=bytes(size),
                )
            )
        for acceptance in self.turn(accepted=tuple(rows)):
            free = acceptance.row.id not in self.model.jobs
            assert (acceptance.refused is None) is (free and not self.out)
            if acceptance.refused is None:
                self.model.jobs[acceptance.row.id] = acceptance.row
        self.settle()

    @rule(
        steps=st.lists(st.tuples(IDS, st.sampled_from(["started", "waiting", "made"]), st.integers(1, 9)), max_size=5)
    )
    def change_jobs(self, steps: list[tuple[str, str, int]]) -> None:
        changes = []
        for job_id, step, number in steps:
            kinds: dict[str, dict[str, Any]] = {
                "started": {"state": "running", "attempts": number},
                "waiting": {"state": "queued", "crashes": number},
                "made": {"state": "delivering", "made": bytes(number)},
            }
            wanted = kinds[step]
            row = self.model.jobs.get(job_id)
            if row is None:
                continue
            changes.append(JobChange(job_id=job_id, **wanted))
            if row.ended_at is None:
                self.model.jobs[job_id] = attrs.evolve(row, **({"made": None} | wanted))
        self.turn(changes=tuple(changes))
        self.settle()

    @rule(job_id=IDS, hooks=st.integers(0, 3), ended_at=st.integers(1, 50), kept=st.integers(0, 20))
    def end(self, job_id: str, hooks: int, ended_at: int, kept: int) -> None:
        row = self.model.jobs.get(job_id)
        if row is None:
            return
        rows = []
        for _ in range(hooks):
            self.hook_sequence += 1
            rows.append(
                WebhookRow(
                    id=f"w{self.hook_sequence}",
                    sequence=self.hook_sequence,
                    job_id=job_id,
                    job_key=row.key,
                    url="u",
                    kind="v2",
                    created_at=1.0,
                )
            )
        values: dict[str, Any] = {"state": "failed", "outcome": b"{}", "ended_at": float(ended_at), "kept_bytes": kept}
        if row.ended_at is None:
            self.model.jobs[job_id] = attrs.evolve(row, request=None, made=None, **values)
            self.model.webhooks.update((hook.id, hook) for hook in rows)
        self.turn(changes=(JobChange(job_id=job_id, webhooks=tuple(rows), **values),))
        self.settle()

    @rule(hook=HOOKS, what=st.sampled_from(["tried", "taken", "dead"]), at=st.integers(1, 50))
    def change_webhook(self, hook: str, what: str, at: int) -> None:
        if int(hook[1:]) > self.hook_sequence:
            return  # nobody knows of it yet
        row = self.model.webhooks.pop(hook, None)
        if what == "taken":
            self.turn(changes=(WebhookChange(webhook_id=hook, taken=True),))
        else:
            values: dict[str, Any] = {"attempts": at, "last_error": what, "next_at": None, "dead_at": None}
            values["dead_at" if what == "dead" else "next_at"] = float(at)
            if row is not None:
                self.model.webhooks[hook] = attrs.evolve(row, **values)
            self.turn(changes=(WebhookChange(webhook_id=hook, **values),))
        self.settle()

    @precondition(lambda self: not self.out)
    @rule(
        age=st.integers(0, 60),
        dead_age=st.integers(0, 60),
        max_bytes=st.integers(0, 40),
        max_jobs=st.integers(0, 4),
        limit=st.integers(1, 3),
    )
    def forget(self, age: int, dead_age: int, max_bytes: int, max_jobs: int, limit: int) -> None:
        with self.database.transaction() as connection:
            forgotten = statements.forget_expired(
                connection,
                now=60.0,
                jobs_s=age,
                dead_s=dead_age,
                max_kept_bytes=max_bytes,
                max_jobs=max_jobs,
                limit=limit,
            )
        assert forgotten == self.expected_to_go(60.0 - age, 60.0 - dead_age, max_bytes, max_jobs)[:limit]
        for job_id, key in forgotten:
            del self.model.jobs[job_id]
            self.model.webhooks = {name: hook for name, hook in self.model.webhooks.items() if hook.job_key != key}
        self.settle()

    def expected_to_go(
        self, ended_before: float, dead_before: float, max_bytes: int, max_jobs: int
    ) -> list[tuple[str, str]]:
        hooks = {row.key: [] for row in self.model.jobs.values()}  # type: dict[str, list[float | None]]
        for hook in self.model.webhooks.values():
            hooks[hook.job_key].append(hook.dead_at)
        ended = [row for row in self.model.jobs.values() if row.ended_at is not None]
        ended.sort(key=lambda row: (row.ended_at, row.sequence))
        free = [row for row in ended if None not in hooks[row.key]]
        going = [
            row
            for row in free
            if row.ended_at is not None
            and row.ended_at < ended_before
            and all(at is not None and at < dead_before for at in hooks[row.key])
        ]
        for row in sorted((row for row in free if row not in going), key=lambda row: bool(hooks[row.key])):
            jobs = len(ended) - len(going) - max_jobs
            excess = sum(each.kept_bytes for each in ended) - sum(each.kept_bytes for each in going) - max_bytes
            if jobs > 0 or (excess > 0 and row.kept_bytes > 0):
                going.append(row)
        return [(row.id, row.key) for row in going]

    @rule()
    def disk_refuses(self) -> None:
        self.database.connection.execute("PRAGMA query_only = ON")
        self.out = True

    @rule()
    def disk_is_well(self) -> None:
        self.database.connection.execute("PRAGMA query_only = OFF")
        self.out = False
        self.turn()
        self.settle()

    @rule()
    def start_again(self) -> None:
        self.database.close()
        self.database = Database.open(self.folder)
        with self.database.transaction() as connection:
            statements.resume_interrupted(connection)
        self.out = False
        self.unsaved = Unsaved()
        self.model = self.on_disk.copy()  # what was not saved is lost
        for job_id, row in self.model.jobs.items():
            if row.state == "running":
                self.model.jobs[job_id] = attrs.evolve(row, state="queued", daemon_deaths=row.daemon_deaths + 1)
        self.settle()

    @invariant()
    def everything_reads_as_in_the_model(self) -> None:
        connection = self.database.connection
        for job_id in ("a", "b", "c", "d"):
            assert statements.find_job(connection, self.unsaved, job_id) == self.model.jobs.get(job_id)
        jobs = sorted(self.model.jobs.values(), key=lambda row: row.sequence)
        assert statements.unfinished_jobs(connection, self.unsaved) == [row for row in jobs if row.ended_at is None]
        hooks = sorted(self.model.webhooks.values(), key=lambda row: row.sequence)
        pending = [row for row in hooks if row.dead_at is None]
        dead = [row for row in hooks if row.dead_at is not None]
        assert statements.pending_webhooks(connection, self.unsaved) == pending
        assert statements.dead_webhooks(connection, self.unsaved, 2) == dead[:2]
        assert statements.count_webhooks(connection, self.unsaved) == (len(pending), len(dead))
        for job_id in ("a", "b"):
            assert statements.webhooks_of(connection, self.unsaved, job_id) == [
                row for row in hooks if row.job_id == job_id
            ]

    @rule(
        states=st.frozensets(STATES, max_size=2),
        workflow=st.sampled_from([None, "", "w"]),
        before=st.none() | st.integers(0, 12),
        limit=st.integers(0, 3),
    )
    def list_jobs(self, states: frozenset[str], workflow: str | None, before: int | None, limit: int) -> None:
        wanted = JobFilter(states=states, workflow=workflow, before=before, limit=limit)
        expected = [
            attrs.evolve(row, request=None, made=None)
            for row in sorted(self.model.jobs.values(), key=lambda row: -row.sequence)
            if (not states or row.state in states)
            and workflow in (None, row.workflow)
            and (before is None or row.sequence < before)
        ][:limit]
        assert statements.list_jobs(self.database.connection, self.unsaved, wanted) == expected


JournalMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_the_journal_is_a_dict_that_outlives_its_daemon = JournalMachine.TestCase
