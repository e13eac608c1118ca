"""Leave two descendants behind: a plain child, and one that forked twice into a session of its own.

Writes their pids, one a line, to the file given as argument, says "ready", and waits; with a second argument it exits
with that code instead. The descendants ignore SIGTERM, and the second has closed its outputs.
"""

import os
import signal
import sys


def descend(session: bool) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if session:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
    os.write(told, f"{os.getpid()}\n".encode())
    while True:
        signal.pause()


reading, told = os.pipe()
if os.fork() == 0:
    descend(session=False)
intermediate = os.fork()
if intermediate == 0:
    os.setsid()
    if os.fork() == 0:
        descend(session=True)
    os._exit(0)
os.waitpid(intermediate, 0)
os.close(told)
with os.fdopen(reading) as pids, open(sys.argv[1], "w") as file:
    file.write(pids.readline() + pids.readline())
print("ready", flush=True)
if len(sys.argv) > 2:
    os._exit(int(sys.argv[2]))
while True:
    signal.pause()
