"""The graphs that are run. Each number gives another graph, of which nothing but unchanging parts can be cached."""

from typing import Any


def graph(name: str, number: int, prefix: str) -> dict[str, Any]:
    """Return the graph *name*.

    *tiny*: a picture of 8 px, for engines that cost nothing. *brief*: the same after 5 ms, on the embedded engine only,
    for servers that miss a prompt which has ended before they know its id. *picture*: one of 512 px that is made,
    inverted and saved. *large*: a file of 200 MB, *huge*: one of 1 GB, on the embedded engine only.
    """
    match name:
        case "tiny":
            return {"1": _empty_image(8, 0), "2": _save("1", prefix)}
        case "brief":
            pause = {"class_type": "Sleep", "inputs": {"seconds": 0.005, "value": ["1", 0]}}
            return {"1": _empty_image(8, 0), "2": pause, "3": _save("2", prefix)}
        case "picture":
            invert = {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}}
            return {"1": _empty_image(512, number % 0xFFFFFF), "2": invert, "3": _save("2", prefix)}
        case "large":
            return large(200, prefix)
        case "huge":
            return large(1024, prefix)
        case _:
            raise ValueError(f"there is no graph {name!r}")


def copied(source: str, prefix: str) -> dict[str, Any]:
    """The graph that makes an output of the input file *source*, on :mod:`benchmarks.media_engine` only."""
    return {"1": {"class_type": "CopyFile", "inputs": {"source": source, "filename_prefix": prefix}}}


def loaded(images: list[str], prefix: str) -> dict[str, Any]:
    """The graph that loads each of *images*, whatever they are to the server: names, URLs, base64."""
    graph: dict[str, Any] = {}
    for number, image in enumerate(images, start=1):
        graph[f"{number}"] = {"class_type": "LoadImage", "inputs": {"image": image}}
        graph[f"{number + 1000}"] = _save(f"{number}", f"{prefix}-{number}")
    return graph


def large(size_mb: int, prefix: str) -> dict[str, Any]:
    """The graph that writes a file of *size_mb* MiB, on the embedded engine only."""
    return {"1": {"class_type": "SaveBytes", "inputs": {"size_mb": size_mb, "filename_prefix": prefix}}}


def _empty_image(size_px: int, color: int) -> dict[str, Any]:
    inputs = {"width": size_px, "height": size_px, "batch_size": 1, "color": color}
    return {"class_type": "EmptyImage", "inputs": inputs}


def _save(source: str, prefix: str) -> dict[str, Any]:
    return {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": prefix}}
