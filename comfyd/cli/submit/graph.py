"""The graph in a file, and the values of its nodes' inputs that the command line sets."""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from comfyd.cli.submit.body import Attachments
from comfyd.cli.submit.errors import BadUse
from comfyd.errors import InvalidValue
from comfyd.wire import decode_json, nearest, quoted

MAX_FILE_BYTES: Final = 256 * 1024 * 1024
"""Of a graph with pictures in it. The daemon takes 100 MB by default."""
_SHOWN_INPUTS: Final = 8
_MARKS_OF_EDITOR: Final = frozenset({"links", "last_node_id", "last_link_id", "version", "definitions"})
STDIN: Final = "-"


def read_request(file: str) -> dict[str, Any]:
    """Read a graph in API format, or a whole request with one in it (``{"prompt": ...}``). Blocks.

    Raises:
        BadUse: it is neither; the text says what it is and what to do.
    """
    shown = "standard input" if file == STDIN else file
    try:
        value = decode_json(_read(file, shown))
    except InvalidValue as exc:
        raise BadUse(f"{shown}: {exc}") from exc
    if isinstance(value, dict) and isinstance(graph := value.get("prompt"), dict) and not _is_node(graph):
        _check_graph(graph, f'"prompt" in {shown}')
        return value
    _check_graph(value, shown)
    return {"prompt": value}


def _read(file: str, shown: str) -> bytes:
    try:
        if file == STDIN:
            data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with open(file, "rb") as opened:
                data = opened.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise BadUse(f"{shown} cannot be read: {exc.strerror}") from exc
    if len(data) > MAX_FILE_BYTES:
        raise BadUse(f"{shown} is larger than {MAX_FILE_BYTES >> 20} MB")
    return data


def _check_graph(value: Any, shown: str) -> None:
    if isinstance(value, dict) and isinstance(value.get("nodes"), list) and _MARKS_OF_EDITOR & value.keys():
        raise BadUse(
            f"{shown} is a workflow as the editor saves it, which only the editor can run. "
            'In ComfyUI choose "Workflow > Export (API)" and submit that file'
        )
    if not isinstance(value, dict) or not value or not all(_is_node(node) for node in value.values()):
        raise BadUse(
            f'{shown} is no graph in API format (node id to {{"class_type", "inputs"}}), and no request with one. '
            'In ComfyUI it is exported by "Workflow > Export (API)"'
        )


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("class_type"), str)


def title_of(node: Mapping[str, Any]) -> str:
    """What a node is called in the editor; its class where the graph does not say, as the daemon has it."""
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return title if isinstance(title, str) and title else str(node["class_type"])


def split_setting(setting: str, option: str, shape: str) -> tuple[str, str]:
    """Split ``place=value`` at the first ``=``.

    Raises:
        BadUse: it has none.
    """
    place, equals, value = setting.partition("=")
    if not equals or not place:
        raise BadUse(f"{option} {quoted(setting)}: must be {shape}")
    return place, value


def set_input(graph: Mapping[str, Any], setting: str, files: Attachments | None) -> None:
    """Set one input of a node by ``node.input=value``, *node* being an id or the one title of that text.

    With *files*, a value ``@path`` is that file, ``@@...`` is the text ``@...``.

    Raises:
        BadUse: there is no such node or input; the nearest ones are named.
    """
    option = "--set" if files is None else "--input"
    place, text = split_setting(setting, option, "NODE.INPUT=VALUE")
    try:
        node_id, name = find_place(graph, place)
    except BadUse as exc:
        raise BadUse(f"{option} {quoted(place)}: {exc}") from exc
    inputs = graph[node_id]["inputs"]
    inputs[name] = value_of(text, files, like=inputs[name])


def value_of(text: str, files: Attachments | None, *, like: Any = None) -> Any:
    """Understand a value: a file where *files* takes them, else JSON if it is some, else a text.

    Where a text stands now (*like*), a number or ``true`` stays one: ``text=2024`` is a prompt.

    Raises:
        BadUse: the file cannot be read.
    """
    if files is not None and text.startswith("@@"):
        return text[1:]
    if files is not None and text.startswith("@"):
        return files.add(Path(os.path.expanduser(text[1:])))
    try:
        value = decode_json(text.encode())
    except (InvalidValue, UnicodeEncodeError):  # surrogates stand for bytes of the command line that are no UTF-8
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(like, str) and not isinstance(value, str | list | dict):
        return text
    return value


def find_place(graph: Mapping[str, Any], place: str) -> tuple[str, str]:
    """Find node id and input name for ``node.input``; either of the two may have dots in it.

    Raises:
        BadUse: there is no such place, or more than one.
    """
    splits = [(place[:dot], place[dot + 1 :]) for dot, character in enumerate(place) if character == "."]
    splits = [(node, name) for node, name in splits if node and name]
    if not splits:
        raise BadUse("must be NODE.INPUT, the node by its id or title")
    without_input: BadUse | None = None
    for node, name in splits:
        ids = list(_nodes_called(graph, node))
        with_input = [node_id for node_id in ids if name in graph[node_id].setdefault("inputs", {})]
        if len(with_input) == 1 and (len(ids) == 1 or node in graph):
            return with_input[0], name
        if len(ids) > 1:
            raise BadUse(f"{len(ids)} nodes have the title {quoted(node)}; name one by its id: {', '.join(ids)}")
        if ids and without_input is None:
            without_input = _no_input(graph[ids[0]], ids[0], name)
    raise without_input or _no_node(graph, splits[-1][0])


def _nodes_called(graph: Mapping[str, Any], name: str) -> Iterator[str]:
    if name in graph:
        yield name
        return
    by_title = [(node_id, title_of(node)) for node_id, node in graph.items()]
    exact = [node_id for node_id, title in by_title if title == name]
    yield from exact or [node_id for node_id, title in by_title if title.casefold() == name.casefold()]


def _no_input(node: Mapping[str, Any], node_id: str, name: str) -> BadUse:
    known = list(node["inputs"])
    like = nearest(name, known)
    hint = f"did you mean {quoted(like)}?" if like else f"it has {', '.join(known[:_SHOWN_INPUTS]) or 'none'}"
    return BadUse(f"node {node_id} ({quoted(title_of(node))}) has no input {quoted(name)}; {hint}")


def _no_node(graph: Mapping[str, Any], name: str) -> BadUse:
    titles = {title_of(node): node_id for node_id, node in graph.items()}
    like = nearest(name, [*titles, *graph])
    if like is None:
        return BadUse(f"the graph has no node with the id or title {quoted(name)}")
    shown = f"{quoted(like)} (node {titles[like]})" if like in titles else quoted(like)
    return BadUse(f"the graph has no node with the id or title {quoted(name)}; did you mean {shown}?")
