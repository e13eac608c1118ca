"""Which command starts the engine: the operator's, ComfyUI's own, ai-dock's ``init.sh``, or our embedded engine."""

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs

PORT_PLACEHOLDER: Final = "{port}"
"""Stands for the port in a command that we make; it is a whole argument, so nothing of an operator's is replaced."""

INIT_SCRIPT: Final = "init.sh"


class NoCommand(ValueError):
    """The engine cannot be started this way; the text says what would do."""


@attrs.frozen(kw_only=True)
class EngineFolders:
    """Where the engine reads and writes. *temp* and *models* None: the engine's own default.

    *temp* is called ``temp``: the engine makes and wipes a folder of that name in the one it is given (main.py).
    """

    input: Path
    output: Path
    temp: Path | None = None
    models: Path | None = None

    def arguments(self) -> list[str]:
        """Return ComfyUI's flags for these folders (comfy/cli_args.py; ``--models-directory`` is ours)."""
        flags = {
            "--input-directory": self.input,
            "--output-directory": self.output,
            "--temp-directory": None if self.temp is None else self.temp.parent,
            "--models-directory": self.models,
        }
        return [word for flag, folder in flags.items() if folder is not None for word in (flag, str(folder))]


@attrs.frozen(kw_only=True)
class EngineCommand:
    """What to execute. *is_ours*: we made it, so its port is :data:`PORT_PLACEHOLDER` and its folders are known."""

    argv: tuple[str, ...]
    is_ours: bool
    cwd: Path | None = None


def embedded_command(address: str, folders: EngineFolders) -> EngineCommand:
    """Start our small engine with the Python that runs us. A PyInstaller build has none, so it starts itself."""
    program = (sys.executable, "__embedded__") if _is_frozen() else (sys.executable, "-m", "comfyd.embedded")
    argv = (*program, "--listen", address, "--port", PORT_PLACEHOLDER, *folders.arguments())
    return EngineCommand(argv=argv, is_ours=True)


def given_command(text: str, environ: Mapping[str, str]) -> EngineCommand:
    """Split the operator's CMD as a shell would, without a shell: quotes work, variables and pipes do not.

    Raises:
        NoCommand: unbalanced quotes, no word at all, or a program that cannot be executed.
    """
    try:
        words = shlex.split(text)
    except ValueError as exc:  # "No closing quotation", "No escaped character"
        raise NoCommand(f"a command line with balanced quotes ({str(exc).lower()})") from exc
    if not words:
        raise NoCommand("a command line with at least one word")
    program = shutil.which(words[0], path=environ.get("PATH"))
    if program is None:
        where = "here" if "/" in words[0] else "on PATH"
        raise NoCommand(f"a command whose program exists {where} and is executable")
    # With its full path, so that neither the working folder nor the child's own PATH can choose another one.
    return EngineCommand(argv=(str(Path(program).absolute()), *words[1:]), is_ours=False)


def default_command(home: Path, address: str, folders: EngineFolders, environ: Mapping[str, str]) -> EngineCommand:
    """Choose a command where CMD is not set: ``init.sh`` if it is on PATH, else ``main.py`` in *home*.

    Raises:
        NoCommand: neither is there, or no Python to run it.
    """
    if shutil.which(INIT_SCRIPT, path=environ.get("PATH")) is not None:
        return given_command(INIT_SCRIPT, environ)
    main = home / "main.py"
    if not main.is_file():
        raise NoCommand(
            f"neither {INIT_SCRIPT} is on PATH nor main.py in COMFY_HOME ({home}); set COMFY_HOME to ComfyUI's folder, "
            "or CMD to the command that starts it, or try `comfyd run --embedded`"
        )
    argv = (
        _python_for(home, environ),
        str(main),
        *("--listen", address, "--port", PORT_PLACEHOLDER),
        *folders.arguments(),
        "--disable-auto-launch",  # of a browser
    )
    return EngineCommand(argv=argv, is_ours=True, cwd=home)


def _python_for(home: Path, environ: Mapping[str, str]) -> str:
    """Find ComfyUI's Python: a venv in its folder, else the one on PATH, else the one that runs us."""
    for candidate in (home / "venv/bin/python", home / ".venv/bin/python"):
        if candidate.is_file():
            return str(candidate)  # not resolved: a venv's python is known by the path it is called by
    found = shutil.which("python3", path=environ.get("PATH")) or shutil.which("python", path=environ.get("PATH"))
    if found is not None:
        return found
    if _is_frozen():
        raise NoCommand(f"no Python is on PATH or in a venv of COMFY_HOME ({home}); set CMD")
    return sys.executable


def _is_frozen() -> bool:
    return bool(getattr(sys, "frozen", False))
