"""Which environment variables are secrets, how they are shown, and what of the environment the engine may see."""

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from comfyd.config import EngineConfig

SECRET_VARIABLES: Final = (
    "AWS_*",
    "AZURE_STORAGE_*",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "HTTP_AUTH_HEADER_VALUE",
    "WEBHOOK_SECRET",
    "API_KEYS",
    "ANTHROPIC_API_KEY",
)
"""The daemon's own secrets: masked wherever they are shown, and kept from the engine unless CHILD_ENV_PASS names them.

ComfyUI runs custom nodes, which is anybody's code. Of AWS_* no name is spared: region, profile and endpoint are of use
only with the credentials. HF_TOKEN, CIVITAI_TOKEN and the like are not here: nodes and model downloaders inside ComfyUI
are who uses them.
"""

_MASKED: Final = (
    *SECRET_VARIABLES,
    *("*_TOKEN", "*_SECRET", "*_SECRETS", "*_PASSWORD", "*_PASSWD", "*_API_KEY", "*_API_KEYS", "*_CREDENTIALS"),
    *("*_SECRET_KEY", "*_ACCESS_KEY", "*_PRIVATE_KEY"),
)
_NOT_MASKED: Final = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ENDPOINT_URL*")

_ABOUT_OUR_PROCESS: Final = (
    # sd_notify, the systemd watchdog and socket activation: about this process, wrong in any other
    *("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"),
    *("MAINPID", "INVOCATION_ID", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID", "CREDENTIALS_DIRECTORY", "FDSTORE"),
    # PyInstaller's bootloader: where this program was unpacked
    *("_PYI_*", "_MEIPASS*", "PYINSTALLER_*"),
)
_SHOWN_CHARACTERS: Final = 80
_URL_SECRETS: Final = re.compile(
    r"(?<=://)[^/\s?#\"']+(?=@)"  # user and password
    r"|(?<=[?&])(?i:(x-(?:amz|goog)-(?:signature|credential|security-token)|sig|signature|(?:access_|api_?)?(?:token|key)"
    r"|password|secret)=)[^&\s#\"']+"
)
MASK: Final = "********"


def child_environment(environ: Mapping[str, str], config: "EngineConfig", *, port: int) -> dict[str, str]:
    """Make the engine's environment from the daemon's *environ*; *port* is the real one, never 0.

    Secrets of the daemon and what concerns only the daemon's own process are left out; the four variables that
    comfyui-api sets (src/comfy.ts) are added.
    """
    inherited = {
        name: value
        for name, value in environ.items()
        if name in config.env_pass or not (_matches(name, SECRET_VARIABLES) or _matches(name, _ABOUT_OUR_PROCESS))
    }
    return {
        **_without_bootloader(inherited, environ),
        **config.extra_env,
        "DIRECT_ADDRESS": config.address,
        "COMFYUI_PORT_HOST": str(port),
        "WEB_ENABLE_AUTH": "false",
        "CF_QUICK_TUNNELS": "false",
    }


def _without_bootloader(inherited: dict[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Undo what PyInstaller's bootloader did to the library path, which would make the engine load our libraries.

    The bootloader keeps the user's value in ``LD_LIBRARY_PATH_ORIG``, if there was one ("Runtime Information" in
    PyInstaller's manual).
    """
    is_bundle = any(_matches(name, ("_PYI_*", "_MEIPASS*")) for name in environ)
    if not is_bundle:
        return inherited
    restored = {k: v for k, v in inherited.items() if k not in ("LD_LIBRARY_PATH", "LD_LIBRARY_PATH_ORIG")}
    original = environ.get("LD_LIBRARY_PATH_ORIG")
    if original:
        restored["LD_LIBRARY_PATH"] = original
    return restored


def is_masked(name: str) -> bool:
    """Whether the value of this variable must not be shown."""
    return _matches(name, _MASKED) and not _matches(name, _NOT_MASKED)


def shown(name: str, value: str, *, quote: bool = True) -> str:
    """Show a variable's *value* on one line: secrets and passwords in URLs masked; with *quote* long ones shortened."""
    if is_masked(name) and value:
        value = MASK
    value = mask_urls(value)
    value = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)
    if not quote:
        return value
    if len(value) > _SHOWN_CHARACTERS:
        value = value[: _SHOWN_CHARACTERS - 3] + "..."
    return f'"{value}"'


def mask_urls(text: str) -> str:
    """Mask what lets in: user and password of every URL in *text*, and the signatures and tokens of its query."""
    if "://" not in text:
        return text
    return _URL_SECRETS.sub(lambda found: f"{found[1] or ''}{'=' if found[1] else ''}{MASK}", text)


def secret_values(environ: Mapping[str, str]) -> list[str]:
    """Collect the values that must not appear in the log, for :func:`comfyd.host.logging.register_secret`.

    Lists (API_KEYS) count by their members. Values of less than 8 characters are left out: they would be no secrets,
    and mask parts of ordinary words.
    """
    values = (value for name, value in environ.items() if is_masked(name))
    parts = {part.strip() for value in values for part in (value, *value.split(","))}
    return sorted(part for part in parts if len(part) >= 8)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
