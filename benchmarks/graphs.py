"""The graphs that are run. Each number gives another graph, of which nothing but unchanging parts can be cached."""

from typing import Any


def graph(name: str, number: int, prefix: str) -> dict[str, Any]:
    """Return the graph *name*.

    *tiny*: a picture of 8 px, for engines that cost nothing. *picture*: one of 512 px that is made, inverted and saved.
    *large*: a file of 200 MB, on the embedded engine only.
    """
    match name:
        case "tiny":
            return {"1": _empty_image(8, 0), "2": _save("1", prefix)}
        case "picture":
            invert = {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}}
            return {"1": _empty_image(512, number % 0xFFFFFF), "2": invert, "3": _save("2", prefix)}
        case "large":
            return {"1": {"class_type": "SaveBytes", "inputs": {"size_mb": 200, "filename_prefix": prefix}}}
        case _:
            raise ValueError(f"there is no graph {name!r}")


def _empty_image(size_px: int, color: int) -> dict[str, Any]:
    inputs = {"width": size_px, "height": size_px, "batch_size": 1, "color": color}
    return {"class_type": "EmptyImage", "inputs": inputs}


def _save(source: str, prefix: str) -> dict[str, Any]:
    return {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": prefix}}
