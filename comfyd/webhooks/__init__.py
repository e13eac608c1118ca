"""Telling receivers: how jobs ended (the outbox), and what ComfyUI does (system events)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comfyd.webhooks.outbox import Outbox, OutboxConfig, retry_policy, serve_outbox
    from comfyd.webhooks.rows import rows_for
    from comfyd.webhooks.system_events import SystemEvents, SystemEventsConfig, serve_system_events

__all__ = [
    "Outbox",
    "OutboxConfig",
    "SystemEvents",
    "SystemEventsConfig",
    "retry_policy",
    "rows_for",
    "serve_outbox",
    "serve_system_events",
]

_MODULES = {
    "SystemEvents": "system_events",
    "SystemEventsConfig": "system_events",
    "rows_for": "rows",
    "serve_system_events": "system_events",
}


def __getattr__(name: str) -> Any:
    """Import when first asked for: the configuration needs a signature's secrets alone, and jobs the rows."""
    if name in __all__:
        return getattr(import_module(f"comfyd.webhooks.{_MODULES.get(name, 'outbox')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
