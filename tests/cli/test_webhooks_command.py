"""``comfyd webhooks``: what it shows, changes and answers, beside a daemon or without one."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import trio
from outbox_kit import FAILURE, Desk, output, running_desk, running_outbox, success, wait_until
from webhook_receiver import webhook_receiver

from comfyd.cli.webhooks import add_parser, webhooks_command
from comfyd.journal import Database, WebhookRow

SECRET_URL = "https://user:password@hooks.example:8443/deep/path?token=s3cret#x"


@attrs.frozen
class Run:
    code: int
    out: str
    err: str

    @property
    def table(self) -> list[list[str]]:
        return [re.split(r" {2,}", line) for line in self.out.splitlines()]


Command = Callable[..., Run]


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``comfyd webhooks`` with these arguments in this process, on the journal in *state_dir*."""

    def run(*arguments: str, state_dir: str | None = None) -> Run:
        parser = argparse.ArgumentParser(prog="comfyd")
        add_parser(parser.add_subparsers(dest="command"))
        options = parser.parse_args(["webhooks", *arguments])
        environ = {"STATE_DIR": str(tmp_path / "state") if state_dir is None else state_dir}
        code = webhooks_command(options, environ)
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


@attrs.frozen
class Rows:
    dead: tuple[WebhookRow, ...]
    pending: tuple[WebhookRow, ...]


@pytest.fixture
async def rows(tmp_path: Path) -> Rows:
    """A journal of a daemon that has stopped, with two dead letters and two pending webhooks."""
    async with running_desk(tmp_path / "state") as desk:
        dead = await _end(desk, tmp_path, "dead")
        pending = await _end(desk, tmp_path, "pending")
        for row in dead:
            desk.journal.webhook_dead(row.id, at=row.created_at + 60, attempts=4, error="it answered 500")
        desk.journal.webhook_tried(
            pending[0].id, attempts=1, next_at=pending[0].created_at + 9, error="\x1b[31mforged\nline"
        )
        assert await desk.journal.count_webhooks() == (2, 2)
    return Rows(dead, pending)


async def _end(desk: Desk, folder: Path, job_id: str) -> tuple[WebhookRow, ...]:
    made = success(output(folder, f"{job_id}.png", b"x"))
    return await desk.end_job(job_id, made, webhook=SECRET_URL, webhook_v2="http://v2.example/")


async def test_list_shows_dead_letters_and_with_all_the_pending_too(rows: Rows, command: Command) -> None:
    listed = command("list")
    assert (listed.code, listed.err) == (0, "")
    heading, *lines = listed.table
    assert heading == ["ID", "JOB", "KIND", "RECEIVER", "ATTEMPTS", "SINCE", "STATE", "LAST ERROR"]
    assert [line[:5] for line in lines] == [
        [rows.dead[0].id, "dead", "v1-output 0", "https://hooks.example:8443/deep/path", "4"],
        [rows.dead[1].id, "dead", "v2", "http://v2.example/", "4"],
    ]
    assert [line[6:] for line in lines] == [["dead", "it answered 500"]] * 2
    every = command("list", "--all")
    assert [line[0] for line in every.table[1:]] == [row.id for row in (*rows.dead, *rows.pending)]
    assert [line[6] for line in every.table[1:]] == ["dead", "dead", "pending", "pending"]


async def test_nothing_secret_and_nothing_that_moves_a_terminal_is_shown(rows: Rows, command: Command) -> None:
    for arguments in (("list", "--all"), ("list", "--all", "--json")):
        shown = command(*arguments)
        assert shown.out.count("hooks.example") == 2
        assert not re.search("s3cret|password|user:", shown.out)
        assert "\x1b" not in shown.out
    assert len(command("list", "--all").out.splitlines()) == 5, "a line for each, whatever is in it"


async def test_json_is_one_object_a_line(rows: Rows, command: Command) -> None:
    lines = [json.loads(line) for line in command("list", "--all", "--json").out.splitlines()]
    assert [line["id"] for line in lines] == [row.id for row in (*rows.dead, *rows.pending)]
    first, _, third, fourth = lines
    assert (first["state"], first["dead_at"]) == ("dead", "2026-01-01T00:01:00.250Z")
    assert (first["job_id"], first["kind"], first["place"], first["attempts"]) == ("dead", "v1-output", 0, 4)
    assert (third["state"], third["next_at"], third["dead_at"]) == ("pending", "2026-01-01T00:00:09.250Z", None)
    assert (fourth["attempts"], fourth["next_at"]) == (0, None)


