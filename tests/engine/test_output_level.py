"""How bad a line of the engine's output is: guessed from what ComfyUI 0.3.64 and its custom nodes really write."""

import time

import pytest

from comfyd.engine.output import OutputLine, StreamName
from comfyd.engine.output_level import Level, OutputLevels, level_of

LINES: list[tuple[Level, str]] = [
    # ComfyUI's own, which name no level
    ("info", "got prompt"),
    ("info", "Prompt executed in 3.21 seconds"),
    ("info", "To see the GUI go to: http://127.0.0.1:8188"),
    ("info", "Total VRAM 24576 MB, total RAM 64306 MB"),
    ("info", "   0.0 seconds: /opt/ComfyUI/custom_nodes/websocket_image_save.py"),
    ("warning", "   1.2 seconds (IMPORT FAILED): /opt/ComfyUI/custom_nodes/broken"),
    ("warning", "Cannot import /opt/ComfyUI/custom_nodes/broken module for custom nodes: No module named 'x'"),
    ("warning", "invalid prompt: {'type': 'invalid_prompt'}"),
    ("error", "!!! Exception during processing !!! CUDA error: out of memory"),
    ("error", "Failed to validate prompt for output 9:"),
    ("error", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
    # formats of the logging module and others
    ("error", "ERROR:root:it broke"),
    ("warning", "WARNING:comfy.model:odd"),
    ("info", "INFO:aiohttp.access:GET /error 200"),
    ("debug", "DEBUG:asyncio:Using selector: EpollSelector"),
    ("error", "[ERROR] An error occurred while retrieving information for the 'X' node."),
    ("warning", "[ComfyUI-Manager] WARNING: the cache is old"),
    ("info", "[ComfyUI-Manager] All startup tasks have been completed."),
    ("info", "[INFO] no ERROR here"),
    ("error", "2026-01-31 12:00:00,123 - root - ERROR - it broke"),
    ("info", "2026-01-31 12:00:00,123 - my.node - INFO - 0 errors"),
    ("warning", "2026-01-31 12:00:00.123 | WARNING  | my.node:run:12 - slow"),
    ("error", "12:00:00 [ERROR] it broke"),
    ("error", "E0131 12:00:00.000000 12 executor.cc:99] failed"),
    ("warning", "W0131 12:00:00.000000 12 executor.cc:99] odd"),
    ("error", "Error: cannot open file"),
    ("error", "Fatal Python error: Segmentation fault"),
    ("warning", "/opt/x/torch/utils.py:12: UserWarning: this is old"),
    ("warning", "WARNING: You need pytorch with cu121"),
    # words that are no level
    ("info", "0 errors, 0 warnings"),
    ("info", "loading error_handling.py"),
    ("info", "Warm-up done"),
    # progress bars
    ("debug", " 45%|████▌     | 9/20 [00:02<00:03,  3.62it/s]"),
    ("debug", "Fetching 3 files: 100%|##########| 3/3 [00:00<00:00, 1.0it/s]"),
    ("debug", "9it [00:01,  8.1it/s]"),
    ("debug", "model.safetensors: 1.02GB [00:12, 83.1MB/s]"),
    ("debug", "3/20 [00:01<00:09,  1.8it/s]"),
]


@pytest.mark.parametrize(("level", "text"), LINES)
def test_the_level_of_a_line_by_itself(level: Level, text: str) -> None:
    assert level_of(text) == level
    assert OutputLevels().level(OutputLine(stream="stderr", text=text)) == level


def levels(*lines: str, stream: StreamName = "stderr") -> list[Level]:
    guess = OutputLevels()
    return [guess.level(OutputLine(stream=stream, text=line)) for line in lines]


TRACEBACK = (
    "Traceback (most recent call last):",
    '  File "/opt/ComfyUI/execution.py", line 349, in execute',
    "    output_data = get_output_data(obj)",
    "                  ^^^^^^^^^^^^^^^^^^^^",
    "  [Previous line repeated 994 more times]",
    "RuntimeError: Error(s) in loading state_dict for UNet:",
    "\tMissing key(s) in state_dict: a, b",
)


def test_a_traceback_is_an_error_to_its_end_and_no_further() -> None:
    assert levels(*TRACEBACK, "got prompt", "  indented") == ["error"] * len(TRACEBACK) + ["info", "info"]


def test_a_chain_of_exceptions_is_one_error() -> None:
    chained = (
        *TRACEBACK,
        "During handling of the above exception, another exception occurred:",
        *TRACEBACK,
        "The above exception was the direct cause of the following exception:",
        *TRACEBACK[:-1],
    )
    assert set(levels(*chained)) == {"error"}


def test_a_group_of_exceptions_is_an_error_to_its_end() -> None:
    group = (
        "  + Exception Group Traceback (most recent call last):",
        '  |   File "x.py", line 1, in <module>',
        "  | ExceptionGroup: several (2 sub-exceptions)",
        "  +-+---------------- 1 ----------------",
        "    | ValueError: first",
        "    +------------------------------------",
    )
    assert levels(*group, "got prompt") == ["error"] * len(group) + ["info"]


def test_what_is_drawn_into_a_traceback_does_not_end_it() -> None:
    bar = " 45%|████▌     | 9/20 [00:02<00:03,  3.62it/s]"
    assert levels(*TRACEBACK[:2], bar, *TRACEBACK[2:]) == ["error", "error", "debug", *["error"] * 5]
    assert levels(*TRACEBACK[:2], "got prompt", *TRACEBACK[1:]) == ["error", "error", "info", *["error"] * 6]


def test_streams_do_not_mix() -> None:
    guess = OutputLevels()
    assert guess.level(OutputLine(stream="stderr", text=TRACEBACK[0])) == "error"
    assert guess.level(OutputLine(stream="stdout", text="  a table")) == "info"
    assert guess.level(OutputLine(stream="stderr", text=TRACEBACK[1])) == "error"


def test_the_source_below_a_warning_belongs_to_it() -> None:
    warned = ("/opt/x.py:12: FutureWarning: old", "  warnings.warn(")
    assert levels(*warned, "  something else") == ["warning", "warning", "info"]


def test_a_line_of_the_longest_kind_is_looked_at_in_no_time() -> None:
    lines = ("[" * 8192, "a - " * 2048, "1:" * 4096, "0" * 8192, "a." * 4096, " " * 8192, "x" * 8192 + " ERROR")
    began = time.process_time()
    for line in lines:
        assert levels(line) == ["info"]
    assert time.process_time() - began < 0.1  # 0.7 ms measured; a pattern that backtracks takes seconds
