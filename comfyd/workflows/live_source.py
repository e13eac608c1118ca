"""Asks the engine what it has, as seldom as is right: once for each start, and again where an answer may be old."""

from collections.abc import Mapping
from typing import Any, Final

import attrs
import structlog
import trio

from comfyd.config import Config
from comfyd.engine import Engine
from comfyd.errors import EngineError
from comfyd.workflows.live import LiveInfo

log = structlog.get_logger("comfyd.workflows")

_ASK_TIMEOUT_S: Final = 30.0
"""Building the answer lists every model folder: 0.7 s measured with 20,000 files, more on network disks."""


@attrs.define(eq=False, kw_only=True)
class LiveSource:
    """What *engine* has, remembered. Before it was ever up nothing is known, and so nothing refused."""

    engine: Engine
    warmup_prompt: Mapping[str, Any] | None = None
    config: Config | None = None
    _info: LiveInfo = attrs.field(factory=LiveInfo)
    _process: int = 0
    """Which of the engine's processes was asked: another one may have other nodes."""
    _asked_at: float = float("-inf")
    _asking: trio.Lock = attrs.field(factory=trio.Lock)

    @property
    def known(self) -> LiveInfo:
        """What was learnt last, without asking."""
        return self._info

    async def get(self, *, max_age_s: float = float("inf")) -> LiveInfo:
        """What the engine has, by an answer of its present process that is at most so old.

        An engine that is down or does not answer leaves what was learnt last.
        """
        if self._is_fresh(max_age_s):
            return self._info
        async with self._asking:  # one question for all who wait
            if not self._is_fresh(max_age_s) and self.engine.up:
                await self._ask()
        return self._info

    def _is_fresh(self, max_age_s: float) -> bool:
        return self._process == self.engine.processes and trio.current_time() - self._asked_at <= max_age_s

    async def _ask(self) -> None:
        process = self.engine.processes
        try:
            with trio.fail_after(_ASK_TIMEOUT_S):
                object_info = await self.engine.client.object_info()
        except (EngineError, trio.TooSlowError) as exc:
            log.warning("workflows.engine_unanswered", reason=str(exc) or "time ran out")
            return
        self._info = LiveInfo.from_object_info(object_info, warmup_prompt=self.warmup_prompt, config=self.config)
        self._process, self._asked_at = process, trio.current_time()
