"""Towards addresses that a caller chose: what may be connected to, and a client that connects to nothing else."""

from typing import TYPE_CHECKING, Any

from comfyd.net.policy import (
    Allowed,
    PolicyMode,
    UrlPolicy,
    UrlRefused,
    check_url,
    display_url,
    parse_allow,
    parse_mode,
    parse_policy,
)

if TYPE_CHECKING:
    from comfyd.net.guarded import GuardedTransport, RedirectRefused, open_body, open_client, open_get

__all__ = [
    "Allowed",
    "GuardedTransport",
    "PolicyMode",
    "RedirectRefused",
    "UrlPolicy",
    "UrlRefused",
    "check_url",
    "display_url",
    "open_body",
    "open_client",
    "open_get",
    "parse_allow",
    "parse_mode",
    "parse_policy",
]


def __getattr__(name: str) -> Any:
    """Import the client when it is first asked for: loading the configuration needs the policy alone, and no httpx."""
    if name in __all__:
        from comfyd.net import guarded

        return getattr(guarded, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
