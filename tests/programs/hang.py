"""Do nothing, for ever, without a word."""

import signal

while True:
    signal.pause()
