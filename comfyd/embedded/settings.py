"""The command line: ComfyUI's own flags, so that one command line starts either engine, and two of ours."""

import argparse
import logging
import os
import tempfile
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Final

import attrs

from comfyd.embedded.files import Folders

DEFAULT_PORT: Final = 8188

_MIB: Final = 1024 * 1024

# ComfyUI's flags that mean nothing here (comfy/cli_args.py, 0.3.64). They are taken and ignored, because the command
# line that starts a real ComfyUI must start this one too. A flag in none of these lists is an error there and here.
_IGNORED_SWITCHES: Final = (
    "--auto-launch", "--disable-auto-launch", "--cuda-malloc", "--disable-cuda-malloc", "--force-fp32",
    "--force-fp16", "--fp32-unet", "--fp64-unet", "--bf16-unet", "--fp16-unet", "--fp8_e4m3fn-unet",
    "--fp8_e5m2-unet", "--fp8_e8m0fnu-unet", "--fp16-vae", "--fp32-vae", "--bf16-vae", "--cpu-vae",
    "--fp8_e4m3fn-text-enc", "--fp8_e5m2-text-enc", "--fp16-text-enc", "--fp32-text-enc", "--bf16-text-enc",
    "--force-channels-last", "--disable-ipex-optimize", "--supports-fp8-compute", "--use-split-cross-attention",
    "--use-quad-cross-attention", "--use-pytorch-cross-attention", "--use-sage-attention", "--use-flash-attention",
    "--disable-xformers", "--force-upcast-attention", "--dont-upcast-attention", "--gpu-only", "--highvram",
    "--normalvram", "--lowvram", "--novram", "--cpu", "--async-offload", "--force-non-blocking",
    "--disable-smart-memory", "--deterministic", "--mmap-torch-files", "--disable-mmap", "--dont-print-server",
    "--windows-standalone-build", "--disable-all-custom-nodes", "--disable-api-nodes", "--multi-user",
    "--enable-compress-response-body", "--cache-classic",
)  # fmt: skip
_IGNORED_WITH_VALUE: Final = (
    "--tls-keyfile", "--tls-certfile", "--cuda-device", "--default-device", "--oneapi-device-selector",
    "--reserve-vram", "--default-hashing-function", "--front-end-version", "--front-end-root", "--comfy-api-base",
    "--database-url",
)  # fmt: skip
_IGNORED_WITH_OPTIONAL_VALUE: Final = (
    "--enable-cors-header", "--directml",
)  # fmt: skip
_IGNORED_WITH_VALUES: Final = (
    "--extra-model-paths-config", "--fast", "--whitelist-custom-nodes",
)  # fmt: skip


class PreviewMethod(Enum):
    """ComfyUI's ``--preview-method``. Here every method but ``none`` shows the painting as it stands."""

    NONE = "none"
    AUTO = "auto"
    LATENT2RGB = "latent2rgb"
    TAESD = "taesd"


class Cost(Enum):
    """What running a node costs."""

    REAL = "real"
    NONE = "none"


class CacheKind(Enum):
    """How long the outputs of a node are kept (ComfyUI's ``--cache-*``)."""

    CLASSIC = "classic"
    LRU = "lru"
    NONE = "none"


@attrs.frozen(kw_only=True)
class Settings:
    """All that the command line says.

    *hosts* are the addresses listened on; *port* 0 lets the system choose. *cache_size* is the number of node results
    kept by :attr:`CacheKind.LRU`. *models_folder* of None means the built-in pretend models.
    """

    hosts: tuple[str, ...] = ("127.0.0.1",)
    port: int = DEFAULT_PORT
    folders: Folders
    models_folder: Path | None = None
    preview_method: PreviewMethod = PreviewMethod.NONE
    preview_size_px: int = 512
    cache: CacheKind = CacheKind.CLASSIC
    cache_size: int = 0
    max_upload_bytes: int = 100 * _MIB
    disable_metadata: bool = False
    log_level: int = logging.INFO
    log_to_stdout: bool = False
    quick_test: bool = False
    cost: Cost = Cost.REAL
    step_delay_s: float = 0.02


