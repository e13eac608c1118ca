"""Environment to configuration: the seed's defaults, one line for each fault, and which command starts the engine."""

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from comfyd import variables
from comfyd.config import (
    VARIABLES,
    Config,
    EngineConfig,
    RestartPolicy,
    describe,
    load_config,
    state_dir_of,
    variables_table,
)
from comfyd.errors import BadConfiguration

Environ = dict[str, str]


def make_program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def environ(tmp_path: Path) -> Environ:
    """Just enough to start: an engine's command on PATH, and a home."""
    make_program(tmp_path / "bin/engine")
    return {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home"), "CMD": "engine", "LOG_FORMAT": "json"}


@pytest.fixture
def load(environ: Environ, tmp_path: Path) -> Callable[..., Config]:
    def load(*, embedded: bool = False, **given: str) -> Config:
        return load_config({**environ, **given}, embedded=embedded, root=tmp_path / "root")

    return load


@pytest.fixture
def faults(load: Callable[..., Config]) -> Callable[..., tuple[str, ...]]:
    def faults(*, embedded: bool = False, **given: str) -> tuple[str, ...]:
        with pytest.raises(BadConfiguration) as caught:
            load(embedded=embedded, **given)
        assert all(line.isprintable() for line in caught.value.faults)
        return caught.value.faults

    return faults


# -- defaults


def test_the_seed_s_defaults_hold(load: Callable[..., Config], tmp_path: Path) -> None:
    config = load()
    assert (config.http.host, config.http.port) == ("::", 3000)
    assert config.http.max_body_bytes == 100 * 1024 * 1024
    engine = config.engine
    assert (engine.address, engine.port, engine.home) == ("127.0.0.1", 8188, Path("/opt/ComfyUI"))
    assert engine.input_dir == Path("/opt/ComfyUI/input")
    assert engine.output_dir == Path("/opt/ComfyUI/output")
    assert engine.model_dir == Path("/opt/ComfyUI/models")
    assert (engine.start_interval_s, engine.start_max_tries, engine.start_budget_s) == (1.0, 10, 10.0)
    assert not engine.always_restart
    assert engine.base == "ai-dock"
    assert engine.restart == RestartPolicy(max_failures=10, window_s=600, first_delay_s=0.5, max_delay_s=30)
    assert (engine.stop_grace_s, engine.env_pass, engine.extra_env) == (5.0, (), {})
    jobs = config.jobs
    assert (jobs.max_queue_depth, jobs.max_queued, jobs.max_attempts) == (0, 1000, 2)
    assert (jobs.timeout_s, jobs.drain_timeout_s, jobs.warmup_prompt) == (None, 25.0, None)
    assert config.media.max_input_bytes == 512 * 1024 * 1024
    assert (config.media.input_timeout_s, config.media.max_input_megapixels) == (300.0, 268)
    assert (config.webhooks.retries, config.webhooks.system_url, config.webhooks.system_events) == (3, None, ())
    assert (config.workflows.folder, config.workflows.markdown_descriptions) == (Path("/workflows"), True)
    assert config.log.level == "info"
    assert config.state_dir == tmp_path / "home/.local/state/comfyd"
    assert config.warnings == ()


def test_every_variable_has_a_default_that_it_would_take_and_a_field_to_go_to() -> None:
    fields = {
        name: {field.name for field in attrs.fields(cls)}
        for name, cls in (
            (field.name, field.type)
            for field in attrs.fields(attrs.resolve_types(Config))
            if attrs.has(field.type)  # type: ignore[arg-type]  # attrs.has takes what is no class too
        )
    }
    fields["engine"].add("restart_limit")
    fields["config"] = {"state_dir"}
    for variable in VARIABLES:
        group, field = variable.target.split(".")
        assert field in fields[group], variable.name
        if variable.default is None:
            assert variable.default_note or variable.name in ("WARMUP_PROMPT_FILE", "SYSTEM_WEBHOOK_URL")
        else:
            shown = variable.kind.show(variable.kind.parse(variable.default))
            assert shown == variable.default, variable.name
    assert len({variable.name for variable in VARIABLES}) == len(VARIABLES)
    assert len({variable.target for variable in VARIABLES}) == len(VARIABLES)


def test_an_empty_variable_is_unset_but_for_two(load: Callable[..., Config]) -> None:
    empty = {variable.name: "" for variable in VARIABLES if variable.name not in ("CMD", "BASE", "STATE_DIR")}
    assert attrs.evolve(load(**empty), settings=()) == attrs.evolve(load(LOG_FORMAT=""), settings=())
    assert load(BASE="").engine.base == ""
    assert load(STATE_DIR="").state_dir is None


# -- values


def test_values_are_read_with_their_units(load: Callable[..., Config]) -> None:
    config = load(
        HOST="0.0.0.0",
        PORT=" 80 ",
        MAX_BODY_SIZE_MB="2",
        STARTUP_CHECK_INTERVAL_S="0.5",
        STARTUP_CHECK_MAX_TRIES="30",
        ALWAYS_RESTART_COMFYUI="YES",
        COMFYUI_RESTART_LIMIT="3",
        CHILD_ENV_PASS="AWS_REGION, API_KEYS,",
        JOB_TIMEOUT_S="90",
        DRAIN_TIMEOUT_S="0",
        LOG_LEVEL="WARN",
        SYSTEM_WEBHOOK_URL="https://u:p@example.com/x",
        SYSTEM_WEBHOOK_EVENTS=" progress, status ,progress",
        SYSTEM_META_batch="abc",
        SYSTEM_META_Empty="",
        WORKFLOW_DIR="relative",
    )
    assert (config.http.host, config.http.port, config.http.max_body_bytes) == ("0.0.0.0", 80, 2 * 1024 * 1024)
    assert config.engine.start_budget_s == 15.0
    assert config.engine.always_restart
    assert config.engine.restart.max_failures == 3
    assert config.engine.env_pass == ("AWS_REGION", "API_KEYS")
    assert (config.jobs.timeout_s, config.jobs.drain_timeout_s) == (90.0, 0.0)
    assert config.log.level == "warn"
    assert config.webhooks.system_url == "https://u:p@example.com/x"
    assert config.webhooks.system_events == ("progress", "status")
    assert config.webhooks.system_metadata == {"batch": "abc"}
    assert config.workflows.folder == Path.cwd() / "relative"


def test_all_stands_for_every_system_event(load: Callable[..., Config]) -> None:
    assert load(SYSTEM_WEBHOOK_EVENTS="all").webhooks.system_events == variables.SYSTEM_EVENTS
    assert load(SYSTEM_WEBHOOK_EVENTS="status,all").webhooks.system_events == variables.SYSTEM_EVENTS


@pytest.mark.parametrize("text", ["true", "TRUE", "1", "yes", "on"])
def test_yes_in_any_wording(load: Callable[..., Config], text: str) -> None:
    assert load(ALWAYS_RESTART_COMFYUI=text).engine.always_restart


@pytest.mark.parametrize("text", ["false", "False", "0", "no", "off"])
def test_no_in_any_wording(load: Callable[..., Config], text: str) -> None:
    assert not load(MARKDOWN_SCHEMA_DESCRIPTIONS=text).workflows.markdown_descriptions


@pytest.mark.parametrize("host", ["::", "::1", "127.0.0.1", "localhost", "comfy_1.internal.", "fe80::1%eth0"])
def test_hosts_that_could_be_resolved(load: Callable[..., Config], host: str) -> None:
    assert load(HOST=host).http.host == host


# -- faults


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("PORT", "80a", "a whole number from 0 to 65535"),
        ("PORT", "65536", "a whole number from 0 to 65535"),
        ("PORT", "-1", "a whole number from 0 to 65535"),
        ("PORT", "1.9", "a whole number from 0 to 65535"),
        ("PORT", "8_0", "a whole number from 0 to 65535"),
        ("PORT", "٣", "a whole number from 0 to 65535"),
        ("PORT", "9" * 30, "a whole number from 0 to 65535"),
        ("MAX_BODY_SIZE_MB", "0", "a whole number from 1 to 10240"),
        ("STARTUP_CHECK_INTERVAL_S", "0", "a number of seconds greater than 0, at most 86400"),
        ("STARTUP_CHECK_INTERVAL_S", "nan", "a number of seconds greater than 0, at most 86400"),
        ("STARTUP_CHECK_INTERVAL_S", "1e3", "a number of seconds greater than 0, at most 86400"),
        ("JOB_TIMEOUT_S", "-1", "a number of seconds greater than 0, at most 2592000, or 0 (no limit)"),
        ("ALWAYS_RESTART_COMFYUI", "ja", "true, 1, yes, on, false, 0, no or off"),
        ("LOG_LEVEL", "verbose", "one of trace, debug, info, warn, error, fatal"),
        ("LOG_FORMAT", "xml", "one of json, text"),
        ("BASE", "runpod", "one of ai-dock, (empty)"),
        ("HOST", "300.1.1.1", "an IP address or a host name"),
        ("HOST", "[::]", "an IP address or a host name"),
        ("HOST", "a b", "an IP address or a host name"),
        ("DIRECT_ADDRESS", "http://x", "an IP address or a host name"),
        ("SYSTEM_WEBHOOK_URL", "ftp://x/", "an http:// or https:// URL"),
        ("SYSTEM_WEBHOOK_URL", "https://", "an http:// or https:// URL"),
        ("SYSTEM_WEBHOOK_URL", "http://x:99999/", "an http:// or https:// URL"),
        ("SYSTEM_WEBHOOK_URL", "http://[::1/", "an http:// or https:// URL"),
        ("WARMUP_PROMPT_FILE", "/nowhere/x.json", "the path of a file that exists"),
        ("CHILD_ENV_PASS", "A B", "a comma separated list of variable names"),
        ("INPUT_DIR", sys.executable, "a folder; a file is there"),
    ],
)
def test_a_bad_value_is_one_line_with_what_is_allowed(
    faults: Callable[..., tuple[str, ...]], name: str, value: str, allowed: str
) -> None:
    assert faults(**{name: value}) == (f'{name}: "{value}" is not allowed; {allowed}',)


