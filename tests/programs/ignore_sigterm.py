"""Ignore SIGTERM, SIGINT and SIGHUP; say "ready" once they are ignored. Only SIGKILL ends it."""

import signal

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print("ready", flush=True)
while True:
    signal.pause()
