"""Which errors of a node say that the GPU is lost to the whole process, and which concern the job alone.

CUDA calls some errors sticky: the process is left in an inconsistent state, every further call returns the same error,
and only a new process can go on (CUDA Runtime API, ``cudaError_t``: "the process must be terminated and relaunched").
ComfyUI lives on with such a process and fails every job in it. HIP uses the same words.

PyTorch writes ``CUDA error: `` or ``HIP error: `` and then the runtime's text, in a ``RuntimeError``, since 2.8 in a
``torch.AcceleratorError`` (``c10/cuda/CUDAException.cpp``); libraries write their status names.
"""

import re
from typing import Final

_STICKY: Final = (
    # The runtime's text, and why a new process helps. Where an issue is named, it is one where ComfyUI met it.
    ("an illegal memory access was encountered", "sticky: cudaErrorIllegalAddress; Comfy-Org/ComfyUI#15271"),
    ("device-side assert triggered", "sticky: cudaErrorAssert; Comfy-Org/ComfyUI#13142"),
    ("unspecified launch failure", "sticky: cudaErrorLaunchFailure, a kernel died"),
    ("an illegal instruction was encountered", "sticky: cudaErrorIllegalInstruction; Comfy-Org/ComfyUI#792"),
    ("misaligned address", "sticky: cudaErrorMisalignedAddress"),
    ("invalid program counter", "sticky: cudaErrorInvalidPc"),
    ("operation not supported on global/shared address space", "sticky: cudaErrorInvalidAddressSpace"),
    ("hardware stack error", "sticky: cudaErrorHardwareStackError"),
    ("the launch timed out and was terminated", "sticky: cudaErrorLaunchTimeout, a display's watchdog"),
    ("uncorrectable ecc error encountered", "cudaErrorECCUncorrectable: the page is retired when the process ends"),
    ("uncorrectable nvlink error", "sticky: cudaErrorNvlinkUncorrectable"),
    ("invalid access of peer gpu memory over nvlink", "sticky: cudaErrorContained, and its like"),
    ("driver shutting down", "cudaErrorCudartUnloading: the runtime of this process has ended"),
    ("context is destroyed", "cudaErrorContextIsDestroyed: so is everything in it"),
    ("gpu is lost", "NVML's text for a device that fell off the bus (Xid 79)"),
    (
        "cuda error: unknown error",
        "cudaErrorUnknown: mostly the driver was reset, or the machine slept",
    ),
    ("hip error: unknown error", "hipErrorUnknown: the same"),
    ("hiperrorillegaladdress", "older PyTorch on ROCm writes the name: rocm-arch/python-pytorch-rocm#41"),
    ("hiperrorlaunchfailure", "the same"),
    ("hiperrorassert", "the same"),
)

_LIBRARY: Final = (
    # A kernel that a library launched has failed. Mostly the first to notice a sticky error of an earlier kernel.
    ("cublas_status_execution_failed", "the GPU program failed to execute"),
    ("hipblas_status_execution_failed", "the same on ROCm"),
    ("cudnn_status_execution_failed", "also CUDNN_STATUS_EXECUTION_FAILED_CUDART and its like of cuDNN 9"),
    ("cublas_status_mapping_error", "GPU memory could not be accessed"),
    ("cudnn_status_mapping_error", "the same"),
    ("miopenstatusunknownerror", "MIOpen's word for a failed kernel; it has no better one"),
)

_JOB_ONLY: Final = (
    # Taken first, whatever else the text says. The process goes on after these.
    ("out of memory", "the next job may be smaller; ComfyUI unloads its models (execution.py)"),
    ("outofmemory", "the exception's type, if its text says otherwise"),
    ("alloc_failed", "CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED: memory again"),
    ("no kernel image is available", "this build does not know this GPU: a restart cannot cure it"),
    ("invalid device function", "the same"),
    ("invalid configuration argument", "a launch was refused: not sticky"),
    ("too many resources requested for launch", "the same"),
    ("not_initialized", "CUBLAS_STATUS_NOT_INITIALIZED: a handle did not fit into memory, as a rule"),
    ("not_supported", "a library does not know this operation"),
)

_OF_A_DEVICE: Final = re.compile(r"cuda|hip|cublas|cudnn|miopen|nvml|gpu|acceleratorerror")
"""That an error is of a device at all: "misaligned address" alone may be anybody's words."""

_TEXT_CHARACTERS: Final = 20_000
"""Of a message that are looked at: PyTorch's stands at its beginning, and some nodes put whole tensors into theirs."""


def broken_device(exception_type: str, exception_message: str) -> str | None:
    """Return the first line of the message if it says that the process has lost its GPU for good, else None.

    A caller may run graphs that raise what they like; the worst that comes of a forged text is a restart.
    """
    message = exception_message[:_TEXT_CHARACTERS]
    text = f"{exception_type}\n{message}".lower()
    if not _OF_A_DEVICE.search(text) or any(words in text for words, _ in _JOB_ONLY):
        return None
    for words, _ in (*_STICKY, *_LIBRARY):
        if words in text:
            return next((line.strip() for line in message.splitlines() if words in line.lower()), words)
    return None