def test_an_unknown_system_event_is_refused_with_the_known_ones(faults: Callable[..., tuple[str, ...]]) -> None:
    (line,) = faults(SYSTEM_WEBHOOK_EVENTS="status, finished")
    assert '"status, finished" is not allowed' in line
    assert all(event in line for event in variables.SYSTEM_EVENTS)


def test_all_faults_are_told_at_once(faults: Callable[..., tuple[str, ...]]) -> None:
    lines = faults(PORT="x", LOG_LEVEL="x", COMFY_HOME=sys.executable, CMD="'", WARMUP_PROMPT_FILE=sys.executable)
    assert [line.split(":")[0] for line in lines] == ["PORT", "COMFY_HOME", "LOG_LEVEL", "CMD", "WARMUP_PROMPT_FILE"]


def test_a_bad_value_is_shortened_and_cannot_forge_a_line(faults: Callable[..., tuple[str, ...]]) -> None:
    (line,) = faults(PORT="1\n\x1b[2J" + "x" * 10_000)
    assert len(line) < 200


def test_a_password_in_a_bad_url_is_not_shown(faults: Callable[..., tuple[str, ...]]) -> None:
    (line,) = faults(SYSTEM_WEBHOOK_URL="ftp://user:hunter2@host/")
    assert "hunter2" not in line
    assert "host" in line


