"""Exit at once, with the code given as argument; ``-N`` dies by signal N."""

import os
import resource
import signal
import sys

code = int(sys.argv[1]) if len(sys.argv) > 1 else 1
if code < 0:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
