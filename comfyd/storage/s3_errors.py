"""What went wrong with S3, in words for the one who has to mend it, and whether trying again can help.

The texts go to callers and logs. They are made from error codes, status and the endpoint's host only: S3's own
messages may quote account ids, and those of compatible stores quote anything.
"""

import errno
import re
import socket
import ssl
from collections.abc import Iterator
from enum import Enum
from typing import Any, Final
from urllib.parse import urlsplit

import attrs

from comfyd.errors import ComfydError, Failure, FailureKind


class Trouble(Enum):
    """Why something in S3 could not be written or read. The value is the ``reason`` of log events."""

    NO_SUCH_BUCKET = "no-such-bucket"
    NO_SUCH_OBJECT = "no-such-object"
    NO_SUCH_UPLOAD = "no-such-upload"
    ACCESS_DENIED = "access-denied"
    BAD_CREDENTIALS = "bad-credentials"
    NO_CREDENTIALS = "no-credentials"
    WRONG_REGION = "wrong-region"
    CLOCK = "clock"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"
    UNREACHABLE = "unreachable"
    TIMED_OUT = "timed-out"
    BROKEN_OFF = "broken-off"
    TOO_LARGE = "too-large"
    LOCAL_FILE = "local-file"
    MISCONFIGURED = "misconfigured"


@attrs.frozen(kw_only=True)
class Diagnosis:
    """What is wrong, in a clause without a final stop. *passes* if it may be gone at the next attempt.

    *region* is where the bucket is, if the store said so.
    """

    trouble: Trouble
    cause: str
    passes: bool = False
    region: str | None = None


class StorageFailed(ComfydError):
    """An object could not be written or read, after as many attempts as were worth it.

    *cause* is a clause for the caller, without secrets. *region* is where the bucket is, if it is elsewhere than it was
    looked for, and the store said so.
    """

    def __init__(self, bucket: str, key: str, trouble: Trouble, cause: str, *, region: str | None = None) -> None:
        super().__init__(f"s3://{bucket}/{key}: {cause}")
        self.bucket = bucket
        self.key = key
        self.trouble = trouble
        self.cause = cause
        self.region = region

    @property
    def failure(self) -> Failure:
        """The outcome of a job whose output could not be stored."""
        return Failure(kind=FailureKind.STORAGE_FAILED, detail=str(self), facts={"reason": self.trouble.value})


class LocalFileError(Exception):
    """The file on our side cannot be read or written, or is not what it was."""


_BY_CODE: Final = {
    "NoSuchBucket": (Trouble.NO_SUCH_BUCKET, "the bucket does not exist"),
    "NoSuchKey": (Trouble.NO_SUCH_OBJECT, "there is no such object"),
    "NoSuchUpload": (Trouble.NO_SUCH_UPLOAD, "the store lost the upload while it went on"),
    "AccessDenied": (Trouble.ACCESS_DENIED, "access denied: comfyd's credentials do not allow it"),
    "AllAccessDisabled": (Trouble.ACCESS_DENIED, "access denied: all access to the bucket is disabled"),
    "AccountProblem": (Trouble.ACCESS_DENIED, "access denied: there is a problem with the store's account"),
    "SignatureDoesNotMatch": (Trouble.BAD_CREDENTIALS, "the secret key is wrong (SignatureDoesNotMatch)"),
    "InvalidAccessKeyId": (Trouble.BAD_CREDENTIALS, "the access key is not known (InvalidAccessKeyId)"),
    "InvalidToken": (Trouble.BAD_CREDENTIALS, "the session token is not valid (InvalidToken)"),
    "ExpiredToken": (Trouble.BAD_CREDENTIALS, "the session token has expired (ExpiredToken)"),
    "RequestTimeTooSkewed": (Trouble.CLOCK, "this machine's clock differs too much from the store's"),
    "KeyTooLongError": (Trouble.REFUSED, "the key is too long for the store (KeyTooLongError)"),
    "InvalidBucketName": (Trouble.REFUSED, "the store does not take such a bucket name (InvalidBucketName)"),
    "EntityTooLarge": (Trouble.REFUSED, "the file is too large for the store (EntityTooLarge)"),
    "QuotaExceeded": (Trouble.REFUSED, "the store's quota is used up (QuotaExceeded)"),
    "InvalidObjectState": (Trouble.REFUSED, "the object is archived and has to be restored first (InvalidObjectState)"),
}