# -- the engine's command


def test_cmd_is_split_like_a_shell_would_and_its_program_found(load: Callable[..., Config], tmp_path: Path) -> None:
    engine = load(CMD="engine --name 'a b' --x=\"$HOME\" | cat").engine
    assert engine.argv == (str(tmp_path / "bin/engine"), "--name", "a b", "--x=$HOME", "|", "cat")
    assert engine.command(1234) == engine.argv
    assert (engine.identity_arg, engine.cwd, engine.argv_is_ours) == (None, None, False)


@pytest.mark.parametrize(
    ("cmd", "part"),
    [
        ("engine 'a", "balanced quotes"),
        ("   ", "at least one word"),
        ("no-such-program x", "exists on PATH and is executable"),
        ("./no-such-program x", "exists here and is executable"),
        ("/etc", "exists here and is executable"),
    ],
)
def test_a_command_that_cannot_start_is_a_fault(faults: Callable[..., tuple[str, ...]], cmd: str, part: str) -> None:
    (line,) = faults(CMD=cmd)
    assert line.startswith(f'CMD: "{cmd}" is not allowed; ')
    assert part in line


def test_without_cmd_init_sh_comes_first(load: Callable[..., Config], tmp_path: Path) -> None:
    make_program(tmp_path / "bin/init.sh")
    make_program(tmp_path / "ComfyUI/main.py")
    engine = load(CMD="", COMFY_HOME=str(tmp_path / "ComfyUI")).engine
    assert engine.argv == (str(tmp_path / "bin/init.sh"),)
    assert not engine.argv_is_ours


