"""What the command shows: a bar or lines on stderr, and on stdout nothing but what a script wants to read."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TextIO

import attrs
import trio

from comfyd.cli.progress_bar import ProgressBar
from comfyd.cli.sse import ServerEvent
from comfyd.cli.submit.errors import SubmitFailed
from comfyd.cli.submit.words import duration_words, problem_lines, progress_words
from comfyd.cli.table import printable
from comfyd.wire import encode_json

_REDRAW_S: Final = 0.1
"""Between two drawings of a bar that every received piece moves."""


@attrs.define(eq=False)
class Display:
    """Tells how the submission goes. *graph* is where titles of nodes come from; empty for a workflow's."""

    as_json: bool = False
    quiet: bool = False
    graph: Mapping[str, Any] = attrs.field(factory=dict)
    out: TextIO = attrs.field(factory=lambda: sys.stdout)
    err: TextIO = attrs.field(factory=lambda: sys.stderr)
    _bar: ProgressBar = attrs.field(init=False)
    _state: str = ""
    _saving: str = ""
    _drawn_at: float = 0.0

    def __attrs_post_init__(self) -> None:
        """Draw where errors are told, so that stdout can go elsewhere."""
        self._bar = ProgressBar(self.err)

    @property
    def silent(self) -> bool:
        """Whether progress is not shown."""
        return self.as_json or self.quiet

    def note(self, text: str) -> None:
        """Say something beside the progress."""
        if not self.silent:
            self._bar.clear()
            self.err.write(f"comfyd submit: {printable(text)}\n")
            self.err.flush()

    def watch(self, event: ServerEvent) -> None:
        """Show an event of the job."""
        if self.silent or not isinstance(event.data, dict):
            return
        if event.name == "progress":
            percent = event.data.get("percent")
            words = progress_words(event.data)
            if not self._bar.is_drawn_over and event.data.get("state") != self._state:
                self._state = str(event.data.get("state"))
                if self._state != "running":  # which the lines with percentages tell
                    self.note(words)
                    return
            # A line is not written for each percent: one without a node would stand for the next, which names it.
            worth_a_line = self._state == "running" and event.data.get("node_id") is not None
            if isinstance(percent, int | float) and (self._bar.is_drawn_over or worth_a_line):
                self._bar.update(float(percent), words)
        elif event.name == "result":
            if "outputs" in event.data and not self._bar.is_drawn_over:
                self._bar.update(100.0, "done")
            self._bar.clear()

    def saving(self, name: str, done: int, size_bytes: int) -> None:
        """Show how much of an output is here."""
        now = trio.current_time()
        if not self.silent and self._bar.is_drawn_over and now >= self._drawn_at + _REDRAW_S:
            self._drawn_at = now
            self._bar.update(100 * done / max(1, size_bytes), printable(f"saving {name}"))

    def submitted(self, job_id: str, url: str) -> None:
        """Tell, as the last thing, that the daemon has the job, whose end nobody waits for."""
        document = {"id": job_id, "state": "accepted", "url": f"{url}/jobs/{job_id}"}
        self._print(encode_json(document).decode() if self.as_json else job_id)

    def finished(self, result: Mapping[str, Any], places: Mapping[int, Path]) -> None:
        """Tell the end; *places* are where outputs were put, by their number."""
        self._bar.clear()
        outputs = [
            {**output, "path": os.fspath(places[number])} if number in places else output
            for number, output in enumerate(result["outputs"])
        ]
        if self.as_json:
            self._print(encode_json({**result, "outputs": outputs}).decode())
        else:
            for output in outputs:
                self._print(printable(str(output.get("path") or output.get("url"))))
        total_ms = (result.get("stats") or {}).get("total_time")
        if isinstance(total_ms, int | float):
            count = f"{len(outputs)} {'output' if len(outputs) == 1 else 'outputs'}"
            self.note(f"done in {duration_words(total_ms / 1000)}, {count}")

    def failed(self, failure: SubmitFailed, job_id: str | None = None) -> None:
        """Tell why it came to nothing."""
        self._bar.clear()
        if self.as_json:
            named = {} if job_id is None else {"id": job_id}
            self.err.write(f"{encode_json({**failure.document, **named}).decode()}\n")
        else:
            lines = list(problem_lines(failure.document, self.graph))
            self.err.write("".join(f"{line}\n" for line in (f"comfyd submit: {lines[0]}", *lines[1:])))
        self.err.flush()

    def _print(self, line: str) -> None:
        try:
            self.out.write(f"{line}\n")
            self.out.flush()
        except BrokenPipeError:  # whoever read has read enough (head); the interpreter's last flush must not fail again
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.out.fileno())
            os.close(nowhere)
