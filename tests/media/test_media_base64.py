"""Base64 as people send it, its every kind of damage, and the types that first bytes tell."""

import base64
import binascii

import pytest
from hypothesis import given
from hypothesis import strategies as st
from media_kit import png, wav

from comfyd.media import base64text
from comfyd.media.base64text import (
    NotBase64,
    decode_pieces,
    decoded_size,
    looks_like_base64,
    media_type_of_text,
)
from comfyd.media.sniff import HEAD_BYTES, sniff

SMALL_PIECE = 8


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base64text, "_PIECE_CHARACTERS", SMALL_PIECE)


def decode(text: str) -> bytes:
    return b"".join(decode_pieces(text))


@st.composite
def spellings(draw: st.DrawFn) -> tuple[bytes, str]:
    """Bytes, and a way of writing them: alphabet, padding, white space anywhere."""
    data = draw(st.binary(max_size=60))
    text = draw(st.sampled_from([base64.b64encode, base64.urlsafe_b64encode]))(data).decode()
    if draw(st.booleans()):
        text = text.rstrip("=")
    for place in sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)), reverse=True):
        text = text[:place] + draw(st.sampled_from([" ", "\n", "\r\n", "\t", "\n" * SMALL_PIECE])) + text[place:]
    return data, text


@given(spellings())
def test_every_spelling_is_decoded_whatever_the_piece_borders(spelling: tuple[bytes, str]) -> None:
    data, text = spelling
    for piece in (1, 2, 3, 4, 5, 7, SMALL_PIECE, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base64text, "_PIECE_CHARACTERS", piece)
            assert decode(text) == data
    assert decoded_size(text) >= len(data)


def forgiving(text: str) -> bytes | None:
    """What the text means, by a plain definition; None if nothing."""
    packed = text.translate(str.maketrans("-_", "+/", " \t\r\n"))
    stripped = packed.rstrip("=")
    if len(stripped) % 4 == 1 or not all(c.isascii() and (c.isalnum() or c in "+/") for c in stripped):
        return None
    return binascii.a2b_base64(stripped + "=" * (-len(stripped) % 4))


@given(st.text(st.sampled_from("Ab+/-_= \n!é"), max_size=14), st.sampled_from([1, 3, 4, 8, 1 << 20]))
def test_any_text_is_decoded_or_refused_the_same_whatever_the_piece_borders(text: str, piece: int) -> None:
    expected = forgiving(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base64text, "_PIECE_CHARACTERS", piece)
        if expected is None:
            with pytest.raises(NotBase64):
                decode(text)
        else:
            assert decode(text) == expected


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A", "cut off"),
        ("QUJDR", "cut off"),
        ("QUJDREVGR", "cut off"),
        ("A=", "cut off"),
        ("QUI=QUJD", "not of base64's alphabet"),
        ("QUJDREU=QUJD", "after the padding"),
        ("QUJD!UJD", "not of base64's alphabet"),
        ("QUJDQUJDQU.D", "not of base64's alphabet"),
        ("QUJDQUJDQUé=", "character 10 "),
        ("é", "character 0 "),
        ("=QUJD", "not of base64's alphabet"),
        ("QUJD\x0bQUJD", "not of base64's alphabet"),
        ("QU JDQUJ\x00", "not of base64's alphabet"),
    ],
)
def test_each_kind_of_damage_is_named(text: str, words: str) -> None:
    with pytest.raises(NotBase64, match=words):
        decode(text)


@pytest.mark.usefixtures("_small_pieces")
def test_text_is_decoded_piece_by_piece() -> None:
    pieces = list(decode_pieces("QUJD" * 10))
    assert len(pieces) == 5
    assert b"".join(pieces) == b"ABC" * 10


def test_nothing_is_nothing() -> None:
    assert decode("") == b""
    assert decode(" \n") == b""
    assert decode("====") == b""


# Types

