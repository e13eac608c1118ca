"""comfyd and the machine it runs on: the log, the environment, systemd, process 1.

The modules are imported by their own names: they have nothing in common but the host, and a command that needs one
should not pay for the others.
"""
