"""What this package needs of Hypercorn and Quart beyond their documented API, checked once at import.

The hardened server builds on Hypercorn's ASGI translators (``HTTPStream``, ``WSStream``) and on Quart's request body,
none of which their authors promise to keep. A mere upgrade must therefore fail loudly here, not oddly in production.
The package checks the server's part when it is imported, ``quart`` its own.
"""

from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import version
from typing import Final

#: Package -> the versions whose source was read and against which the tests ran.
TESTED_VERSIONS: Final = {
    "hypercorn": ("0.18.0",),
    "quart": ("0.22.0", "0.23.1"),
    "quart-trio": ("0.12.0", "0.13.0"),
}
#: Module -> dotted names that must exist in it.
NEEDED_NAMES: Final = {
    "hypercorn.config": ("Config.log", "Config.response_headers", "Config.websocket_max_message_size"),
    "hypercorn.protocol.events": ("Body", "Data", "EndBody", "EndData", "Request", "Response", "StreamClosed"),
    "hypercorn.protocol.http_stream": ("HTTPStream.handle", "HTTPStream.app_send", "ASGIHTTPState.CLOSED"),
    "hypercorn.protocol.ws_stream": (
        "ASGIWebsocketState.CONNECTED",
        "FrameTooLargeError",
        "WSStream._accept",
        "WSStream._handle_events",
        "WSStream._send_wsproto_event",
        "WSStream.app_send",
        "WSStream.handle",
    ),
    "hypercorn.trio.worker_context": ("WorkerContext",),
    "quart_trio": ("QuartTrio.asgi_websocket_class", "QuartTrio.full_dispatch_request"),
    "quart_trio.wrappers.request": ("TrioBody", "TrioRequest.body_class"),
    "quart_trio.wrappers.response": ("TrioFileBody.buffer_size", "TrioResponse.file_body_class"),
}


#: The modules of :data:`NEEDED_NAMES` that only the app class needs; a raw ASGI app does without Quart.
QUART_MODULES: Final = tuple(module for module in NEEDED_NAMES if module.startswith("quart"))
SERVER_MODULES: Final = tuple(module for module in NEEDED_NAMES if not module.startswith("quart"))


def check(packages: Iterable[str], modules: Iterable[str]) -> None:
    """Make sure that *packages* are at a tested version and that *modules* have what we use.

    Raises:
        ImportError: naming the package or name at fault, what was expected and where to look.
    """
    for package in packages:
        found, tested = version(package), TESTED_VERSIONS[package]
        if found not in tested:
            raise ImportError(
                f"comfyd.http.server was made for {package} {' or '.join(tested)}, but {found} is installed. It uses "
                "names that may change in any release: install what pyproject.toml pins, or port it and its tests"
            )
    for module in modules:
        for dotted in NEEDED_NAMES[module]:
            found_so_far: object = import_module(module)
            for part in dotted.split("."):
                try:
                    found_so_far = getattr(found_so_far, part)
                except AttributeError as exc:
                    raise ImportError(
                        f"comfyd.http.server needs {module}.{dotted}, which the installed package does not have"
                    ) from exc
