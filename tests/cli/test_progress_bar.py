"""The progress bar on a terminal, and lines where there is none."""

import io

import pytest

from comfyd.cli.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(*updates: tuple[float, str]) -> str:
    terminal = Terminal()
    bar = ProgressBar(terminal)
    for percent, label in updates:
        bar.update(percent, label)
    return terminal.getvalue()


@pytest.mark.parametrize(("percent", "filled"), [(0, 0), (1, 0), (50, 16), (99, 32), (100, 32)])
def test_the_bar_is_filled_by_the_percentage_and_always_as_wide(percent: float, filled: int) -> None:
    text = drawn((percent, "KSampler"))
    assert text.count("█") == filled
    assert text.count("█") + text.count("░") == 32
    assert f"{percent:5.1f} %  KSampler" in text


def test_each_update_draws_over_the_last_one_and_starts_no_line() -> None:
    text = drawn((10, "a long label that is over"), (20, "short"))
    assert text.split("\r\x1b[2K")[0] == ""
    assert len(text.split("\r\x1b[2K")) == 3
    assert "\n" not in text


def test_a_long_label_is_cut_so_that_the_bar_stays_on_its_line() -> None:
    assert len(drawn((10, "x" * 500))) < 100


def test_closing_ends_the_line_once_and_only_if_there_is_one() -> None:
    terminal = Terminal()
    bar = ProgressBar(terminal)
    bar.close()
    assert terminal.getvalue() == ""
    bar.update(10, "a")
    bar.close()
    bar.close()
    assert terminal.getvalue().count("\n") == 1


def test_where_there_is_no_terminal_a_line_is_written_each_twenty_percent_and_at_the_end() -> None:
    stream = io.StringIO()
    bar = ProgressBar(stream)
    for percent in range(101):
        bar.update(percent, "node")
    bar.update(100, "node")
    bar.close()
    assert stream.getvalue() == "".join(f"  {percent:5.1f} %  node\n" for percent in range(0, 101, 20))


def test_the_end_is_told_even_if_the_last_line_was_not_long_ago() -> None:
    stream = io.StringIO()
    bar = ProgressBar(stream)
    for percent in (0.0, 95.0, 100.0):
        bar.update(percent, "node")
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["0.0", "95.0", "100.0"]
