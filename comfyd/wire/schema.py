"""JSON Schema of attrs classes, for OpenAPI: a thin layer over msgspec's."""

from typing import Any, get_args

import attrs
import msgspec

from comfyd.wire.shapes import is_literal
from comfyd.wire.structuring import wire_name


def json_schema(
    *shapes: Any, ref_template: str = "#/components/schemas/{name}"
) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """Give the JSON Schema (2020-12) of each of *shapes*, and the components that they refer to by class name.

    Raises:
        TypeError: two different attrs classes of one name, whose components could not be told apart.
    """
    classes: dict[str, Any] = {}
    for shape in shapes:
        _collect_classes(shape, classes)
    schemas, components = msgspec.json.schema_components(shapes, ref_template=ref_template)
    for name, cls in classes.items():
        component = components[name]
        component["additionalProperties"] = False  # msgspec ignores unknown keys of attrs classes; structure() does not
        for field in attrs.fields(cls):
            name_in_json = wire_name(field)
            if name_in_json != field.name:
                properties = component["properties"]
                component["properties"] = {
                    name_in_json if key == field.name else key: value for key, value in properties.items()
                }
                component["required"] = [name_in_json if n == field.name else n for n in component.get("required", ())]
    return schemas, components


def _collect_classes(shape: Any, classes: dict[str, Any]) -> None:
    if attrs.has(shape):
        if classes.setdefault(shape.__name__, shape) is not shape:
            raise TypeError(f"two classes are called {shape.__name__}")
        attrs.resolve_types(shape)
        for field in attrs.fields(shape):
            _collect_classes(field.type, classes)
    elif not is_literal(shape):
        for argument in get_args(shape):
            _collect_classes(argument, classes)
