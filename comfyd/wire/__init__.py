"""The schema layer: JSON text to plain values, plain values to attrs instances, and their JSON Schema.

What a field accepts stands in its type, once: ``Annotated[int, msgspec.Meta(ge=1, le=100, description="...")]``.
:func:`structure` enforces it and reports every fault with its dotted path; :func:`json_schema` publishes it.
Two rules are ours: ``null`` means absent wherever a field has a default, and an unknown key is a fault that names the
nearest known one. Constraints live in ``Meta``, not in attrs validators: those report at the class, not at the field.
On an optional field they go inside, ``Annotated[float, Meta(gt=0)] | None``: msgspec gives no schema otherwise.
"""

from comfyd.wire.hooks import MAX_FAULTS
from comfyd.wire.json_text import MAX_DEPTH, decode_json, encode_json
from comfyd.wire.schema import json_schema
from comfyd.wire.structuring import structure, unstructure, wire_field
from comfyd.wire.words import nearest, quoted

__all__ = [
    "MAX_DEPTH",
    "MAX_FAULTS",
    "decode_json",
    "encode_json",
    "json_schema",
    "nearest",
    "quoted",
    "structure",
    "unstructure",
    "wire_field",
]
