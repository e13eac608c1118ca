"""The environment of an ai-dock image: what its shell scripts set, read by running them once.

comfyui-api (src/config.ts, ``loadEnvCommand``) sources the same three files before it runs ComfyUI's Python.
"""

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_ENVIRONMENT_SCRIPT: Final = "opt/ai-dock/etc/environment.sh"
_VENV_SCRIPT: Final = "opt/ai-dock/bin/venv-set.sh"
# $1 and $2 are the scripts. Their chatter goes to stderr; stdout carries nothing but the environment.
_SOURCE: Final = (
    '{ source "$1" && source "$2" comfyui && source "$COMFYUI_VENV/bin/activate"; } </dev/null 1>&2 && env -0'
)
_BASH: Final = ("bash", "--noprofile", "--norc", "-c", _SOURCE, "bash")
_OF_THE_SHELL: Final = frozenset({"_", "SHLVL", "PWD", "OLDPWD"})


class AiDockError(Exception):
    """ai-dock's files are there, but its environment could not be loaded. The text is one line."""


def environment(environ: Mapping[str, str], *, root: Path = Path("/"), limit_s: float = 10.0) -> dict[str, str]:
    """Return what ai-dock's scripts add to *environ* or change in it; nothing where the files do not exist.

    Runs bash for at most *limit_s*, and blocks: call it before Trio starts.

    Raises:
        AiDockError: a script failed, took too long, or there is no bash.
    """
    scripts = (root / _ENVIRONMENT_SCRIPT, root / _VENV_SCRIPT)
    if not all(script.is_file() for script in scripts):
        return {}
    try:
        returncode, stdout, stderr = _run([*_BASH, *map(str, scripts)], environ, limit_s)
    except subprocess.TimeoutExpired as exc:
        raise AiDockError(f"loading ai-dock's environment took more than {limit_s:g} s") from exc
    except OSError as exc:
        raise AiDockError(f"loading ai-dock's environment failed: bash cannot be run ({exc.strerror})") from exc
    if returncode != 0:
        raise AiDockError(f"loading ai-dock's environment failed with exit code {returncode}{_last_line(stderr)}")
    loaded = dict(entry.split("=", 1) for entry in os.fsdecode(stdout).split("\0") if "=" in entry)
    return {name: value for name, value in loaded.items() if name not in _OF_THE_SHELL and environ.get(name) != value}


def _run(argv: list[str], environ: Mapping[str, str], limit_s: float) -> tuple[int, bytes, bytes]:
    with subprocess.Popen(
        argv,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            # The whole group, which subprocess.run would not: what a script started holds the pipes open.
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, stdout, stderr


def _last_line(stderr: bytes) -> str:
    lines = stderr[-1000:].decode(errors="replace").strip().splitlines()
    return f": {lines[-1][:200]}" if lines else ""
