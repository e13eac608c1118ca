"""When a webhook that was not taken is tried again."""

import random
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

import attrs

MAX_RETRY_AFTER_S: Final = 600.0
"""A receiver that asks for more gets this: a mistyped date must not silence its webhooks for days."""


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """How often an attempt is repeated, and how long to wait before each repetition.

    *retries* counts those after the first attempt. Without a word of the receiver the delay doubles from
    *first_delay_s* to *max_delay_s*, and jitter takes off up to half of it, so that what failed together does not come
    back together.
    """

    retries: int = attrs.field(validator=attrs.validators.ge(0))
    first_delay_s: float = 0.5
    max_delay_s: float = 30.0
    max_retry_after_s: float = MAX_RETRY_AFTER_S

    def delay_s(
        self, attempt: int, *, retry_after_s: float | None, jitter: Callable[[], float] = random.random
    ) -> float | None:
        """Return how long to wait after so many attempts (1 or more), or None when there is to be no other.

        *retry_after_s* is what the receiver asked for: never less than that, up to *max_retry_after_s*. *jitter* gives
        a number from 0 to 1.
        """
        if attempt > self.retries:
            return None
        doublings = min(attempt - 1, 63)  # beyond that the bound holds anyway, and a float would overflow
        own_s = min(self.max_delay_s, self.first_delay_s * 2.0**doublings) * (1.0 - jitter() / 2.0)
        return own_s if retry_after_s is None else max(own_s, min(retry_after_s, self.max_retry_after_s))


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks for, from *now* (unix seconds) if it is a date.

    None without one, or for one that is neither seconds nor a date (RFC 9110, 10.2.3). A date that is over is 0.
    """
    text = "" if value is None else value.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    if len(text) > 64:  # no date is
        return None
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:  # asctime's form, and -0000
            date = date.replace(tzinfo=UTC)
        return max(0.0, date.timestamp() - now)
    except (ValueError, OverflowError):
        return None
