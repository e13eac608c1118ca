"""``comfyd workflow new|check|list``: what is written where, and what is said when nothing is."""

import argparse
import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import attrs
import pytest
from workflows_kit import MINIMAL, node, node_class, object_info, txt2img, write

from comfyd.cli import workflow as command_module
from comfyd.cli.workflow import EXIT_BAD_USE, EXIT_FAULTS, add_parser, workflow_command
from comfyd.workflows import load_catalogue

HAS_ANTHROPIC = importlib.util.find_spec("anthropic") is not None


@attrs.frozen
class Run:
    code: int
    out: str
    err: str


Command = Callable[..., Run]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``comfyd workflow`` with these arguments in this process."""

    def run(*arguments: object, environ: dict[str, str] | None = None) -> Run:
        parser = argparse.ArgumentParser(prog="comfyd")
        add_parser(parser.add_subparsers(dest="command"))
        code = workflow_command(parser.parse_args(["workflow", *map(str, arguments)]), environ or {})
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write(tmp_path, {"my-graph.json": txt2img()}) / "my-graph.json"


@attrs.define
class Standin:
    """A server on loopback that answers in turn, whatever it is asked."""

    url: str
    answers: list[tuple[int, Any]]
    requests: list[tuple[str, dict[str, str], Any]] = attrs.field(factory=list)


@contextmanager
def standin(*answers: tuple[int, Any]) -> Iterator[Standin]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            headers = {name.lower(): value for name, value in self.headers.items()}
            server.requests.append((self.path, headers, body))
            status, content = server.answers[len(server.requests) - 1]
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer  # noqa: N815  # http.server's names

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # http.server's name
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        server = Standin(f"http://127.0.0.1:{http_server.server_port}", list(answers))
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            http_server.shutdown()
            thread.join()


def test_new_writes_python_to_stdout_and_nothing_else(command: Command, graph: Path) -> None:
    before = sorted(graph.parent.iterdir())
    run = command("new", graph)
    assert (run.code, run.err) == (0, "")
    assert run.out.startswith('"""My graph.\n\nThe graph is that of my-graph.json.\n"""\n')
    assert sorted(graph.parent.iterdir()) == before


def test_new_writes_a_file_that_the_daemon_would_serve(command: Command, graph: Path, tmp_path: Path) -> None:
    output = tmp_path / "w" / "paint.py"
    output.parent.mkdir()
    run = command("new", graph, "-o", output, "--summary", "Paints.")
    assert (run.code, run.out) == (0, "")
    assert run.err == f"comfyd: wrote {output}\n"
    catalogue = load_catalogue(output.parent)
    assert [(each.route, each.summary) for each in catalogue.workflows] == [("paint", "Paints.")]
    assert [path.name for path in output.parent.iterdir()] == ["paint.py"]


def test_new_overwrites_only_when_forced(command: Command, graph: Path, tmp_path: Path) -> None:
    output = tmp_path / "paint.py"
    output.write_text("mine")
    run = command("new", graph, "-o", output)
    assert (run.code, run.out) == (EXIT_BAD_USE, "")
    assert run.err == f"comfyd: {output} is there already; --force overwrites it\n"
    assert output.read_text() == "mine"
    assert command("new", graph, "-o", output, "--force").code == 0
    assert "def workflow" in output.read_text()


def test_a_file_that_somebody_made_meanwhile_is_not_overwritten(
    command: Command, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "paint.py"
    read = command_module._read_graph

    def read_slowly(name: str) -> Any:
        output.write_text("theirs")
        return read(name)

    monkeypatch.setattr(command_module, "_read_graph", read_slowly)
    run = command("new", graph, "-o", output)
    assert run.code == EXIT_BAD_USE
    assert "is there already" in run.err
    assert output.read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-graph.json", "paint.py"]


def test_a_folder_that_is_not_there_is_said(command: Command, graph: Path, tmp_path: Path) -> None:
    run = command("new", graph, "-o", tmp_path / "no" / "paint.py")
    assert run.code == EXIT_BAD_USE
    assert "cannot be written: No such file or directory" in run.err


@pytest.mark.parametrize("arguments", [["-o", "my-graph.yaml"], ["-o", "my-graph.yml"], ["--sidecar"]])
def test_new_writes_a_sidecar(command: Command, graph: Path, arguments: list[str]) -> None:
    arguments = [str(graph.parent / each) if each.endswith("ml") else each for each in arguments]
    run = command("new", graph, *arguments)
    assert run.code == 0
    if run.out:
        (graph.parent / "my-graph.yaml").write_text(run.out)
    (workflow,) = load_catalogue(graph.parent).workflows
    assert (workflow.route, workflow.summary) == ("my-graph", "My graph.")


@pytest.mark.parametrize(
    ("output", "told"),
    [("elsewhere.yaml", "a sidecar takes effect beside its graph"), ("my-graph.py", "are the same route")],
)
def test_a_place_where_the_file_takes_no_effect_is_noted(command: Command, graph: Path, output: str, told: str) -> None:
    run = command("new", graph, "-o", graph.with_name(output))
    assert run.code == 0
    assert f"comfyd: note: {'' if 'yaml' in output else graph.with_name(output)}" in run.err
    assert told in run.err


def test_stdin_and_a_whole_request_are_taken(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"prompt": txt2img(), "webhook": "x"}).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(body)))
    run = command("new", "-")
    assert run.code == 0
    assert run.out.startswith('"""Workflow.\n\nThe graph came on stdin.\n"""\n')


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read: No such file or directory"),
        ("[1", "not valid JSON"),
        ('{"nodes": [], "links": []}', "Workflow > Export (API)"),
        ('{"1": {"inputs": {}}}', "prompt.1.class_type must be the name of a node class"),
        ('{"1": {"class_type": "VAEDecode", "inputs": {"a": ["1", 0]}}}', "runs in a circle: 1 -> 1"),
    ],
)
def test_what_is_no_graph_is_refused(command: Command, tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "g.json"
    if content is not None:
        path.write_text(content)
    run = command("new", path)
    assert (run.code, run.out) == (EXIT_BAD_USE, "")
    assert told in run.err
    assert len(run.err.splitlines()) == 1


def test_unknown_classes_are_noted_with_what_to_do(command: Command, tmp_path: Path) -> None:
    graphs = write(tmp_path, {"g.json": {"1": node("Mystery", "input: x", amount=2)}})
    run = command("new", graphs / "g.json")
    assert "x: int = 2" in run.out
    assert "the built-in engine does not know Mystery" in run.err
    assert "--url or --object-info" in run.err


def test_bounds_come_from_a_saved_answer(command: Command, tmp_path: Path) -> None:
    info = {"Mystery": node_class(amount=["INT", {"min": 1, "max": 9, "tooltip": "So many."}])}
    files = write(tmp_path, {"g.json": {"1": node("Mystery", "input: x", amount=2)}, "info.json": info})
    run = command("new", files / "g.json", "--object-info", files / "info.json")
    assert 'x: Annotated[int, Field(description="So many.", ge=1, le=9)] = 2' in run.out
    assert run.err == ""


def test_bounds_come_from_a_running_engine(command: Command, tmp_path: Path) -> None:
    info = {"Mystery": node_class(amount=["INT", {"min": 1, "max": 9}])}
    files = write(tmp_path, {"g.json": {"1": node("Mystery", "input: x", amount=2)}})
    with standin((200, info)) as engine:
        run = command("new", files / "g.json", "--url", f"{engine.url}/")
    assert "x: Annotated[int, Field(ge=1, le=9)] = 2" in run.out
    assert [path for path, _, _ in engine.requests] == ["/object_info"]


def test_an_engine_that_does_not_answer_so_is_said(command: Command, graph: Path) -> None:
    with standin((404, {})) as engine:
        run = command("new", graph, "--url", engine.url)
    assert run.code == EXIT_BAD_USE
    assert "/object_info answered 404; is it comfyd's own address?" in run.err
    run = command("new", graph, "--url", engine.url)  # it is gone
    assert (run.code, run.out) == (EXIT_BAD_USE, "")
    assert "does not answer" in run.err


def test_a_file_that_does_not_make_its_graph_is_not_given_out(
    command: Command, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comfyd.workflows.writing.write_python", lambda *_, **__: MINIMAL)
    run = command("new", graph, "-o", tmp_path / "w.py")
    assert run.code == EXIT_FAULTS
    assert "please report this" in run.err
    assert not (tmp_path / "w.py").exists()


def test_check_tells_each_file_and_its_exit_code(command: Command, tmp_path: Path) -> None:
    folder = write(tmp_path / "w", {"good.py": MINIMAL, "sub/graph.json": txt2img()})
    run = command("check", folder)
    assert (run.code, run.err) == (0, "")
    assert run.out == f"{folder}/good.py: ok\n{folder}/sub/graph.json: ok\n"
    write(folder, {"bad.py": "x = 1\nraise ValueError('no\\n\x1b[2J')\n"})
    run = command("check", environ={"WORKFLOW_DIR": str(folder)})
    assert run.code == EXIT_FAULTS
    assert run.out.splitlines()[0] == f"{folder}/bad.py:2: raised ValueError: no\\n\\x1b[2J"


def test_check_with_an_engine_finds_what_it_lacks(command: Command, tmp_path: Path) -> None:
    write(tmp_path, {"info.json": object_info(tmp_path)})
    folder = write(tmp_path / "w", {"g.json": {"1": node("KSampleer", a=1)}})
    assert command("check", folder).code == 0
    run = command("check", folder, "--object-info", tmp_path / "info.json")
    assert run.code == EXIT_FAULTS
    assert f'{folder}/g.json:1: needs the node class "KSampleer"' in run.out


@pytest.mark.parametrize("action", ["check", "list"])
def test_a_folder_without_workflows_is_no_success(command: Command, tmp_path: Path, action: str) -> None:
    run = command(action, tmp_path)
    assert (run.code, run.out) == (EXIT_FAULTS, "")
    assert run.err == f"comfyd: there is no workflow in {tmp_path}\n"


def test_list_shows_routes_summaries_and_inputs(command: Command, tmp_path: Path) -> None:
    folder = write(tmp_path / "w", {"a/good.py": MINIMAL, "bad.py": "raise ValueError"})
    run = command("list", folder)
    assert run.code == 0
    assert [line.split() for line in run.out.splitlines()] == [
        ["ROUTE", "SUMMARY", "INPUTS"],
        ["a/good", "A", "summary.", "width"],
    ]
    assert run.err == "comfyd: 1 file is wrong and left out; see `comfyd workflow check`\n"


def test_list_as_json_has_the_schema(command: Command, tmp_path: Path) -> None:
    run = command("list", write(tmp_path / "w", {"a/good.py": MINIMAL}), "--json")
    assert json.loads(run.out) == {
        "route": "a/good",
        "summary": "A summary.",
        "description": "A description.",
        "tags": ["a"],
        "source": "python",
        "input": {"type": "object", "properties": {"width": {"type": "integer", "default": 512}}, "required": []}
        | {"additionalProperties": False},
    }


# By Claude


def test_claude_without_a_key_is_refused(command: Command, graph: Path) -> None:
    run = command("new", graph, "--claude")
    assert (run.code, run.out) == (EXIT_BAD_USE, "")
    assert run.err == "comfyd: --claude needs an API key in ANTHROPIC_API_KEY\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--claude", "--sidecar"], "writes Python, not sidecars"),
        (["--wish", "x"], "are for --claude"),
        (["--model", "x"], "are for --claude"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(
    command: Command, graph: Path, arguments: list[str], told: str
) -> None:
    run = command("new", graph, *arguments)
    assert run.code == EXIT_BAD_USE
    assert told in run.err


def test_without_the_package_it_is_said_how_to_get_it(
    command: Command, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "anthropic", None)
    run = command("new", graph, "--claude", environ={"ANTHROPIC_API_KEY": "sk-x"})
    assert run.code == EXIT_FAULTS
    assert "pip install 'comfyd[claude]'" in run.err


needs_anthropic = pytest.mark.skipif(not HAS_ANTHROPIC, reason="needs the extra claude")


def by_claude(graph: Path, server: Standin, *arguments: str) -> Run:
    """Runs the command with the real package in a process of its own: it looks at the environment, and warns."""
    script = (
        "import argparse, sys\nfrom comfyd.cli.workflow import add_parser, workflow_command\n"
        "parser = argparse.ArgumentParser()\nadd_parser(parser.add_subparsers())\n"
        "sys.exit(workflow_command(parser.parse_args(sys.argv[1:])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "workflow", "new", str(graph), "--claude", *arguments],
        env={**os.environ, "ANTHROPIC_API_KEY": "sk-secret", "ANTHROPIC_BASE_URL": server.url},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "sk-secret" not in done.stdout + done.stderr
    return Run(done.returncode, done.stdout, done.stderr)


def message(source: str, example: dict[str, Any]) -> dict[str, Any]:
    call = {"source": source, "example_input": example}
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-x",
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
        "content": [
            {"type": "thinking", "thinking": "Well.", "signature": "c2ln"},
            {"type": "tool_use", "id": "toolu_1", "name": "write_workflow", "input": call},
        ],
    }


@needs_anthropic
def test_claude_writes_a_file_which_is_tried_first(command: Command, graph: Path, tmp_path: Path) -> None:
    source = command("new", graph).out.replace("My graph.", "By Claude.")
    example = {"seed": txt2img()["3"]["inputs"]["seed"]}
    output = tmp_path / "claude.py"
    wrong = message(source.replace('"euler"', '"heun"'), example)
    with standin((200, wrong), (200, message(source, example))) as server:
        run = by_claude(graph, server, "-o", str(output), "--wish", "Only the prompt.", "--model", "claude-x")
    assert run.code == 0, run.err
    assert output.read_text() == source
    assert 'sampler_name must be "euler", is "heun"' in run.err
    (path, headers, first), (_, _, second) = server.requests
    assert (path, headers["authorization"], first["model"]) == ("/v1/messages", "Bearer sk-secret", "claude-x")
    assert "Only the prompt." in first["messages"][0]["content"]
    assert second["messages"][1] == {"role": "assistant", "content": wrong["content"]}
    assert second["messages"][2]["content"][0]["is_error"] is True


@needs_anthropic
def test_what_the_api_refuses_is_said_and_nothing_is_written(graph: Path, tmp_path: Path) -> None:
    refusal = {"type": "error", "error": {"type": "authentication_error", "message": "invalid x-api-key"}}
    with standin((401, refusal)) as server:
        run = by_claude(graph, server, "-o", str(tmp_path / "claude.py"))
    assert run.code == EXIT_FAULTS
    assert run.err.splitlines()[-1] == "comfyd: the API answered 401: invalid x-api-key"
    assert not (tmp_path / "claude.py").exists()


def test_claude_does_not_overwrite_unasked_and_asks_nothing_for_it(command: Command, graph: Path) -> None:
    taken = graph.with_suffix(".py")
    taken.write_text("mine")
    with standin() as server:
        environ = {"ANTHROPIC_API_KEY": "sk-x", "ANTHROPIC_BASE_URL": server.url}
        run = command("new", graph, "--claude", "-o", taken, environ=environ)
    assert run.code == EXIT_BAD_USE
    assert (taken.read_text(), server.requests) == ("mine", [])
