"""Where outputs go and inputs come from, beyond this machine's disk: S3, by one adapter around boto3."""

from comfyd.storage.s3 import S3Store
from comfyd.storage.s3_config import AddressingStyle, S3Config
from comfyd.storage.s3_errors import StorageFailed, Trouble
from comfyd.storage.target import BadS3Url, S3Object, S3Target, key_of, parse_s3_url, s3_url

__all__ = [
    "AddressingStyle",
    "BadS3Url",
    "S3Config",
    "S3Object",
    "S3Store",
    "S3Target",
    "StorageFailed",
    "Trouble",
    "key_of",
    "parse_s3_url",
    "s3_url",
]
