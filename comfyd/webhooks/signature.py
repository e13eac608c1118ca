"""Signatures of webhooks by Standard Webhooks 1.0.0 (``spec/standard-webhooks.md`` of standard-webhooks).

What is signed is ``<id>.<timestamp>.<body>``, by HMAC-SHA256, once with each secret, so that a receiver can change its
own while both count. The timestamp is the attempt's, not the event's; the id is the event's, the same at each attempt.
"""

import base64
import binascii
import hmac
import re
from collections.abc import Sequence
from typing import Final

import attrs

MIN_SECRET_BYTES: Final = 16
"""The specification asks for 24 when a secret is made; comfyui-api takes any, and 16 are out of anybody's reach."""

ALLOWED_SECRETS: Final = (
    f"base64 of at least {MIN_SECRET_BYTES} bytes, with or without the prefix whsec_; several are separated by commas"
)
_PREFIX: Final = "whsec_"
_STANDARD: Final = re.compile(r"[A-Za-z0-9+/]*={0,2}", re.ASCII)
_URL_SAFE: Final = re.compile(r"[A-Za-z0-9_-]*={0,2}", re.ASCII)
_ID: Final = re.compile(r"[A-Za-z0-9_:-]{1,255}", re.ASCII)
_URL_SAFE_TO_STANDARD: Final = str.maketrans("-_", "+/")


def parse_secrets(text: str) -> tuple[bytes, ...]:
    """Read WEBHOOK_SECRET; empty entries do not count.

    Raises:
        ValueError: with what is allowed, and nothing of *text*.
    """
    return tuple(_parse_secret(entry) for part in text.split(",") if (entry := part.strip()))


def _parse_secret(entry: str) -> bytes:
    digits = entry.removeprefix(_PREFIX)
    # A key of the asymmetric scheme (whsk_, whpk_) and a prefix too many would pass as URL-safe base64.
    if digits.startswith((_PREFIX, "whsk_", "whpk_")):
        raise ValueError(ALLOWED_SECRETS)
    if _STANDARD.fullmatch(digits) is None and _URL_SAFE.fullmatch(digits) is None:
        raise ValueError(ALLOWED_SECRETS)
    bare = digits.rstrip("=").translate(_URL_SAFE_TO_STANDARD)
    padded = bare + "=" * (-len(bare) % 4)
    if "=" in digits and len(digits) != len(padded):
        raise ValueError(ALLOWED_SECRETS)
    try:
        secret = base64.b64decode(padded, validate=True)
    except binascii.Error:  # a length that no bytes have
        raise ValueError(ALLOWED_SECRETS) from None
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(ALLOWED_SECRETS)
    return secret


@attrs.define(eq=False, init=False)
class Signer:
    """Makes the headers of one attempt from the body as it is, piece by piece; bodies may be gigabytes."""

    _id: str
    _timestamp: int
    _macs: "tuple[hmac.HMAC, ...]" = attrs.field(repr=False)

    def __init__(self, secrets: Sequence[bytes], webhook_id: str, timestamp: int) -> None:
        """Begin an attempt at *timestamp*, unix seconds. Without *secrets* nothing is signed.

        Raises:
            ValueError: *webhook_id* holds something else than letters, digits, ``_``, ``-`` and ``:``. A full stop in
                it would let one signature stand for two messages (the specification, "Signature scheme").
        """
        if _ID.fullmatch(webhook_id) is None:
            raise ValueError(f"not a webhook id: {webhook_id!r}")
        self._id, self._timestamp = webhook_id, timestamp
        head = f"{webhook_id}.{timestamp}.".encode()
        self._macs = tuple(hmac.new(secret, head, "sha256") for secret in secrets)

    def update(self, piece: bytes) -> None:
        """Take the next *piece* of the body."""
        for mac in self._macs:
            mac.update(piece)

    def headers(self) -> dict[str, str]:
        """Give the headers for the body so far; no signature header when there is no secret."""
        headers = {"webhook-id": self._id, "webhook-timestamp": str(self._timestamp)}
        if self._macs:
            headers["webhook-signature"] = " ".join(
                f"v1,{base64.b64encode(mac.digest()).decode('ascii')}" for mac in self._macs
            )
        return headers
