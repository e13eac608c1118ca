"""Sleep for the seconds given as first argument, then exit with the code given as second (0 if there is none)."""

import sys
import time

print("sleeping", flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
