"""What an engine says of its node classes in ``GET /object_info``, reduced to what comfyd acts upon.

Shape (ComfyUI 0.3.64, ``server.py`` node_info): class name -> ``{"input": {"required": {name: [type, options]},
"optional": {...}}, "output_node": bool, ...}``. A choice is written in two ways: ``[["a", "b"], {...}]`` and
``["COMBO", {"options": ["a", "b"], ...}]``.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, Self

import attrs


class MediaKind(Enum):
    """What a loader's input takes."""

    IMAGE = "image"
    VIDEO = "video"
    AUDIO = "audio"


@attrs.frozen(kw_only=True)
class MediaInput:
    """An input that takes a media file. *listed* are the file names that the engine offered when it was asked."""

    kind: MediaKind
    listed: frozenset[str] = frozenset()
    is_folder: bool = False
    """It takes the name of a folder; a caller may give a list of media, which become the folder's files."""
    wants_path: bool = False
    """It looks from the process's working folder, not from INPUT_DIR: only an absolute path is sure to be found."""


def _takes(kind: MediaKind, *, path: bool = False) -> MediaInput:
    return MediaInput(kind=kind, wants_path=path)


_IMAGES_IN_FOLDER: Final = MediaInput(kind=MediaKind.IMAGE, is_folder=True)
_IMAGES_IN_FOLDER_BY_PATH: Final = MediaInput(kind=MediaKind.IMAGE, is_folder=True, wants_path=True)

# Classes whose own definition does not carry an upload flag: those that comfyui-api's users know to work. The ones of
# VideoHelperSuite that end in "Path" open what they are given as it is (ComfyUI-VideoHelperSuite, load_video_nodes.py).
_FALLBACK: Final[Mapping[str, Mapping[str, MediaInput]]] = {
    "LoadImage": {"image": _takes(MediaKind.IMAGE)},
    "LoadImageMask": {"image": _takes(MediaKind.IMAGE)},
    "LoadImageOutput": {"image": _takes(MediaKind.IMAGE)},
    "VHS_LoadImagePath": {"image": _takes(MediaKind.IMAGE, path=True)},
    "VHS_LoadImages": {"directory": _IMAGES_IN_FOLDER},
    "VHS_LoadImagesPath": {"directory": _IMAGES_IN_FOLDER_BY_PATH},
    "LoadVideo": {"file": _takes(MediaKind.VIDEO), "video": _takes(MediaKind.VIDEO)},
    "VHS_LoadVideo": {"video": _takes(MediaKind.VIDEO)},
    "VHS_LoadVideoPath": {"video": _takes(MediaKind.VIDEO, path=True)},
    "VHS_LoadVideoFFmpeg": {"video": _takes(MediaKind.VIDEO)},
    "VHS_LoadVideoFFmpegPath": {"video": _takes(MediaKind.VIDEO, path=True)},
    "LoadAudio": {"audio": _takes(MediaKind.AUDIO)},
}

# Output nodes that show and save nothing: a graph with no other yields no file, whatever it computes.
_ONLY_SHOW: Final = frozenset(
    {
        "PreviewImage",
        "PreviewAudio",
        "PreviewAny",
        "PreviewVideo",
        "Preview3D",
        "Preview3DAnimation",
        "MaskPreview",
        "SaveImageWebsocket",  # sends its pictures to the submitter's websocket, which is ours
    }
)

_UPLOAD_FLAGS: Final = (
    ("image_upload", MediaKind.IMAGE),
    ("video_upload", MediaKind.VIDEO),
    ("audio_upload", MediaKind.AUDIO),
)


@attrs.frozen(kw_only=True)
class NodeClasses:
    """The node classes of an engine."""

    names: frozenset[str]
    saving: frozenset[str]
    """Classes that write files when they run."""
    media: Mapping[str, Mapping[str, MediaInput]]
    """Class -> input -> what it takes, for inputs that are media."""

    @classmethod
    def from_object_info(cls, object_info: Mapping[str, Any]) -> Self:
        """Reduce an engine's answer. Classes whose info makes no sense are known by name only."""
        saving = {
            name
            for name, info in object_info.items()
            if isinstance(info, dict) and info.get("output_node") and name not in _ONLY_SHOW
        }
        media = {name: _media_inputs(name, info) for name, info in object_info.items()}
        return cls(
            names=frozenset(object_info),
            saving=frozenset(saving),
            media={name: inputs for name, inputs in media.items() if inputs},
        )


def _media_inputs(class_type: str, info: Any) -> dict[str, MediaInput]:
    known = _FALLBACK.get(class_type, {})
    found: dict[str, MediaInput] = {}
    groups = info.get("input") if isinstance(info, dict) else None
    for group in (groups or {}).values() if isinstance(groups, dict) else ():
        for name, spec in group.items() if isinstance(group, dict) else ():
            options = spec[1] if isinstance(spec, list) and len(spec) > 1 and isinstance(spec[1], dict) else {}
            flagged = next((MediaInput(kind=kind) for flag, kind in _UPLOAD_FLAGS if options.get(flag)), None)
            media = known.get(name) or flagged
            if media is not None:
                found[name] = attrs.evolve(media, listed=_choices(spec, options))
    return found or dict(known)


def _choices(spec: Any, options: Mapping[str, Any]) -> frozenset[str]:
    choices = spec[0] if isinstance(spec, list) and spec and isinstance(spec[0], list) else options.get("options")
    return (
        frozenset(choice for choice in choices if isinstance(choice, str)) if isinstance(choices, list) else frozenset()
    )


def is_link(value: Any) -> bool:
    """Whether *value* is a link to another node's output, by ComfyUI's rule (``comfy_execution/graph_utils.py``)."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) in (int, float)
