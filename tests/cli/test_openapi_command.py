"""``comfyd openapi``: the document of a configuration, without a daemon."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import yaml
from workflows_kit import MINIMAL, write

from comfyd import __version__
from comfyd.cli.openapi import add_parser, openapi_command


@attrs.frozen
class Run:
    code: int
    out: str
    err: str


Command = Callable[..., Run]


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``comfyd openapi`` with these arguments in this process, with further variables."""
    environ = {"HOME": str(tmp_path), "CMD": f"{sys.executable} -c pass", "BASE": "", "PORT": "4321"}

    def run(*arguments: str, **more: str) -> Run:
        parser = argparse.ArgumentParser()
        add_parser(parser.add_subparsers())
        code = openapi_command(parser.parse_args(["openapi", *arguments]), {**environ, **more})
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


def test_the_document_is_written_with_the_workflows(command: Command, tmp_path: Path) -> None:
    run = command(WORKFLOW_DIR=str(write(tmp_path / "workflows", {"a/w.py": MINIMAL})))
    document = json.loads(run.out)
    assert (run.code, run.err) == (0, "")
    assert document["info"]["version"] == __version__
    assert "/workflow/a/w" in document["paths"]
    assert document["servers"] == [{"url": "http://localhost:4321"}]


def test_yaml_is_the_same_document(command: Command) -> None:
    assert yaml.safe_load(command("--yaml").out) == json.loads(command().out)


def test_the_server_can_be_named(command: Command) -> None:
    assert json.loads(command("--server", "https://api.example/v1").out)["servers"] == [
        {"url": "https://api.example/v1"}
    ]


def test_a_broken_workflow_is_told_and_left_out(command: Command, tmp_path: Path) -> None:
    folder = write(tmp_path / "workflows", {"good.py": MINIMAL, "bad.py": "def"})
    run = command(WORKFLOW_DIR=str(folder))
    paths = json.loads(run.out)["paths"]
    assert run.code == 0
    assert run.err.startswith("comfyd: bad.py: ")
    assert "/workflow/good" in paths
    assert "/workflow/bad" not in paths


def test_descriptions_follow_the_configuration(command: Command, tmp_path: Path) -> None:
    folder = str(write(tmp_path / "workflows", {"w.py": MINIMAL}))

    def description(**more: str) -> str:
        document = json.loads(command(WORKFLOW_DIR=folder, **more).out)
        return str(document["paths"]["/workflow/w"]["post"]["description"])

    assert "| `width` | integer | no | `512` |" in description()
    assert description(MARKDOWN_SCHEMA_DESCRIPTIONS="false") == "A description."


def test_keys_and_the_metrics_port_follow_the_configuration(command: Command) -> None:
    plain, other = json.loads(command().out), command(API_KEYS="a-key-of-somebody-1234", METRICS_PORT="4322")
    document = json.loads(other.out)
    assert "/metrics" in plain["paths"]
    assert "/metrics" not in document["paths"]
    assert "security" not in plain
    assert document["security"] == [{"bearer": []}, {"apiKey": []}]
    assert "a-key-of-somebody" not in other.out


def test_a_configuration_that_would_not_start_writes_nothing(command: Command) -> None:
    run = command(PORT="many")
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("comfyd: PORT")
