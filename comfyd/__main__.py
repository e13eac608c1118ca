"""The ``comfyd`` command."""

import os
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    _hold_standard_descriptors()
    # The two hidden commands are for a one-file build, where there is no interpreter to start a module with. Nothing
    # else is imported before them: the guard must begin at once and stay small.
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "__guard__":
        from comfyd.engine.guard import main as guard_main

        sys.exit(guard_main(sys.argv[2:]))
    if command == "__embedded__":
        from comfyd.embedded.__main__ import main as embedded_main

        del sys.argv[1]
        sys.exit(embedded_main())
    from comfyd.cli import run

    sys.exit(run(sys.argv[1:]))


def _hold_standard_descriptors() -> None:
    """Open what is closed of stdin, stdout and stderr, or a socket of ours would get that number, and log lines."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


if __name__ == "__main__":
    main()
