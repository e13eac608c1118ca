"""How bad a line of the engine's output is, as far as its text tells.

ComfyUI itself logs bare messages (0.3.64, ``app/logger.py``: ``%(message)s``), custom nodes in every format there is,
and many print. So this guesses: a level that a line names by a known format first, then what tracebacks, warnings and
progress bars look like, then a few words. What says nothing is information.
"""

import re
from enum import Enum, auto
from functools import lru_cache
from typing import Final, Literal, TypeAlias

from comfyd.engine.output import OutputLine

Level: TypeAlias = Literal["debug", "info", "warning", "error"]
"""Names of structlog's methods."""

_LOOKED_AT: Final = 256  # characters from the line's beginning: levels stand there, and lines may be 8 KiB

_NAMES: Final = "(?:TRACE|DEBUG|INFO|SUCCESS|NOTICE|WARN|WARNING|ERROR|EXCEPTION|CRITICAL|FATAL)"
_NAMED: Final = re.compile(
    rf"\W{{0,3}}{_NAMES}\W"  # WARNING:root:text of logging.basicConfig; [ERROR] text; ERROR: text
    rf"|[\d\-/:.,TZ+ \[\]]+[\s|\-\]]+{_NAMES}\b"  # after a time: 2026-01-31 12:00:00,123 - ERROR - text; loguru's
    rf"|.{{1,120}}? [-|] {_NAMES} +[-|] "  # after a time and a name: 2026-01-31 12:00:00,123 - x.y - ERROR - text
    rf"|\[[^\]]{{1,60}}\][ :\-]*\[?{_NAMES}[\]:]"  # [Some Node] WARNING: text
)
_NAME: Final = re.compile(rf"\b{_NAMES}\b")
_GLOG: Final = re.compile(r"([IWEF])\d{4} \d\d:\d\d:\d\d")  # absl, TensorFlow: E0131 12:00:00.000000
_BY_NAME: Final[dict[str, Level]] = {
    **dict.fromkeys(("TRACE", "DEBUG"), "debug"),
    **dict.fromkeys(("INFO", "SUCCESS", "NOTICE", "I"), "info"),
    **dict.fromkeys(("WARN", "WARNING", "W"), "warning"),
    **dict.fromkeys(("ERROR", "EXCEPTION", "CRITICAL", "FATAL", "E", "F"), "error"),
}

_PROGRESS: Final = re.compile(
    r"\d{1,3}%\||\d+(?:\.\d+)?[kMGT]?(?:it|B|iB|file|files)? \[\d\d:\d\d[,<]|\d+/\d+ \[\d\d:\d\d[,<]"
)
"""tqdm (``format_meter``): ``45%|###  | 9/20 [..``; without a known total ``9it [00:01, ..``; without a bar."""

_TRACEBACK: Final = re.compile(
    r"[\s+|]*(?:Exception Group )?Traceback \(most recent call last\):|Exception in thread |Exception ignored in"
)
_FRAME: Final = re.compile(r'[\s|]+File "[^"]*", line \d+')
_BETWEEN: Final = re.compile(r"(?:During handling of the above|The above) exception")
_EXCEPTION: Final = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:: |:?$)|[a-z_]\w*(?:\.\w+)+(?:: |:?$)")
"""A traceback's last line: a class, perhaps with its module, and what it says."""

_WARNING_AT: Final = re.compile(r"[^:]{1,200}:\d+: (?:[A-Z]\w*)?Warning: ")  # warnings.formatwarning
_BAD: Final = re.compile(
    r"!!! Exception during processing"  # ComfyUI 0.3.64, execution.py, as the next two
    r"|Failed to validate prompt|Error occurred when executing"
    r"|Fatal Python error|Segmentation fault|CUDA error|CUDA out of memory|OutOfMemoryError"
    r"|\b(?:ERROR|FATAL|CRITICAL)\b"
    r"|^\s*(?:\w{1,60}\.){0,6}\w{0,60}(?:Error|Exception)\b ?:|^\s*(?:Fatal e|E)rror\b"
)
_DOUBTFUL: Final = re.compile(
    r"\(IMPORT FAILED\)|^Cannot import "  # ComfyUI 0.3.64, nodes.py: a custom node is missing, the rest works
    r"|^invalid prompt:"  # server.py: the caller is told
    r"|\bWARN(?:ING)?\b|^\s*\w{0,60}Warning\b ?:|\b[Dd]eprecated\b"
)


@lru_cache(maxsize=256)  # ComfyUI says the same two lines with every prompt, and eight patterns are 30 us
def level_of(text: str) -> Level:
    """Guess the level of a line that stands for itself."""
    head = text[:_LOOKED_AT]
    glog = _GLOG.match(head)
    if glog is not None:
        return _BY_NAME[glog[1]]
    named = _NAMED.match(head)
    if named is not None:
        names = _NAME.findall(named[0])
        if names:
            return _BY_NAME[names[-1]]
    if _PROGRESS.search(head):
        return "debug"
    if _BAD.search(head):
        return "error"
    if _WARNING_AT.match(head) or _DOUBTFUL.search(head):
        return "warning"
    return "info"


class OutputLevels:
    """Guesses level after level of one process's output; remembers of each stream whether it is in a traceback."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}

    def level(self, line: OutputLine) -> Level:
        """Guess the level of *line*, the next of its stream."""
        stream = self._streams.get(line.stream)
        if stream is None:
            stream = self._streams[line.stream] = _Stream()
        return stream.level(line.text)


class _Part(Enum):
    """What the next line of a stream may belong to."""

    NOTHING = auto()
    FRAMES = auto()
    """A traceback, up to the line that names the exception."""
    MESSAGE = auto()
    """The lines of that exception's message, which mostly are indented (``Missing key(s) in state_dict: ...``)."""
    SOURCE = auto()
    """The line of source below a warning."""


class _Stream:
    """One stream. A traceback is an error from its first line to its last; what is drawn into it keeps its own level.

    Blank lines do not come this far, so a part ends at the first line that is not indented. Where the end was missed
    (another thread's line), the next frame begins the traceback anew.
    """

    def __init__(self) -> None:
        self._part = _Part.NOTHING

    def level(self, text: str) -> Level:
        head = text[:_LOOKED_AT]
        if _TRACEBACK.match(head) or _FRAME.match(head):
            self._part = _Part.FRAMES
            return "error"
        if self._part is not _Part.NOTHING:
            if _PROGRESS.search(head):  # drawn in between
                return "debug"
            if head[0] in " \t|+":
                if self._part is not _Part.SOURCE:
                    return "error"
                self._part = _Part.NOTHING
                return "warning"
            if self._part is _Part.FRAMES and _EXCEPTION.match(head):
                self._part = _Part.MESSAGE
                return "error"
        if _BETWEEN.match(head):
            self._part = _Part.NOTHING
            return "error"
        level = level_of(head)
        self._part = _Part.SOURCE if level == "warning" and _WARNING_AT.match(head) else _Part.NOTHING
        return level
