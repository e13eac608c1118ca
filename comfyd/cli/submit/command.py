"""The command line of ``comfyd submit``."""

import argparse
import os
import signal
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from comfyd.cli.submit.errors import BadUse, SubmitFailed

_DEFAULT_PORT: Final = "3000"
_RECONNECT_S: Final = 120.0
_OWN_FIELDS: Final = frozenset({"prompt", "input", "id", "priority", "timeout_s"})
_EPILOG: Final = """\
NODE is a node's id or its title. Values are JSON where they are some, else text; where a text stands in the graph, a
number stays a text.

  comfyd submit graph.json --set KSampler.seed=7 --set 6.text='a red house' --input 'Load Image.image=@photo.jpg'
  comfyd submit --workflow sd1.5/txt2img --input prompt='a red house' --input steps=20 -o pictures

The daemon is at --url, else COMFYD_URL, else on this machine at PORT (3000); COMFYD_API_KEY is sent to it.

exit codes: 0 done; 1 the job failed, or an output could not be saved; 2 the command or the request is not valid;
3 the daemon is not reachable or not ready; 130 after Ctrl-C, which cancels the job (twice: leave at once).
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line's *subparsers*."""
    parser = subparsers.add_parser(
        "submit",
        help="run a graph or a workflow on a daemon and save what it makes",
        description="Submits a job to a comfyd daemon, shows its progress, and saves its outputs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", nargs="?", metavar="FILE", help='a graph in API format, or a request with one ({"prompt"}); - is stdin'
    )
    parser.add_argument("--workflow", metavar="NAME", help="a workflow of the daemon instead of FILE")
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="NODE.INPUT=VALUE", help="set an input of a node"
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        dest="inputs",
        metavar="NODE.INPUT=@FILE",
        help="send a local file as an input of a node; with --workflow: KEY=VALUE or KEY=@FILE (@@ is a plain @)",
    )
    parser.add_argument("-o", "--output", default=".", metavar="DIR", help="where outputs are put (default: here)")
    parser.add_argument("--force", action="store_true", help="replace files in DIR instead of adding -2 to the name")
    parser.add_argument("--url", metavar="URL", help="where the daemon is")
    parser.add_argument("--id", metavar="ID", help="name the job; the same request again joins it")
    parser.add_argument("--priority", type=int, metavar="N", help="-100 to 100; higher runs first")
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="seconds from submission to result, at most")
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        dest="fields",
        metavar="KEY=JSON",
        help="any other field of the request, such as convert_output or s3",
    )
    parser.add_argument("--no-wait", action="store_true", help="print the job's id once the daemon has it, and leave")
    parser.add_argument("--wait-ready", type=_seconds, default=0.0, metavar="S", help="wait so long for the daemon")
    parser.add_argument(
        "--reconnect",
        type=_seconds,
        default=_RECONNECT_S,
        metavar="S",
        help="how long the daemon may be away once it has the job (default: %(default)g)",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="one JSON document on stdout, problems as JSON on stderr")
    shown.add_argument("-q", "--quiet", action="store_true", help="no progress")


def submit_command(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Do what *options* say; return the exit code."""
    try:
        return _submit(options, environ)
    except KeyboardInterrupt:  # while files were read, before anything was sent
        return 128 + signal.SIGINT


def _submit(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    # A quarter of a second of imports, of which --help need not wait.
    import trio

    from comfyd.cli.submit.body import Attachments
    from comfyd.cli.submit.files import OutputFolder
    from comfyd.cli.submit.remote import Patience
    from comfyd.cli.submit.show import Display
    from comfyd.cli.submit.submission import Order, run_order

    display = Display(as_json=options.json, quiet=options.quiet)
    try:
        files = Attachments()
        request = _request(options, files)
        display.graph = request.get("prompt") or {}
        order = Order(
            url=options.url or environ.get("COMFYD_URL") or f"http://127.0.0.1:{environ.get('PORT') or _DEFAULT_PORT}",
            api_key=environ.get("COMFYD_API_KEY") or None,
            path=_path(options.workflow),
            body=files.body(request),
            job_id=request["id"],
            folder=None if options.no_wait else OutputFolder.make(Path(options.output), force=options.force),
            patience=Patience(ready_s=options.wait_ready, away_s=options.reconnect),
        )
    except SubmitFailed as exc:
        display.failed(exc)
        return exc.exit_code
    return trio.run(run_order, order, display)


def _request(options: argparse.Namespace, files: Any) -> dict[str, Any]:
    """Make the request's document, in which files stand by the texts that *files* has given them."""
    from comfyd.cli.submit.graph import read_request, set_input, split_setting, value_of
    from comfyd.wire import quoted

    if (options.file is None) == (options.workflow is None):
        raise BadUse("give the FILE of a graph, or the name of a --workflow")
    if options.workflow is None:
        request = read_request(options.file)
        for setting in options.settings:
            set_input(request["prompt"], setting, None)
        for setting in options.inputs:
            set_input(request["prompt"], setting, files)
    else:
        values: dict[str, Any] = {}
        for option, settings, taken in (("--set", options.settings, None), ("--input", options.inputs, files)):
            for setting in settings:
                key, value = split_setting(setting, option, "KEY=VALUE")
                values[key] = value_of(value, taken)
        request = {"input": values}
    for setting in options.fields:
        key, value = split_setting(setting, "--field", "KEY=JSON")
        if key in _OWN_FIELDS:
            raise BadUse(f"--field {quoted(key)}: there is an option for it")
        request[key] = value_of(value, None)
    given = {"id": options.id, "priority": options.priority, "timeout_s": options.timeout}
    request |= {name: value for name, value in given.items() if value is not None}
    if request.get("id") is None:
        # Files are named after the job: by its time they sort, by the rest they differ.
        request["id"] = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    if not isinstance(request["id"], str):
        raise BadUse(f"the id of the request must be a text, got {quoted(request['id'])}")
    return request


def _path(workflow: str | None) -> str:
    from urllib.parse import quote

    return "/prompt" if workflow is None else f"/workflow/{quote(workflow.strip('/'))}"


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 31_536_000:
        raise argparse.ArgumentTypeError("must be a number of seconds, 0 or greater")
    return number
