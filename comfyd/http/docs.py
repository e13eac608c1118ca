"""``/openapi.json`` and ``/docs``: the document of this very daemon, and Swagger UI to read it and try things out.

Everything that the page needs comes from here (``assets/``), so it works without a way to anywhere else, and its policy
lets it ask nobody else. All its addresses are relative: it may stand below a prefix of a proxy's.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib.resources import files
from typing import Any, Final

import attrs
import trio

from comfyd import __version__
from comfyd.errors import RequestRefused
from comfyd.http import problems
from comfyd.http.asgi import JSON, Exchange, by_method, send_empty, send_whole
from comfyd.http.openapi import build_openapi
from comfyd.http.ranges import not_modified
from comfyd.wire import encode_json
from comfyd.workflows import LiveInfo, WorkflowCatalogue, Workflows
from comfyd.workflows.live_source import LiveSource

OPENAPI_PATH: Final = "/openapi.json"
_DOCS: Final = "/docs"
_ASSETS: Final = f"{_DOCS}/assets/"
_HTML: Final = b"text/html; charset=utf-8"
_YAML: Final = b"application/yaml"
_ASSET_TYPES: Final[Mapping[str, bytes]] = {
    "docs.css": b"text/css; charset=utf-8",
    "docs.js": b"text/javascript; charset=utf-8",
    "swagger-ui.css": b"text/css; charset=utf-8",
    "swagger-ui-bundle.js": b"text/javascript; charset=utf-8",
}
_LIVE_MAX_AGE_S: Final = 60.0
"""Models come and go while the engine runs. To ask for all it has costs it up to a second, so no more than this."""

_POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    b"media-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""No script, style or connection but our own. ``data:`` are Swagger UI's icons, ``blob:`` pictures that were made."""
_PAGE_HEADERS: Final = (
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
_ASSET_HEADERS: Final = ((b"x-content-type-options", b"nosniff"),)


@attrs.frozen(kw_only=True)
class _Page:
    """Something that is sent whole. *etag* names its content."""

    body: bytes
    content_type: bytes
    etag: str

    @classmethod
    def of(cls, body: bytes, content_type: bytes) -> "_Page":
        digest = hashlib.blake2b(body, digest_size=12).hexdigest()
        return cls(body=body, content_type=content_type, etag=f'"{digest}"')


def _as_json(document: Mapping[str, Any]) -> bytes:
    return encode_json(document)


def _as_yaml(document: Mapping[str, Any]) -> bytes:
    from comfyd.http.openapi.yaml_text import as_yaml  # PyYAML is for the few who ask for it

    return as_yaml(document)


@attrs.frozen
class _Form:
    """A form of the document. *root* is where the daemon is, relative to the form's own address."""

    root: str
    content_type: bytes
    encode: Callable[[Mapping[str, Any]], bytes]


_FORMS: Final[Mapping[str, _Form]] = {
    OPENAPI_PATH: _Form(".", JSON, _as_json),
    f"{_DOCS}/json": _Form("..", JSON, _as_json),
    f"{_DOCS}/yaml": _Form("..", _YAML, _as_yaml),
}


def is_docs_path(path: str) -> bool:
    """Whether :class:`DocsEndpoint` is to answer for *path*."""
    return path in {OPENAPI_PATH, _DOCS} or path.startswith(f"{_DOCS}/")


@attrs.define(eq=False, kw_only=True)
class DocsEndpoint:
    """The endpoint, as a plain ASGI application.

    It remembers what it made, at most once for each of the few addresses: the forms of the document until there are
    other workflows or the engine has something else, and the page's files, 2 MB, for good.
    """

    workflows: Workflows
    live: LiveSource
    markdown: bool = True
    api_keys: bool = False
    metrics: bool = True
    _made_of: tuple[WorkflowCatalogue, LiveInfo] | None = None
    _forms: dict[str, _Page] = attrs.field(factory=dict)
    _files: dict[str, _Page] = attrs.field(factory=dict)
    _making: trio.Lock = attrs.field(factory=trio.Lock)

    async def __call__(self, exchange: Exchange) -> None:
        """Serve one request for which :func:`is_docs_path` holds."""
        path = exchange.scope["path"]
        await by_method(exchange, {"GET": partial(self._get, path)})

    async def _get(self, path: str, exchange: Exchange) -> None:
        if path == f"{_DOCS}/":  # the page's relative addresses are for the one without the slash
            await send_empty(exchange.send, 308, [(b"location", b"../docs")])
        elif path == _DOCS:
            await _send(exchange, await self._file("docs.html", _HTML), _PAGE_HEADERS)
        elif path in _FORMS:
            await _send(exchange, await self._form(path))
        elif path.startswith(_ASSETS) and (name := path.removeprefix(_ASSETS)) in _ASSET_TYPES:
            await _send(exchange, await self._file(name, _ASSET_TYPES[name]), _ASSET_HEADERS)
        else:
            raise RequestRefused(problems.not_found("such route"))

    async def _form(self, path: str) -> _Page:
        """The document as it is at *path*, made anew if it is not of what there is now."""
        live = await self.live.get(max_age_s=_LIVE_MAX_AGE_S)
        async with self._making:  # one for all who wait
            made_of = (self.workflows.current, live)
            if self._made_of is None or any(now is not then for now, then in zip(made_of, self._made_of, strict=True)):
                self._forms = {}
                self._made_of = made_of
            if path not in self._forms:
                make = partial(self._make, _FORMS[path], *made_of)
                self._forms[path] = await trio.to_thread.run_sync(make)
            return self._forms[path]

    def _make(self, form: _Form, catalogue: WorkflowCatalogue, live: LiveInfo) -> _Page:
        document = build_openapi(
            __version__,
            catalogue.workflows,
            live,
            markdown=self.markdown,
            api_keys=self.api_keys,
            metrics=self.metrics,
            servers=(form.root,),
        )
        return _Page.of(form.encode(document), form.content_type)

    async def _file(self, name: str, content_type: bytes) -> _Page:
        async with self._making:
            if name not in self._files:
                asset = files("comfyd.http") / "assets" / name
                self._files[name] = _Page.of(await trio.to_thread.run_sync(asset.read_bytes), content_type)
            return self._files[name]


async def _send(exchange: Exchange, page: _Page, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    # "no-cache": to be kept, but asked for again, as the next version of comfyd has another.
    validators = ((b"etag", page.etag.encode()), (b"cache-control", b"private, no-cache"))
    if not_modified(exchange.scope, page.etag):
        await send_empty(exchange.send, 304, validators)
    else:
        await send_whole(exchange.send, 200, page.body, page.content_type, (*validators, *headers))
