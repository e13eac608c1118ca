"""The node types this engine has."""

from types import MappingProxyType
from typing import Final

from comfyd.embedded.nodes import image, loading, sampling, saving, testing, text
from comfyd.embedded.nodes.registry import NodeType

__all__ = ["NODE_TYPES", "NodeType"]

NODE_TYPES: Final = MappingProxyType(
    {node.name: node for module in (image, loading, saving, sampling, text, testing) for node in module.NODES}
)
