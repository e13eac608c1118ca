"""Who takes part in a scenario, and in which order: all on engines of one kind, in turn, round by round.

Rounds repeat, and each begins with another contender, so that whatever else the machine does meets them alike.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal

import attrs

from benchmarks.load import Load, Measured
from benchmarks.processes import NO_SETTINGS, Cores, EngineKind, LoadFailed, Server, comfyd, engine_alone, peer


@attrs.define(eq=False)
class Contenders:
    """Those that run: ``comfyd``; ``raw``, an engine for a client of its own; ``peer``, if PEER_COMMAND is set."""

    servers: dict[str, Server]

    def in_turn(self, rounds: int) -> Iterator[tuple[int, str, Server]]:
        """Yield who has its turn, with the number of the round; the first, 0, is for warming up."""
        for turn in range(rounds + 1):
            names = list(self.servers)
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if name in self.servers:  # it may have given up since
                    yield turn, name, self.servers[name]

    def run(self, name: str, load: Load) -> Measured | None:
        """Run a load against one of them. A peer that cannot do it takes no further part; what it did counts.

        Raises:
            LoadFailed: one of ours could not do it.
        """
        try:
            return self.servers[name].run(load)
        except LoadFailed as exc:
            if name != "peer":
                raise
            print(f"the peer takes no further part in this scenario: {exc}", file=sys.stderr, flush=True)
            del self.servers[name]
            return None


@contextmanager
def open_contenders(
    kind: EngineKind,
    cores: Cores,
    settings: Mapping[str, str] = NO_SETTINGS,
    *,
    raw: bool = False,
    peer_starts: EngineKind | None = None,
) -> Iterator[Contenders]:
    """Start comfyd with *settings* and, as wanted and possible, the others.

    The peer is told to start an engine of the same *kind* too, unless *peer_starts* names another.
    """
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        if raw:
            servers["raw"] = stack.enter_context(engine_alone(kind, cores))
        servers["comfyd"] = stack.enter_context(comfyd(kind, cores, settings))
        if has_peer():
            servers["peer"] = stack.enter_context(peer(cores, peer_starts or kind, settings))
        yield Contenders(servers)


def has_peer() -> bool:
    """Whether there is somebody to compare with."""
    return bool(os.environ.get("PEER_COMMAND"))


def small_prompts(contender: str) -> Literal["raw", "prompts"]:
    """Return the mode of a load of small prompts: a raw client speaks to an engine, all others speak like comfyd."""
    return "raw" if contender == "raw" else "prompts"
