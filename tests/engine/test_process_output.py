"""An engine's output: which lines come out of which bytes, and that no output can hold up engine or daemon."""

import gc
import re
import time

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from process_support import Family, Lines, opened, program

from comfyd.engine.output import (
    BURST_LINES,
    CUT_MARK,
    LINES_PER_S,
    MAX_LINE_BYTES,
    TAIL_CHARACTERS,
    TAIL_LINES,
    LineBudget,
    LineSplitter,
    OutputLine,
    StreamName,
    Tail,
    forward_lines,
)


def split(*pieces: bytes, at: float = 0.0) -> list[str]:
    splitter = LineSplitter()
    lines = [line for piece in pieces for line in splitter.feed(piece, at)]
    return lines + splitter.finish()


# Bytes into lines


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        (b"", []),
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"no end", ["no end"]),
        (b"\n\n  \n\t\nblank lines are left out\n\n", ["blank lines are left out"]),
        (b"  indented, not trimmed at its start  \n", ["  indented, not trimmed at its start"]),
        (b"tab\tstays\n", ["tab\tstays"]),
        ("café 画 🎨\n".encode(), ["café 画 🎨"]),
        (b"caf\xe9 \xf0\x9f\x98\n", ["caf\N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}"]),
        (b"nul\x00bell\x07del\x7fbackspace\x08\n", ["nulbelldelbackspace"]),
        ("c1\x9b31m next\x85line para\u2029graph\n".encode(), ["c1 nextline paragraph"]),
        (b"\x1b[1;38;5;196mred\x1b[0m and \x1b[Kerased\x1b[2J\n", ["red and erased"]),
        (b"\x1b]0;a title\x07text \x1b]8;;http://a\x1b\\link\x1b]8;;\x1b\\\n", ["text link"]),
        (b"\x1b(B\x1b7\x1b8\x1b=plain\x1b\n", ["plain"]),
        (b"\x1bPdevice control\x1b\\seen\n", ["seen"]),
        (b"\rone\rtwo\rthree\n", ["three"]),
        (b"one\r\n\rtwo\r\n", ["one", "two"]),
        (b"a bar that is wiped\r                   \r\n", ["a bar that is wiped"]),
        (b"wiped\r     \rnext text\n", ["next text"]),
        (b"\r\r\r\n", []),
        (b"\x1b[31mcolours around \x1b[0m\r\x1b[32mprogress\x1b[0m\n", ["progress"]),
    ],
)
def test_lines_are_clean_text(written: bytes, lines: list[str]) -> None:
    assert split(written) == lines


