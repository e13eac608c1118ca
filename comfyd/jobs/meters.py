"""Who counts what jobs do, if anybody does."""

from collections.abc import Callable
from typing import Final

import attrs

from comfyd.jobs.model import Job


@attrs.frozen(kw_only=True)
class Meters:
    """What is told as it happens. None of these may wait or raise.

    *downloaded* hears the URL and the size in bytes of each input that was fetched, None of one that failed;
    *uploaded* the size of each output that was stored, None of one that was not.
    """

    job_ended: Callable[[Job], None] | None = None
    downloaded: Callable[[str, int | None], None] | None = None
    uploaded: Callable[[int | None], None] | None = None


NOBODY_COUNTS: Final = Meters()
