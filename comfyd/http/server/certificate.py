"""The certificate that the server shows, read again when its files change.

Certificates live for weeks and are renewed by others (certbot, cert-manager, a secret that Kubernetes swaps), most of
whom cannot be told to signal us. A look at two files each minute costs nothing and needs nobody's help.
"""

import ssl
from pathlib import Path
from typing import Final, NoReturn

import attrs
import structlog
import trio

from comfyd.errors import StartupFailed
from comfyd.http.server.config import TlsFiles

log = structlog.get_logger("comfyd.http")

#: Forward secrecy and authenticated encryption only (Mozilla's "intermediate" without DHE, which is slow). It rules
#: TLS 1.2; the suites of 1.3 are all fine. Said here because distributions differ in their defaults.
CIPHERS_OF_TLS_1_2: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
#: HTTP/2 is not offered: see ``connection``. A client that insists on it is told so there.
PROTOCOLS: Final = ("http/1.1",)

#: What tells one version of both files from another: device, inode, size and time, or why a file cannot be looked at.
Fingerprint = tuple[tuple[int, ...] | str, ...]


class UnusableCertificate(Exception):
    """The files do not make a certificate that can be served; the text says which and why."""


@attrs.define(eq=False)
class Certificate:
    """The certificate as its files hold it, or held it when they last made sense.

    New connections use :attr:`context`; those that are open keep what they began with.
    """

    files: TlsFiles
    context: ssl.SSLContext
    _seen: Fingerprint
    # One look at a time, in a thread: the files may lie on a network file system.
    _limiter: trio.CapacityLimiter

    @classmethod
    async def load(cls, files: TlsFiles) -> "Certificate":
        """Read the certificate for the first time.

        Raises:
            StartupFailed: it cannot be used.
        """
        limiter = trio.CapacityLimiter(1)
        seen = await trio.to_thread.run_sync(_fingerprint, files, limiter=limiter, abandon_on_cancel=True)
        try:
            context = await trio.to_thread.run_sync(load_context, files, limiter=limiter, abandon_on_cancel=True)
        except UnusableCertificate as exc:
            raise StartupFailed(f"TLS cannot be served: {exc}") from exc
        return cls(files=files, context=context, seen=seen, limiter=limiter)

    async def keep_current(self, every_s: float) -> NoReturn:
        """Look at the files each *every_s* seconds, and take over what is new."""
        while True:
            await trio.sleep(every_s)
            await self.renew()

    async def renew(self) -> None:
        """Take over the files if they have changed. What makes no sense is logged, once, and the old one stays."""
        found = await trio.to_thread.run_sync(_fingerprint, self.files, limiter=self._limiter, abandon_on_cancel=True)
        if found == self._seen:
            return
        self._seen = found  # before the reading: a change that comes during it is then seen next time
        try:
            self.context = await trio.to_thread.run_sync(
                load_context, self.files, limiter=self._limiter, abandon_on_cancel=True
            )
        except UnusableCertificate as exc:
            log.error("http.certificate_unusable", reason=str(exc), kept="the one before")  # noqa: TRY400 -- said in full
        else:
            log.info("http.certificate_renewed", file=str(self.files.certificate))


def _fingerprint(files: TlsFiles) -> Fingerprint:
    """Tell what the files are now, following symbolic links: Kubernetes swaps a link to a folder. Blocks."""
    return tuple(_look(path) for path in (files.certificate, files.key))


def _look(path: Path) -> tuple[int, ...] | str:
    try:
        found = path.stat()
    except OSError as exc:
        return str(exc.strerror)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def load_context(files: TlsFiles) -> ssl.SSLContext:
    """Make what TLS connections are opened with. Blocks.

    Raises:
        UnusableCertificate: a file cannot be read, is not PEM, the key is another certificate's or wants a passphrase.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS_OF_TLS_1_2)
    context.set_alpn_protocols(list(PROTOCOLS))
    context.options |= ssl.OP_NO_RENEGOTIATION  # TLS 1.2's way to make a server sign again and again
    context.options |= ssl.OP_NO_COMPRESSION
    for path in (files.certificate, files.key):  # OpenSSL does not say which one it could not open
        try:
            path.open("rb").close()
        except OSError as exc:
            raise UnusableCertificate(f"{path}: {exc.strerror}") from exc
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_passphrase)
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise UnusableCertificate(f"the key in {files.key} is not that of {files.certificate}") from exc
        reason = (exc.reason or "not understood").lower().replace("_", " ")
        raise UnusableCertificate(
            f"{files.certificate} and {files.key} are not a PEM chain and its key: {reason}"
        ) from exc
    except _WantsPassphraseError as exc:
        raise UnusableCertificate(f"the key in {files.key} wants a passphrase; store it without one") from exc
    return context


class _WantsPassphraseError(Exception):
    """Raised through OpenSSL's callback, which would else ask on the terminal, and wait."""


def _no_passphrase() -> str:
    raise _WantsPassphraseError