async def test_replay_makes_dead_letters_pending_with_all_their_attempts(
    rows: Rows, command: Command, tmp_path: Path
) -> None:
    run = command("replay", rows.dead[0].id)
    assert (run.code, run.out) == (0, "1 webhook replayed\n")
    with Database.open_beside(tmp_path / "state") as journal:
        by_id = {row.id: row for row in journal.list_webhooks()}
    assert (by_id[rows.dead[0].id].dead_at, by_id[rows.dead[0].id].attempts) == (None, 0)
    assert by_id[rows.dead[1].id].dead_at is not None
    run = command("replay", "--all")
    assert (run.code, run.out) == (0, "1 webhook replayed\n"), "those that are pending are left alone"
    run = command("replay", "--all")
    assert (run.code, run.out) == (1, "0 webhooks replayed\n")


async def test_drop_removes_what_is_named_and_with_all_only_dead_letters(rows: Rows, command: Command) -> None:
    assert command("drop", rows.pending[0].id, rows.dead[0].id).out == "2 webhooks dropped\n"
    assert [line[0] for line in command("list", "--all").table[1:]] == [rows.dead[1].id, rows.pending[1].id]
    assert command("drop", "--all").out == "1 webhook dropped\n"
    assert [line[0] for line in command("list", "--all").table[1:]] == [rows.pending[1].id]
    assert command("list") == Run(1, "no dead letters\n", "")


async def test_an_unknown_id_is_named_and_the_known_ones_are_done(rows: Rows, command: Command) -> None:
    run = command("drop", "msg_nobody\x1b[2J", rows.dead[0].id)
    assert run.code == 1
    assert run.out == "1 webhook dropped\n"
    assert run.err == "comfyd: there is no webhook 'msg_nobody\\x1b[2J'\n"


@pytest.mark.parametrize("action", ["replay", "drop"])
async def test_ids_and_all_or_neither_make_no_sense(rows: Rows, command: Command, action: str) -> None:
    for arguments in ((), ("--all", rows.dead[0].id)):
        run = command(action, *arguments)
        assert run.code == 2
        assert "ids" in run.err
    assert len(command("list", "--all").table) == 5


def test_without_a_journal_it_says_where_it_looked(command: Command, tmp_path: Path) -> None:
    assert command("list").code == 2
    assert str(tmp_path / "state") in command("list").err
    assert not (tmp_path / "state").exists(), "looking makes nothing"
    nowhere = command("list", state_dir="")
    assert nowhere.code == 2
    assert "STATE_DIR is empty" in nowhere.err


def test_a_file_that_is_no_journal_is_said(command: Command, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "journal.sqlite3").write_bytes(b"this is no database at all, whatever its name says" * 100)
    run = command("list")
    assert run.code == 2
    assert run.err.startswith("comfyd: ")
    assert "Traceback" not in run.err


async def test_a_running_outbox_sends_what_is_replayed_within_seconds(tmp_path: Path, command: Command) -> None:
    with trio.fail_after(20):
        async with (
            webhook_receiver() as receiver,
            running_desk(tmp_path / "state") as desk,
            running_outbox(desk.journal) as outbox,
        ):
            (row,) = await desk.end_job("j", FAILURE, webhook_v2=receiver.url())
            desk.journal.webhook_dead(row.id, at=row.created_at, attempts=4, error="it answered 500")
            assert await desk.journal.count_webhooks() == (0, 1)
            run = await trio.to_thread.run_sync(command, "replay", "--all")
            assert run.out.startswith("1 webhook replayed\n")
            (request,) = await receiver.wait_received(1)
            await wait_until(outbox, lambda: not outbox.pending)
            assert request.headers["webhook-id"] == row.id


def test_help_and_refusals_load_neither_the_jobs_nor_httpx() -> None:
    """A command line that takes half a second for its help is one that nobody asks."""
    program = (
        "import argparse, sys; from comfyd.cli.webhooks import add_parser\n"
        "parser = argparse.ArgumentParser(); add_parser(parser.add_subparsers())\n"
        "parser.parse_args(['webhooks', 'list'])\n"
        "print([name for name in ('httpx', 'comfyd.jobs', 'comfyd.journal') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"
