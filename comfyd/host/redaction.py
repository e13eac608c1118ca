"""What must never be shown, and its masking: the one place through which everything goes that is logged.

Three kinds are masked: secrets of the daemon's own environment (for good), values that a running job brought (while it
runs, and a little longer), and what lets in at a URL, wherever a URL stands in a text.
"""

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from comfyd.host.environment import MASK, mask_urls, secret_values

__all__ = ["redact", "redacting", "register_secret", "register_secrets_of"]

_MIN_SECRET: Final = 4  # shorter ones are words of every other line
_MIN_GUESSED: Final = 8
"""For what is only taken for a secret because of where it stands: ``extra_data`` also says ``"auto"``."""
_MIN_LINE: Final = 16  # of a secret of several lines (a private key): shorter ones are its frame
_SIGNING_PREFIX: Final = "whsec_"
_SCHEMES: Final = ("Bearer ", "Basic ", "Token ")

_MAX_LENT: Final = 32
"""Of one job: ``extra_data`` has two keys of ComfyUI's own (``api_key_comfy_org``, ``auth_token_comfy_org``). Each is
looked for in each text that is logged."""
_LINGERING_S: Final = 10.0
"""The engine's lines come through a pipe and the end of its job through a socket: the last ones may be read later."""
_MAX_LINGERING: Final = 64  # of all jobs, for the same reason as above

_changing: Final = threading.Lock()
_kept: set[str] = set()
_lent: Counter[str] = Counter()
_lingering: deque[tuple[float, str]] = deque()
_masked: tuple[str, ...] = ()
"""All of them, the longest first as one may contain another. A tuple, replaced as a whole: readers need no lock."""


def redact(text: str) -> str:
    """Mask every secret in *text*. May be called from any thread."""
    for secret in _masked:
        if secret in text:
            text = text.replace(secret, MASK)
    return mask_urls(text) if "://" in text else text


def register_secret(value: str) -> None:
    """Mask *value* from now on, also as it stands in JSON and in URLs. Less than four characters are not taken.

    Without ``whsec_`` before it, or the scheme of an ``Authorization`` header, it is the same secret.
    """
    with _changing:
        _kept.update(_forms(value, _MIN_SECRET))
        _publish()


def register_secrets_of(environ: Mapping[str, str]) -> None:
    """Mask every secret of the daemon's own environment from now on.

    These are the values of variables that are named as secrets, each member of a list for itself, and the passwords
    and tokens of URLs, which a library may well log apart from their URL.
    """
    for value in secret_values(environ):
        register_secret(value)
    for value in environ.values():
        if "://" in value:
            for secret in _secrets_in_url(value):
                register_secret(secret)


@contextmanager
def redacting(values: Iterable[str]) -> Iterator[None]:
    """Mask *values* inside the block, and for some seconds after it.

    For what a job brings: a node may print it. Values of less than eight characters are not taken, nor more than 32.
    """
    forms = list({form for value in islice(values, _MAX_LENT) for form in _forms(value, _MIN_GUESSED)})
    if not forms:
        yield
        return
    with _changing:
        _lent.update(forms)
        _publish()
    try:
        yield
    finally:
        with _changing:
            until = time.monotonic() + _LINGERING_S
            _lingering.extend((until, form) for form in forms)
            _publish()


def _publish() -> None:
    """Let go of what has lingered enough, and give readers the new state."""
    global _masked  # noqa: PLW0603  process-wide, like the log
    now = time.monotonic()
    while _lingering and (_lingering[0][0] <= now or len(_lingering) > _MAX_LINGERING):
        _, form = _lingering.popleft()
        _lent[form] -= 1
        if _lent[form] <= 0:
            del _lent[form]
    _masked = tuple(sorted({*_kept, *_lent}, key=lambda form: (-len(form), form)))


def _forms(value: str, min_characters: int) -> set[str]:
    """*value* as it may stand in a text."""
    bare = value.removeprefix(_SIGNING_PREFIX)
    for scheme in _SCHEMES:
        bare = bare.removeprefix(scheme)
    lines = [line.strip() for line in value.splitlines()]
    plain = {value, bare, *(line for line in lines if len(lines) > 1 and len(line) >= _MIN_LINE)}
    forms = {form for text in plain for form in (text, json.dumps(text)[1:-1], quote(text, safe=""))}
    return {form for form in forms if len(form) >= min_characters}


def _secrets_in_url(text: str) -> Iterator[str]:
    """Yield what lets in at a URL: its password, and the members of its query that :func:`mask_urls` masks."""
    try:
        url = urlsplit(text)
        found = [unquote(url.password or "")]
    except ValueError:  # no URL, then; whoever needs one says so
        return
    for name, value in parse_qsl(url.query):
        if MASK in mask_urls(f"{url.scheme}://host/?{quote(name)}=x"):
            found.append(value)
    yield from (secret for secret in found if len(secret) >= _MIN_GUESSED)
