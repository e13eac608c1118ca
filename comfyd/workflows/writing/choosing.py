"""What of a graph becomes an input: the choice that a JSON workflow makes too, so that callers' names stay the same."""

import textwrap
from collections.abc import Mapping
from typing import Any, Final

import attrs

from comfyd.workflows.author import SEED_MAX
from comfyd.workflows.json_workflow import json_workflow
from comfyd.workflows.live import LiveInfo
from comfyd.workflows.offers import Kind, TypedOffer
from comfyd.workflows.sidecar import Sidecar

_LONGEST_DESCRIPTION: Final = 100
"""Characters. Tooltips of custom nodes may be pages; their first sentence says what the input is."""

_NO_BOUND: Final = 2**63 - 1
"""What nodes write who know of no bound."""


@attrs.frozen(kw_only=True)
class Chosen:
    """A graph and what of it is to be an input. The offers' defaults are the graph's own values."""

    graph: Mapping[str, Any]
    offers: tuple[TypedOffer, ...]

    def own_input(self) -> dict[str, Any]:
        """Return the input, by the offers' names, of which this very graph is made."""
        return {offer.name: offer.default for offer in self.offers}


def choose(graph: Any, live: LiveInfo, *, every: bool = False) -> Chosen:
    """Choose the widgets of *graph* that its author marked, else the usual ones, or *every* one.

    Raises:
        NotAGraph: it is not a graph in API format; the text says what to do.
    """
    workflow = json_workflow(graph, route="graph", sidecar=Sidecar(others="all" if every else None))
    offers = (_fitting(offer) for offer in workflow.offers(live) if offer.kind != "choices")
    return Chosen(graph=workflow.graph, offers=tuple(offers))


def _fitting(offer: TypedOffer) -> TypedOffer:
    """Let the graph's own value pass: it ran with it, whatever the engine says of it now."""
    value = offer.default
    offer = attrs.evolve(offer, description=_short(offer.description), group=None)
    if offer.media is not None and isinstance(value, str) and value:
        # The file that was tried lies in its author's folder. Whether it is in this engine's too is no reason for
        # another file to be written.
        return attrs.evolve(offer, required=True, drawn=False)
    if offer.kind == "choice":
        return offer
    offer = attrs.evolve(offer, media=None, required=False)
    kinds: dict[type, Kind] = {bool: "bool", int: "int", float: "float"}
    own = kinds.get(type(value), "string")
    if own == "float" and offer.kind == "int" and value.is_integer():
        value, own = int(value), "int"
    if own != offer.kind and not (own == "int" and offer.kind == "float"):
        return attrs.evolve(offer, kind=own, low=None, high=None, step=None, drawn=False)
    if isinstance(value, str | bool):
        return offer
    # PrimitiveInt says that it may be drawn too (0.3.64, nodes_primitive.py); what is no seed keeps its value.
    seed = any("seed" in name.casefold() for name in (offer.name, offer.places[0][1]))
    low = None if offer.low is None or value < offer.low or offer.low <= -_NO_BOUND else offer.low
    high = None if offer.high is None or value > offer.high or _NO_BOUND <= offer.high < SEED_MAX else offer.high
    return attrs.evolve(offer, default=value, low=low, high=high, drawn=offer.drawn and seed)


def _short(text: str) -> str:
    text = " ".join(text.split())
    if len(text) <= _LONGEST_DESCRIPTION:
        return text
    return textwrap.shorten(f"{text.split('. ')[0].rstrip('.')}.", _LONGEST_DESCRIPTION, placeholder=" ...")
