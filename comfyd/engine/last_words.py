"""What an engine wrote last, kept for whoever must be told why a job did not survive it.

What is handed out goes to callers: without progress bars, server paths and secrets, and short.
"""

import re
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

from comfyd.engine.output import OutputLine
from comfyd.host.environment import MASK, mask_urls
from comfyd.texts import hide_paths

KEPT_LINES: Final = 100
KEPT_CHARACTERS: Final = 64 * 1024  # lines may be 8 KiB each; a hundred of ordinary length take a tenth of this
TOLD_LINES: Final = 20
TOLD_BYTES: Final = 4096
"""What fits into a problem document and a webhook without drowning the rest; a traceback's end is its best part."""
_LINE_CHARACTERS: Final = 500
_MIN_SECRET: Final = 4  # shorter values are parts of ordinary words

_TRACEBACK_MARKS: Final = re.compile(r"[\s~^]+")
"""What Python 3.11 and later draw under a traceback's lines: every third line, and no use without its font."""
_PROGRESS: Final = re.compile(r"\d{1,3}%\||\d+(?:it|B|iB) \[\d")
"""tqdm's two forms, with and without a known total (``format_meter``): ``45%|###  | 9/20 [..`` and ``9it [..``."""


class LastWords:
    """The last lines of an engine's stderr: `KEPT_LINES` lines and `KEPT_CHARACTERS` at most, each with its time."""

    def __init__(self) -> None:
        self._lines: deque[tuple[float, str]] = deque()
        self._characters = 0
        self._secrets: tuple[str, ...] = ()

    def begin(self, secrets: Iterable[str] = ()) -> None:
        """Forget everything: a new process begins to speak, which was told *secrets*."""
        self._lines.clear()
        self._characters = 0
        self._secrets = tuple(secrets)

    def add(self, line: OutputLine, now: float) -> None:
        """Append a line of stderr, written at *now* (seconds, any clock), and drop the oldest that no longer fit."""
        if line.stream != "stderr" or _PROGRESS.search(line.text) or _TRACEBACK_MARKS.fullmatch(line.text):
            return
        self._lines.append((now, line.text))
        self._characters += len(line.text)
        while len(self._lines) > KEPT_LINES or self._characters > KEPT_CHARACTERS:
            self._characters -= len(self._lines.popleft()[1])

    def concerning(self, since: float, secrets: Iterable[str] = ()) -> tuple[str, ...]:
        """Return the last lines written since *since*, oldest first, fit for a caller: paths hidden, secrets masked.

        At most `TOLD_LINES` and `TOLD_BYTES`. *secrets* are further ones, beside those that the process was told.
        """
        masked = sorted({*self._secrets, *secrets}, key=len, reverse=True)  # the longest first: one may contain another
        told: deque[str] = deque()
        size_bytes = 0
        for at, text in reversed(self._lines):
            if at < since or len(told) == TOLD_LINES:
                break
            line = _fit(text, masked)
            size_bytes += len(line.encode())
            if size_bytes > TOLD_BYTES:
                break
            told.appendleft(line)
        return tuple(told)


def secrets_in(extra_data: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the texts of a prompt's ``extra_data``: keys for partner nodes travel there (ComfyUI 0.3.64)."""
    return tuple(value for value in extra_data.values() if isinstance(value, str) and len(value) >= _MIN_SECRET)


def _fit(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:  # before anything is cut: half a secret would not be found
        text = text.replace(secret, MASK)
    text = hide_paths(mask_urls(text))
    return text if len(text) <= _LINE_CHARACTERS else f"{text[:_LINE_CHARACTERS]}..."
