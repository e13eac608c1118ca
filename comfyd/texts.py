"""Text of others made fit to be shown to a caller: no path of the server, and no longer than a person reads."""

import re
from typing import Final

_MAX_TEXT: Final = 4000
"""Characters of a text that are passed on; some nodes put whole tensors into their messages."""

# An absolute path of two or more parts, not part of a URL; its last part may stay, as it is mostly the file's name.
_PATH: Final = re.compile(r"(?<![\w:/.])/(?:[^\s'\"<>|:,;/]+/)+")


def hide_paths(text: str) -> str:
    """Reduce absolute paths in *text* to their last part, and *text* to a length that a person reads."""
    hidden = _PATH.sub("", text)
    return hidden if len(hidden) <= _MAX_TEXT else f"{hidden[:_MAX_TEXT]}..."