@pytest.mark.parametrize("venv", ["venv", ".venv", None])
def test_without_init_sh_main_py_is_started_with_the_right_flags(
    load: Callable[..., Config], tmp_path: Path, venv: str | None
) -> None:
    home = tmp_path / "ComfyUI"
    make_program(home / "main.py")
    python = make_program(home / venv / "bin/python" if venv else tmp_path / "bin/python3")
    engine = load(CMD="", COMFY_HOME=str(home), OUTPUT_DIR=str(tmp_path / "out put"), COMFYUI_PORT_HOST="0").engine
    assert engine.command(4321) == (
        str(python),
        str(home / "main.py"),
        *("--listen", "127.0.0.1", "--port", "4321"),
        *("--input-directory", str(home / "input"), "--output-directory", str(tmp_path / "out put")),
        "--disable-auto-launch",
    )
    assert (engine.cwd, engine.port, engine.argv_is_ours) == (home, 0, True)
    assert engine.identity_arg == str(tmp_path / "out put")
    assert engine.identity_arg in engine.argv


def test_without_a_python_on_path_the_one_that_runs_us_is_taken(load: Callable[..., Config], tmp_path: Path) -> None:
    make_program(tmp_path / "ComfyUI/main.py")
    engine = load(CMD="", COMFY_HOME=str(tmp_path / "ComfyUI")).engine
    assert engine.argv[0] == sys.executable


