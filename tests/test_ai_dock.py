"""Loading the environment of an ai-dock image: only where its files are, and never for long."""

import os
import time
from pathlib import Path

import pytest

from comfyd.config import load_config
from comfyd.errors import BadConfiguration
from comfyd.host import ai_dock

ENVIRON = {"PATH": os.environ["PATH"], "HOME": "/nowhere"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image: two scripts and a venv, as in ai-dock, with some chatter."""
    (tmp_path / "opt/ai-dock/etc").mkdir(parents=True)
    (tmp_path / "opt/ai-dock/bin").mkdir()
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "opt/ai-dock/etc/environment.sh").write_text("echo loading; export FROM_IMAGE='a=b\nc'\nUNEXPORTED=1\n")
    (tmp_path / "opt/ai-dock/bin/venv-set.sh").write_text(f'export COMFYUI_VENV="{tmp_path}/venv" VENV_OF="$1"\n')
    (tmp_path / "venv/bin/activate").write_text('export PATH="$COMFYUI_VENV/bin:$PATH"\n')
    return tmp_path


def write_environment_script(root: Path, text: str) -> None:
    (root / "opt/ai-dock/etc/environment.sh").write_text(text)


def test_where_the_files_are_not_nothing_is_run(tmp_path: Path) -> None:
    assert ai_dock.environment({"PATH": ""}, root=tmp_path) == {}


def test_what_the_scripts_set_is_returned_and_nothing_else(root: Path) -> None:
    assert ai_dock.environment(ENVIRON, root=root) == {
        "FROM_IMAGE": "a=b\nc",
        "COMFYUI_VENV": f"{root}/venv",
        "VENV_OF": "comfyui",
        "PATH": f"{root}/venv/bin:{ENVIRON['PATH']}",
    }


def test_a_script_that_fails_is_one_line_with_its_last_words(root: Path) -> None:
    write_environment_script(root, "echo first >&2; echo no such venv >&2; exit 3")
    with pytest.raises(ai_dock.AiDockError, match=r"failed with exit code 3: no such venv$"):
        ai_dock.environment(ENVIRON, root=root)


def test_a_script_that_hangs_is_killed_with_what_it_started(root: Path) -> None:
    write_environment_script(root, f"sleep 60 & echo $! > {root}/pid; wait")
    began = time.monotonic()
    with pytest.raises(ai_dock.AiDockError, match=r"more than 0\.5 s"):
        ai_dock.environment(ENVIRON, root=root, limit_s=0.5)
    assert time.monotonic() - began < 5
    state = Path(f"/proc/{(root / 'pid').read_text().strip()}/stat")
    assert not state.exists() or state.read_text().split(") ")[1][0] == "Z"


def test_a_script_cannot_wait_for_input(root: Path) -> None:
    write_environment_script(root, "read answer; export ANSWER=got:$answer")
    assert ai_dock.environment(ENVIRON, root=root)["ANSWER"] == "got:"


def test_without_bash_the_line_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(root))
    with pytest.raises(ai_dock.AiDockError, match="bash cannot be run"):
        ai_dock.environment({"PATH": str(root)}, root=root)


def test_the_engine_s_program_is_looked_for_on_the_image_s_path(root: Path) -> None:
    program = root / "venv/bin/engine"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    engine = load_config({**ENVIRON, "CMD": "engine"}, root=root).engine
    assert engine.argv == (str(program),)
    assert engine.extra_env["FROM_IMAGE"] == "a=b\nc"


def test_init_sh_starts_without_it_as_it_loads_it_by_itself(root: Path) -> None:
    program = root / "venv/bin/init.sh"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    engine = load_config({**ENVIRON, "CMD": "init.sh --x"}, root=root).engine
    assert engine.argv == (str(program), "--x")
    assert engine.extra_env == {}


def test_an_empty_base_leaves_it_out(root: Path) -> None:
    write_environment_script(root, "exit 3")
    assert load_config({**ENVIRON, "CMD": "sh", "BASE": ""}, root=root).engine.extra_env == {}


def test_a_failure_is_a_fault_of_base(root: Path) -> None:
    write_environment_script(root, "exit 3")
    with pytest.raises(BadConfiguration) as caught:
        load_config({**ENVIRON, "CMD": "sh"}, root=root)
    assert caught.value.faults == (
        "BASE: loading ai-dock's environment failed with exit code 3; set BASE to empty to start without it",
    )