def parse_command_line(argv: Sequence[str]) -> Settings:
    """Read ComfyUI's flags. Exits with code 2 for an unknown flag or value, as argparse and ComfyUI do."""
    args = _parser().parse_args(argv)
    # ComfyUI keeps its folders beside its source; an installed package must not write into itself.
    base = Path(args.base_directory or Path(tempfile.gettempdir(), "comfyd-embedded"))
    folders = Folders(
        input=_absolute(args.input_directory, base / "input"),
        output=_absolute(args.output_directory, base / "output"),
        # As in ComfyUI, a folder of its own is made inside the given one, because it is wiped at start and end.
        temp=_absolute(args.temp_directory, base) / "temp",
        user=_absolute(args.user_directory, base / "user"),
    )
    cost = Cost(args.cost)
    # Two lines per prompt are a third of what a prompt costs with --cost none: there they need an explicit --verbose.
    level = args.verbose or ("INFO" if cost is Cost.REAL else "WARNING")
    step_delay_s = args.step_delay_s
    if step_delay_s is None:
        step_delay_s = 0.02 if cost is Cost.REAL else 0.0
    return Settings(
        hosts=tuple(host.strip() for host in args.listen.split(",") if host.strip()),
        port=args.port,
        folders=folders,
        models_folder=None if args.models_directory is None else Path(args.models_directory).absolute(),
        preview_method=PreviewMethod(args.preview_method),
        preview_size_px=args.preview_size,
        cache=CacheKind.NONE if args.cache_none else CacheKind.LRU if args.cache_lru > 0 else CacheKind.CLASSIC,
        cache_size=args.cache_lru,
        max_upload_bytes=round(args.max_upload_size * _MIB),
        disable_metadata=args.disable_metadata,
        log_level=logging.getLevelNamesMapping()[level],
        log_to_stdout=args.log_stdout,
        quick_test=args.quick_test_for_ci,
        cost=cost,
        step_delay_s=step_delay_s,
    )


def _absolute(given: str | None, default: Path) -> Path:
    return Path(os.path.abspath(default if given is None else given))


def _existing_folder(text: str) -> str:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return text


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 3600 seconds")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m comfyd.embedded",
        description="A small engine that speaks ComfyUI's protocol. Its image nodes are real; its checkpoints, "
        "samplers and encoders are procedural patterns that need no model and no GPU. Other ComfyUI flags are ignored.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--listen",
        default="127.0.0.1",
        metavar="IP",
        nargs="?",
        const="0.0.0.0,::",
        help="addresses, separated by commas",
    )
    add("--port", type=int, default=DEFAULT_PORT, help="0 lets the system choose; the address is printed")
    add("--base-directory", help="where input, output, temp and user are, unless given singly")
    add("--output-directory")
    add("--input-directory")
    add("--temp-directory", help="a folder `temp` is made in it, and wiped at start")
    add("--user-directory", type=_existing_folder)
    add("--max-upload-size", type=float, default=100, help="MB, for every request body")
    add("--preview-method", choices=[method.value for method in PreviewMethod], default="none")
    add("--preview-size", type=int, default=512, help="longest side of a preview, in pixels")
    add("--cache-lru", type=int, default=0, metavar="N", help="keep the results of N nodes")
    add("--cache-none", action="store_true", help="keep no results")
    add("--disable-metadata", action="store_true", help="do not write the prompt into files")
    add("--verbose", nargs="?", const="DEBUG", choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
    add("--log-stdout", action="store_true")
    add("--quick-test-for-ci", action="store_true", help="load everything, then exit 0")
    ours = parser.add_argument_group("comfyd's own")
    ours.add_argument("--models-directory", type=_existing_folder, help="list models from here, not the pretend ones")
    ours.add_argument(
        "--cost", choices=[cost.value for cost in Cost], default="real", help="none: no pixel is computed"
    )
    ours.add_argument("--step-delay-s", type=_not_negative, help="time that a sampler step takes at least")
    for flag in _IGNORED_SWITCHES:
        add(flag, action="store_true", help=argparse.SUPPRESS)
    for flag in _IGNORED_WITH_VALUE:
        add(flag, help=argparse.SUPPRESS)
    for flag in _IGNORED_WITH_OPTIONAL_VALUE:
        add(flag, nargs="?", const="", help=argparse.SUPPRESS)
    for flag in _IGNORED_WITH_VALUES:
        add(flag, nargs="*", action="append", help=argparse.SUPPRESS)
    return parser