def test_a_bundle_without_any_python_says_so(
    faults: Callable[..., tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    make_program(tmp_path / "ComfyUI/main.py")
    (line,) = faults(CMD="", COMFY_HOME=str(tmp_path / "ComfyUI"))
    assert line.startswith("CMD: is not set, and no Python is on PATH")


def test_nothing_to_start_is_a_fault_that_says_what_would_do(
    faults: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    (line,) = faults(CMD="", COMFY_HOME=str(tmp_path))
    assert all(word in line for word in ("CMD", "COMFY_HOME", "comfyd run --embedded"))


def test_a_free_port_cannot_be_chosen_for_somebody_else_s_command(faults: Callable[..., tuple[str, ...]]) -> None:
    (line,) = faults(COMFYUI_PORT_HOST="0")
    assert line.startswith('COMFYUI_PORT_HOST: "0" is not allowed; a whole number from 1 to 65535')


def test_the_engine_s_url_has_brackets_for_ipv6(load: Callable[..., Config]) -> None:
    assert load().engine.url(8188) == "http://127.0.0.1:8188"
    assert load(DIRECT_ADDRESS="::1").engine.url(1) == "http://[::1]:1"


# -- the embedded engine


def test_embedded_is_our_engine_below_the_state_folder_at_a_free_port(
    load: Callable[..., Config], tmp_path: Path
) -> None:
    config = load(embedded=True, CMD="", STATE_DIR=str(tmp_path / "state"))
    engine, home = config.engine, tmp_path / "state/embedded"
    assert engine.command(5555) == (
        *(sys.executable, "-m", "comfyd.embedded", "--listen", "127.0.0.1", "--port", "5555"),
        *("--input-directory", str(home / "input"), "--output-directory", str(home / "output")),
        *("--temp-directory", str(home)),
    )
    assert (engine.port, engine.home, engine.cwd, engine.base) == (0, home, None, "")
    assert engine.identity_arg == str(home / "output")
    assert (engine.input_dir, engine.output_dir, engine.temp_dir) == (home / "input", home / "output", home / "temp")
    assert not home.exists()


def test_embedded_keeps_folders_address_and_port_that_are_given(load: Callable[..., Config], tmp_path: Path) -> None:
    engine = load(
        embedded=True, INPUT_DIR="/in", OUTPUT_DIR="/out", MODEL_DIR="/models", COMFYUI_PORT_HOST="8190"
    ).engine
    assert (engine.input_dir, engine.output_dir, engine.model_dir, engine.port) == (
        *(Path("/in"), Path("/out"), Path("/models")),
        8190,
    )
    assert engine.argv[-2:] == ("--models-directory", "/models")


def test_embedded_does_not_need_comfyui_and_says_what_it_ignores(load: Callable[..., Config]) -> None:
    config = load(embedded=True, CMD="no-such-program")
    assert config.warnings == ("CMD does not count with --embedded",)


def test_a_bundle_starts_itself_as_the_embedded_engine(
    load: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert load(embedded=True).engine.argv[:2] == (sys.executable, "__embedded__")


def test_memory_only_still_gives_the_embedded_engine_its_folders(load: Callable[..., Config], tmp_path: Path) -> None:
    config = load(embedded=True, STATE_DIR="")
    assert config.state_dir is None
    assert config.engine.home == tmp_path / "home/.local/state/comfyd/embedded"


# -- state


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"STATE_DIR": "/s", "STATE_DIRECTORY": "/systemd"}, "/s"),
        ({"STATE_DIRECTORY": "/systemd", "XDG_STATE_HOME": "/xdg"}, "/systemd"),
        ({"STATE_DIRECTORY": "/first:/second"}, "/first"),
        ({"XDG_STATE_HOME": "/xdg"}, "/xdg/comfyd"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/h"}, "/h/.local/state/comfyd"),
    ],
)
def test_the_state_folder_by_precedence(load: Callable[..., Config], given: Environ, expected: str) -> None:
    assert load(**given).state_dir == Path(expected)


def test_without_a_home_the_journal_is_in_memory_and_that_is_said(load: Callable[..., Config]) -> None:
    config = load(HOME="")
    assert config.state_dir is None
    assert "memory" in config.warnings[0]


def test_embedded_without_any_home_is_a_fault(faults: Callable[..., tuple[str, ...]]) -> None:
    (line,) = faults(embedded=True, HOME="")
    assert line.startswith("STATE_DIR: ")


# -- the warm-up prompt

GRAPH = {
    "1": {"class_type": "A", "inputs": {"x": [1]}, "_meta": {"title": "t"}},
    "2": {"class_type": "B", "inputs": {}},
}


@pytest.mark.parametrize("document", [GRAPH, {"prompt": GRAPH}, {"prompt": GRAPH, "id": "x", "convert_output": {}}])
def test_a_warmup_prompt_is_a_graph_or_a_request(load: Callable[..., Config], tmp_path: Path, document: Any) -> None:
    path = tmp_path / "warm.json"
    path.write_text(json.dumps(document))
    jobs = load(WARMUP_PROMPT_FILE=str(path)).jobs
    assert (jobs.warmup_file, jobs.warmup_prompt) == (path, GRAPH)


def test_a_node_that_is_called_prompt_is_a_node(load: Callable[..., Config], tmp_path: Path) -> None:
    path = tmp_path / "warm.json"
    path.write_text('{"prompt": {"class_type": "A"}}')
    assert load(WARMUP_PROMPT_FILE=str(path)).jobs.warmup_prompt == {"prompt": {"class_type": "A", "inputs": {}}}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "empty"),
        ('{"1": ', "it ends too early"),
        ("[]", "not an object of nodes"),
        ("{}", "not an object of nodes"),
        ('{"1": {"inputs": {}}}', 'node "1" has no class_type'),
        ('{"1": 3}', 'node "1" has no class_type'),
        ('{"1": {"class_type": "A", "inputs": []}}', 'the inputs of node "1" are not an object'),
        ('{"nodes": [], "links": []}', "Export (API)"),
    ],
)
def test_a_warmup_file_that_is_no_prompt_is_a_fault(
    faults: Callable[..., tuple[str, ...]], tmp_path: Path, content: str, part: str
) -> None:
    path = tmp_path / "warm.json"
    path.write_text(content)
    (line,) = faults(WARMUP_PROMPT_FILE=str(path))
    assert line.startswith("WARMUP_PROMPT_FILE: ")
    assert part in line


