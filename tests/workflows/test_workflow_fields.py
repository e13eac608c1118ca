"""The tables and messages that are made from a schema."""

from comfyd.workflows.fields import fields_of, nearest_ones


def test_types_are_named_as_a_caller_would() -> None:
    image = {"type": "string", "x-comfyd-media": "image"}
    shown = {
        "one of": {"enum": ["a", 1, True]},
        "optional": {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "null"}], "default": None},
        "list": {"type": "array", "items": {"type": "string"}},
        "anything": {},
        "media": {"anyOf": [image, {"type": "array", "items": image}]},
        "group": {"type": "string", "x-comfyd-group": "Size"},
    }
    fields = {field.name: field for field in fields_of({"properties": shown, "required": ["list"]})}
    assert {name: field.type for name, field in fields.items()} == {
        "one of": 'one of "a", 1, true',
        "optional": "integer",
        "list": "list of string",
        "anything": "any",
        "media": "image or list of image",
        "group": "string",
    }
    assert fields["optional"].bounds == ">= 3"
    assert fields["optional"].default == "null"
    assert fields["group"].group == "Size"
    assert [field.name for field in fields.values() if field.required] == ["list"]


def test_the_nearest_names_come_first_and_are_few() -> None:
    known = ["euler", "euler_ancestral", "heun", "dpmpp_2m", "euler_cfg_pp", 7]
    assert nearest_ones("Euler", known)[0] == "euler"
    assert len(nearest_ones("euler", known)) <= 3
    assert nearest_ones("qqqq", known) == []
    assert nearest_ones("e" * 10_000, known) == []


def test_the_nearest_of_thousands_is_found() -> None:
    known = [f"model_{number:05}_of_somebody.safetensors" for number in range(5000)]
    assert nearest_ones("modle_04711_of_somebody.safetensors", known)[0] == "model_04711_of_somebody.safetensors"
