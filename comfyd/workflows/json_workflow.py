"""A workflow without code: a graph in ComfyUI's API format, of which some widgets are offered by name."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from comfyd.engine import is_link
from comfyd.errors import ComfydError, Fault, InvalidValue
from comfyd.jobs.graph import check_shape
from comfyd.wire import nearest, quoted
from comfyd.wire.words import got, kind
from comfyd.workflows.fields import nearest_ones
from comfyd.workflows.live import LiveInfo
from comfyd.workflows.model import Built, Workflow, WorkflowFailed, as_graph, told
from comfyd.workflows.offers import Offer, TypedOffer, typed, usual
from comfyd.workflows.sidecar import Sidecar, SidecarInput
from comfyd.workflows.widgets import Widget, marked, named, widgets_of

_EDITOR_KEYS: Final = frozenset({"nodes", "links", "last_node_id"})
HOW_TO_EXPORT: Final = (
    "is a workflow as the editor saves it, not a graph that runs; in ComfyUI open it, choose Workflow > Export (API), "
    "and put that file here"
)


class NotAGraph(ComfydError):
    """A JSON file below the folder is no graph in API format; the text says what to do."""


@attrs.define(eq=False)
class _Memory:
    """The offers as typed for the engine that was asked last: of all callers' calls, nearly all have the same one."""

    live: LiveInfo | None = None
    offers: tuple[TypedOffer, ...] = ()


@attrs.frozen(kw_only=True, eq=False)
class JsonWorkflow(Workflow):
    """A graph with holes. *chosen* are offered always; *candidates* where they are among the usual ones."""

    graph: Mapping[str, Any] = attrs.field(repr=False)
    chosen: tuple[Offer, ...]
    candidates: tuple[Offer, ...]
    _memory: _Memory = attrs.field(factory=_Memory, repr=False)

    def offers(self, live: LiveInfo) -> tuple[TypedOffer, ...]:
        """Return the inputs as this engine takes them."""
        memory = self._memory
        if memory.live is not live:
            usual_ones = (offer for offer in self.candidates if usual(offer.widget, live))
            memory.offers = tuple(typed(offer, live) for offer in (*self.chosen, *usual_ones))
            memory.live = live
        return memory.offers

    def input_schema(self, live: LiveInfo) -> dict[str, Any]:
        """Return the schema, with what this engine offers."""
        offers = self.offers(live)
        return {
            "type": "object",
            "properties": {offer.name: offer.schema() for offer in offers},
            "required": [offer.name for offer in offers if offer.required],
            "additionalProperties": False,
        }

    async def build(self, raw_input: Any, live: LiveInfo) -> Built:
        """Make the graph."""
        if type(raw_input) is not dict:
            raise InvalidValue((Fault(location="input", message=f"must be an object, got {got(raw_input)}"),))
        self._refuse_unknown_classes(live)
        offers = self.offers(live)
        faults = list(_unknown(raw_input, [offer.name for offer in offers]))
        values: dict[str, Any] = {}
        graph = as_graph(self.route, self.graph)
        for offer in offers:
            try:
                value = offer.value(raw_input.get(offer.name))
            except InvalidValue as exc:
                faults += exc.faults
                continue
            values[offer.name] = value
            for node_id, name in offer.places:
                node = graph[node_id]
                node["inputs"] = {**(node.get("inputs") or {}), name: _as_input(offer, value)}
        if faults:
            raise InvalidValue(tuple(faults))
        return Built(prompt=graph, input=values)

    def _refuse_unknown_classes(self, live: LiveInfo) -> None:
        if not live.object_info:  # nothing is known of the engine yet
            return
        for node_id, node in self.graph.items():
            class_type = node["class_type"]
            if class_type not in live.object_info:
                near = nearest_ones(class_type, live.object_info)
                hint = f"; the nearest are {', '.join(map(quoted, near))}" if near else ""
                raise WorkflowFailed(
                    self.route,
                    f"needs the node class {quoted(class_type)} (node {quoted(node_id)}), which this ComfyUI does not "
                    f"have; install the custom nodes or the version of ComfyUI that it was made with{hint}",
                )


