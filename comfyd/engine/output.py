"""An engine's output: bytes from a pipe in, a bounded number of clean lines out, and the pipe never left full.

A pipe holds 64 KiB, and who writes into a full one stops. So we read for as long as the engine lives, whatever it
writes: floods, progress bars, lines without end, bytes that are no text.
"""

import re
from collections import deque
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

import attrs
import trio

StreamName: TypeAlias = Literal["stdout", "stderr"]

MAX_LINE_BYTES: Final = 8 * 1024  # what log collectors take as one line; a workflow dumped by a node is far longer
CUT_MARK: Final = f" … [cut after {MAX_LINE_BYTES} bytes]"
PROGRESS_EVERY_S: Final = 1.0  # tqdm redraws ten times a second; in a log, once is plenty

# A start with many custom nodes writes a few thousand lines at once; after that, more than 2,000 lines a second is a
# loop gone wrong. Formatting a line costs about 30 µs, so a flood costs at most 6 % of a core, and not the log's disk.
BURST_LINES: Final = 5000
LINES_PER_S: Final = 2000.0
LINES_PER_PASS: Final = 32  # between two checkpoints: about a millisecond of formatting
KEPT_OF_FLOOD_LINES: Final = 50  # a flood's end is shown, as it may be the traceback
KEPT_OF_FLOOD_BYTES: Final = 16 * 1024

TAIL_LINES: Final = 200
TAIL_CHARACTERS: Final = 64 * 1024  # with lines at their longest, 200 of them would be 1.6 million

_READ_BYTES: Final = 64 * 1024  # all that a pipe holds

# ECMA-48: CSI sequences; OSC, DCS and the like up to their terminator; two-character sequences.
_ESCAPES: Final = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])|\x9b[0-?]*[ -/]*[@-~]"
)
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


@attrs.frozen(kw_only=True)
class OutputLine:
    """One line that the engine wrote, without its end; never empty, and safe to print on a terminal."""

    stream: StreamName
    text: str


class LineSplitter:
    r"""Turn one stream's bytes into lines of clean text; holds at most `MAX_LINE_BYTES` of a line.

    Text is UTF-8, what is not becomes U+FFFD. Colours and control characters are taken out, blank lines left out. Of a
    line drawn over itself by ``\r`` only the last state counts, and is shown once a second until the line ends.
    """

    def __init__(self) -> None:
        self._text = bytearray()  # since the last \n or \r
        self._text_bytes = 0  # the same before it was cut
        self._drawn: str | None = None  # the state before the last \r; None if this line has seen no \r
        self._shown = ""
        self._shown_at = float("-inf")

    def feed(self, data: bytes, now: float) -> list[str]:
        """Return the lines that *data* ends, and a state of progress if one is due at *now* (seconds, any clock)."""
        lines = []
        *ended, rest = data.split(b"\n")
        for part in ended:
            self._add(part)
            lines.append(self._end())
        self._add(rest)
        if self._drawn is not None and now - self._shown_at >= PROGRESS_EVERY_S:
            state = self._state()
            if state and state != self._shown:
                self._shown, self._shown_at = state, now
                lines.append(state)
        return [line for line in lines if line]

    def finish(self) -> list[str]:
        """Return what stands there unended, at the end of the stream or before something else is shown."""
        line = self._end()
        return [line] if line else []

    def _add(self, part: bytes) -> None:
        drawn, overwritten, last = part.rpartition(b"\r")
        if overwritten:
            # A bar that is wiped by blanks is not lost: the last state with something in it counts.
            _, overwritten, state = drawn.rstrip().rpartition(b"\r")
            if overwritten:
                self._clear()
            self._append(state)
            self._drawn = self._clean() or self._drawn or ""
            self._clear()
        self._append(last)

    def _append(self, data: bytes) -> None:
        self._text += data[: MAX_LINE_BYTES - len(self._text)]
        self._text_bytes += len(data)

    def _clear(self) -> None:
        self._text.clear()
        self._text_bytes = 0

    def _state(self) -> str:
        return self._clean() or self._drawn or ""

    def _end(self) -> str:
        """Return the line that ends here, or nothing if it was shown as progress already; begin the next."""
        line = self._state()
        if self._drawn is not None and line == self._shown:
            line = ""
        self._clear()
        self._drawn = None
        self._shown = ""
        return line

    def _clean(self) -> str:
        text = self._text.decode("utf-8", "replace")
        if not text.isprintable():
            text = _CONTROLS.sub("", _ESCAPES.sub("", text))
        if self._text_bytes > MAX_LINE_BYTES:
            return text.rstrip("\ufffd") + CUT_MARK  # the cut may have gone through a character
        return text.rstrip()


