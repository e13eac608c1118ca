"""On SaladCloud: tell its metadata service what deleting this container would cost, and who we are in webhooks.

The service prefers to delete the container with the least cost when a group shrinks (``PUT /v1/deletion-cost`` with
``Metadata: true``; what comfyui-api 1.9.2 sends, src/utils.ts setDeletionCost). Our cost is the jobs waiting and
running. Unlike there, requests do not overtake each other, and one that fails is repeated.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final, NoReturn, Self
from urllib.parse import urlsplit

import attrs
import structlog
import trio

from comfyd.errors import BadConfiguration, ComfydError
from comfyd.host.environment import shown

if TYPE_CHECKING:
    import httpx

log = structlog.get_logger("comfyd.salad")

METADATA_URL: Final = "http://169.254.169.254"
"""Link-local, as in other clouds: answered by the host of the container, never routed."""
URL_VARIABLE: Final = "SALAD_METADATA_URL"

_NEEDED: Final = ("SALAD_MACHINE_ID", "SALAD_CONTAINER_GROUP_ID")
_METADATA_VARIABLES: Final = (
    "SALAD_ORGANIZATION_NAME",
    "SALAD_ORGANIZATION_ID",
    "SALAD_PROJECT_NAME",
    "SALAD_PROJECT_ID",
    "SALAD_CONTAINER_GROUP_NAME",
    "SALAD_CONTAINER_GROUP_ID",
    "SALAD_INSTANCE_ID",
    "SALAD_MACHINE_ID",
)


class DeletionCostRefused(ComfydError):
    """The metadata service did not take the deletion cost."""


@attrs.frozen(kw_only=True)
class SaladConfig:
    """Where the metadata service is, and how often it is told. *url* is its base, without a final slash.

    After failures the delay doubles from *min_interval_s*, which is also the time between two values, to *max_delay_s*.
    """

    url: str = METADATA_URL
    min_interval_s: float = 1.0
    max_delay_s: float = 60.0
    timeout_s: float = 5.0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self | None:
        """Return the configuration, or None where this is not Salad: machine and container group are not both set.

        Raises:
            BadConfiguration: SALAD_METADATA_URL is no http URL.
        """
        if not all(environ.get(name) for name in _NEEDED):
            return None
        url = environ.get(URL_VARIABLE, "").strip().rstrip("/") or METADATA_URL
        if not _is_http_url(url):
            raise BadConfiguration((f"{URL_VARIABLE}: {shown(URL_VARIABLE, url)} is not allowed; an http:// URL",))
        return cls(url=url)

    def delay_s(self, failures: int) -> float:
        """Return how long to wait after a request, with so many *failures* in a row (0 or more)."""
        return min(max(self.max_delay_s, self.min_interval_s), self.min_interval_s * 2.0 ** min(failures, 63))


def salad_metadata(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what Salad tells of this container, for the metadata of system webhooks: ``salad_machine_id`` and so on.

    They win over SYSTEM_META_* of the same name, as in comfyui-api 1.13.
    """
    return {name.lower(): value for name in _METADATA_VARIABLES if (value := environ.get(name))}


async def serve_deletion_cost(
    config: SaladConfig,
    depth: Callable[[], int],
    wait_changed: Callable[[], Awaitable[None]],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Keep the metadata service told of *depth*, the jobs waiting and running, until cancelled.

    One request at a time, and at most one each ``min_interval_s``: what changes meanwhile is told by the latest value.
    A service that refuses or does not answer is asked again, ever less often, and harms nobody. *wait_changed* returns
    when *depth* may have changed since the call.
    """
    import httpx  # the rest of this module is read wherever the configuration is, mostly not on Salad

    told: int | None = None  # what the service has; None: not known
    failures = 0
    task_status.started()
    # No proxy: the address is this machine's business. A connection each: one is needed every second at the most.
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=0)
    async with httpx.AsyncClient(trust_env=False, limits=limits, timeout=None) as client:  # noqa: S113  # fail_after
        while True:
            looked_at = trio.current_time()
            if (cost := depth()) == told:
                await wait_changed()
            else:
                try:
                    with trio.fail_after(config.timeout_s):
                        await _tell(client, config.url, cost)
                except (httpx.HTTPError, httpx.InvalidURL, DeletionCostRefused, trio.TooSlowError) as exc:
                    told = None  # it may have taken this value, or kept the one before
                    failures += 1
                    _log_failure(exc, config, failures)
                else:
                    if failures:
                        log.info("salad.deletion_cost_taken", after_failures=failures)
                    told = cost
                    failures = 0
            # After a change as well: counting jobs takes longer the more there are, and they change with each step.
            await trio.sleep_until(looked_at + config.delay_s(failures))


async def _tell(client: "httpx.AsyncClient", url: str, cost: int) -> None:
    request = client.stream(
        "PUT", f"{url}/v1/deletion-cost", headers={"Metadata": "true"}, json={"deletion_cost": cost}
    )
    async with request as response:  # nobody reads its body, however long that is
        if not response.is_success:
            raise DeletionCostRefused(f"the metadata service answered {response.status_code}")


def _log_failure(exc: Exception, config: SaladConfig, failures: int) -> None:
    reason = f"no answer within {config.timeout_s:g} s" if isinstance(exc, trio.TooSlowError) else str(exc)
    say = log.warning if failures == 1 else log.debug  # for days perhaps, and nothing depends on it
    say(
        "salad.deletion_cost_failed",
        reason=reason or type(exc).__name__,
        failures=failures,
        retry_in_s=config.delay_s(failures),
    )


def _is_http_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return is_whole and re.search(r"[\s\0?#]", url) is None  # a path is to be put behind it
