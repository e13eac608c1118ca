"""The log: one line for each event whoever logs it, without secrets, and whatever stderr does."""

import json
import logging
import os
import re
import select
import subprocess
import sys
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from comfyd.config import LogConfig
from comfyd.host import logging as comfyd_logging
from comfyd.host import redaction
from comfyd.host.logging import (
    bind_job,
    configure_logging,
    current_job,
    redacting,
    register_secret,
    register_secrets_of,
)


class Pipe:
    """A pipe in stderr's place, whose reader is the test."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)

    def text(self) -> str:
        """Return what was written since the last call."""
        parts = []
        while select.select([self.read_fd], [], [], 0)[0] and (part := os.read(self.read_fd, 65536)):
            parts.append(part)
        return b"".join(parts).decode()

    def lines(self) -> list[dict[str, Any]]:
        text = self.text()
        assert not text or text.endswith("\n")
        return [json.loads(line) for line in text.splitlines()]

    def whole_lines(self) -> list[dict[str, Any]]:
        """Return the lines but for a last one that was cut."""
        return [json.loads(line) for line in self.text().split("\n")[:-1]]

    def line(self) -> dict[str, Any]:
        (line,) = self.lines()
        return line

    def close_reader(self) -> None:
        os.close(self.read_fd)
        self.read_fd = -1


def fail(exc: Exception) -> None:
    raise exc


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    monkeypatch.setattr(redaction, "_kept", set())
    monkeypatch.setattr(redaction, "_lent", Counter())
    monkeypatch.setattr(redaction, "_lingering", deque())
    monkeypatch.setattr(redaction, "_masked", ())
    root = logging.getLogger()
    level = root.level
    pipe = Pipe()
    with warnings.catch_warnings():
        yield pipe
        logging.captureWarnings(False)
    root.handlers[:] = []
    root.setLevel(level)
    for name in (*comfyd_logging._DEMOTED, *comfyd_logging._NOISY):
        logging.getLogger(name).setLevel(logging.NOTSET)
    structlog.reset_defaults()
    for fd in (pipe.read_fd, pipe.write_fd):
        if fd != -1:
            os.close(fd)


@pytest.fixture
def configure(pipe: Pipe, request: pytest.FixtureRequest) -> Callable[..., Any]:
    def configure(*, level: Any = "info", format: Any = "json", colour: bool | None = None) -> Any:  # noqa: A002  the field's name
        logging.getLogger().handlers[:] = []  # pytest's own, which raise what a library logs wrongly
        configure_logging(LogConfig(level=level, format=format), fd=pipe.write_fd, colour=colour)
        return structlog.get_logger(request.node.name)

    return configure


# -- lines


def test_an_event_is_one_json_object_with_its_keys_in_order(pipe: Pipe, configure: Callable[..., Any]) -> None:
    configure().info("engine.ready", waited_s=0.21, pid=7, note='a "b"\nc', none=None, flag=True, path=Path("/x"))
    text = pipe.text()
    assert text.count("\n") == 1
    line = json.loads(text)
    assert list(line)[:4] == ["time", "level", "event", "logger"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "info",
        "event": "engine.ready",
        "logger": "test_an_event_is_one_json_object_with_its_keys_in_order",
        "waited_s": 0.21,
        "pid": 7,
        "note": 'a "b"\nc',
        "none": None,
        "flag": True,
        "path": "/x",
    }


LEVELS = ("trace", "debug", "info", "warn", "error", "fatal")


@pytest.mark.parametrize("level", LEVELS)
def test_levels_have_the_seed_s_names_and_lower_ones_are_silent(
    pipe: Pipe, configure: Callable[..., Any], level: str
) -> None:
    log = configure(level=level)
    for name in ("trace", "debug", "info", "warning", "error", "critical"):
        getattr(log, name)("event", value=1)
    expected = list(LEVELS[LEVELS.index(level) :])
    assert [line["level"] for line in pipe.lines()] == expected
    foreign = logging.getLogger("somebody")
    for number in (5, 10, 20, 30, 40, 50):
        foreign.log(number, "event %d", number)
    assert [line["level"] for line in pipe.lines()] == expected


def test_names_that_every_line_has_cannot_be_taken_by_a_field(pipe: Pipe, configure: Callable[..., Any]) -> None:
    configure().info("event", level="x", time="y", logger="z")
    line = pipe.line()
    assert (line["level"], line["field_level"], line["field_time"], line["field_logger"]) == ("info", "x", "y", "z")


def test_an_exception_is_one_line_with_a_traceback_field(pipe: Pipe, configure: Callable[..., Any]) -> None:
    log = configure()
    try:
        fail(ExceptionGroup("several", [ValueError("first"), KeyError("second")]))
    except ExceptionGroup as group:
        log.exception("job.bug", job="x")
        log.error("job.bug", exc_info=group)  # noqa: TRY400  the other way to give an exception
    for line in pipe.lines():
        assert line["level"] == "error"
        assert all(part in line["traceback"] for part in ("Traceback", "ValueError: first", "KeyError: 'second'"))


def test_exception_outside_of_a_handler_is_an_ordinary_line(pipe: Pipe, configure: Callable[..., Any]) -> None:
    configure().exception("odd")
    assert pipe.line()["event"] == "odd"


# -- other people's logs


def test_a_library_s_records_take_the_same_way(pipe: Pipe, configure: Callable[..., Any]) -> None:
    configure()
    try:
        fail(OSError("gone"))
    except OSError:
        logging.getLogger("hypercorn.error").exception("it %s", "failed", stack_info=True)
    line = pipe.line()
    assert (line["level"], line["logger"], line["event"]) == ("error", "hypercorn.error", "it failed")
    assert "OSError: gone" in line["traceback"]
    assert "Stack" in line["stack"]


def test_a_library_s_wrong_arguments_are_told_and_do_not_raise(pipe: Pipe, configure: Callable[..., Any]) -> None:
    configure()
    logging.getLogger("somebody").warning("%d files", "many")
    assert pipe.line()["event"].startswith("%d files (arguments do not fit: TypeError")


def test_requests_of_httpx_are_debug_and_the_wire_below_is_trace(pipe: Pipe, configure: Callable[..., Any]) -> None:
    seen = {}
    for level in ("info", "debug", "trace"):
        configure(level=level)
        logging.getLogger("httpx").info("HTTP Request: GET /")
        logging.getLogger("httpcore.http11").debug("send_request_headers.started")
        logging.getLogger("botocore.hooks").warning("retrying")
        seen[level] = [(line["logger"], line["level"]) for line in pipe.lines()]
    warned = ("botocore.hooks", "warn")
    assert seen == {
        "info": [warned],
        "debug": [("httpx", "debug"), warned],
        "trace": [("httpx", "debug"), ("httpcore.http11", "debug"), warned],
    }


def test_warnings_are_logged(pipe: Pipe, configure: Callable[..., Any]) -> None:
    configure()
    warnings.simplefilter("always")
    warnings.warn("old thing", DeprecationWarning, stacklevel=1)
    line = pipe.line()
    assert line["logger"] == "py.warnings"
    assert "DeprecationWarning: old thing" in line["event"]


def test_configuring_again_replaces_what_was(pipe: Pipe, configure: Callable[..., Any]) -> None:
    log = configure()
    log.info("one")
    configure()
    log.info("two")
    logging.getLogger("somebody").info("three")
    assert [line["event"] for line in pipe.lines()] == ["one", "two", "three"]


# -- the job


def test_the_job_is_on_every_line_inside_and_on_none_outside(pipe: Pipe, configure: Callable[..., Any]) -> None:
    log = configure()
    with bind_job("job-1", 2):
        log.info("in")
        logging.getLogger("somebody").info("in too")
        with bind_job("job-2", 1):
            log.info("inner")
        log.info("said", job_id="other")
    log.info("out")
    assert [(line.get("job_id"), line.get("attempt")) for line in pipe.lines()] == [
        ("job-1", 2),
        ("job-1", 2),
        ("job-2", 1),
        ("other", 2),
        (None, None),
    ]


async def test_tasks_and_threads_inherit_the_job_and_do_not_mix(
    pipe: Pipe, configure: Callable[..., Any], autojump_clock: trio.testing.MockClock
) -> None:
    log = configure()

    async def work(job_id: str) -> None:
        with bind_job(job_id, 1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child, job_id)
                nursery.start_soon(child, job_id)

    async def child(expected: str) -> None:
        await trio.sleep(1)
        log.info("task", expected=expected)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(work, f"job-{number}")
    lines = pipe.lines()
    assert len(lines) == 10
    assert all(line["job_id"] == line["expected"] for line in lines)


async def test_a_thread_inherits_the_job(pipe: Pipe, configure: Callable[..., Any]) -> None:
    log = configure()
    with bind_job("job-1", 3):
        await trio.to_thread.run_sync(log.info, "thread")
    assert (pipe.line()["job_id"], log.info("x"), "job_id" in pipe.line()) == ("job-1", None, False)


# -- secrets


def test_a_registered_secret_is_masked_wherever_it_is(pipe: Pipe, configure: Callable[..., Any]) -> None:
    log = configure()
    register_secret("hunter2")
    register_secret("hunter2-long")

    class Talkative:
        def __str__(self) -> str:
            return "I know hunter2"

    nested = {"a": ["hunter2", {"b": "-hunter2-"}], "hunter2": Talkative()}
    log.info("hunter2", plain="x hunter2-long y", nested=nested, obj=Talkative(), items=("hunter2",), some={"hunter2"})
    try:
        fail(ValueError("hunter2"))
    except ValueError:
        log.exception("failed")
    logging.getLogger("somebody").info("password is %s", "hunter2")
    text = pipe.text()
    assert text.count("\n") == 3
    assert "hunter2" not in text
    assert "x ******** y" in text
    assert "I know ********" in text


def test_passwords_and_signatures_in_urls_are_masked(pipe: Pipe, configure: Callable[..., Any]) -> None:
    configure().info("fetch", url="https://u:pw@h/x?X-Amz-Signature=abc", plain="https://h/x")
    line = pipe.line()
    assert line["url"] == "https://********@h/x?X-Amz-Signature=********"
    assert line["plain"] == "https://h/x"


def test_a_secret_of_digits_does_not_break_numbers(pipe: Pipe, configure: Callable[..., Any]) -> None:
    register_secret("12345")
    configure().info("event", number=123456, text="123456")
    line = pipe.line()
    assert (line["number"], line["text"]) == (123456, "********6")


def test_a_very_short_secret_is_not_taken_as_it_would_mask_everything(
    pipe: Pipe, configure: Callable[..., Any]
) -> None:
    register_secret("e")
    register_secret("")
    configure().info("event")
    assert pipe.line()["event"] == "event"


# Every secret that the daemon can hold, by the variable that gives it, with each form in which it may turn up.
SIGNING = "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER_SIGNING = "aXQgaXMgYW5vdGhlciBzaWduaW5nIGtleQ=="
PRIVATE_KEY = "-----BEGIN KEY-----\nQUFBQUFBQUFBQUFBQUFBQUFB\nQkJCQkJCQkJCQkJCQkJCQkJC\n-----END KEY-----"
SECRETS_OF_THE_DAEMON = [
    ("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE", ["AKIAIOSFODNN7EXAMPLE"]),
    (
        "AWS_SECRET_ACCESS_KEY",
        "wJalrXUtnFEMI/K7MDENG+bPx",
        ["wJalrXUtnFEMI/K7MDENG+bPx", "wJalrXUtnFEMI%2FK7MDENG%2BbPx"],
    ),
    ("AWS_SESSION_TOKEN", "IQoJb3JpZ2luX2VjEXAMPLE==", ["IQoJb3JpZ2luX2VjEXAMPLE=="]),
    ("WEBHOOK_SECRET", f"whsec_{SIGNING}", [f"whsec_{SIGNING}", SIGNING]),
    (
        "WEBHOOK_SECRET",
        f"whsec_{SIGNING}, {OTHER_SIGNING}",
        [SIGNING, f"whsec_{SIGNING}", OTHER_SIGNING, f"{SIGNING} and {OTHER_SIGNING}"],
    ),
    ("API_KEYS", "first-api-key,second-api-key", ["first-api-key", "second-api-key"]),
    ("ANTHROPIC_API_KEY", "sk-ant-api03-abcdef", ["sk-ant-api03-abcdef"]),
    ("HTTP_AUTH_HEADER_VALUE", "Bearer storage-token", ["Bearer storage-token", "storage-token"]),
    (
        "SYSTEM_WEBHOOK_URL",
        "https://u:correct%20horse@h/x",
        ["correct horse", "correct%20horse"],
    ),
    ("SYSTEM_WEBHOOK_URL", "https://h/x?a=plainly&token=query-token", ["query-token"]),
    ("HF_TOKEN", "hf_abcdefghijkl", ["hf_abcdefghijkl"]),
    ("SOME_PASSWORD", 'quoted"pass\\word', ['quoted"pass\\word', json.dumps('quoted"pass\\word')]),
    ("SOME_PRIVATE_KEY", PRIVATE_KEY, PRIVATE_KEY.splitlines()[1:3]),
]


@pytest.mark.parametrize(("name", "value", "forms"), SECRETS_OF_THE_DAEMON)
@pytest.mark.parametrize("format", ["json", "text"])
def test_no_secret_of_the_daemon_s_environment_is_logged_in_any_form(
    pipe: Pipe,
    configure: Callable[..., Any],
    format: str,  # noqa: A002  as above
    name: str,
    value: str,
    forms: list[str],
) -> None:
    configure(format=format)
    log = structlog.get_logger("comfyd.engine.output")  # the test's own name has the secret in it
    for form in forms:
        log.info("engine.output", text=f"before {form} after")
    shown = pipe.text()
    bare = [line for form in forms for line in form.strip('"').split(" and ")]
    assert all(json.dumps(form)[1:-1] in shown for form in bare), "the test would see nothing"
    register_secrets_of({name: value})
    for form in forms:
        log.info("engine.output", text=f"before {form} after", nested={"a": [form], form: 1})
        log.info(form)
        logging.getLogger("somebody").warning("it is %s", form)
        try:
            fail(ValueError(form))
        except ValueError:
            log.exception("failed")
    text = pipe.text()
    for form in bare:
        assert form not in text
        assert json.dumps(form)[1:-1] not in text
    assert text.count("before") == len(forms)


def test_what_is_no_secret_of_a_url_is_shown(pipe: Pipe, configure: Callable[..., Any]) -> None:
    log = configure()
    register_secrets_of(
        {"SYSTEM_WEBHOOK_URL": "https://user:short@receiver.example/path?page=something", "NOT": "a [b://"}
    )
    log.info("sent", text="short receiver.example something")
    assert pipe.line()["text"] == "short receiver.example something"


def test_what_a_job_brought_is_masked_while_it_runs_and_a_little_longer(
    pipe: Pipe, configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = configure()
    now = 1000.0
    monkeypatch.setattr("comfyd.host.redaction.time.monotonic", lambda: now)
    with redacting(["comfyui-partner-key"]), redacting(["comfyui-partner-key", "of-the-second"]):
        log.info("engine.output", text="key is comfyui-partner-key")
    log.info("engine.output", text="key is comfyui-partner-key, of-the-second")
    now += 5
    with redacting(["of-the-third"]):
        log.info("engine.output", text="comfyui-partner-key of-the-third")
    now += 6
    with redacting(["of-the-fourth"]):
        log.info("engine.output", text="comfyui-partner-key of-the-third")
    assert [line["text"] for line in pipe.lines()] == [
        "key is ********",
        "key is ********, ********",
        "******** ********",
        "comfyui-partner-key ********",
    ]


def test_a_job_s_value_that_is_the_daemon_s_secret_too_stays_masked(
    pipe: Pipe, configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = configure()
    now = 1000.0
    monkeypatch.setattr("comfyd.host.redaction.time.monotonic", lambda: now)
    register_secret("the-daemon-s-key")
    for _ in range(2):
        with redacting(["the-daemon-s-key"]):
            now += 60
    with redacting(["something-else"]):
        log.info("event", text="the-daemon-s-key")
    assert pipe.line()["text"] == "********"


def test_jobs_cannot_make_the_log_slow_or_mask_ordinary_words(pipe: Pipe, configure: Callable[..., Any]) -> None:
    log = configure()
    with redacting(["auto", "true", *(f"some-value-{number}" for number in range(10_000))]):
        assert len(redaction._masked) <= 32
        log.info("event", text="auto true some-value-3")
    for number in range(1000):
        with redacting([f"another-value-{number}"]):
            pass
    assert len(redaction._masked) <= 65
    assert pipe.line()["text"] == "auto true ********"


def test_the_job_that_is_bound_can_be_asked_for() -> None:
    assert current_job() is None
    with bind_job("job-1", 2):
        assert current_job() == ("job-1", 2)


# -- it never raises


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Endless(dict[str, Any]):
    pass


def odd_values() -> list[Any]:
    endless = Endless()
    endless["self"] = endless
    return [
        *(
            b"\xff" * 5,
            bytearray(3),
            "\ud800 lone",
            "\x00\x1b[2J\u2028",
            10**400,
            float("nan"),
            float("inf"),
            1j,
            object(),
        ),
        *(endless, {1: 2, None: 3, ("a",): 4}, {"x", "y"}, [[[[[[[[[1]]]]]]]]], range(3), Path("/x"), LogConfig()),
        *(ValueError("x"), {"deep": {"deep": {"deep": {"deep": {"deep": {"deep": {"deep": 1}}}}}}}),
    ]


@pytest.mark.parametrize("format", ["json", "text"])
def test_any_value_can_be_logged_on_one_line(pipe: Pipe, configure: Callable[..., Any], format: str) -> None:  # noqa: A002  as above
    log = configure(format=format)
    for value in odd_values():
        log.info("event", value=value)
        text = pipe.text()
        assert text.count("\n") == 1
        assert text[:-1].isprintable()
        assert "unprintable" not in text
        if format == "json":
            assert "value" in json.loads(text)


@pytest.mark.parametrize("format", ["json", "text"])
def test_a_field_without_a_text_costs_the_line_but_says_so(
    pipe: Pipe,
    configure: Callable[..., Any],
    format: str,  # noqa: A002  as above
) -> None:
    log = configure(format=format)
    log.info("event", value=Unprintable())
    log.info(Unprintable())
    text = pipe.text()
    assert text.count("log.unprintable") == 2
    assert text.count("RuntimeError") == 2


def test_a_line_is_bounded(pipe: Pipe, configure: Callable[..., Any]) -> None:
    log = configure()
    log.info("event", value="x" * 10_000_000)
    line = pipe.line()
    assert len(line["value"]) < 20_000
    assert "characters left out" in line["value"]
    log.info("event", value=list(range(100_000)))
    assert len(pipe.line()["value"]) == 100


def test_a_closed_reader_is_survived(pipe: Pipe, configure: Callable[..., Any]) -> None:
    log = configure()
    pipe.close_reader()
    for _ in range(3):
        log.error("nobody listens")
        logging.getLogger("somebody").error("nobody listens")


def test_a_closed_stderr_is_survived(pipe: Pipe, configure: Callable[..., Any]) -> None:
    log = configure()
    os.close(pipe.write_fd)
    try:
        log.error("there is nothing")
    finally:
        pipe.write_fd = -1


def test_a_stuck_reader_loses_lines_does_not_stall_and_is_told(pipe: Pipe, configure: Callable[..., Any]) -> None:
    log = configure()
    log.info("first")
    done = threading.Event()

    def flood() -> None:
        for number in range(5000):
            log.info("flood", number=number)
        done.set()

    threading.Thread(target=flood, daemon=True).start()
    assert done.wait(10)  # it waits for the reader once, not at every line
    before = pipe.whole_lines()
    log.info("after")
    lost, after = pipe.whole_lines()[-2:]
    assert (lost["event"], after["event"]) == ("log.lines_dropped", "after")
    assert lost["lines"] == 5001 - len(before)


def test_after_a_line_that_was_cut_the_next_begins_on_its_own(pipe: Pipe, configure: Callable[..., Any]) -> None:
    log = configure()
    for _ in range(10):
        log.info("long", fill="x" * 9_000)  # three pages of a pipe that has sixteen
    before = pipe.text()
    assert not before.endswith("\n")
    log.info("after")
    after = pipe.text()
    assert after[0] == "\n"
    assert [json.loads(line)["event"] for line in after.splitlines() if line] == ["log.lines_dropped", "after"]


def test_lines_of_many_threads_do_not_mix(pipe: Pipe, configure: Callable[..., Any]) -> None:
    log = configure()
    collected: list[dict[str, Any]] = []
    buffer = b""
    threads = [
        threading.Thread(target=lambda n=n: [log.info("e", n=n, fill="x" * 5000) for _ in range(50)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    while len(collected) < 200:
        assert select.select([pipe.read_fd], [], [], 10)[0]
        buffer += os.read(pipe.read_fd, 65536)
        *whole, buffer = buffer.split(b"\n")
        collected += [json.loads(line) for line in whole]
    for thread in threads:
        thread.join()
    assert sorted(line["n"] for line in collected) == sorted(n for n in range(4) for _ in range(50))


# -- text


def test_text_is_aligned_and_readable(pipe: Pipe, configure: Callable[..., Any]) -> None:
    log = configure(format="text")
    with bind_job("j1", 1):
        log.warning("engine.slow", waited_s=0.21, reason="no answer", items=[1, "a"])
    text = pipe.text()
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.\d{3} warn  engine\.slow {17} test_text_is_aligned_and_readable "
        r'job_id=j1 attempt=1 waited_s=0\.21 reason="no answer" items=\[1,"a"\]\n',
        text,
    )


def test_text_cannot_forge_a_line_or_move_the_cursor(pipe: Pipe, configure: Callable[..., Any]) -> None:
    configure(format="text").info("a\nb\x1b[2J", field="c\nd\x1b[2J\x9b\u2028", **{"k\ne\x1by": 1})
    text = pipe.text()
    assert text.count("\n") == 1
    assert text[:-1].isprintable()


def test_a_traceback_is_indented_below_its_line(pipe: Pipe, configure: Callable[..., Any]) -> None:
    log = configure(format="text")
    try:
        fail(ValueError("first\nsecond"))
    except ValueError:
        log.exception("bug")
    first, *rest = pipe.text().splitlines()
    assert "bug" in first
    assert rest
    assert all(line.startswith("    ") for line in rest)
    assert rest[-2:] == ["    ValueError: first", "    second"]


@pytest.mark.parametrize(("colour", "has_escapes"), [(True, True), (False, False), (None, False)])
def test_colour_only_where_it_is_wanted(
    pipe: Pipe, configure: Callable[..., Any], colour: bool | None, has_escapes: bool
) -> None:
    configure(format="text", colour=colour).info("event", a=1)
    assert ("\x1b[" in pipe.text()) == has_escapes


@pytest.mark.parametrize(
    ("environ", "has_escapes"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_a_terminal_gets_colour_unless_the_environment_says_no(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], has_escapes: bool
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as stack:
        master, terminal = os.openpty()
        stack.callback(os.close, master)
        stack.callback(os.close, terminal)
        configure_logging(LogConfig(format="text"), fd=terminal)
        structlog.get_logger("terminal").info("event")
        assert ("\x1b[" in os.read(master, 4096).decode()) == has_escapes


# -- the whole process


def test_nothing_but_lines_is_on_stderr_and_nothing_on_stdout() -> None:
    program = (
        "import logging, structlog\n"
        "from comfyd.config import LogConfig\n"
        "from comfyd.host.logging import configure_logging\n"
        "configure_logging(LogConfig())\n"
        "structlog.get_logger('a').info('one', x=1)\n"
        "logging.getLogger('b').info('two')\n"
        "print('out')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=30)
    assert done.stdout == b"out\n"
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == ["one", "two"]