# -- what people see


def test_the_listing_tells_value_and_origin_of_every_variable(load: Callable[..., Config], tmp_path: Path) -> None:
    config = load(PORT="80", MAX_INPUT_SIZE_MB="7", SYSTEM_META_batch="abc", SYSTEM_WEBHOOK_EVENTS="status, progress")
    rows = {row.name: row for row in describe(config)}
    assert set(rows) == {variable.name for variable in VARIABLES} | {"SYSTEM_META_batch"}
    assert (rows["PORT"].value, rows["PORT"].origin) == ("80", "environment")
    assert (rows["HOST"].value, rows["HOST"].origin) == ("::", "default")
    assert rows["MAX_INPUT_SIZE_MB"].value == "7"
    assert rows["JOB_TIMEOUT_S"].value == "0"
    assert rows["SYSTEM_WEBHOOK_EVENTS"].value == "status,progress"
    assert rows["CMD"].value == str(tmp_path / "bin/engine")
    assert rows["INPUT_DIR"].value == "/opt/ComfyUI/input"
    assert rows["SYSTEM_META_batch"].value == "abc"
    embedded = {row.name: row for row in describe(load(embedded=True))}
    assert embedded["CMD"].origin == "--embedded"


def test_secrets_are_masked_in_the_listing_and_in_repr(load: Callable[..., Config]) -> None:
    config = load(SYSTEM_WEBHOOK_URL="https://user:hunter2@example.com/x", SYSTEM_META_API_TOKEN="hunter2")
    assert "hunter2" not in "".join(row.value for row in describe(config))
    assert config.webhooks.system_url == "https://user:hunter2@example.com/x"
    assert "hunter2" not in repr(attrs.evolve(config.webhooks, system_metadata={}))


def test_the_docs_table_has_a_row_of_four_cells_for_each_variable() -> None:
    head, rule, *rows = variables_table().splitlines()
    assert head == "| variable | default | meaning | allowed |"
    assert rule == "| --- | --- | --- | --- |"
    assert len(rows) == len(VARIABLES) + 1
    assert all(row.count("|") == 5 for row in rows)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MAX_QUEUE_DEPHT", "MAX_QUEUE_DEPTH"),
        ("COMFYUI_HOME", "COMFY_HOME"),
        ("always_restart_comfyui", "ALWAYS_RESTART_COMFYUI"),
    ],
)
def test_a_likely_typo_is_a_warning(load: Callable[..., Config], name: str, meant: str) -> None:
    assert load(**{name: "1"}).warnings == (f"{name} is not a variable of comfyd; did you mean {meant}?",)


