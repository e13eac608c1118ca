"""A download on its way to disk, without a network."""

import gzip
import itertools
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media_kit import png

from comfyd.media.spool import PIECE_BYTES, ContentRefused, SpoolFile

PNG = png(8, 8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    body=st.binary(max_size=3000),
    cuts=st.lists(st.integers(0, 4000), max_size=6),
    coding=st.sampled_from(["", "gzip", "deflate", "raw"]),
)
def test_the_file_is_the_body_however_it_is_cut_and_compressed(
    tmp_path: Path, body: bytes, cuts: list[int], coding: str
) -> None:
    content = PNG + body
    sent = {
        "": content,
        "gzip": gzip.compress(content),
        "deflate": zlib.compress(content),
        "raw": zlib.compress(content)[2:-4],
    }[coding]
    file = SpoolFile(path=tmp_path / "spooled", max_bytes=len(content), coding="deflate" if coding == "raw" else coding)
    edges = sorted({0, *(cut for cut in cuts if 2 <= cut < len(sent)), len(sent)})
    for begin, end in itertools.pairwise(edges):
        file.write(sent[begin:end])
    file.finish(b"")
    assert file.path.read_bytes() == content
    assert (file.received_bytes, file.written_bytes) == (len(sent), len(content))


@pytest.mark.parametrize("coding", ["", "gzip"])
def test_one_byte_more_than_allowed_is_refused(tmp_path: Path, coding: str) -> None:
    sent = gzip.compress(PNG) if coding else PNG
    file = SpoolFile(path=tmp_path / "spooled", max_bytes=len(PNG) - 1, coding=coding, too_large="is too large")
    with pytest.raises(ContentRefused, match="is too large"):
        file.finish(sent)
    file.close()


def test_a_bomb_is_stopped_before_it_fills_the_disk(tmp_path: Path) -> None:
    bomb = gzip.compress(PNG + bytes(64 << 20))
    file = SpoolFile(path=tmp_path / "spooled", max_bytes=1 << 40, coding="gzip")
    with pytest.raises(ContentRefused, match="compressed more than"):
        file.write(bomb)
    file.close()
    assert file.path.stat().st_size <= (16 << 20) + PIECE_BYTES
