"""Write numbered lines to stderr, as fast as the pipe takes them; as many as the argument says, or for ever."""

import itertools
import sys

limit = int(sys.argv[1]) if len(sys.argv) > 1 else None
for block in itertools.count():
    first = block * 1000
    last = first + 1000 if limit is None else min(first + 1000, limit)
    if last <= first:
        break
    sys.stderr.write("".join(f"line {number} of a flood\n" for number in range(first, last)))