KNOWN = [
    (b"\x89PNG\r\n\x1a\n", "image/png", ".png"),
    (b"\xff\xd8\xff\xe0", "image/jpeg", ".jpg"),
    (b"\xff\xd8\xff\xdb", "image/jpeg", ".jpg"),
    (b"GIF87a", "image/gif", ".gif"),
    (b"GIF89a", "image/gif", ".gif"),
    (b"II*\0", "image/tiff", ".tiff"),
    (b"MM\0*", "image/tiff", ".tiff"),
    (b"BM", "image/bmp", ".bmp"),
    (b"\0\0\1\0", "image/vnd.microsoft.icon", ".ico"),
    (b"v/1\1", "image/x-exr", ".exr"),
    (b"RIFF\0\0\0\0WEBPVP8 ", "image/webp", ".webp"),
    (b"RIFF\0\0\0\0WAVEfmt ", "audio/wav", ".wav"),
    (b"RIFF\0\0\0\0AVI LIST", "video/x-msvideo", ".avi"),
    (b"\0\0\0\x1cftypavif", "image/avif", ".avif"),
    (b"\0\0\0\x1cftypavis", "image/avif", ".avif"),
    (b"\0\0\0\x1cftypheic", "image/heic", ".heic"),
    (b"\0\0\0\x1cftypheix", "image/heic", ".heic"),
    (b"\0\0\0\x1cftypmif1", "image/heic", ".heic"),
    (b"\0\0\0\x14ftypqt  ", "video/quicktime", ".mov"),
    (b"\0\0\0\x1cftypM4A ", "audio/mp4", ".m4a"),
    (b"\0\0\0\x1cftypM4B ", "audio/mp4", ".m4a"),
    (b"\0\0\0\x1cftypisom", "video/mp4", ".mp4"),
    (b"\0\0\0\x1cftypmp42", "video/mp4", ".mp4"),
    (b"\0\0\0\x1cftyp3gp5", "video/mp4", ".mp4"),
    (b"\x1aE\xdf\xa3", "video/webm", ".webm"),
    (b"FLV\1", "video/x-flv", ".flv"),
    (b"fLaC", "audio/flac", ".flac"),
    (b"OggS", "audio/ogg", ".ogg"),
    (b"ID3\4", "audio/mpeg", ".mp3"),
    (b"\xff\xfb", "audio/mpeg", ".mp3"),
    (b"\xff\xf3", "audio/mpeg", ".mp3"),
    (b"\xff\xf2", "audio/mpeg", ".mp3"),
    (b"\xff\xf1", "audio/aac", ".aac"),
    (b"\xff\xf9", "audio/aac", ".aac"),
]


@pytest.mark.parametrize(("head", "name", "ending"), KNOWN)
def test_a_type_is_told_by_first_bytes_raw_or_as_base64(head: bytes, name: str, ending: str) -> None:
    whole = head + bytes(HEAD_BYTES)
    found = sniff(whole[:HEAD_BYTES])
    assert found is not None
    assert (found.name, found.ending, found.is_image) == (name, ending, name.startswith("image/"))
    for text in (base64.encodebytes(whole).decode(), base64.urlsafe_b64encode(whole).decode().rstrip("=")):
        assert media_type_of_text(text) == found
        assert media_type_of_text("\n " + text) == found


@pytest.mark.parametrize(
    "head",
    [b"", b"\x89PNG", b"<svg", b"%PDF-1.7", b"RIFF", b"RIFF\0\0\0\0JUNK", b"ftyp", b"GIF88a", b"\xff", b"PK\3\4", b"{"],
)
def test_what_no_loader_reads_has_no_type(head: bytes) -> None:
    assert sniff(head) is None
    assert sniff(head + b" " * 40) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "picture.png",
        "sub/picture.png",
        "/9j/4AAQ.jpg",
        "https://example.com/a.png",
        "a",
        "ab",
        "abc",
        "名前",
        "iVBORw0KGgo\u2003",
        "\u00a0iVBORw0KGgoAAAANSUhEUg",
        "iVBOR=w0KGgoAAAANSUhEUgAAAAE",
        "AAAA",
        "clipspace/clipspace-mask-123",
    ],
)
def test_a_text_that_is_no_media_in_base64_is_none(text: str) -> None:
    assert media_type_of_text(text) is None


def test_a_jpeg_is_known_although_its_base64_begins_like_an_absolute_path() -> None:
    text = base64.b64encode(b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(30)).decode()
    assert text.startswith("/9j/")
    found = media_type_of_text(text)
    assert found is not None
    assert found.name == "image/jpeg"


def test_a_type_is_told_by_the_beginning_alone_however_long_the_text() -> None:
    whole = base64.b64encode(wav(30_000)).decode()
    assert media_type_of_text(whole[:200] + "!" * 1000) is not None
    assert media_type_of_text(base64.b64encode(png(1, 1)).decode()[:12]) is not None


@pytest.mark.parametrize(
    ("text", "looks"),
    [
        ("A" * 63, False),
        ("A" * 64, True),
        ("A" * 63 + "=", True),
        ("A-_/+\n" * 20, True),
        ("A" * 64 + ".png", False),
        ("A" * 63 + "\u2003", False),
        ("A" * 5000 + "!", False),
        ("!" + "A" * 5000, False),
        ("A" * 5000 + "!" + "A" * 64, True),
    ],
)
def test_a_long_text_in_the_alphabet_looks_like_base64(text: str, looks: bool) -> None:
    assert looks_like_base64(text) is looks