def test_other_people_s_variables_are_no_typos(load: Callable[..., Config]) -> None:
    others = (
        "PORTS",
        "HOSTNAME",
        "MANPATH",
        "HF_TOKEN",
        "LOGNAME",
        "STATE_DIRECTORY",
        "XDG_STATE_HOME",
        "PROMPT_COMMAND",
    )
    assert load(**dict.fromkeys(others, "/x")).warnings == ()


# -- small things of the values


def test_restart_delays_double_up_to_their_bound() -> None:
    policy = RestartPolicy()
    assert [policy.delay_s(failures) for failures in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert policy.delay_s(100_000) == 30


def test_only_our_own_command_has_its_port_filled_in() -> None:
    root = Path("/")
    theirs = EngineConfig(argv=("x", "{port}"), home=root, input_dir=root, output_dir=root, model_dir=root)
    assert theirs.command(1) == ("x", "{port}")
    assert attrs.evolve(theirs, argv_is_ours=True).command(1) == ("x", "1")


def test_keys_are_read_and_never_shown(load: Callable[..., Config]) -> None:
    config = load(API_KEYS="first-key-of-16-characters, short")
    assert config.http.api_keys == ("first-key-of-16-characters", "short")
    assert "first-key" not in repr(config)
    assert "first-key" not in repr(describe(config))
    assert [warning for warning in config.warnings if "API_KEYS" in warning]


@pytest.mark.parametrize("text", ["a,,b", "with space", "umlaut-ä", ","])
def test_a_list_of_keys_that_makes_no_sense_is_refused_without_showing_it(
    load: Callable[..., Config], text: str
) -> None:
    with pytest.raises(BadConfiguration) as refused:
        load(API_KEYS=text)
    assert [fault.split(":")[0] for fault in refused.value.faults] == ["API_KEYS"]
    assert text not in str(refused.value) or text == ","


def test_a_certificate_needs_its_key_and_the_metrics_another_port(load: Callable[..., Config], tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.touch()
    with pytest.raises(BadConfiguration) as refused:
        load(TLS_CERT_FILE=str(pem), METRICS_PORT="3000", CORS_ORIGINS="example.com")
    assert sorted(fault.split(":")[0] for fault in refused.value.faults) == [
        "CORS_ORIGINS",
        "METRICS_PORT",
        "TLS_KEY_FILE",
    ]
    config = load(TLS_CERT_FILE=str(pem), TLS_KEY_FILE=str(pem), METRICS_PORT="0", CORS_ORIGINS="https://a.test")
    assert (config.http.tls_cert_file, config.http.metrics_port) == (pem, 0)


def test_secrets_of_webhooks_are_decoded_and_never_shown(load: Callable[..., Config]) -> None:
    first, second = base64.b64encode(b"a" * 24).decode(), base64.b64encode(b"b" * 32).decode()
    config = load(WEBHOOK_SECRET=f"whsec_{first}, {second}")
    assert config.webhooks.secrets == (b"a" * 24, b"b" * 32)
    assert first not in repr(config)
    assert "YWFh" not in repr(describe(config))
    with pytest.raises(BadConfiguration) as refused:
        load(WEBHOOK_SECRET="not base64 at all")
    assert "WEBHOOK_SECRET" in str(refused.value)
    assert "not base64" not in str(refused.value)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"STATE_DIR": "/var/lib/x"}, Path("/var/lib/x")),
        ({"STATE_DIR": "", "HOME": "/home/me"}, None),
        ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}, Path("/var/lib/a")),
        ({"XDG_STATE_HOME": "/state", "HOME": "/home/me"}, Path("/state/comfyd")),
        ({"HOME": "/home/me"}, Path("/home/me/.local/state/comfyd")),
        ({}, None),
    ],
)
def test_the_state_folder_is_found_without_the_rest_of_the_configuration(
    environ: dict[str, str], expected: Path | None
) -> None:
    assert state_dir_of(environ) == expected
