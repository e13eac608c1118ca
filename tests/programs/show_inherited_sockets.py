"""Takes the inherited sockets, prints what they are as a line of JSON, and answers one connection on each."""

import json
import os
import subprocess
import sys

from comfyd.host.socket_activation import take_inherited_sockets


def main() -> None:
    inherited = take_inherited_sockets(os.environ)
    in_child = subprocess.run(
        [sys.executable, "-S", "-c", "import os; print(sorted(os.listdir('/proc/self/fd')))"],
        capture_output=True,
        text=True,
        check=True,
        close_fds=False,
    )
    report = {
        "sockets": [
            {
                "name": each.name,
                "family": each.socket.family.name,
                "tcp": each.is_tcp,
                "blocking": each.socket.getblocking(),
                "fd": each.socket.fileno(),
                "address": each.socket.getsockname(),
            }
            for each in inherited
        ],
        "variables": [name for name in os.environ if name.startswith("LISTEN_")],
        "childs_fds": in_child.stdout.strip(),
    }
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    for each in inherited:
        each.socket.settimeout(10)
        connection, _ = each.socket.accept()
        with connection:
            connection.sendall(each.name.encode())


if __name__ == "__main__":
    main()
