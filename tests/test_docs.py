"""The operator's guide: that what it says is so. Its ``sh`` blocks are run, its JSON is held against real answers."""

import ast
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from importlib import import_module
from ipaddress import ip_address
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import attrs
import pytest
import yaml
from daemon_support import Daemon, start_daemon

from comfyd import cli, errors
from comfyd.engine import process
from comfyd.errors import EngineError, FailureKind
from comfyd.http.openapi import build_openapi
from comfyd.http.problems import document_of
from comfyd.media.convert_options import AvifOptions, JpegOptions, PngOptions, WebpOptions
from comfyd.net.policy import PolicyMode, UrlPolicy
from comfyd.storage.s3_errors import Trouble
from comfyd.variables import VARIABLES
from comfyd.webhooks.signature import Signer, parse_secrets
from comfyd.wire import json_schema
from comfyd.workflows import LiveInfo, load_catalogue
from comfyd.workflows import author as workflow_author

ROOT: Final = Path(__file__).parent.parent
DOCS: Final = ROOT / "docs"
PAGES: Final = sorted(DOCS.rglob("*.md"))
RUN: Final = ("api.md", "jobs.md", "webhooks.md", "workflows.md")
"""Pages with ``sh`` blocks: each is run from its first to its last, in one folder."""
WITHIN_S: Final = 60.0
SECRET: Final = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

_BLOCK: Final = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_CODE: Final = re.compile(r"`([^`]+)`")
_EVENT: Final = re.compile(r"[a-z0-9_]+\.[a-z0-9_]+|s3_[a-z_]+")
_LINK: Final = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

OTHERS: Final = frozenset(
    (
        *("STATE_DIRECTORY", "XDG_STATE_HOME", "HTTP_PROXY", "HTTPS_PROXY"),  # systemd's, XDG's, everybody's
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"),  # boto3's
        *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE"),
        "BASE_IMAGE",  # docker/api.dockerfile's
        *("WEB_ENABLE_AUTH", "CF_QUICK_TUNNELS", "SEED_MAX"),  # what ComfyUI's images read; a name of comfyd.workflow
    )
)
PEERS: Final = frozenset(
    (
        "CACHE_DIR",
        "LRU_CACHE_SIZE_GB",
        "MANIFEST_JSON",
        "PREPEND_FILENAMES",
        "WARMUP_PROMPT_URL",
        "HTTP_AUTH_HEADER_NAME",
    )
)
"""Variables of comfyui-api that comfyd has not; only the page about moving from it may name them."""


@attrs.frozen(kw_only=True)
class Block:
    """A block of code. *answers*: it stands right below the ``sh`` block that it is the answer of."""

    language: str
    text: str
    answers: bool

    @property
    def name(self) -> str:
        return next(iter(self.text.splitlines()), "")[:60]


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    text = page.read_text()
    end, before = 0, ""
    for match in _BLOCK.finditer(text):
        adjacent = text[end : match.start()].strip() == "" and before == "sh"
        language = match["language"]
        found.append(Block(language=language, text=match["text"], answers=adjacent and language == "json"))
        end, before = match.end(), language
    return found


def prose(page: Path) -> str:
    return _BLOCK.sub("", page.read_text())


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next one of the same or a higher level."""
    text = (DOCS / page).read_text()
    found = re.search(rf"^(#+) {re.escape(heading)}$(.*?)(?=^#{{1,2}} |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None, f"{page} has no heading {heading!r}"
    return found[2]


def rows(text: str) -> list[list[str]]:
    """The cells of the tables in *text*, without heads."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in cells] for cells in lines if not set(cells[0].strip()) <= {"-"}]


def first_code(cells: list[str]) -> list[str]:
    return _CODE.findall(cells[0])


