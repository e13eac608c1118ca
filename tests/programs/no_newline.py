"""Write text that no newline ends, and exit; with the argument "endless", never stop writing it."""

import sys

if sys.argv[1:] == ["endless"]:
    while True:
        sys.stdout.write("no newline " * 1000)
sys.stdout.write("no newline")
