"""``comfyd webhooks list|replay|drop``: what was not told, and what is to become of it. A running daemon notices."""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from comfyd.config import state_dir_of
from comfyd.errors import BadConfiguration, ComfydError

if TYPE_CHECKING:
    from comfyd.journal import Database, WebhookRow

EXIT_NOTHING: Final = 1
EXIT_BAD_USE: Final = 2
_COLUMNS: Final = ("ID", "JOB", "KIND", "RECEIVER", "ATTEMPTS", "SINCE", "STATE", "LAST ERROR")


class _CannotDo(ComfydError):
    """The command makes no sense, or has nothing to work on. The text is for the person who gave it."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line's *subparsers*."""
    parser = subparsers.add_parser(
        "webhooks",
        help="list, replay or drop webhooks that were not taken",
        description="Webhooks that were given up after their last attempt (dead letters), or wait for their next one. "
        "They are read from STATE_DIR; a running daemon follows what is done here within seconds.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="show the dead letters")
    listing.add_argument("--all", action="store_true", help="those that are still being sent as well")
    listing.add_argument("--json", action="store_true", help="as JSON, one object a line")
    for name, what in (
        ("replay", "send again, with all attempts"),
        ("drop", "never send"),
    ):
        action = actions.add_parser(name, help=f"{what}: those named by id, or every dead letter")
        action.add_argument("ids", nargs="*", metavar="ID", help="as in the list")
        action.add_argument("--all", action="store_true", help="every dead letter")


def webhooks_command(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Do what *options* say; return the exit code: 0, 1 if there was nothing to do it to, 2 if it made no sense."""
    try:
        with _open_journal(environ) as journal:
            if options.action == "list":
                return _list(journal, dead_only=not options.all, as_json=options.json)
            return _change(journal, options.action, options.ids, every=options.all)
    except BadConfiguration as exc:
        for fault in exc.faults:
            sys.stderr.write(f"comfyd: {fault}\n")
    except ComfydError as exc:
        sys.stderr.write(f"comfyd: {exc}\n")
    return EXIT_BAD_USE


def _open_journal(environ: Mapping[str, str]) -> "Database":
    state_dir = state_dir_of(environ)
    if state_dir is None:
        raise _CannotDo("STATE_DIR is empty, so webhooks are in the daemon's memory only")
    from comfyd.journal import Database  # not for --help

    try:
        return Database.open_beside(state_dir)
    except FileNotFoundError:
        raise _CannotDo(f"there is no journal in {state_dir}; is STATE_DIR the daemon's?") from None
    except OSError as exc:
        raise _CannotDo(f"the journal in {state_dir} cannot be opened: {exc.strerror}") from exc


def _list(journal: "Database", *, dead_only: bool, as_json: bool) -> int:
    rows = journal.list_webhooks(dead_only=dead_only)
    if as_json:
        from comfyd.wire import encode_json

        for row in rows:
            sys.stdout.write(encode_json(_document(row)).decode() + "\n")
    elif rows:
        now = time.time()
        _write_table([_cells(row, now) for row in rows])
    else:
        sys.stdout.write("no dead letters\n" if dead_only else "no webhooks\n")
    return 0 if rows else EXIT_NOTHING


def _change(journal: "Database", action: str, ids: Sequence[str], *, every: bool) -> int:
    if bool(ids) == every:
        raise _CannotDo(f"webhooks {action}: give the ids of webhooks, or --all for every dead letter")
    dead = [row.id for row in journal.list_webhooks(dead_only=True)]
    wanted = dead if every else list(dict.fromkeys(ids))
    unknown = set(wanted).difference(row.id for row in journal.list_webhooks())
    for webhook_id in sorted(unknown):
        sys.stderr.write(f"comfyd: there is no webhook {webhook_id!a}\n")
    known = [webhook_id for webhook_id in wanted if webhook_id not in unknown]
    done = (journal.replay(known) if action == "replay" else journal.drop(known)) if known else 0
    word = "replayed" if action == "replay" else "dropped"
    sys.stdout.write(f"{done} {'webhook' if done == 1 else 'webhooks'} {word}\n")
    return 0 if done and not unknown else EXIT_NOTHING


def _document(row: "WebhookRow") -> dict[str, Any]:
    from comfyd.net import display_url
    from comfyd.webhooks.rows import iso_ms

    return {
        "id": row.id,
        "job_id": row.job_id,
        "kind": row.kind,
        "place": row.place,
        "receiver": display_url(row.url),
        "state": _state(row),
        "attempts": row.attempts,
        "created_at": iso_ms(row.created_at),
        "next_at": None if row.next_at is None or row.dead_at is not None else iso_ms(row.next_at),
        "dead_at": None if row.dead_at is None else iso_ms(row.dead_at),
        "last_error": row.last_error,
    }


def _cells(row: "WebhookRow", now: float) -> tuple[str, ...]:
    from comfyd.net import display_url

    kind = row.kind if row.place is None else f"{row.kind} {row.place}"
    age = _age(now - (row.created_at if row.dead_at is None else row.dead_at))
    cells = (row.id, row.job_id, kind, display_url(row.url), str(row.attempts), age, _state(row), row.last_error)
    return tuple(_printable(cell) for cell in cells)


def _state(row: "WebhookRow") -> str:
    return "pending" if row.dead_at is None else "dead"


def _write_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(line[place]) for line in (_COLUMNS, *rows)) for place in range(len(_COLUMNS))]
    for line in (_COLUMNS, *rows):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write(text.rstrip() + "\n")


def _age(seconds: float) -> str:
    """How long ago, in the largest unit that fits."""
    for unit, size_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size_s:
            return f"{int(seconds // size_s)} {unit}"
    return f"{max(0, int(seconds))} s"


def _printable(text: str) -> str:
    """Escape what could move a terminal's cursor: errors and paths come from elsewhere."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
