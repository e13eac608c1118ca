"""What an engine says on its websocket, parsed once.

Lenient on purpose: ComfyUI's messages grow fields and types from release to release, so an event keeps its whole
``data`` and only what comfyd acts upon is looked at. Shapes: ComfyUI 0.3.64, ``server.py`` and ``execution.py``.
"""

from typing import Any

import attrs
import msgspec


@attrs.frozen(kw_only=True)
class EngineEvent:
    """One text frame. *prompt_id* is the attempt it belongs to, or None for what concerns the whole engine."""

    type: str
    data: dict[str, Any]
    prompt_id: str | None


class UnreadableFrame(ValueError):
    """A frame that makes no sense; the text says why."""


class _Frame(msgspec.Struct):
    type: str
    data: dict[str, Any]


_decoder = msgspec.json.Decoder(_Frame)


def parse_event(frame: str | memoryview) -> EngineEvent:
    """Parse one text frame.

    Raises:
        UnreadableFrame: it is not JSON, or not an object with a text ``type`` and an object ``data``.
    """
    try:
        decoded = _decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise UnreadableFrame(str(exc)) from exc
    prompt_id = decoded.data.get("prompt_id")
    return EngineEvent(
        type=decoded.type,
        data=decoded.data,
        prompt_id=prompt_id if isinstance(prompt_id, str) else None,
    )
