"""Does what systemd does: opens the listening sockets, puts them at descriptor 3 and up, and becomes the program.

Arguments: the path for a Unix socket, then the program's own. The sockets are IPv4, IPv6 (if there is any), Unix;
the last one is left without a name.
"""

import os
import socket
import sys

FIRST_FD = 3


def main() -> None:
    path, *argv = sys.argv[1:]
    sockets = [socket.create_server(("127.0.0.1", 0))]
    names = ["v4"]
    if socket.has_dualstack_ipv6():
        sockets.append(socket.create_server(("::1", 0), family=socket.AF_INET6))
        names.append("v6")
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(path)
    unix.listen()
    sockets.append(unix)
    copies = [os.dup(sock.fileno()) for sock in sockets]  # so that no target is a source still to be copied
    for sock in sockets:
        sock.detach()
    high = [os.dup2(copy, 100 + i, inheritable=False) for i, copy in enumerate(copies)]
    for i, fd in enumerate(high):
        os.dup2(fd, FIRST_FD + i)
    os.environ.update(LISTEN_FDS=str(len(sockets)), LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES=":".join(names))
    os.execv(argv[0], argv)  # noqa: S606 - no shell, so that LISTEN_PID stays right


if __name__ == "__main__":
    main()
