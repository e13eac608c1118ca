r"""Draw a progress bar on stderr as tqdm does: each state begins with ``\r``, only the last ends the line.

Draws as many states as the argument says (1000 if there is none), as fast as it can.
"""

import sys

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
for step in range(steps + 1):
    percent = 100 * step // steps
    sys.stderr.write(f"\r{percent:3d}%|{'█' * (percent // 10):<10}| {step}/{steps}")
    sys.stderr.flush()
sys.stderr.write("\n")
print("done", flush=True)