# --- the code


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("comfyd_docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log_events() -> dict[str, set[str]]:
    """The events that comfyd logs, each with its levels: what is called on a ``log`` with a constant for a name."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "comfyd").rglob("*.py"):
        if "embedded" in path.parts:  # the engine's own log, which is not ours
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and (level := level_of(node.func)) is not None:
                first = node.args[0]
                for each in (first.body, first.orelse) if isinstance(first, ast.IfExp) else (first,):
                    if isinstance(each, ast.Constant) and _EVENT.fullmatch(str(each.value)):
                        found.setdefault(str(each.value), set()).add(level)
    return found


def level_of(function: ast.expr) -> str | None:
    match function:
        case ast.Attribute(value=ast.Name(id=name), attr=level) if name == "log" or name.endswith("_log"):
            return level
        case ast.Call(func=ast.Name(id="getattr"), args=[ast.Name(id=name), *_]) if name.endswith("log"):
            return "info"  # one of several
        case ast.Name(id="say" | "tell"):  # "say = log.warning if failures == 1 else log.debug"
            return "info"
    return None


def options_of(command: str) -> frozenset[str]:
    """Every option and every word that a command takes, its actions' included."""
    parser = ArgumentParser(prog="comfyd")
    import_module(f"comfyd.cli.{command}").add_parser(parser.add_subparsers())
    return frozenset(_words(parser))


def _words(parser: ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, _SubParsersAction):
            for name, inner in action.choices.items():
                yield name
                yield from _words(inner)


# --- what the pages say of the code


def test_the_table_of_variables_is_what_the_code_says() -> None:
    page = DOCS / "configuration.md"
    assert generator().with_tables(page.read_text()) == page.read_text(), "run: make docs"


def test_the_generator_refuses_a_page_without_its_markers() -> None:
    with pytest.raises(ValueError, match="0 times"):
        generator().with_tables("# Configuration\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_variable_that_a_page_names_exists(page: Path) -> None:
    sources = " ".join(path.read_text() for path in (ROOT / "comfyd").rglob("*.py"))
    known = {variable.name for variable in VARIABLES} | OTHERS | (PEERS if "migrating" in page.name else set())
    named = set(re.findall(r"(?<![\w$])[A-Z][A-Z0-9]*_[A-Z0-9_]*[A-Z0-9](?![\w*])", prose(page)))
    unknown = {name for name in named - known if f'"{name}"' not in sources}
    assert not unknown, f"{page.name} names variables that nobody reads"


def test_every_problem_type_is_explained_with_its_status() -> None:
    told = {code: cells[1] for cells in rows(section("failures.md", "Problem types")) for code in first_code(cells)}
    real = {kind.value: str(document_of(errors.Failure(kind=kind, detail=""))["status"]) for kind in FailureKind}
    assert told == real


def test_every_reason_for_a_restart_is_explained() -> None:
    told = {code for cells in rows(section("failures.md", "Why ComfyUI was restarted")) for code in first_code(cells)}
    kinds = [
        kind
        for module in (errors, process)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, EngineError)
    ]
    # Those of EngineExited and Engine.lose have no class of their own.
    real = {kind.cause for kind in kinds} | {"exited", "signal", "oom-killed", "start-failed", "stopped", "forgotten"}
    assert told == real - {EngineError.cause}


def test_every_reason_of_s3_is_named() -> None:
    assert {trouble.value for trouble in Trouble} <= set(_CODE.findall((DOCS / "failures.md").read_text()))


def test_every_log_event_is_explained_and_no_other() -> None:
    told = set(_CODE.findall((DOCS / "failures.md").read_text().split("\n## Log events\n")[1]))
    events = log_events()
    assert len(events) > 80, "the search for events finds too few"
    visible = {event for event, levels in events.items() if levels - {"debug"}}
    assert visible - told == set(), "failures.md does not explain them"
    families = {event.partition(".")[0] for event in events}
    claimed = {word for word in told if _EVENT.fullmatch(word) and word.partition(".")[0] in families}
    assert claimed - events.keys() == set(), "nobody logs them"


def test_levels_in_the_tables_of_events_are_the_real_ones() -> None:
    events = log_events()
    for cells in rows((DOCS / "failures.md").read_text().split("\n## Log events\n")[1]):
        if len(cells) == 4 and cells[1] in {"error", "warning"}:
            for event in first_code(cells):
                levels = {"error" if level == "exception" else level for level in events[event]} - {"debug"}
                assert cells[1] in levels | ({"warning"} if levels == {"info"} else set()), event


@pytest.mark.parametrize(
    ("name", "options"), [("jpeg", JpegOptions), ("webp", WebpOptions), ("png", PngOptions), ("avif", AvifOptions)]
)
def test_every_option_of_a_format_is_named(name: str, options: type) -> None:
    _, components = json_schema(options)
    properties = components[options.__name__]["properties"]
    row = next(cells for cells in rows(section("api.md", "Conversion")) if name in first_code(cells))
    wanted = {
        option for option, schema in properties.items() if not str(schema.get("description")).startswith("The same as")
    }
    assert wanted == set(_CODE.findall(row[1]))


def test_every_name_for_workflow_authors_is_explained() -> None:
    told = {code for cells in rows(section("workflows.md", "Python")) for code in first_code(cells)}
    public = set(import_module("comfyd.workflow").__all__)
    assert told == public
    assert all(hasattr(workflow_author, name) for name in told)


def test_every_route_has_an_example_that_is_run() -> None:
    document = build_openapi("0", (), LiveInfo(), metrics=True)
    wanted = {
        (method.upper(), path)
        for path, item in document["paths"].items()
        for method in item
        if method in {"get", "post", "delete"} and not path.startswith("/workflows/")
    }
    asked = set()
    for block in blocks(DOCS / "api.md"):
        for line in re.sub(r"\\\n", " ", block.text).splitlines() if block.language == "sh" else ():
            if (found := re.search(r"\$COMFYD(/[^\s\"?]*)", line)) is not None:
                method = "DELETE" if "-X DELETE" in line else "POST" if "--json" in line else "GET"
                asked.add((method, found[1]))
    missing = {(m, p) for m, p in wanted if not any(m == n and _fits(p, path) for n, path in asked)}
    assert not missing


def _fits(template: str, path: str) -> bool:
    parts = re.split(r"\{[^}]*\}", template)
    return re.fullmatch(".+".join(re.escape(part) for part in parts), path) is not None


def test_every_metric_that_is_named_exists() -> None:
    known = set(re.findall(r"^\| `(comfyd_\w+)`", (ROOT / "deploy/grafana/README.md").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"\bcomfyd_[a-z_]+", page.read_text()))
        unknown = {
            name for name in named if re.sub(r"_(bucket|sum|count)$", "", name) not in known and name not in known
        }
        assert not unknown, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_names_exists_with_its_options(page: Path) -> None:
    lines = [" ".join(code.split()) for code in _CODE.findall(prose(page))]
    for block in blocks(page):
        if block.language in {"sh", "console"}:
            lines += [line.split("  #")[0] for line in re.sub(r"\\\n", " ", block.text).splitlines()]
    for line in lines:
        for found in re.finditer(r"(?:^|[\s/])comfyd +(?P<command>[a-z]+)\b(?P<rest>[^|&;`)]*)", line):
            if found["command"] in {"run", "demo"} or found["command"] in cli._COMMANDS:
                unknown = set(re.findall(r"(?<!\S)--[a-z-]+", found["rest"])) - options_of(found["command"])
                assert not unknown, line
            else:
                assert line.startswith(("#", "docker", "journalctl", "systemctl")) or "systemctl" in line, line


def test_every_command_is_in_the_table_with_options_that_it_has() -> None:
    told = set()
    for cells in rows(section("configuration.md", "Commands")):
        names = {code.split()[1] for code in first_code(cells) if code.startswith("comfyd ")} - {"--version"}
        told |= names
        options = {code.split()[0] for code in _CODE.findall(" ".join(cells[1:])) if code.startswith("--")}
        for name in names:
            assert options <= options_of(name), name
    assert told == set(cli._COMMANDS)


@pytest.mark.parametrize(
    ("column", "addresses"),
    [
        (1, ("93.184.215.14", "2606:4700::1111")),
        (2, ("10.0.0.1", "192.168.1.1", "fc00::1")),
        (3, ("127.0.0.1", "::1", "169.254.1.1", "169.254.169.254", "224.0.0.1", "0.0.0.0")),
    ],
)
def test_the_table_of_url_policies_is_what_they_do(column: int, addresses: tuple[str, ...]) -> None:
    told = {first_code(cells)[0]: cells[column] for cells in rows(section("security.md", "URLs of callers"))}
    assert told.keys() == {mode.value for mode in PolicyMode}
    for mode in PolicyMode:
        for address in addresses:
            refused = UrlPolicy(mode=mode).refusal(address, 443, ip_address(address)) is not None
            assert told[mode.value] == ("no" if refused else "yes"), (mode, address)


# --- links and blocks


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    bare = (re.sub(r"&\w+;", "", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in bare}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT), target
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


def test_every_page_can_be_reached_from_the_index() -> None:
    linked = {(DOCS / target.partition("#")[0]).resolve() for target in _LINK.findall((DOCS / "index.md").read_text())}
    assert set(PAGES) - {DOCS / "index.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_what_they_say(page: Path) -> None:
    for block in blocks(page):
        match block.language:
            case "json":
                json.loads(block.text)
            case "yaml":
                yaml.safe_load(block.text)
            case "python":
                compile(block.text, page.name, "exec")
            case "sh":
                assert page.name in RUN, f"{page.name}: sh blocks are run; call it console"
            case other:
                assert other in {"", "console", "javascript"}, other


def test_no_page_knows_the_machine_that_it_was_written_on() -> None:
    for path in (*PAGES, DOCS / "architecture.svg"):
        assert str(ROOT) not in path.read_text()
        assert not re.search(r"/root/|\.\./shared", path.read_text())


def test_the_picture_of_the_tree_names_every_nursery_and_is_readable_on_dark() -> None:
    text = (DOCS / "architecture.svg").read_text()
    assert "prefers-color-scheme: dark" in text
    daemon = (ROOT / "comfyd/daemon.py").read_text()
    nurseries = set(re.findall(r"open_nursery\(\) as (\w+):", daemon)) - {"telling"}
    for nursery in nurseries:
        assert f">{nursery.removesuffix('s')}" in text or f">{nursery}" in text or nursery.upper() in text, nursery


# --- the examples


@pytest.fixture(scope="module")
def documented_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = start_daemon(tmp_path_factory.mktemp("docs-daemon"), environ={"WORKFLOW_DIR": str(ROOT / "workflows")})
    try:
        daemon.wait_ready()
        yield daemon
        assert daemon.stop() == 0, str(daemon.log)
    finally:
        daemon.close()


@pytest.mark.parametrize("name", RUN)
def test_the_examples_of_a_page_work(name: str, documented_daemon: Daemon, tmp_path: Path) -> None:
    """On the embedded engine, one after the other; an answer that is shown has the members of the real one."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not here, which the examples use")
    scripts = Path(sys.executable).parent
    env = {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
        "COMFYD": documented_daemon.url,
        "STATE_DIR": str(documented_daemon.folder / "state"),
        "WORKFLOW_DIR": str(ROOT / "workflows"),
    }
    output = ""
    for block in blocks(DOCS / name):
        if block.answers:
            assert_alike(json.loads(block.text), json.loads(output), block.name)
        elif block.language == "sh":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text],  # our own documentation
                env=env,
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=WITHIN_S,
                check=False,
            )
            assert done.returncode == 0, f"{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            output = done.stdout


def assert_alike(sample: Any, answer: Any, place: str) -> None:
    """The same members, of the same types; of lists the first element stands for all."""
    if isinstance(sample, dict):
        assert isinstance(answer, dict), place
        assert sample.keys() == answer.keys(), place
        for name, value in sample.items():
            assert_alike(value, answer[name], f"{place}.{name}")
    elif isinstance(sample, list):
        assert isinstance(answer, list), place
        assert bool(sample) == bool(answer), place
        if sample:
            assert_alike(sample[0], answer[0], f"{place}[0]")
    elif isinstance(sample, bool) or not isinstance(sample, int | float):
        assert type(sample) is type(answer), place
    else:
        assert isinstance(answer, int | float), place


def test_the_workflow_example_is_a_workflow(tmp_path: Path) -> None:
    example = next(block for block in blocks(DOCS / "workflows.md") if block.language == "python")
    (tmp_path / "example.py").write_text(example.text)
    catalogue = load_catalogue(tmp_path)
    assert catalogue.problems == ()
    assert [workflow.route for workflow in catalogue.workflows] == ["example"]


def snippet(language: str) -> str:
    return next(block.text for block in blocks(DOCS / "webhooks.md") if block.language == language)


def signed(body: bytes, secrets: str = SECRET) -> dict[str, str]:
    signer = Signer(parse_secrets(secrets), "msg_1", int(time.time()))
    signer.update(body)
    return signer.headers()


def test_the_python_snippet_takes_our_signatures_and_no_others() -> None:
    names: dict[str, Any] = {}
    exec(snippet("python"), names)  # noqa: S102  # our own documentation
    verify = names["verify"]
    body = b'{"type":"prompt.complete"}'
    verify(SECRET, signed(body), body)
    verify(SECRET, signed(body, "AAAAAAAAAAAAAAAAAAAAAAAA," + SECRET), body)  # while secrets are rotated
    with pytest.raises(ValueError, match="no signature"):
        verify(SECRET, signed(body), body + b" ")
    with pytest.raises(ValueError, match="too far"):
        verify(SECRET, {**signed(body), "webhook-timestamp": "1700000000"}, body)


def test_the_javascript_snippet_takes_our_signatures_and_no_others(tmp_path: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("Node.js is not here")
    body = b'{"type":"prompt.complete"}'
    cases = [
        (signed(body), body, True),
        (signed(body, "AAAAAAAAAAAAAAAAAAAAAAAA," + SECRET), body, True),
        (signed(body), body + b" ", False),
        ({**signed(body), "webhook-timestamp": "1700000000"}, body, False),
        ({**signed(body), "webhook-timestamp": "soon"}, body, False),
    ]
    calls = "".join(
        f"try {{ verify({json.dumps(SECRET)}, {json.dumps(headers)}, Buffer.from({json.dumps(text.decode())}));"
        ' console.log("true"); } catch { console.log("false"); }\n'
        for headers, text, _ in cases
    )
    (tmp_path / "verify.mjs").write_text(snippet("javascript") + calls)
    done = subprocess.run(
        ["node", "verify.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=WITHIN_S, check=True
    )
    assert done.stdout.split() == [str(good).lower() for *_, good in cases]