def _as_input(offer: TypedOffer, value: Any) -> Any:
    # A bare list would be a link to ComfyUI; this is how it takes one as a value (0.3.64, execution.py).
    return {"__value__": value} if offer.kind == "choices" else value


def _unknown(raw_input: Mapping[str, Any], known: list[str]) -> Iterable[Fault]:
    for name in raw_input:
        if name not in known:
            near = nearest(name, known)
            hint = f"; did you mean {quoted(near)}?" if near else f"; the known ones are {', '.join(known) or 'none'}"
            yield Fault(location=f"input.{name[:80]}", message=f"unknown field{hint}")


def json_workflow(
    graph: Any, *, route: str, sidecar: Sidecar | None = None, wishes: Mapping[str, SidecarInput] | None = None
) -> JsonWorkflow:
    """Understand a decoded JSON file and what its sidecar says.

    Raises:
        NotAGraph: it is not a graph in API format.
        InvalidValue: the sidecar does not fit the graph; every fault with its place.
    """
    _check_graph(graph)
    sidecar = sidecar or Sidecar()
    widgets = widgets_of(graph)
    hidden, faults = _hidden(sidecar, graph)
    chosen: tuple[Offer, ...] = ()
    candidates: tuple[Offer, ...] = ()
    if wishes:
        chosen, more = _wished(wishes, graph, widgets)
        faults += more
        hidden |= {place for offer in chosen for place in offer.places}
    else:
        chosen = _offers(widget for widget in marked(graph, widgets) if widget.place not in hidden)
        hidden |= {offer.widget.place for offer in chosen}
    others = sidecar.others or ("hide" if chosen else "default")
    if others != "hide":
        taken = {offer.name for offer in chosen}
        rest = _offers(widget for widget in widgets if widget.place not in hidden)
        rest = tuple(offer if offer.name not in taken else _beside(offer, taken) for offer in rest)
        chosen, candidates = ((*chosen, *rest), ()) if others == "all" else (chosen, rest)
    if faults:
        raise InvalidValue(tuple(faults))
    return JsonWorkflow(
        route=route,
        summary=sidecar.summary or route,
        description=sidecar.description or "",
        tags=tuple(route.split("/")[:-1]) if sidecar.tags is None else sidecar.tags,
        source="json",
        graph=graph,
        chosen=chosen,
        candidates=candidates,
    )


def _check_graph(graph: Any) -> None:
    if not isinstance(graph, dict):
        raise NotAGraph(f"must be an object of nodes, is {got(graph)}")
    if len(_EDITOR_KEYS & graph.keys()) >= 2:
        raise NotAGraph(HOW_TO_EXPORT)
    if isinstance(graph.get("prompt"), dict) and "class_type" not in graph["prompt"]:
        raise NotAGraph('is a whole request; put only what is below "prompt" here')
    faults = check_shape(graph)
    if faults:
        raise NotAGraph(f"is not a graph in API format: {told(faults)}")


def _offers(widgets: Iterable[Widget]) -> tuple[Offer, ...]:
    return tuple(Offer(name=name, places=(widget.place,), widget=widget) for name, widget in named(widgets).items())


def _beside(offer: Offer, taken: set[str]) -> Offer:
    number = 2
    while f"{offer.name}_{number}" in taken:
        number += 1
    taken.add(f"{offer.name}_{number}")
    return attrs.evolve(offer, name=f"{offer.name}_{number}")


def _hidden(sidecar: Sidecar, graph: Mapping[str, Any]) -> tuple[set[tuple[str, str]], list[Fault]]:
    hidden: set[tuple[str, str]] = set()
    faults: list[Fault] = []
    for index, target in enumerate(sidecar.hide):
        try:
            hidden.add(_place(target, graph, f"hide.{index}"))
        except InvalidValue as exc:
            faults += exc.faults
    return hidden, faults


