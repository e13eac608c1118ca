"""``comfyd openapi``: the document of the API, with the workflows of ``WORKFLOW_DIR``, without a daemon."""

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any, Final

EXIT_BAD_CONFIGURATION: Final = 2


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line's *subparsers*."""
    parser = subparsers.add_parser(
        "openapi",
        help="write the OpenAPI document of this configuration",
        description="Writes the OpenAPI 3.1 document to stdout, with the workflows of WORKFLOW_DIR, whose Python files "
        "are run for it. Nothing else is started: what an engine would add (models, samplers) only a daemon's own "
        "/openapi.json has.",
    )
    parser.add_argument("--yaml", action="store_true", help="as YAML instead of JSON")
    parser.add_argument("--server", metavar="URL", help="where the daemon is (default: http://localhost, with PORT)")
    parser.add_argument("--embedded", action="store_true", help="for the configuration of `comfyd run --embedded`")


def openapi_command(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Write the document; return the exit code: 0, or 2 if comfyd would not start with *environ*.

    Files that are no workflow are told on stderr; the document is without them, as the daemon is.
    """
    from comfyd import __version__  # a second of imports that --help need not take
    from comfyd.config import load_config
    from comfyd.errors import BadConfiguration
    from comfyd.http.openapi import build_openapi
    from comfyd.workflows import LiveInfo, load_catalogue

    try:
        config = load_config(environ, embedded=options.embedded)
    except BadConfiguration as exc:
        for fault in exc.faults:
            sys.stderr.write(f"comfyd: {fault}\n")
        return EXIT_BAD_CONFIGURATION
    catalogue = load_catalogue(config.workflows.folder, required=config.workflows.folder_is_given)
    for problem in catalogue.problems:
        sys.stderr.write(f"comfyd: {problem.file}: {problem.message}\n")
    http = config.http
    scheme = "http" if http.tls_cert_file is None else "https"
    document = build_openapi(
        __version__,
        catalogue.workflows,
        LiveInfo(config=config),
        markdown=config.workflows.markdown_descriptions,
        api_keys=bool(http.api_keys),
        metrics=http.metrics_port is None,
        servers=(options.server or f"{scheme}://localhost:{http.port}",),
    )
    sys.stdout.write(_yaml(document) if options.yaml else _json(document))
    return 0


def _json(document: Mapping[str, Any]) -> str:
    import json

    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _yaml(document: Mapping[str, Any]) -> str:
    from comfyd.http.openapi.yaml_text import as_yaml

    return as_yaml(document).decode()
