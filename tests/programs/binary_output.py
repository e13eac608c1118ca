"""Write every byte there is, broken UTF-8, NULs, and escape sequences; a line each."""

import sys

sys.stdout.buffer.write(bytes(range(256)) + b"\n")
sys.stdout.buffer.write(b"caf\xc3\xa9 caf\xe9 \xf0\x9f\x98\n")
sys.stdout.buffer.write(b"a\x00b\n")
sys.stdout.buffer.write(b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07text \xc2\x9b31m\x1b(B\n")
sys.stdout.buffer.write(b"last\n")