class LineBudget:
    """A token bucket: `LINES_PER_S` in the long run, `BURST_LINES` at once."""

    def __init__(self, now: float) -> None:
        self._lines = float(BURST_LINES)
        self._at = now

    def available(self, now: float) -> int:
        """Return how many lines may be shown at *now* (seconds)."""
        self._lines = min(BURST_LINES, self._lines + (now - self._at) * LINES_PER_S)
        self._at = now
        return int(self._lines)

    def spend(self, lines: int) -> None:
        """Take *lines* from the budget."""
        self._lines -= lines


class Flood:
    """What is over the budget: counted, unseen, its end kept; for a second, so that one notice tells of it all."""

    def __init__(self, now: float) -> None:
        self.ends_at = now + 1.0
        self._lines = 0
        self._kept = b""

    def add(self, data: bytes) -> None:
        """Count *data*, whose beginning may be the middle of a line."""
        self._lines += data.count(b"\n")
        self._kept = (self._kept + data)[-KEPT_OF_FLOOD_BYTES:]

    def end(self) -> tuple[str, bytes]:
        """Return a notice of what was dropped, and what was kept: whole lines and then the beginning of one."""
        _, _, kept = self._kept.partition(b"\n")  # the first is, or may be, the rest of a line
        kept = b"\n".join(kept.split(b"\n")[-KEPT_OF_FLOOD_LINES - 1 :])
        dropped = self._lines - kept.count(b"\n")
        return f"[comfyd: {dropped} lines dropped, the engine writes more than {LINES_PER_S:g} a second]", kept


async def forward_lines(
    source: trio.abc.ReceiveStream, stream: StreamName, on_line: Callable[[OutputLine], None]
) -> None:
    """Read *source* to its end and hand its lines to *on_line*, at a bounded rate and a few between checkpoints."""

    def show(texts: list[str]) -> None:
        for text in texts:
            on_line(OutputLine(stream=stream, text=text))

    splitter = LineSplitter()
    budget = LineBudget(trio.current_time())
    flood: Flood | None = None
    ended = False
    while not ended:
        data: bytes | None = None
        with trio.move_on_at(flood.ends_at if flood else float("inf")):
            data = bytes(await source.receive_some(_READ_BYTES))
            ended = not data
        now = trio.current_time()
        if flood and (ended or now >= flood.ends_at):
            notice, kept = flood.end()
            flood = None
            show([notice, *splitter.feed(kept, now)])
            await trio.lowlevel.checkpoint()
        rest = data or b""
        while rest and not flood:
            allowed = min(budget.available(now), LINES_PER_PASS)
            if b"\n" not in rest:  # a line's beginning costs nothing yet
                part, rest = rest, b""
            elif allowed > 0:
                part, rest = _cut_after_lines(rest, allowed)
                budget.spend(part.count(b"\n"))
            else:
                splitter.finish()  # the beginning of a line whose end the flood counts
                flood = Flood(now)
                break
            show(splitter.feed(part, now))
            if rest:  # else reading on gives the others their turn
                await trio.lowlevel.checkpoint()
        if flood:
            flood.add(rest)
    show(splitter.finish())


def _cut_after_lines(data: bytes, count: int) -> tuple[bytes, bytes]:
    """Return the first *count* lines of *data* with their ends, and the rest."""
    parts = data.split(b"\n", count)
    if len(parts) <= count:
        return data, b""
    rest = parts.pop()
    return data[: len(data) - len(rest)], rest


class Tail:
    """The last lines of an engine, for whoever must say why it died: `TAIL_LINES`, `TAIL_CHARACTERS` at most."""

    def __init__(self) -> None:
        self._lines: deque[OutputLine] = deque()
        self._characters = 0

    def add(self, line: OutputLine) -> None:
        """Append *line*, and drop the oldest that no longer fit."""
        self._lines.append(line)
        self._characters += len(line.text)
        while len(self._lines) > TAIL_LINES or self._characters > TAIL_CHARACTERS:
            self._characters -= len(self._lines.popleft().text)

    @property
    def lines(self) -> tuple[OutputLine, ...]:
        """The lines kept, oldest first."""
        return tuple(self._lines)