@given(st.lists(st.binary(max_size=40).map(lambda data: data.replace(b"\r", b""))))
def test_lines_do_not_depend_on_how_the_bytes_are_read(pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    assert split(*pieces) == split(whole)
    assert split(*(bytes([byte]) for byte in whole)) == split(whole)


@given(st.lists(st.one_of(st.binary(), st.sampled_from([b"\r", b"\n", b"\x1b[", b"\xc3", b"x" * 9000]))))
def test_no_bytes_break_the_bounds_or_reach_a_terminal(pieces: list[bytes]) -> None:
    for line in split(*pieces):
        assert line.strip()
        assert len(line) <= MAX_LINE_BYTES + len(CUT_MARK)
        assert re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", line) is None


@given(st.lists(st.text(alphabet=st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1)))
def test_what_is_text_comes_out_as_it_was_written(texts: list[str]) -> None:
    assert split("".join(f"{text}\n" for text in texts).encode()) == texts


def test_a_line_that_is_too_long_is_cut_with_a_mark_and_the_next_is_whole() -> None:
    fits, long = b"y" * MAX_LINE_BYTES, b"x" * (MAX_LINE_BYTES + 1)
    assert split(fits + b"\n" + long + b"\n", b"after\n") == [fits.decode(), "x" * MAX_LINE_BYTES + CUT_MARK, "after"]


def test_a_cut_goes_around_a_character_not_through_it() -> None:
    (line,) = split("ü".encode() * MAX_LINE_BYTES if MAX_LINE_BYTES % 2 else b"-" + "ü".encode() * MAX_LINE_BYTES)
    assert line == "-" + "ü" * ((MAX_LINE_BYTES - 1) // 2) + CUT_MARK


def test_a_line_that_never_ends_takes_no_memory() -> None:
    splitter = LineSplitter()
    for _ in range(100):
        assert splitter.feed(b"x" * 65536, 0.0) == []
    assert len(splitter._text) == MAX_LINE_BYTES
    assert splitter.finish() == ["x" * MAX_LINE_BYTES + CUT_MARK]


def test_progress_is_shown_once_a_second_and_its_last_state_once() -> None:
    splitter = LineSplitter()
    shown = []
    for step in range(101):  # ten states a second, for ten seconds
        shown += [(step / 10, line) for line in splitter.feed(f"\r{step}%|###".encode(), step / 10)]
    shown += [(10.05, line) for line in splitter.feed(b"\nnext\n", 10.05)]
    assert shown == [*((float(s), f"{10 * s}%|###") for s in range(11)), (10.05, "next")]


def test_the_last_state_of_progress_is_shown_even_if_it_came_too_early() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"\r 50%", 0.0) == [" 50%"]
    assert splitter.feed(b"\r100%", 0.1) == []
    assert splitter.feed(b"\n", 0.2) == ["100%"]


def test_equal_lines_are_all_shown() -> None:
    assert split(b"same\r\nsame\r\nsame\n") == ["same"] * 3


# Rate


def test_budget_allows_a_burst_and_then_a_rate() -> None:
    budget = LineBudget(100.0)
    assert budget.available(100.0) == BURST_LINES
    budget.spend(BURST_LINES)
    assert budget.available(100.0) == 0
    assert budget.available(100.5) == LINES_PER_S / 2
    assert budget.available(1000.0) == BURST_LINES


class Script(trio.abc.ReceiveStream):
    """A stream that gives chunks at their times: (seconds since the start, bytes)."""

    def __init__(self, *chunks: tuple[float, bytes]) -> None:
        self._chunks = list(chunks)
        self._start = trio.current_time()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self._chunks:
            return b""
        at, data = self._chunks[0]
        await trio.sleep_until(self._start + at)
        del self._chunks[0]
        return data

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def numbered(first: int, last: int) -> bytes:
    return "".join(f"line {number}\n" for number in range(first, last)).encode()


async def test_a_burst_within_the_budget_comes_out_whole(autojump_clock: trio.testing.MockClock) -> None:
    lines = Lines()
    await forward_lines(Script((0, numbered(0, BURST_LINES))), "stderr", lines)
    assert lines.texts("stderr") == [f"line {number}" for number in range(BURST_LINES)]


async def test_a_flood_is_dropped_with_one_notice_and_its_end_is_shown(autojump_clock: trio.testing.MockClock) -> None:
    """The notice comes within a second, without further output; what follows is forwarded as before."""
    lines = Lines()
    flood = numbered(0, BURST_LINES + 10_000)
    noticed_at = []

    def on_line(line: OutputLine) -> None:
        lines(line)
        if "dropped" in line.text:
            noticed_at.append(trio.current_time() - started_at)

    started_at = trio.current_time()
    await forward_lines(Script((0, flood[:70_001]), (0, flood[70_001:]), (60, b"later\n")), "stdout", on_line)
    texts = lines.texts()
    assert texts[:BURST_LINES] == [f"line {number}" for number in range(BURST_LINES)]
    assert texts[BURST_LINES] == "[comfyd: 9950 lines dropped, the engine writes more than 2000 a second]"
    assert texts[BURST_LINES + 1 :] == [
        *(f"line {number}" for number in range(BURST_LINES + 9950, BURST_LINES + 10_000)),
        "later",
    ]
    assert noticed_at == [pytest.approx(1.0)]


async def test_the_traceback_at_the_end_of_a_flood_is_shown_at_the_end_of_the_output(
    autojump_clock: trio.testing.MockClock,
) -> None:
    lines = Lines()
    await forward_lines(
        Script((0, numbered(0, 50_000)), (0.1, b"Traceback\nMemoryError: the reas"), (0.2, b"on")), "stderr", lines
    )
    assert lines.texts()[-3:] == ["line 49999", "Traceback", "MemoryError: the reason"]


async def test_a_line_of_any_length_counts_as_one_once_it_ends(autojump_clock: trio.testing.MockClock) -> None:
    chunks = [(0, numbered(1, BURST_LINES)), *[(0, b"x" * 65536)] * 3, (0, b"\nover"), (0, b" budget\n"), (9, b"end\n")]
    lines = Lines()
    await forward_lines(Script(*chunks), "stdout", lines)
    assert lines.texts()[BURST_LINES - 1 :] == [
        "x" * MAX_LINE_BYTES + CUT_MARK,
        "[comfyd: 1 lines dropped, the engine writes more than 2000 a second]",
        "end",
    ]


# The tail


def test_tail_keeps_the_newest_lines_within_both_bounds() -> None:
    tail = Tail()
    for number in range(TAIL_LINES + 50):
        tail.add(OutputLine(stream="stdout", text=str(number)))
    assert [line.text for line in tail.lines] == [str(number) for number in range(50, TAIL_LINES + 50)]
    for _ in range(TAIL_LINES):
        tail.add(OutputLine(stream="stderr", text="x" * 1000))
    assert len(tail.lines) == TAIL_CHARACTERS // 1000


# Real engines


@pytest.fixture
def family() -> Family:
    return Family()


async def output_of(family: Family, *command: str) -> Lines:
    lines = Lines()
    async with opened(family.config(*command), lines) as engine:
        assert await engine.wait() == 0
        assert list(engine.last_lines) == lines.seen[-TAIL_LINES:]  # complete as soon as wait returns
    return lines


async def test_both_outputs_arrive_under_their_names(family: Family) -> None:
    lines = await output_of(family, *program("exit_zero"))
    assert lines.texts("stdout") == ["all is well"]
    assert lines.texts("stderr") == ["good bye"]


async def test_lines_arrive_in_order(family: Family) -> None:
    lines = await output_of(family, *program("flood_stdout", 4000))
    assert lines.texts() == [f"line {number} of a flood" for number in range(4000)]


async def test_text_that_nothing_ends_is_shown_at_the_exit(family: Family) -> None:
    assert (await output_of(family, *program("no_newline"))).texts() == ["no newline"]


async def test_a_huge_line_is_cut(family: Family) -> None:
    assert (await output_of(family, *program("big_line"))).texts() == ["x" * MAX_LINE_BYTES + CUT_MARK, "after"]


async def test_bytes_that_are_no_text_do_no_harm(family: Family) -> None:
    texts = (await output_of(family, *program("binary_output"))).texts()
    assert texts[-4:] == ["café caf\ufffd \ufffd", "ab", "red text", "last"]


async def test_a_thousand_states_of_a_progress_bar_are_a_few_lines(family: Family) -> None:
    lines = await output_of(family, *program("progress_bar", 1000))
    assert len(lines.texts("stderr")) < 5
    assert lines.texts("stderr")[-1] == "100%|██████████| 1000/1000"
    assert lines.texts("stdout") == ["done"]


async def test_closed_outputs_are_not_an_exit(family: Family) -> None:
    lines = Lines()
    async with opened(family.config(*program("close_stdout")), lines) as engine:
        await lines.wait_for("closing")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert engine.returncode is None


class LongestStep(trio.abc.Instrument):
    """The longest that any task kept the loop, in seconds of this thread's CPU, so that a busy machine adds nothing."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._started_at = time.thread_time()  # of the step that installs this

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._started_at = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.longest_s = max(self.longest_s, time.thread_time() - self._started_at)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_every_line_of_a_flood_is_shown_or_counted_and_the_loop_goes_on(
    family: Family, stream: StreamName
) -> None:
    """A million lines at full speed, with a sink as slow as a log is."""
    count = 1_000_000
    lines = Lines()

    def slow(line: OutputLine) -> None:
        lines(line)
        give_up_at = time.thread_time() + 50e-6
        while time.thread_time() < give_up_at:
            pass

    meter = LongestStep()
    async with opened(family.config(*program(f"flood_{stream}", count)), slow) as engine:
        gc.freeze()  # a full collection of pytest's heap takes 50 ms, which says nothing of ours
        trio.lowlevel.add_instrument(meter)
        assert await engine.wait() == 0
        trio.lowlevel.remove_instrument(meter)
        gc.unfreeze()
    texts = lines.texts(stream)
    dropped = [int(match[1]) for text in texts if (match := re.match(r"\[comfyd: (\d+) lines dropped", text))]
    assert sum(dropped) + len(texts) - len(dropped) == count
    assert sum(dropped) > count // 2
    assert texts[-1] == f"line {count - 1} of a flood"
    assert meter.longest_s < 0.020


async def test_an_endless_flood_is_stopped_in_time(family: Family) -> None:
    lines = Lines()
    async with opened(family.config(*program("flood_stdout"), stop_grace_s=20), lines) as engine:
        await lines.wait_for("line 4000 of a flood")
        started_at = trio.current_time()
        await engine.stop()
        assert trio.current_time() - started_at < 2


async def test_an_endless_line_is_stopped_in_time(family: Family) -> None:
    lines = Lines()
    async with opened(family.config(*program("no_newline", "endless"), stop_grace_s=20), lines) as engine:
        with trio.move_on_after(0.2):
            await engine.wait()
        await engine.stop()
    assert [len(text) for text in lines.texts()] == [MAX_LINE_BYTES + len(CUT_MARK)]
