"""``comfyd config``: what holds and where it came from, and what is wrong; nothing secret."""

import argparse
import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

from comfyd.cli.config import add_parser, config_command
from comfyd.cli.table import printable, table_lines, terminal_width
from comfyd.config import VARIABLES, load_config
from comfyd.errors import BadConfiguration

SECRET = "c2VjcmV0LXNlY3JldC1zZWNyZXQtMTIzNA=="


@attrs.frozen
class Run:
    code: int
    out: str
    err: str

    @property
    def rows(self) -> dict[str, list[str]]:
        lines = [re.split(r" {2,}", line, maxsplit=3) for line in self.out.splitlines()]
        return {line[0]: line[1:] for line in lines}


Command = Callable[..., Run]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "CMD": f"{sys.executable} -c pass", "BASE": "", "LOG_FORMAT": "json"}


@pytest.fixture
def command(environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``comfyd config`` with these arguments in this process, with further variables."""

    def run(*arguments: str, **more: str) -> Run:
        parser = argparse.ArgumentParser(prog="comfyd")
        add_parser(parser.add_subparsers(dest="command"))
        code = config_command(parser.parse_args(["config", *arguments]), {**environ, **more})
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


def test_every_variable_is_shown_with_its_value_origin_and_meaning(command: Command) -> None:
    shown = command(PORT="8080", SYSTEM_META_region="mars")
    assert (shown.code, shown.err) == (0, "")
    assert shown.rows["NAME"] == ["VALUE", "ORIGIN", "MEANING"]
    assert shown.rows["PORT"] == ["8080", "environment", "port that comfyd listens on; 0 is any free one"]
    assert shown.rows["HOST"][:2] == ["::", "default"]
    assert shown.rows["SYSTEM_META_region"][:2] == ["mars", "environment"]
    assert set(shown.rows) == {"NAME", "SYSTEM_META_region", *(variable.name for variable in VARIABLES)}


def test_secrets_are_masked_in_every_form(command: Command) -> None:
    secrets = {"WEBHOOK_SECRET": SECRET, "SYSTEM_WEBHOOK_URL": "https://user:hunter2@hooks.example/?token=t0ken"}
    for arguments in ((), ("--json",), ("--check", "--json")):
        shown = command(*arguments, **secrets)
        assert shown.code == 0
        assert not re.search(f"{re.escape(SECRET)}|hunter2|t0ken", shown.out + shown.err)
    assert command(**secrets).rows["WEBHOOK_SECRET"][:2] == ["********", "environment"]


def test_check_says_nothing_where_nothing_is_wrong(command: Command) -> None:
    assert command("--check") == Run(0, "", "")


@pytest.mark.parametrize("arguments", [(), ("--check",)])
def test_faults_are_those_of_the_start_with_its_exit_code(
    command: Command, environ: dict[str, str], arguments: tuple[str, ...]
) -> None:
    wrong = {"PORT": "99999", "DRAIN_TIMEOUT_S": "soon"}
    with pytest.raises(BadConfiguration) as caught:
        load_config({**environ, **wrong})
    shown = command(*arguments, **wrong)
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.splitlines() == [f"comfyd: {fault}" for fault in caught.value.faults]
    assert len(caught.value.faults) == 2
    started = subprocess.run(
        [sys.executable, "-m", "comfyd", "run"],
        env={**environ, **wrong}, capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert (started.returncode, started.stderr) == (2, shown.err)


@pytest.mark.parametrize("arguments", [(), ("--check",)])
def test_warnings_are_told_and_are_no_faults(command: Command, arguments: tuple[str, ...]) -> None:
    shown = command(*arguments, MAX_QUEUED_JOB="5")
    assert shown.code == 0
    assert "comfyd: warning: MAX_QUEUED_JOB is not a variable of comfyd; did you mean MAX_QUEUED_JOBS?" in shown.err


def test_json_holds_settings_warnings_and_faults(command: Command) -> None:
    document = json.loads(command("--json", PORT="8080").out)
    by_name = {row["name"]: row for row in document["settings"]}
    assert by_name["PORT"]["value"] == "8080"
    assert by_name["PORT"]["origin"] == "environment"
    assert (document["warnings"], document["faults"]) == ([], [])
    broken = command("--json", PORT="x")
    assert broken.code == 2
    assert json.loads(broken.out)["faults"] == ['PORT: "x" is not allowed; a whole number from 0 to 65535']
    assert json.loads(command("--check", "--json").out) == {"settings": [], "warnings": [], "faults": []}


def test_embedded_is_the_configuration_of_run_embedded(command: Command) -> None:
    assert command("--embedded").rows["CMD"][1] == "--embedded"
    assert "comfyd: warning: CMD does not count with --embedded\n" in command("--embedded").err


def test_help_and_parser_load_no_configuration() -> None:
    program = (
        "import argparse, sys; from comfyd.cli.config import add_parser\n"
        "add_parser(argparse.ArgumentParser().add_subparsers())\n"
        "print([name for name in ('attrs', 'trio', 'comfyd.config') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"


# --- tables


ROWS = [("NAME", "VALUE", "MEANING"), ("A", "one two three four", "m " * 30), ("LONGER", "x" * 50, "short")]


def test_without_a_terminal_each_row_is_one_line() -> None:
    lines = list(table_lines(ROWS, wrapped=frozenset({1, 2})))
    assert len(lines) == 3
    assert lines[1] == f"A       one two three four{' ' * 34}{('m ' * 30).rstrip()}"


def test_one_long_cell_does_not_push_the_others_out_of_sight() -> None:
    lines = list(table_lines([("V", "M"), ("x" * 500, "a"), ("y", "b")], wrapped=frozenset({0})))
    assert lines[2] == f"y{' ' * 61}b"
    assert lines[1] == f"{'x' * 500}  a"


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_on_a_terminal_columns_are_wrapped_so_that_all_fit_and_nothing_is_lost(width: int) -> None:
    lines = list(table_lines(ROWS, width=width, wrapped=frozenset({1, 2})))
    assert max(map(len, lines)) <= width
    text = "".join("".join(lines).split())
    assert text.count("x") == 50
    assert text.count("m") == 30
    assert all(line.startswith((" " * 8, "NAME    ", "A       ", "LONGER  ")) for line in lines)


def test_a_terminal_too_narrow_for_anything_still_gets_the_words() -> None:
    lines = list(table_lines(ROWS, width=3, wrapped=frozenset({1, 2})))
    assert "".join("".join(lines).split()).count("x") == 50


def test_an_empty_cell_keeps_its_row() -> None:
    assert list(table_lines([("A", "B"), ("1", ""), ("", "2")], width=20, wrapped=frozenset({1}))) == [
        "A  B", "1", "   2",
    ]  # fmt: skip


def test_what_moves_a_cursor_is_escaped_and_text_is_left() -> None:
    assert printable("a\x1b[2J\n\r\x00é ü 漢 \udc80") == "a\\x1b[2J\\n\\r\\x00é ü 漢 \\udc80"


@contextmanager
def terminal() -> Iterator[io.TextIOWrapper]:
    leader, follower = pty.openpty()
    try:
        with os.fdopen(follower, "w") as stream:
            yield stream
    finally:
        os.close(leader)


def test_only_a_terminal_has_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "57")
    with terminal() as stream:
        assert terminal_width(stream) == 57
    assert terminal_width(io.StringIO()) is None
