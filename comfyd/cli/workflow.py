"""``comfyd workflow new|check|list``: writes workflow files, tries those of a folder, shows what they offer.

What is known of ComfyUI's nodes comes from ``--url`` (a ComfyUI that runs) or ``--object-info`` (its saved answer). For
``new`` the embedded engine's own answer takes their place, and the values in the graph that of classes it has not; for
``check`` nothing is then known, as the embedded engine's models are nobody's.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from comfyd.errors import ComfydError

if TYPE_CHECKING:
    from comfyd.workflows import LiveInfo, Workflow
    from comfyd.workflows.writing import Chosen

EXIT_FAULTS: Final = 1
EXIT_BAD_USE: Final = 2
_MAX_GRAPH_BYTES: Final = 16 * 1024 * 1024  # as of the daemon (catalogue.py)
_HEADINGS: Final = ("ROUTE", "SUMMARY", "INPUTS")


class _CannotDo(ComfydError):
    """The command makes no sense, or has nothing to work on. The text is for the person who gave it."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line's *subparsers*."""
    parser = subparsers.add_parser(
        "workflow",
        help="write workflow files from graphs, check them, list them",
        description="Named workflows are files below WORKFLOW_DIR. `new` writes one from a graph, `check` tries them "
        "all, `list` shows what they offer.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_new(actions)
    check = actions.add_parser(
        "check",
        help="load every file of a folder and let it make a graph",
        description="Says ok or what is wrong, with file and line. Runs the code of the files, as the daemon does. "
        "The exit code is 1 if anything is wrong, or there is nothing.",
    )
    listing = actions.add_parser("list", help="show routes, summaries and inputs")
    listing.add_argument("--json", action="store_true", help="as JSON, one object a line, with the schemas")
    for action in (check, listing):
        action.add_argument("folder", nargs="?", metavar="DIR", help="the folder (default: WORKFLOW_DIR)")
        _add_sources(action)


def _add_new(actions: Any) -> None:
    new = actions.add_parser(
        "new",
        help="write a workflow file from a graph",
        description="Writes Python, or a YAML sidecar, from a graph in ComfyUI's API format (Workflow > Export (API)): "
        "what its author titled `input: name`, else prompts, media, seed, steps, size and models become inputs. "
        "Without --url or --object-info, types and bounds are those that the built-in engine knows, and for nodes that "
        "it has not, those of the graph's values. The file is tried before it is given out.",
    )
    new.add_argument("graph", metavar="GRAPH.json", help="the graph; - is stdin")
    new.add_argument("-o", "--output", metavar="FILE", help="where to write it (default: stdout)")
    new.add_argument("--force", action="store_true", help="overwrite the file")
    new.add_argument("--sidecar", action="store_true", help="a sidecar, also without a name that ends in .yaml or .yml")
    new.add_argument("--all", action="store_true", help="make an input of every widget")
    new.add_argument("--summary", metavar="TEXT", help="the first line of the docs (default: from the file's name)")
    new.add_argument("--claude", action="store_true", help="let Claude write it; needs ANTHROPIC_API_KEY, costs money")
    new.add_argument("--wish", metavar="TEXT", help="with --claude: what to offer, and how, in your words")
    new.add_argument("--model", metavar="NAME", help="with --claude: which model")
    _add_sources(new)


def _add_sources(action: Any) -> None:
    sources = action.add_mutually_exclusive_group()
    sources.add_argument("--url", metavar="URL", help="of a running ComfyUI, asked for its node classes")
    sources.add_argument("--object-info", metavar="FILE", help="a saved answer of its GET /object_info")


def workflow_command(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Do what *options* say; return the exit code: 0, 1 if a workflow is wrong or none was made, 2 for bad use."""
    from comfyd.workflows.json_workflow import NotAGraph  # not for --help
    from comfyd.workflows.writing import CircularGraph, ClaudeFailed, DryRunFailed, NoNodeClasses

    try:
        match options.action:
            case "new":
                return _new(options, environ)
            case "check":
                return _check(options, environ)
            case _:
                return _list(options, environ)
    except NotAGraph as exc:
        _say(f"{options.graph} {exc}")
    except (CircularGraph, NoNodeClasses, _CannotDo) as exc:
        _say(str(exc))
    except (ClaudeFailed, DryRunFailed) as exc:
        _say(str(exc))
        return EXIT_FAULTS
    return EXIT_BAD_USE


def _new(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from comfyd.workflows import LiveInfo
    from comfyd.workflows.writing import (
        built_in_classes,
        choose,
        prove,
        python_input,
        unknown_classes,
        write_python,
        write_sidecar,
    )

    output = None if options.output is None else Path(options.output)
    as_sidecar = options.sidecar or (output is not None and output.suffix in (".yaml", ".yml"))
    _refuse_bad_use(options, output, as_sidecar=as_sidecar)
    graph = _read_graph(options.graph)
    asked = _object_info(options)
    live = LiveInfo.from_object_info(built_in_classes() if asked is None else asked)
    chosen = choose(graph, live, every=options.all)
    unknown = unknown_classes(chosen.graph, live.object_info)
    if unknown:
        advice = "give --url or --object-info of the ComfyUI that has them" if asked is None else "is it the right one?"
        whom = "the built-in engine" if asked is None else "that ComfyUI"
        _say(f"note: {whom} does not know {', '.join(unknown)}: their inputs have the types of their values; {advice}")
    summary = options.summary or _summary_of(output, options.graph)
    if as_sidecar:
        text = write_sidecar(chosen, summary=summary)
        faults = prove(text, chosen.graph, chosen.own_input(), suffix=".yaml")
    else:
        by_name = options.graph != "-"
        origin = f"The graph is that of {Path(options.graph).name}." if by_name else "The graph came on stdin."
        text = write_python(chosen, live, summary=summary, description=origin)
        faults = prove(text, chosen.graph, python_input(chosen))
    if faults and not options.claude:
        _say("what was written does not make this graph again, so it is not given out; please report this:")
        for fault in faults:
            _say(f"  {fault}")
        return EXIT_FAULTS
    if options.claude:
        text = _by_claude(options, environ, chosen, live, draft=text)
    return _give_out(text, output, force=options.force)


def _refuse_bad_use(options: argparse.Namespace, output: Path | None, *, as_sidecar: bool) -> None:
    if output is not None and output.exists() and not options.force:  # before anything costs time or money
        raise _CannotDo(f"{output} is there already; --force overwrites it")
    if options.claude and as_sidecar:
        raise _CannotDo("--claude writes Python, not sidecars")
    if not options.claude and (options.wish is not None or options.model is not None):
        raise _CannotDo("--wish and --model are for --claude")
    if output is None:
        return
    if as_sidecar and not output.with_suffix(".json").exists():
        _say(f"note: a sidecar takes effect beside its graph; put that at {output.with_suffix('.json')}")
    if not as_sidecar and output.with_suffix(".json").exists():
        _say(f"note: {output} and {output.with_suffix('.json').name} are the same route, so neither would be served")


def _by_claude(
    options: argparse.Namespace, environ: Mapping[str, str], chosen: "Chosen", live: "LiveInfo", *, draft: str
) -> str:
    from comfyd.workflows.writing import DEFAULT_MODEL, Question, anthropic_api, write_with_claude

    key = environ.get("ANTHROPIC_API_KEY", "").strip()
    if not key:
        raise _CannotDo("--claude needs an API key in ANTHROPIC_API_KEY")
    api = anthropic_api(key, environ.get("ANTHROPIC_BASE_URL") or None)
    question = Question(graph=chosen.graph, draft=draft, wish=options.wish or "")
    return write_with_claude(question, live, api, model=options.model or DEFAULT_MODEL, tell=_say)


def _give_out(text: str, output: Path | None, *, force: bool) -> int:
    if output is None:
        sys.stdout.write(text)
        return 0
    # Beside its place first: a daemon that watches the folder must not find half a file. Hidden ones it leaves out.
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        try:
            if force:
                draft.replace(output)
            else:
                os.link(draft, output)  # fails if somebody made it meanwhile
        finally:
            draft.unlink(missing_ok=True)
    except FileExistsError:
        raise _CannotDo(f"{output} is there already; --force overwrites it") from None
    except OSError as exc:
        raise _CannotDo(f"{output} cannot be written: {exc.strerror}") from exc
    _say(f"wrote {output}")
    return 0


def _read_graph(name: str) -> Any:
    from comfyd.errors import InvalidValue
    from comfyd.wire import decode_json

    try:
        if name == "-":
            data = sys.stdin.buffer.read(_MAX_GRAPH_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(_MAX_GRAPH_BYTES + 1)
    except OSError as exc:
        raise _CannotDo(f"{name} cannot be read: {exc.strerror}") from exc
    if len(data) > _MAX_GRAPH_BYTES:
        raise _CannotDo(f"{name} has more than {_MAX_GRAPH_BYTES} bytes")
    try:
        graph = decode_json(data.removeprefix(b"\xef\xbb\xbf"))
    except InvalidValue as exc:
        raise _CannotDo(f"{name}: {exc}") from None
    inner = graph.get("prompt") if isinstance(graph, dict) else None
    # A whole request body is taken for what it holds, as that is what people have at hand.
    return inner if isinstance(inner, dict) and "class_type" not in inner else graph


def _object_info(options: argparse.Namespace) -> dict[str, Any] | None:
    from comfyd.workflows.writing import ask_engine, read_classes

    if options.url is not None:
        return ask_engine(options.url)
    return None if options.object_info is None else read_classes(Path(options.object_info))


def _summary_of(output: Path | None, graph: str) -> str:
    stem = output.stem if output is not None else "workflow" if graph == "-" else Path(graph).stem
    words = stem.replace("_", " ").replace("-", " ").strip() or "workflow"
    return f"{words[0].upper()}{words[1:]}."


def _check(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from comfyd.cli.table import printable
    from comfyd.workflows.writing import check_folder

    folder = _folder(options, environ)
    checked = check_folder(folder, _known(options))
    for each in checked:
        path = printable(str(folder / each.file))
        sys.stdout.write(f"{path}:{each.line}: {printable(each.message)}\n" if each.message else f"{path}: ok\n")
    if not checked:
        _say(f"there is no workflow in {folder}")
    return EXIT_FAULTS if not checked or any(each.message for each in checked) else 0


def _list(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from comfyd.cli.table import printable, table_lines, terminal_width
    from comfyd.wire import encode_json
    from comfyd.workflows import load_catalogue

    folder = _folder(options, environ)
    catalogue, live = load_catalogue(folder), _known(options)
    if options.json:
        for workflow in catalogue.workflows:
            sys.stdout.write(encode_json(_document(workflow, live)).decode() + "\n")
    elif catalogue.workflows:
        rows = [_HEADINGS, *(_row(workflow, live) for workflow in catalogue.workflows)]
        cells = [tuple(printable(cell) for cell in row) for row in rows]
        for line in table_lines(cells, width=terminal_width(sys.stdout), wrapped=frozenset({1, 2})):
            sys.stdout.write(line + "\n")
    else:
        _say(f"there is no workflow in {folder}")
    if catalogue.problems:
        broken = len({problem.file for problem in catalogue.problems})
        _say(f"{broken} {'file is' if broken == 1 else 'files are'} wrong and left out; see `comfyd workflow check`")
    return 0 if catalogue.workflows else EXIT_FAULTS


def _row(workflow: "Workflow", live: "LiveInfo") -> tuple[str, ...]:
    inputs = (f"{field.name}{'*' if field.required else ''}" for field in workflow.fields(live))
    return workflow.route, workflow.summary, ", ".join(inputs)


def _document(workflow: "Workflow", live: "LiveInfo") -> dict[str, Any]:
    return {
        "route": workflow.route,
        "summary": workflow.summary,
        "description": workflow.description,
        "tags": list(workflow.tags),
        "source": workflow.source,
        "input": workflow.input_schema(live),
    }


def _known(options: argparse.Namespace) -> "LiveInfo":
    from comfyd.workflows import LiveInfo

    object_info = _object_info(options)
    return LiveInfo() if object_info is None else LiveInfo.from_object_info(object_info)


def _folder(options: argparse.Namespace, environ: Mapping[str, str]) -> Path:
    from comfyd.variables import VARIABLES

    default = next(variable.default for variable in VARIABLES if variable.name == "WORKFLOW_DIR")
    return Path(options.folder or environ.get("WORKFLOW_DIR") or default or ".").expanduser()


def _say(text: str) -> None:
    from comfyd.cli.table import printable

    sys.stderr.write(f"comfyd: {printable(text)}\n")