def _wished(
    wishes: Mapping[str, SidecarInput], graph: Mapping[str, Any], widgets: Iterable[Widget]
) -> tuple[tuple[Offer, ...], list[Fault]]:
    by_place = {widget.place: widget for widget in widgets}
    offers: list[Offer] = []
    faults: list[Fault] = []
    taken: dict[tuple[str, str], str] = {}
    for name, wish in wishes.items():
        location = f"inputs.{name}"
        try:
            places = tuple(_place(target, graph, f"{location}.target") for target in wish.targets)
        except InvalidValue as exc:
            faults += exc.faults
            continue
        for place in places:
            if taken.setdefault(place, name) != name:
                faults.append(
                    Fault(location=f"{location}.target", message=f"{'.'.join(place)} is set by {taken[place]} already")
                )
        widget = _widget(places[0], graph, by_place)
        offers.append(Offer(name=name, places=places, widget=widget, wish=wish))
        faults += _wrong_bounds(wish, location)
        if wish.default is not None and not _alike(widget.value, wish.default):
            message = f"must be {kind(widget.value)} like the graph's own value, got {got(wish.default)}"
            faults.append(Fault(location=f"{location}.default", message=message))
    return tuple(offers), faults


def _wrong_bounds(wish: SidecarInput, location: str) -> Iterable[Fault]:
    if wish.min is not None and wish.max is not None and wish.min > wish.max:
        yield Fault(location=f"{location}.min", message=f"must be <= max ({wish.max}), got {wish.min}")
    if wish.step is not None and wish.step <= 0:
        yield Fault(location=f"{location}.step", message=f"must be > 0, got {wish.step}")
    if wish.choices is not None and wish.default is not None and wish.default not in wish.choices:
        yield Fault(location=f"{location}.default", message=f"must be one of the choices, got {quoted(wish.default)}")
    if type(wish.default) in (int, float):
        if wish.min is not None and wish.default < wish.min:
            yield Fault(location=f"{location}.default", message=f"must be >= {wish.min}, got {wish.default}")
        if wish.max is not None and wish.default > wish.max:
            yield Fault(location=f"{location}.default", message=f"must be <= {wish.max}, got {wish.default}")


def _alike(value: Any, default: Any) -> bool:
    return value is None or kind(value) == kind(default)


def _widget(place: tuple[str, str], graph: Mapping[str, Any], by_place: Mapping[tuple[str, str], Widget]) -> Widget:
    """Return the widget at *place*; one that the exported graph left out (an optional one) is made up."""
    if place in by_place:
        return by_place[place]
    node_id, name = place
    return Widget(
        node_id=node_id,
        input=name,
        class_type=graph[node_id]["class_type"],
        title="",
        titled_by_hand=False,
        value=(graph[node_id].get("inputs") or {}).get(name),
    )


def _place(target: str, graph: Mapping[str, Any], location: str) -> tuple[str, str]:
    """Find the widget that ``node.widget`` means; the node by its id, else by its title."""
    node, dot, name = target.rpartition(".")
    if not dot or not node or not name:
        raise _refused(location, f'must be "node.widget", such as "3.seed", got {quoted(target)}')
    if node not in graph:
        titles = {node_id: (each.get("_meta") or {}).get("title") for node_id, each in graph.items()}
        found = [node_id for node_id, title in titles.items() if title == node]
        if len(found) != 1:
            near = nearest(node, [title for title in titles.values() if isinstance(title, str)])
            hint = f"; did you mean {quoted(near)}?" if near and not found else ""
            problem = f"titles {len(found)} nodes; use the id of one" if found else "is no node's id or title"
            raise _refused(location, f"{quoted(node)} {problem}{hint}")
        node = found[0]
    inputs = graph[node].get("inputs") or {}
    if is_link(inputs.get(name)):
        raise _refused(location, f"{quoted(target)} is linked to another node; it has no widget to set")
    if name not in inputs:
        near = nearest(name, inputs)
        if near is not None:
            raise _refused(location, f"the node has no widget {quoted(name)}; did you mean {quoted(near)}?")
    return node, name


def _refused(location: str, message: str) -> InvalidValue:
    return InvalidValue((Fault(location=location, message=message),))
