"""What the engine sees of the daemon's environment, and what is masked where values are shown."""

from pathlib import Path

import attrs
import pytest

from comfyd.config import EngineConfig, child_environment
from comfyd.host.environment import mask_urls, secret_values, shown

ENGINE = EngineConfig(
    argv=("engine",), home=Path("/c"), input_dir=Path("/c/i"), output_dir=Path("/c/o"), model_dir=Path("/c/m")
)

ADDED = {
    "DIRECT_ADDRESS": "127.0.0.1",
    "COMFYUI_PORT_HOST": "4321",
    "WEB_ENABLE_AUTH": "false",
    "CF_QUICK_TUNNELS": "false",
}


def test_the_engine_gets_the_daemon_s_environment_and_the_four_variables_of_the_peer() -> None:
    environ = {"PATH": "/bin", "HF_TOKEN": "hf", "COMFYUI_PORT_HOST": "0", "WEB_ENABLE_AUTH": "true"}
    assert child_environment(environ, ENGINE, port=4321) == {"PATH": "/bin", "HF_TOKEN": "hf", **ADDED}
    assert environ["COMFYUI_PORT_HOST"] == "0"


SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AZURE_STORAGE_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "HTTP_AUTH_HEADER_VALUE",
    "WEBHOOK_SECRET",
    "API_KEYS",
    "ANTHROPIC_API_KEY",
)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_of_the_daemon_reaches_the_engine_only_when_it_is_named(name: str) -> None:
    environ = dict.fromkeys(SECRETS, "x")
    assert child_environment(environ, ENGINE, port=4321) == ADDED
    passing = attrs.evolve(ENGINE, env_pass=(name,))
    assert child_environment(environ, passing, port=4321) == {name: "x", **ADDED}


@pytest.mark.parametrize(
    "name", ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "JOURNAL_STREAM"]
)
def test_what_systemd_says_of_our_process_is_not_told_to_another(name: str) -> None:
    assert child_environment({name: "x"}, ENGINE, port=4321) == ADDED


@pytest.mark.parametrize(("original", "restored"), [("/mine", {"LD_LIBRARY_PATH": "/mine"}), (None, {})])
def test_a_bundle_s_library_path_is_undone(original: str | None, restored: dict[str, str]) -> None:
    environ = {"_PYI_ARCHIVE_FILE": "x", "_MEIPASS2": "x", "LD_LIBRARY_PATH": "/tmp/_MEIx"}
    if original is not None:
        environ["LD_LIBRARY_PATH_ORIG"] = original
    assert child_environment(environ, ENGINE, port=4321) == {**restored, **ADDED}


def test_without_a_bundle_the_library_path_is_left_alone() -> None:
    assert child_environment({"LD_LIBRARY_PATH": "/mine"}, ENGINE, port=4321) == {"LD_LIBRARY_PATH": "/mine", **ADDED}


def test_what_the_base_adds_overrides_what_was_inherited_but_not_our_four() -> None:
    engine = attrs.evolve(ENGINE, extra_env={"PATH": "/venv/bin", "COMFYUI_PORT_HOST": "1"})
    assert child_environment({"PATH": "/bin"}, engine, port=4321) == {"PATH": "/venv/bin", **ADDED}


@pytest.mark.parametrize("name", ["WEBHOOK_SECRET", "HF_TOKEN", "MY_PASSWORD", "X_API_KEY", "AWS_SECRET_ACCESS_KEY"])
def test_a_secret_is_never_shown(name: str) -> None:
    assert shown(name, "hunter2") == '"********"'
    assert shown(name, "") == '""'


def test_an_ordinary_value_is_shown_short_and_on_one_line() -> None:
    assert shown("PORT", "80") == '"80"'
    assert shown("AWS_REGION", "eu-1", quote=False) == "eu-1"
    assert len(shown("PORT", "x\n" * 1000)) <= 82
    assert shown("PORT", "x\n" * 1000).isprintable()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://user:pw@host/a?b=1", "https://********@host/a?b=1"),
        ("https://token@host", "https://********@host"),
        ("see http://a:b@x and http://c:d@y/z", "see http://********@x and http://********@y/z"),
        ("s3://b/k?X-Amz-Signature=abc&x=1", "s3://b/k?X-Amz-Signature=********&x=1"),
        ("https://h/?api_key=1&token=2&sig=3#f", "https://h/?api_key=********&token=********&sig=********#f"),
        ("https://h/a@b", "https://h/a@b"),
        ("mail me@x.org, sig=3", "mail me@x.org, sig=3"),
    ],
)
def test_what_lets_in_is_masked_in_urls(text: str, masked: str) -> None:
    assert mask_urls(text) == masked


def test_the_values_to_hide_from_the_log_include_the_members_of_lists() -> None:
    environ = {
        "API_KEYS": "first-key, second-key",
        "X_TOKEN": "short",
        "PATH": "/usr/local/bin",
        "AWS_REGION": "eu-central-1",
    }
    assert secret_values(environ) == ["first-key", "first-key, second-key", "second-key"]
