"""What a caller is told of an engine's end: its cause, its last lines; and which errors of a node are the engine's."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import attrs
import pytest
import trio
from engine_kit import ScriptedClient, bring_up, event
from process_support import Family, program
from trio.testing import MockClock

from comfyd.config import EngineConfig, RestartPolicy
from comfyd.engine import Engine, EngineEvent, Execution, Interrupted, Raised, Submission, supervisor
from comfyd.engine.broken_device import broken_device
from comfyd.engine.last_words import (
    KEPT_CHARACTERS,
    KEPT_LINES,
    TOLD_BYTES,
    TOLD_LINES,
    LastWords,
    secrets_in,
)
from comfyd.engine.output import OutputLine
from comfyd.engine.supervisor import SupervisorConfig, keep_running, run_engine
from comfyd.errors import EngineBroken, EngineError, EngineExited, EngineLost

# --- the lines


def wrote(words: LastWords, *texts: str, at: float = 0.0, stream: str = "stderr") -> None:
    for text in texts:
        words.add(OutputLine(stream="stderr" if stream == "stderr" else "stdout", text=text), at)


def test_the_lines_since_a_job_began_are_told_in_their_order() -> None:
    words = LastWords()
    wrote(words, "before", at=9.9)
    wrote(words, "one", "two", at=10.0)
    wrote(words, "three", at=11.0)
    assert words.concerning(10.0) == ("one", "two", "three")
    assert words.concerning(11.5) == ()


def test_stdout_progress_bars_and_the_marks_of_a_traceback_are_no_words() -> None:
    words = LastWords()
    wrote(words, "got prompt", stream="stdout")
    wrote(
        words,
        " 45%|████▌     | 9/20 [00:03<00:04,  2.50it/s]",
        "Loading: 100%|##########| 3/3 [00:00<00:00, 9.1it/s]",
        "9it [00:01,  8.21it/s]",
        "    ~~~~~~~~~~^^^^^^^^^",
        "45% of the pictures are blue",
    )
    assert words.concerning(0) == ("45% of the pictures are blue",)


def test_only_the_last_are_told_and_never_more_than_fit() -> None:
    words = LastWords()
    wrote(words, *(f"line {number}" for number in range(1000)))
    told = words.concerning(0)
    assert told == tuple(f"line {number}" for number in range(1000 - TOLD_LINES, 1000))
    wrote(words, *("ä" * 5000 for _ in range(50)))
    told = words.concerning(0)
    assert 1 < len(told) < TOLD_LINES
    assert sum(len(line.encode()) for line in told) <= TOLD_BYTES
    assert all(line.endswith("ä...") for line in told)


def test_what_is_kept_is_bounded_in_lines_and_in_characters() -> None:
    words = LastWords()
    wrote(words, *("x" for _ in range(10 * KEPT_LINES)))
    assert len(words._lines) == KEPT_LINES
    wrote(words, *("y" * 8000 for _ in range(KEPT_LINES)))
    assert sum(len(text) for _, text in words._lines) <= KEPT_CHARACTERS


def test_a_new_process_has_said_nothing_yet() -> None:
    words = LastWords()
    wrote(words, "of the old one")
    words.begin()
    assert words.concerning(0) == ()


def test_paths_and_secrets_are_not_told() -> None:
    words = LastWords()
    words.begin(["hf_abcdefgh", "hf_abcdefghijkl"])
    wrote(
        words,
        '  File "/srv/ComfyUI/custom_nodes/x/nodes.py", line 3, in run',
        "401 for hf_abcdefghijkl and hf_abcdefgh",
        "GET https://me:pw@models.example/a?token=abc failed",
        "the job's own key sk-comfy-1 is wrong",
    )
    assert words.concerning(0, secrets_in({"api_key_comfy_org": "sk-comfy-1", "n": 3, "short": "key"})) == (
        '  File "nodes.py", line 3, in run',
        "401 for ******** and ********",
        "GET https://********@models.example/a?token=******** failed",
        "the job's own key ******** is wrong",
    )


def test_a_secret_is_masked_before_a_line_is_cut() -> None:
    words = LastWords()
    words.begin(["s3cret" * 10])
    wrote(words, "x" * 480 + "s3cret" * 10)
    assert "s3cret" not in words.concerning(0)[0]


# --- errors of a GPU

SUFFIX = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("torch.AcceleratorError", "CUDA error: an illegal memory access was encountered" + SUFFIX),
        ("torch.AcceleratorError", "HIP error: an illegal memory access was encountered" + SUFFIX),
        ("torch.AcceleratorError", "CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert'" + SUFFIX),
        ("RuntimeError", "CUDA error: unspecified launch failure" + SUFFIX),
        ("RuntimeError", "CUDA error: an illegal instruction was encountered" + SUFFIX),
        ("RuntimeError", "CUDA error: misaligned address" + SUFFIX),
        ("RuntimeError", "CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA`"),
        ("RuntimeError", "CUDA error: the launch timed out and was terminated" + SUFFIX),
        ("RuntimeError", "CUDA error: driver shutting down"),
        ("RuntimeError", "CUDA error: unknown error" + SUFFIX),
        ("RuntimeError", "HIP error: hipErrorLaunchFailure"),
        ("RuntimeError", "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb)`"),
        ("RuntimeError", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        ("RuntimeError", "Unable to determine the device handle for GPU 0000:01:00.0: GPU is lost."),
    ],
)
def test_an_error_after_which_no_job_can_use_the_gpu_is_the_engines(kind: str, message: str) -> None:
    assert broken_device(kind, message) == message.splitlines()[0]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("torch.OutOfMemoryError", "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of"),
        ("torch.AcceleratorError", "CUDA error: out of memory" + SUFFIX),
        ("torch.OutOfMemoryError", "Allocation on device \nThis error means you ran out of memory on your GPU."),
        ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ("RuntimeError", "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        ("torch.AcceleratorError", "CUDA error: no kernel image is available for execution on the device" + SUFFIX),
        ("torch.AcceleratorError", "CUDA error: invalid configuration argument" + SUFFIX),
        ("torch.AcceleratorError", "CUDA error: invalid argument" + SUFFIX),
        ("RuntimeError", "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`"),
        ("RuntimeError", "Expected all tensors to be on the same device, but found cuda:0 and cpu!"),
        ("ValueError", "misaligned address in the list of recipients"),
        ("", ""),
    ],
)
def test_an_error_that_the_process_survives_is_the_jobs(kind: str, message: str) -> None:
    assert broken_device(kind, message) is None


# --- what the loss of an engine tells


@attrs.define(eq=False)
class Bench:
    engine: Engine = attrs.field(factory=lambda: Engine(name="engine-1"))
    client: ScriptedClient = attrs.field(factory=ScriptedClient)
    result: Execution | EngineLost | None = None

    async def execute(self) -> None:
        submission = Submission(graph={}, extra_data={"api_key_comfy_org": "sk-comfy-1"}, prompt_id="p")
        try:
            self.result = await self.engine.execute(submission, lambda _: None)
        except EngineLost as exc:
            self.result = exc

    async def lost(self, *acts: Callable[[], None]) -> EngineLost:
        """Execute a prompt while *acts* happen, and return how it was lost."""
        result = await self.run(*acts)
        assert isinstance(result, EngineLost)
        return result

    async def run(self, *acts: Callable[[], None]) -> Execution | EngineLost | None:
        bring_up(self.engine, self.client)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.execute)
                await trio.testing.wait_all_tasks_blocked()
                for act in acts:
                    act()
        return self.result


def broken(bench: Bench, message: str = "CUDA error: device-side assert triggered") -> Callable[[], None]:
    data = {"node_id": "3", "node_type": "KSampler", "exception_type": "torch.AcceleratorError"}
    return partial(bench.engine.received, event("execution_error", exception_message=message, **data))


def ended(bench: Bench) -> Callable[[], None]:
    return partial(bench.engine.received, event("executing", node=None))


async def test_a_job_that_breaks_the_gpu_is_lost_and_its_engine_condemned(autojump_clock: MockClock) -> None:
    bench = Bench()
    loss = await bench.lost(broken(bench), ended(bench))
    assert loss.cause == "cuda-broken"
    assert str(loss) == "the engine's GPU context is broken: CUDA error: device-side assert triggered"
    with pytest.raises(EngineBroken):
        await bench.engine.wait_condemned()
    assert (bench.engine.up, bench.engine.last_cause) == (False, "cuda-broken")


async def test_the_engine_is_condemned_at_the_error_although_no_end_follows(autojump_clock: MockClock) -> None:
    """The worker may die of the same error before it tells the end."""
    bench = Bench()
    raised: list[EngineError] = []

    async def supervise() -> None:
        try:
            await bench.engine.wait_condemned()
        except EngineBroken as exc:
            raised.append(exc)

    async with trio.open_nursery() as nursery:
        bring_up(bench.engine, bench.client)
        nursery.start_soon(supervise)
        loss = await bench.lost(broken(bench))
    assert loss.cause == "cuda-broken"
    assert len(raised) == 1


async def test_a_broken_gpu_that_only_history_tells_of_is_one_too(autojump_clock: MockClock) -> None:
    bench = Bench()
    error = {"exception_type": "RuntimeError", "exception_message": "CUDA error: misaligned address"}
    status = {"status_str": "error", "completed": False, "messages": [["execution_error", error]]}
    loss = await bench.lost(
        bench.engine.disconnected,
        partial(bench.client.end, "p", status=status),
        partial(bench.engine.connected, "client-2"),
    )
    assert loss.cause == "cuda-broken"


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (
            event("execution_error", exception_type="torch.OutOfMemoryError", exception_message="CUDA out of memory"),
            Raised,
        ),
        (event("execution_interrupted"), Interrupted),
    ],
)
async def test_an_error_of_the_job_and_an_interrupt_of_somebody_else_are_ends_as_before(
    autojump_clock: MockClock, last: EngineEvent, kind: type[Execution]
) -> None:
    bench = Bench()
    assert isinstance(await bench.run(partial(bench.engine.received, last), ended(bench)), kind)
    assert bench.engine.up


async def test_a_loss_tells_the_cause_and_the_words_of_that_attempt_only(autojump_clock: MockClock) -> None:
    bench = Bench()
    bench.engine.launched()
    wrote(bench.engine.last_words, "of the job before", at=trio.current_time())
    await trio.sleep(10)
    loss = await bench.lost(
        lambda: wrote(bench.engine.last_words, "key sk-comfy-1 refused", "Killed", at=trio.current_time()),
        lambda: bench.engine.went_down("crash", cause="signal"),
    )
    assert (loss.cause, loss.last_words) == ("signal", ("key ******** refused", "Killed"))
    await bench.execute()  # the next prompt, which never began
    assert isinstance(bench.result, EngineLost)
    assert (bench.result.cause, bench.result.last_words) == ("signal", ())


async def test_a_stop_of_comfyd_is_a_cause_of_its_own(autojump_clock: MockClock) -> None:
    bench = Bench()
    assert (await bench.lost(bench.engine.let_go)).cause == "stopped"


@pytest.mark.parametrize(
    ("error", "cause", "text"),
    [
        (EngineExited(3), "exited", "the engine exited with code 3"),
        (EngineExited(-11), "signal", "the engine was ended by signal 11"),
        (EngineExited(-9), "signal", "the engine was ended by signal 9"),
        (
            EngineExited(-9, oom_killed=True),
            "oom-killed",
            "the engine was ended by signal 9, probably by the kernel's out-of-memory killer",
        ),
    ],
)
async def test_restarts_are_counted_by_cause(
    autojump_clock: MockClock, error: EngineExited, cause: str, text: str
) -> None:
    engine = Engine(name="engine-1")
    runs: list[float] = []

    async def run_once() -> NoReturn:
        runs.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if len(runs) == 3:
            await trio.sleep_forever()
        raise error

    with trio.move_on_after(100):
        await keep_running(run_once, RestartPolicy(), engine)
    assert engine.restarts_by_cause == {cause: 2}
    assert (engine.last_failure, engine.last_cause) == (text, cause)


@pytest.mark.parametrize(("kills", "cause"), [((5, 6), "oom-killed"), ((5, 5), "signal"), ((None, None), "signal")])
async def test_sigkill_is_the_kernels_only_if_it_says_that_it_killed_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: tuple[int | None, int | None], cause: str
) -> None:
    answers = list(kills)
    monkeypatch.setattr(supervisor, "read_oom_kills", lambda: answers.pop(0))
    engine = Engine(name="engine-1")
    config = EngineConfig(
        argv=program("hang"),
        home=tmp_path,
        port=0,
        input_dir=tmp_path,
        output_dir=tmp_path,
        model_dir=tmp_path,
    )
    family = Family()
    with trio.fail_after(10), pytest.RaisesGroup(EngineExited, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_engine, engine, SupervisorConfig(engine=config, env=lambda _: family.env()))
            while not engine.processes:
                await engine.wait_changed()
            (pid,) = family.alive()
            os.kill(pid, signal.SIGKILL)
    assert engine.last_cause == cause
    assert answers == []
