"""What the writer does in one turn: a batch of everything that was waiting, in one transaction, then the questions."""

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import trio

from comfyd.journal import statements
from comfyd.journal.changes import Change, JobChange, Unsaved
from comfyd.journal.database import Database, describe
from comfyd.journal.rows import JobRow, JournalUnavailable

__all__ = ["Acceptance", "ChangeOrder", "Question", "TurnResult", "subject", "take_turn"]


@attrs.define(eq=False, kw_only=True)
class Acceptance:
    """A job that is to be added. *refused* is set in the turn if it could not be."""

    row: JobRow
    done: Callable[[JournalUnavailable | None], None]
    refused: JournalUnavailable | None = None


@attrs.define(eq=False, kw_only=True)
class ChangeOrder:
    """A change that is to be made. *done* hears of it when it is saved, or when the first try has failed."""

    change: Change
    done: Callable[[], None] | None = None


@attrs.define(eq=False, kw_only=True)
class Question:
    """Something asked of the database by *waiter*. *abandoned*: nobody waits for the answer any more."""

    ask: Callable[[Database, Unsaved], Any]
    waiter: trio.lowlevel.Task
    begun: bool = False
    abandoned: bool = False
    told: bool = False
    answer: Any = None
    refused: JournalUnavailable | None = None

    def tell(self) -> None:
        """Wake the waiter, once, if there still is one. On the Trio thread."""
        if not (self.told or self.abandoned):
            self.told = True
            trio.lowlevel.reschedule(self.waiter)


@attrs.frozen(kw_only=True)
class TurnResult:
    """How a turn went. *failure* is why something could not be written, None if all was.

    *erases*: something was deleted, or begun and undone, that is still in the log. *erased*: whether the log was
    emptied, None if that was not asked for.
    """

    unsaved: Unsaved
    failure: str | None = None
    wrote: bool = False
    erases: bool = False
    erased: bool | None = None
    refused: tuple[tuple[Change, str], ...] = ()


def take_turn(
    database: Database,
    *,
    unsaved: Unsaved,
    accepted: Sequence[Acceptance],
    changes: Sequence[Change],
    questions: Sequence[Question],
    erase: bool,
    probe: bool,
) -> TurnResult:
    """Write what there is, then answer. For the writer's thread. Raises nothing that a disk can cause.

    What could not be accepted says so in its ``refused``; the changes that could not be saved are in the result.
    """
    wanted = unsaved.and_then(changes)
    failure = None
    wrote = False
    refused: list[tuple[Change, str]] = []
    if accepted or wanted or probe:
        try:
            refused = _write(database, accepted, wanted, probe=probe)
            wrote = True
        except sqlite3.Error as exc:
            failure = describe(exc)
            for acceptance in accepted:
                acceptance.refused = JournalUnavailable(f"the journal cannot be written: {failure}")
                acceptance.refused.__cause__ = exc
            if accepted and wanted:
                # What jobs have become is small, and may fit where new requests do not.
                try:
                    refused = _write(database, (), wanted, probe=False)
                    wrote = True
                except sqlite3.Error as second:
                    failure = describe(second)
    left = Unsaved() if wrote or not wanted else wanted
    for question in questions:
        _answer(question, database, left)
    return TurnResult(
        unsaved=left,
        failure=failure,
        wrote=wrote,
        erases=(wrote and wanted.erases) or (failure is not None and bool(accepted)),
        erased=_erase(database) if erase else None,
        refused=tuple(refused),
    )


def _write(
    database: Database, accepted: Sequence[Acceptance], wanted: Unsaved, *, probe: bool
) -> list[tuple[Change, str]]:
    """Write everything in one transaction, and return the changes that fit no row."""
    refused: list[tuple[Change, str]] = []
    # What is refused for its own sake is told only if the transaction holds: else it is refused for the disk's.
    unfit: list[tuple[Acceptance, JournalUnavailable]] = []
    with database.transaction() as connection:
        if probe:
            statements.probe(connection)
        for acceptance in accepted:
            try:
                statements.accept(connection, acceptance.row)
            except JournalUnavailable as exc:
                unfit.append((acceptance, exc))
            except statements.RowRefused as exc:
                unfit.append((acceptance, JournalUnavailable(f"the job cannot be put into the journal: {exc}")))
        for change in wanted.in_order():
            try:
                statements.change(connection, change)
            except statements.RowRefused as exc:
                refused.append((change, str(exc)))
    for acceptance, reason in unfit:
        acceptance.refused = reason
    return refused


def _answer(question: Question, database: Database, unsaved: Unsaved) -> None:
    if question.abandoned:
        return
    try:
        question.answer = question.ask(database, unsaved)
    except sqlite3.Error as exc:
        question.refused = JournalUnavailable(f"the journal cannot be read: {describe(exc)}")
        question.refused.__cause__ = exc


def _erase(database: Database) -> bool:
    try:
        return database.erase()
    except sqlite3.Error:
        return False  # tried again until it works; an outage of the disk is found, and told, by the writes


def subject(change: Change) -> dict[str, str]:
    """Return the log fields that name what a change is about."""
    return {"job_id": change.job_id} if isinstance(change, JobChange) else {"webhook_id": change.webhook_id}
