"""Write one line of 1 MiB, or of as many bytes as the argument says, and then a short one."""

import sys

count = int(sys.argv[1]) if len(sys.argv) > 1 else 1024 * 1024
sys.stdout.write("x" * count + "\nafter\n")
