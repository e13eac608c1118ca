"""Start up talkatively and never open a port, as an engine does whose custom nodes hang while they load."""

import time

print("Starting server", flush=True)
while True:
    time.sleep(3600)
