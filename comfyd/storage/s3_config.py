"""How comfyd talks to S3, and the boto3 client that does so."""

import os
from collections.abc import Mapping
from typing import Any, Final, Literal, Self, get_args
from urllib.parse import urlsplit

import attrs

from comfyd import __version__
from comfyd.errors import BadConfiguration
from comfyd.wire import quoted

AddressingStyle = Literal["auto", "virtual", "path"]

MIB: Final = 1 << 20


@attrs.frozen(kw_only=True)
class S3Config:
    """What is ours to decide. Credentials, profile and endpoint are boto3's to find, in its usual places.

    *addressing_style* ``auto`` is boto3's: path style where an endpoint is set, else virtual hosts where the bucket's
    name allows it. *connect_timeout_s* also bounds how long a peer may take no bytes while we send, *read_timeout_s*
    how long it may send none. *attempts* is per HTTP request, so that a part that fails costs a part. After a cancel,
    *stop_grace_s* is what a transfer gets to undo itself while the caller waits.
    """

    region: str | None = None
    addressing_style: AddressingStyle = "auto"
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0
    max_concurrent: int = 8
    attempts: int = 3
    first_delay_s: float = 0.5
    max_delay_s: float = 5.0
    stop_grace_s: float = 5.0
    multipart_from_bytes: int = 16 * MIB
    part_bytes: int = 16 * MIB

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """Read the variables that boto3 does not read itself.

        ``AWS_REGION`` is what other SDKs (comfyui-api's among them) call boto3's ``AWS_DEFAULT_REGION``.

        Raises:
            BadConfiguration: AWS_S3_ADDRESSING_STYLE is none of those that exist.
        """
        style = environ.get("AWS_S3_ADDRESSING_STYLE") or "auto"
        if style not in get_args(AddressingStyle):
            raise BadConfiguration(
                (f"AWS_S3_ADDRESSING_STYLE: {quoted(style)} is none of {', '.join(get_args(AddressingStyle))}",)
            )
        return cls(
            region=environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or None,
            addressing_style=style,  # type: ignore[arg-type]  # mypy does not narrow by membership
        )

    def delay_s(self, failures: int, jitter: float) -> float:
        """How long to wait after so many *failures* (1 or more); *jitter* is in 0 to 1."""
        delay_s: float = min(self.max_delay_s, self.first_delay_s * 2.0 ** min(failures - 1, 30))
        return delay_s * (0.5 + jitter / 2)


def make_client(config: S3Config) -> Any:
    """Make the one client, which is thread-safe. Blocks, 0.1 s and more: the first call imports boto3.

    Raises:
        Exception: boto3's, as many kinds as there are ways to misconfigure it.
    """
    client = _make_client(config, config.addressing_style)
    host = urlsplit(client.meta.endpoint_url).hostname or ""
    if config.addressing_style == "auto" and host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        # "auto" presigns with the global host name (botocore/signers.py, _should_use_global_endpoint), from where a
        # bucket of another region may redirect, which the signature does not survive. "virtual" names the region, and
        # is by path all the same where the bucket's name is none for a host.
        client.close()
        client = _make_client(config, "virtual")
    return client


def _make_client(config: S3Config, addressing_style: AddressingStyle) -> Any:
    import boto3.session  # 27 MB and 0.4 s that a daemon without S3 does not pay
    import botocore.session
    from botocore.config import Config

    session = botocore.session.Session(session_vars=_without_empty(botocore.session.Session.SESSION_VARIABLES))
    client = boto3.session.Session(botocore_session=session, region_name=config.region).client(
        "s3",
        config=Config(
            signature_version="s3v4",  # without it, presigned URLs are signature version 2
            connect_timeout=config.connect_timeout_s,
            read_timeout=config.read_timeout_s,
            max_pool_connections=config.max_concurrent,
            tcp_keepalive=True,
            # Attempts are ours (s3_transfer.py): botocore waits in a sleep that no cancel ends, and its retry quota is
            # used up by an outage and refilled only by success, so that afterwards every hiccup would be an error.
            retries={"mode": "standard", "total_max_attempts": 1},
            # S3-compatible stores refuse the trailing checksums that botocore adds to everything since 1.36.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": addressing_style},
            user_agent_extra=f"comfyd/{__version__}",
        ),
    )
    client.meta.events.register_last("before-parameter-build.s3", _do_not_redirect)
    return client


def _without_empty(variables: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Take the environment variables that are set but empty out of botocore's table of settings.

    Empty is unset for all of comfyd, and what a compose file makes of a variable that is not there; for botocore
    ``AWS_PROFILE=`` is a profile without a name, hence an error. The table is name to (name in the configuration file,
    environment variable or a list of them, default, conversion).
    """
    table = {}
    for setting, (in_file, names, *rest) in variables.items():
        listed = names if isinstance(names, list) else [names] if names else []
        table[setting] = (in_file, [name for name in listed if os.environ.get(name)] or None, *rest)
    return table


def _do_not_redirect(context: dict[str, Any], **_: Any) -> None:
    """Tell botocore's S3RegionRedirectorv2 (utils.py, 1.44.5) that it has done its work; ours is in s3.py.

    It asks HEAD for a region that an answer does not name, and where HEAD is redirected too, by a balancer to https
    for one, it asks HEAD again from within itself: some 80 times, until Python stops it. And presigning ignores what
    it found out.
    """
    context["s3_redirect"]["redirected"] = True
