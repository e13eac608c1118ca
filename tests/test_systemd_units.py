"""The units: systemd finds no fault in them, they are as closed as they say, and their numbers fit the daemon's."""

import configparser
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from comfyd.config import load_config
from comfyd.engine.process import GUARD_WAIT_S, KILL_WAIT_S, LEFTOVERS_WAIT_S
from comfyd.host.notify import EXTEND_EVERY_S
from comfyd.http.server.sockets import KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES
from comfyd.services import HTTP_STOP_GRACE_S
from comfyd.variables import VARIABLES

UNITS: Final = Path(__file__).parent.parent / "systemd"
needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")


def unit(name: str) -> dict[str, list[str]]:
    """Return the settings of a unit; one that is given several times keeps every value."""
    settings: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            settings.setdefault(key, []).append(value)
    return settings


def number(settings: dict[str, list[str]], key: str) -> int:
    (value,) = settings[key]
    return int(value)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the units, whose program is one that exists here."""
    for name in ("comfyd.service", "comfyd.socket"):
        text = (UNITS / name).read_text()
        (tmp_path / name).write_text(
            re.sub("^ExecStart=/opt/comfyd/bin/comfyd", "ExecStart=/bin/sh", text, flags=re.MULTILINE)
        )
    return tmp_path


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    argv = ["systemd-analyze", "--no-pager", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


@needs_analyze
def test_systemd_finds_no_fault_in_the_units(installed: Path) -> None:
    """Unknown settings are only a line on stderr, with exit code 0."""
    done = analyze("verify", "--man=no", installed / "comfyd.service", installed / "comfyd.socket")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_analyze
def test_a_fault_would_be_found(installed: Path) -> None:
    service = installed / "comfyd.service"
    service.write_text(service.read_text().replace("ProtectClock=", "ProtectClok="))
    assert "ProtectClok" in analyze("verify", "--man=no", service).stderr


@needs_analyze
def test_the_service_is_as_closed_as_a_gpu_allows(installed: Path) -> None:
    """1.9 with systemd 252; a later one may weigh differently. 9.6 is a service without any of it."""
    done = analyze("security", "--offline=true", "--threshold=25", installed / "comfyd.service")
    exposure = re.search(r"Overall exposure level .*: ([0-9.]+)", done.stdout)
    assert exposure is not None, done.stdout + done.stderr
    assert float(exposure[1]) <= 2.5
    assert done.returncode == 0


def test_the_stop_has_time_for_every_rung_of_the_ladder() -> None:
    config = load_config({"STATE_DIR": "/nonexistent/state"}, embedded=True)
    longest_s = (
        config.jobs.drain_timeout_s
        + HTTP_STOP_GRACE_S
        + config.engine.stop_grace_s
        + KILL_WAIT_S
        + GUARD_WAIT_S
        + LEFTOVERS_WAIT_S
    )
    assert number(unit("comfyd.service"), "TimeoutStopSec") >= longest_s + 10


def test_the_start_timeout_leaves_room_for_lost_extensions() -> None:
    assert number(unit("comfyd.service"), "TimeoutStartSec") >= 3 * EXTEND_EVERY_S


def test_a_wrong_configuration_is_not_tried_again() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "comfyd", "run"], env={"PORT": "x"}, capture_output=True, check=False, timeout=60
    )
    assert unit("comfyd.service")["RestartPreventExitStatus"] == [str(done.returncode)]


def test_the_socket_has_the_options_of_our_own() -> None:
    settings = unit("comfyd.socket")
    assert number(settings, "KeepAliveTimeSec") == KEEPALIVE_IDLE_S
    assert number(settings, "KeepAliveIntervalSec") == KEEPALIVE_INTERVAL_S
    assert number(settings, "KeepAliveProbes") == KEEPALIVE_PROBES


def test_the_example_names_variables_that_there_are_and_is_a_valid_configuration(tmp_path: Path) -> None:
    text = (UNITS / "comfyd.env.example").read_text()
    names = re.findall(r"^#?([A-Z][A-Z0-9_]*)=", text, flags=re.MULTILINE)
    known = {variable.name for variable in VARIABLES} | {"AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert len(names) > 5
    assert set(names) <= known
    parser = configparser.RawConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # configparser's documented way to keep case
    parser.read_string("[env]\n" + text)
    environ = dict(parser["env"])
    (tmp_path / "main.py").touch()
    config = load_config({**environ, "COMFY_HOME": str(tmp_path), "STATE_DIR": str(tmp_path / "state")})
    assert config.warnings == ()
    assert config.engine.start_budget_s == 300.0


def test_the_guide_needs_six_lines_and_names_files_that_exist() -> None:
    guide = (UNITS / "README.md").read_text()
    commands = guide.split("```sh\n")[1].split("```")[0].strip().splitlines()
    assert len(commands) == 6
    assert all(subprocess.run(["sh", "-n", "-c", command], check=False).returncode == 0 for command in commands)
    root = UNITS.parent
    for path in re.findall(r"(?<!/)\b(?:systemd|requirements)/[\w.]+", "\n".join(commands)):
        assert (root / path).is_file(), path
    assert not any(stat.S_IMODE(path.stat().st_mode) & 0o111 for path in UNITS.iterdir())
