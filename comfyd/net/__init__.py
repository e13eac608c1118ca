"""Towards addresses that a caller chose: what may be connected to, and a client that connects to nothing else."""

from comfyd.net.guarded import GuardedTransport, RedirectRefused, open_body, open_client, open_get
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
