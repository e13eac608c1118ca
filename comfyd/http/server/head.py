"""What the header of a request says about how to treat it, before any app sees it."""

from http import HTTPStatus

import attrs
import h11


@attrs.frozen(kw_only=True)
class RequestHead:
    """What the header of a request says about how to treat it."""

    method: bytes
    #: A path and query; the absolute form has been turned into it.
    target: bytes
    http_version: bytes
    header_bytes: int
    #: -1 without the header; zero is something else beside ``Transfer-Encoding``.
    content_length: int
    chunked: bool
    websocket: bool
    #: Whether the websocket headers can be decoded.
    ascii_handshake: bool

    @classmethod
    def of(cls, request: h11.Request) -> "RequestHead":
        """Look once through the header of *request*."""
        upgrade, connection = b"", b""
        content_length, chunked, ascii_handshake = -1, False, True
        header_bytes = len(request.method) + len(request.target)
        for name, value in request.headers:
            header_bytes += len(name) + len(value) + 4  # colon, space and line end
            if name == b"upgrade":
                upgrade = value.strip().lower()
            elif name == b"connection":
                connection += b"," + value.lower()
            elif name == b"content-length":
                content_length = int(value)
            elif name == b"transfer-encoding":
                chunked = True
            elif name.startswith(b"sec-websocket-"):
                ascii_handshake = ascii_handshake and value.isascii()
        asked = b"upgrade" in (token.strip() for token in connection.split(b","))
        target = request.target
        for scheme in (b"http://", b"https://"):  # the absolute form, which a server must take (RFC 9112, 3.2.2)
            if target[: len(scheme)].lower() == scheme:
                target = b"/" + target[len(scheme) :].partition(b"/")[2]
        return cls(
            method=request.method,
            target=target,
            http_version=request.http_version,
            header_bytes=header_bytes,
            content_length=content_length,
            chunked=chunked,
            ascii_handshake=ascii_handshake,
            websocket=asked and upgrade == b"websocket" and request.method == b"GET",
        )

    def refusal(self, max_header_bytes: int) -> tuple[int, str] | None:
        """Status and reason why no app should see this request; None when one may."""
        if self.header_bytes > max_header_bytes:  # h11 looks only at headers that did not arrive in one piece
            return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the header is larger than {max_header_bytes} bytes"
        if self.http_version not in {b"1.0", b"1.1"}:
            return HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "only HTTP/1.0 and HTTP/1.1 are spoken here"
        if self.method == b"CONNECT":
            return HTTPStatus.NOT_IMPLEMENTED, "this is not a proxy"
        if not self.target.startswith(b"/") and not (self.target == b"*" and self.method == b"OPTIONS"):
            return HTTPStatus.BAD_REQUEST, "the request target is neither a path nor an http URL"
        if self.chunked and (self.content_length >= 0 or self.http_version == b"1.0"):
            return HTTPStatus.BAD_REQUEST, "the length of the body is ambiguous"  # the stuff of request smuggling
        if self.websocket and (self.chunked or self.content_length > 0):
            return HTTPStatus.BAD_REQUEST, "a websocket handshake has no body"
        if self.websocket and not self.ascii_handshake:
            return HTTPStatus.BAD_REQUEST, "the websocket handshake is not ASCII"  # Hypercorn would fail to decode it
        return None
