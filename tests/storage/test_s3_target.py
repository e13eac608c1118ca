"""The ``s3`` block of a request, keys and ``s3://`` URLs: all verbatim."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.errors import BadConfiguration, InvalidValue
from comfyd.storage import BadS3Url, S3Config, S3Object, S3Target, key_of, parse_s3_url, s3_url
from comfyd.storage.s3_config import MIB
from comfyd.storage.s3_transfer import MAX_PARTS, part_size
from comfyd.wire import json_schema, structure, unstructure


def faults_of(block: object) -> list[tuple[str, str]]:
    with pytest.raises(InvalidValue) as caught:
        structure(S3Target, block, location="s3")
    return [(fault.location, fault.message) for fault in caught.value.faults]


def test_a_bucket_is_enough_and_the_block_comes_back_as_sent() -> None:
    target = structure(S3Target, {"bucket": "pictures"})
    assert (target.prefix, target.is_async, target.presign_s) == ("", False, None)
    block = {"bucket": "pictures", "prefix": "a/b ", "async": True, "presign_s": 60}
    assert unstructure(structure(S3Target, block)) == block


@pytest.mark.parametrize("bucket", ["abc", "Old_Style.Bucket-1", "a" * 255, "1.2.3.4"])
def test_buckets_of_compatible_stores_are_taken(bucket: str) -> None:
    assert structure(S3Target, {"bucket": bucket}).bucket == bucket


@pytest.mark.parametrize("bucket", ["", "ab", "a/b/c", "a b c", "abc\n", "..abc", "abc?", "a" * 256, "\u00fcber"])
def test_what_is_no_bucket_is_refused_by_its_place(bucket: str) -> None:
    ((location, message),) = faults_of({"bucket": bucket})
    assert location == "s3.bucket"
    assert "name of a bucket" in message


@pytest.mark.parametrize("prefix", ["../", "/", " #?%20", "\U0001f431/", "a" * 900, "\u00e9" * 450, "'\"<>\\"])
def test_any_prefix_without_control_characters_is_kept_verbatim(prefix: str) -> None:
    target = structure(S3Target, {"bucket": "abc", "prefix": prefix})
    assert target.place("x.png") == S3Object(bucket="abc", key=prefix + "x.png")


@pytest.mark.parametrize(
    ("prefix", "text"),
    [
        ("a\x00b", "control characters"),
        ("a\nb", "control characters"),
        ("\x7f", "control characters"),
        ("a" * 901, "900 characters"),
        ("\u00e9" * 451, "900 bytes in UTF-8, got 902"),
        ("\ud83d", "surrogate"),
    ],
)
def test_a_prefix_that_is_no_part_of_a_key_is_refused(prefix: str, text: str) -> None:
    ((location, message),) = faults_of({"bucket": "abc", "prefix": prefix})
    assert location in ("s3.prefix", "s3")
    assert text in message
    assert "prefix" in location + message


@pytest.mark.parametrize(("seconds", "bound"), [(0, ">= 1"), (604_801, "<= 604800"), (True, "number"), (1.5, "number")])
def test_the_life_of_a_presigned_url_is_bounded(seconds: object, bound: str) -> None:
    ((location, message),) = faults_of({"bucket": "abc", "presign_s": seconds})
    assert location == "s3.presign_s"
    assert bound in message


def test_the_schema_says_async_and_the_bounds() -> None:
    _, components = json_schema(S3Target)
    properties = components["S3Target"]["properties"]
    assert set(properties) == {"bucket", "prefix", "async", "presign_s"}
    assert properties["prefix"]["maxLength"] == 900


@given(
    bucket=st.text("azAZ09._-", min_size=2, max_size=20).map("b".__add__),
    prefix=st.text(max_size=20),
    name=st.text(min_size=1, max_size=20),
)
def test_an_s3_url_reads_back_as_the_same_object(bucket: str, prefix: str, name: str) -> None:
    key = key_of(prefix, name)
    assert parse_s3_url(s3_url(bucket, key)) == S3Object(bucket=bucket, key=key)


def test_nothing_in_a_key_is_decoded() -> None:
    url = "s3://pictures//a b/../c%20d#e?f=g&h\u00e9\U0001f431"
    assert parse_s3_url(url) == S3Object(bucket="pictures", key="/a b/../c%20d#e?f=g&h\u00e9\U0001f431")
    assert parse_s3_url(url).url == url
    assert parse_s3_url("S3://pictures/x").key == "x"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("s3://", "names no bucket"),
        ("s3:///key", "names no bucket"),
        ("s3://pictures", "names no object"),
        ("s3://pictures/", "names no object"),
        ("s3://a b c/key", "names a bucket that cannot be"),
        ("s3://user:pw@pictures/key", "names a bucket that cannot be"),
        ("s3://abc\n/key", "names a bucket that cannot be"),
        ("https://pictures/key", "is not an s3:// URL"),
        ("s3://pictures/\ud83d", "surrogate"),
    ],
)
def test_an_s3_url_without_an_object_says_what_is_missing(url: str, text: str) -> None:
    with pytest.raises(BadS3Url, match=text):
        parse_s3_url(url)


def test_the_region_goes_by_either_name_and_empty_is_unset() -> None:
    assert S3Config.from_environment({"AWS_REGION": "eu-west-3", "AWS_DEFAULT_REGION": "x"}).region == "eu-west-3"
    assert S3Config.from_environment({"AWS_REGION": "", "AWS_DEFAULT_REGION": "eu-west-1"}).region == "eu-west-1"
    assert S3Config.from_environment({}).region is None


def test_an_addressing_style_that_does_not_exist_stops_the_start() -> None:
    assert S3Config.from_environment({"AWS_S3_ADDRESSING_STYLE": "virtual"}).addressing_style == "virtual"
    with pytest.raises(BadConfiguration, match='AWS_S3_ADDRESSING_STYLE: "paht" is none of auto, virtual, path'):
        S3Config.from_environment({"AWS_S3_ADDRESSING_STYLE": "paht"})


@pytest.mark.parametrize("size_bytes", [16 * MIB, 160_000 * MIB, 160_000 * MIB + 1, 5 << 40])
def test_no_upload_needs_more_parts_than_s3_allows(size_bytes: int) -> None:
    part_bytes = part_size(size_bytes, 16 * MIB)
    assert part_bytes >= 16 * MIB
    assert -(-size_bytes // part_bytes) <= MAX_PARTS
    assert part_bytes <= 5 << 30  # S3's own bound for a part