_REGION_CODES: Final = frozenset(
    {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)

# Codes that pass although their status is not one that does.
_PASSING_CODES: Final = frozenset(
    {
        "BadDigest",  # bytes changed on the way
        "IncompleteBody",
        "OperationAborted",  # a conflicting operation on the same bucket or key
        "RequestTimeout",  # 400: we were too slow for the server, which was perhaps the network
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "RequestLimitExceeded",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
    }
)


def handled_errors() -> tuple[type[Exception], ...]:
    """The exceptions that :func:`diagnose` knows. Anything else that boto3 raises is a bug."""
    from botocore.exceptions import BotoCoreError, ClientError  # see s3_config.make_client
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError  # some pass botocore while a body is read

    return (BotoCoreError, ClientError, ResponseParserError, HTTPError, LocalFileError)


def diagnose(error: Exception, endpoint: str) -> Diagnosis:
    """Say what one of the :func:`handled_errors` means. *endpoint* is the URL of the store."""
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    at = _host_of(endpoint)
    for cause in _chain(error):
        if isinstance(cause, LocalFileError):  # raised by a body that botocore was reading
            return Diagnosis(trouble=Trouble.LOCAL_FILE, cause=str(cause))
    match error:
        case boto.ClientError():
            return _diagnose_answer(error.response)
        case ResponseParserError():
            return Diagnosis(
                trouble=Trouble.UNAVAILABLE, cause=f"{at} answers, but not as S3 does", passes=True
            )  # a balancer's page while the store starts
        case boto.NoCredentialsError():
            return Diagnosis(
                trouble=Trouble.NO_CREDENTIALS,
                cause="comfyd has no S3 credentials: no AWS_ACCESS_KEY_ID, AWS_PROFILE or role",
            )
        case boto.PartialCredentialsError():
            return Diagnosis(trouble=Trouble.NO_CREDENTIALS, cause="comfyd has half of its S3 credentials only")
        case (
            boto.CredentialRetrievalError()
            | boto.MetadataRetrievalError()
            | boto.TokenRetrievalError()
            | boto.SSOError()
            | boto.RefreshWithMFAUnsupportedError()
        ):
            return Diagnosis(
                trouble=Trouble.NO_CREDENTIALS, cause="S3 credentials could not be had from where they should come"
            )
        case boto.ParamValidationError():
            return Diagnosis(trouble=Trouble.REFUSED, cause="boto3 does not take this bucket or key")
        case boto.ProxyConnectionError():
            return Diagnosis(trouble=Trouble.UNREACHABLE, cause=f"the proxy on the way to {at} fails", passes=True)
        case boto.ConnectionError() | boto.HTTPClientError() | boto.IncompleteReadError():
            return _diagnose_connection(error, at)
        case boto.BotoCoreError():
            return Diagnosis(
                trouble=Trouble.MISCONFIGURED, cause=f"comfyd's S3 settings do not work ({type(error).__name__})"
            )
        case _:
            return _diagnose_connection(error, at)


def _diagnose_answer(response: dict[str, Any]) -> Diagnosis:
    error = response.get("Error", {})
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    raw = str(error.get("Code", ""))
    code = raw if re.fullmatch(r"[A-Za-z][A-Za-z0-9.]{0,63}", raw) else ""
    shown = f"{status} {code}".strip() if status else code
    if code in _REGION_CODES or 301 <= status <= 308:
        region = str(error.get("Region") or headers.get("x-amz-bucket-region") or "")
        if re.fullmatch(r"[a-z0-9-]{1,40}", region):
            cause = f"the bucket is in region {region}; set AWS_REGION"
            return Diagnosis(trouble=Trouble.WRONG_REGION, cause=cause, region=region)
        cause = "the bucket is in another region or at another endpoint; see AWS_REGION and AWS_ENDPOINT_URL"
        return Diagnosis(trouble=Trouble.WRONG_REGION, cause=cause)
    if code in _PASSING_CODES or status in (408, 425, 429) or (status >= 500 and status != 501):
        return Diagnosis(trouble=Trouble.UNAVAILABLE, cause=f"the store answers {shown}", passes=True)
    if code in _BY_CODE:
        trouble, cause = _BY_CODE[code]
        return Diagnosis(trouble=trouble, cause=cause)
    if status in (401, 403):
        return Diagnosis(trouble=Trouble.ACCESS_DENIED, cause=f"access denied ({shown})")
    return Diagnosis(trouble=Trouble.REFUSED, cause=f"the store refuses the request ({shown or 'without a reason'})")


def _diagnose_connection(error: Exception, at: str) -> Diagnosis:
    """Find the operating system's word on it, which urllib3 and botocore wrap once or twice."""
    from urllib3.exceptions import NameResolutionError
    from urllib3.exceptions import TimeoutError as Urllib3Timeout

    causes = tuple(_chain(error))
    for cause in causes:
        match cause:
            case NameResolutionError() | socket.gaierror():
                return Diagnosis(trouble=Trouble.UNREACHABLE, cause=f"the name of {at} does not resolve", passes=True)
            case ssl.SSLCertVerificationError():
                return Diagnosis(
                    trouble=Trouble.UNREACHABLE, cause=f"the certificate of {at} is not trusted (AWS_CA_BUNDLE)"
                )
            case ConnectionRefusedError():
                return Diagnosis(trouble=Trouble.UNREACHABLE, cause=f"{at} refuses connections", passes=True)
            case OSError() if cause.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
                return Diagnosis(trouble=Trouble.UNREACHABLE, cause=f"there is no route to {at}", passes=True)
    for cause in causes:
        match cause:
            case TimeoutError() | Urllib3Timeout():
                return Diagnosis(trouble=Trouble.TIMED_OUT, cause=f"{at} did not answer in time", passes=True)
            case ssl.SSLError() if not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                return Diagnosis(trouble=Trouble.UNREACHABLE, cause=f"there is no TLS with {at}", passes=True)
    return Diagnosis(trouble=Trouble.BROKEN_OFF, cause=f"the connection to {at} broke off", passes=True)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Walk over what *error* wraps: botocore keeps it in ``kwargs``, urllib3 in ``reason``, Python in its contexts."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        current = waiting.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        kwargs = getattr(current, "kwargs", None)
        waiting.append(kwargs.get("error") if isinstance(kwargs, dict) else None)
        waiting.append(getattr(current, "reason", None))
        waiting.extend((current.__cause__, current.__context__))
        waiting.extend(argument for argument in current.args if isinstance(argument, BaseException))


def _host_of(endpoint: str) -> str:
    """Name the endpoint without a path or a password."""
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "the S3 endpoint"
    if not host:
        return "the S3 endpoint"
    shown = f"[{host}]" if ":" in host else host
    return f"{shown}:{port}" if port else shown
