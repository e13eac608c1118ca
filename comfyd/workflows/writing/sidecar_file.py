"""A graph's sidecar as text: what is offered of it, with the bounds that the engine tells, to be changed by hand."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from comfyd.workflows.offers import TypedOffer
from comfyd.workflows.writing.choosing import Chosen
from comfyd.workflows.writing.names import hand_titles

_PLAIN_NAME: Final = re.compile(r"[^\W\d]\w*", re.ASCII)
_PLAIN_TARGET: Final = re.compile(r"\d+\.[A-Za-z_]\w*", re.ASCII)
_WORDS_OF_YAML: Final = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"})


def write_sidecar(chosen: Chosen, *, summary: str) -> str:
    """Write the file; it is YAML, and stands beside the graph under the graph's own name."""
    titles = hand_titles(chosen.graph)
    lines = [f"summary: {_text(summary)}"]
    lines.append("inputs:" if chosen.offers else "inputs: {}")
    for offer in chosen.offers:
        lines += _input(offer, chosen.graph, titles)
    lines.append("others: hide                # or default: what is usual is offered as well; or all: every widget")
    return "\n".join(lines) + "\n"


def _input(offer: TypedOffer, graph: Mapping[str, Any], titles: Mapping[str, str]) -> Iterator[str]:
    ((node_id, name),) = offer.places
    title = titles.get(node_id) or graph[node_id]["class_type"]
    comment = " ".join("".join(c if c.isprintable() else " " for c in title).split())
    yield f"  {_name(offer.name)}:"
    yield f"    target: {_target(f'{node_id}.{name}')}  # {comment}"
    if offer.description:
        yield f"    description: {_text(offer.description)}"
    for word, bound in (("min", offer.low), ("max", offer.high), ("step", offer.step)):
        if bound is not None:
            yield f"    {word}: {json.dumps(bound)}"
    if offer.required:
        yield "    required: true"


def _name(name: str) -> str:
    return name if _PLAIN_NAME.fullmatch(name) and name.lower() not in _WORDS_OF_YAML else json.dumps(name)


def _target(target: str) -> str:
    return target if _PLAIN_TARGET.fullmatch(target) else json.dumps(target)


def _text(text: str) -> str:
    """Write a text; one in double quotes is the same in YAML as in JSON."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else json.dumps(text)
