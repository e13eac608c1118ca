"""What is read of ``/object_info``: names, savers, media inputs; and that odd classes do no harm."""

from typing import Any

import pytest

from comfyd.engine.object_info import MediaInput, MediaKind, NodeClasses


def node(*, output: Any = False, **inputs: Any) -> dict[str, Any]:
    return {"input": {"required": inputs}, "output_node": output}


def media_of(info: Any, name: str = "Custom") -> Any:
    return NodeClasses.from_object_info({name: info}).media.get(name)


def test_names_are_all_classes_and_savers_are_the_output_nodes_that_do_not_only_show() -> None:
    classes = NodeClasses.from_object_info(
        {
            "SaveImage": node(output=True),
            "PreviewImage": node(output=True),
            "PreviewAny": node(output=True),
            "EmptyImage": node(),
            "Odd": None,
        }
    )
    assert classes.names == {"SaveImage", "PreviewImage", "PreviewAny", "EmptyImage", "Odd"}
    assert classes.saving == {"SaveImage"}


@pytest.mark.parametrize(
    ("flag", "kind"),
    [
        ("image_upload", MediaKind.IMAGE),
        ("video_upload", MediaKind.VIDEO),
        ("audio_upload", MediaKind.AUDIO),
    ],
)
def test_an_upload_flag_makes_an_input_media_in_both_spellings_of_a_choice(flag: str, kind: MediaKind) -> None:
    expected = {"file": MediaInput(kind=kind, listed=frozenset({"a.png", "b.png"}))}
    assert media_of(node(file=[["a.png", "b.png"], {flag: True}])) == expected
    assert media_of(node(file=["COMBO", {"options": ["a.png", "b.png"], flag: True}])) == expected


def test_optional_inputs_count_and_unset_flags_do_not() -> None:
    info = {
        "input": {
            "required": {"text": ["STRING", {"multiline": True}], "no": [["a"], {"image_upload": False}]},
            "optional": {"mask": [["m.png"], {"image_upload": True}]},
            "hidden": {"prompt": "PROMPT"},
        }
    }
    assert media_of(info) == {"mask": MediaInput(kind=MediaKind.IMAGE, listed=frozenset({"m.png"}))}


def test_a_class_that_is_known_to_load_media_needs_no_flag() -> None:
    assert media_of(node(video=[["v.mp4"], {}], other=[["x"], {}]), "VHS_LoadVideo") == {
        "video": MediaInput(kind=MediaKind.VIDEO, listed=frozenset({"v.mp4"}))
    }
    assert media_of(None, "LoadAudio") == {"audio": MediaInput(kind=MediaKind.AUDIO)}


@pytest.mark.parametrize(
    "info",
    [
        None,
        [],
        "text",
        5,
        {},
        {"input": None},
        {"input": []},
        {"input": {"required": None, "optional": []}},
        node(a=None, b="IMAGE", c=[], d=["IMAGE"], e=["COMBO", None], f=["COMBO", []], g=[["a"], "text"]),
    ],
)
def test_a_class_whose_info_makes_no_sense_is_known_by_name_only(info: Any) -> None:
    classes = NodeClasses.from_object_info({"Custom": info})
    assert classes.names == {"Custom"}
    assert classes.saving == frozenset()
    assert classes.media == {}


@pytest.mark.parametrize("options", [None, 5, True, "ab.png", {"a.png": 1}, [None, 5, ["a.png"]]])
def test_choices_that_make_no_sense_are_none(options: Any) -> None:
    info = node(file=["COMBO", {"options": options, "image_upload": True}])
    assert media_of(info) == {"file": MediaInput(kind=MediaKind.IMAGE)}
