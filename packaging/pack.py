"""Make one file of a folder: ``python packaging/pack.py FOLDER FILE``. What is in the file, launcher.c tells."""

import hashlib
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs
import lz4.block  # type: ignore[import-not-found, import-untyped, unused-ignore]  # only where the file is built

MAGIC: Final = b"comfyd\0\1"
BLOCK_BYTES: Final = 1 << 20  # MAX_BLOCK in launcher.c
LAUNCHER: Final = Path(__file__).with_name("launcher.c")


@attrs.frozen(kw_only=True)
class Entry:
    """A file, folder or link. *kind*: see launcher.c."""

    kind: bytes
    path: bytes
    content: bytes = attrs.field(default=b"", repr=False)
    target: bytes = b""

    def encoded(self) -> bytes:
        """Return it as it stands in the index."""
        head = struct.pack("=cQHH", self.kind, len(self.content), len(self.path), len(self.target))
        return head + self.path + self.target


def read_entries(folder: Path) -> Iterator[Entry]:
    """Read what is below *folder*, in an order that depends on the names only, folders before what is in them."""
    for path in sorted(folder.rglob("*")):
        name = os.fsencode(path.relative_to(folder))
        if path.is_symlink():
            yield Entry(kind=b"l", path=name, target=os.fsencode(path.readlink()))
        elif path.is_dir():
            yield Entry(kind=b"d", path=name)
        else:
            kind = b"x" if path.stat().st_mode & 0o100 else b"f"
            yield Entry(kind=kind, path=name, content=path.read_bytes())


def packed_blocks(content: bytes) -> Iterator[bytes]:
    """Compress *content*, block by block."""
    for start in range(0, len(content), BLOCK_BYTES):
        plain = content[start : start + BLOCK_BYTES]
        packed = lz4.block.compress(plain, mode="high_compression", compression=12, store_size=False)
        yield struct.pack("=III", len(packed), len(plain), zlib.adler32(plain)) + packed


def compile_launcher() -> bytes:
    """Compile ``launcher.c`` with the machine's C compiler, ``$CC`` or ``cc``; return the program."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "launcher"
        flags = ["-std=gnu11", "-O3", "-s", "-Wall", "-Wextra", "-Werror", "-D_FORTIFY_SOURCE=2", "-fstack-protector"]
        subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", program, LAUNCHER], check=True)
        return program.read_bytes()


def pack(folder: Path, launcher: bytes) -> bytes:
    """Return the file that unpacks *folder* and runs the program ``comfyd`` in it."""
    entries = list(read_entries(folder))
    index = b"".join(entry.encoded() for entry in entries)
    content = b"".join(entry.content for entry in entries)
    # The name of the unpacked folder: the same contents have the same one, and different contents never do.
    name = hashlib.sha256(hashlib.sha256(index).digest() + content).hexdigest()[:32].encode()
    blocks = b"".join(packed_blocks(content))
    index_at = len(launcher) + len(blocks)
    trailer = struct.pack("=QQQQ32s8s", len(launcher), index_at, len(index), zlib.adler32(index), name, MAGIC)
    return launcher + blocks + index + trailer


def main() -> None:
    """Write the file, at once and whole."""
    folder, file = map(Path, sys.argv[1:])
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.part")
    beside.write_bytes(pack(folder, compile_launcher()))
    beside.chmod(0o755)
    beside.replace(file)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
