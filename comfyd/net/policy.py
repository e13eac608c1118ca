"""Which addresses a URL of a caller may lead to (URL_POLICY, URL_ALLOW), decided without touching the network.

The decision is about addresses, not names: :func:`check_url` refuses at submission what can be told from the text, and
:mod:`comfyd.net.guarded` asks :meth:`UrlPolicy.refusal` again about every address that a name resolves to, connecting
to no other. httpx's parser is the only one that reads such a URL, so what is checked is what is connected to.
"""

import ipaddress
import re
import socket
from collections.abc import Iterator
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Final

import attrs

from comfyd.errors import ComfydError
from comfyd.wire import quoted

if TYPE_CHECKING:
    import httpx

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_URL_LENGTH: Final = 8192
"""Presigned URLs have one or two thousand characters; few servers take a request line of more than this."""

ALLOW_FORMS: Final = "hosts, *.domains, host:port, addresses, [IPv6]:port and CIDRs, separated by commas"


class UrlRefused(ComfydError):
    """A URL must not be asked. *reason* is a sentence without secrets, and without what a name resolved to."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PolicyMode(Enum):
    """URL_POLICY."""

    OPEN = "open"
    GUARDED = "guarded"
    STRICT = "strict"


class AddressKind(Enum):
    """What an address is, in words for a message."""

    GLOBAL = "a public address"
    PRIVATE = "a private address"
    METADATA = "an address of a cloud's metadata service"
    LOOPBACK = "a loopback address"
    LINK_LOCAL = "a link-local address"
    UNSPECIFIED = "an unspecified address"
    MULTICAST = "a multicast address"
    BROADCAST = "a broadcast address"


_PERMITTED: Final = {
    PolicyMode.OPEN: frozenset(AddressKind),
    PolicyMode.GUARDED: frozenset({AddressKind.GLOBAL, AddressKind.PRIVATE}),
    PolicyMode.STRICT: frozenset({AddressKind.GLOBAL}),
}


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


# Where clouds answer with credentials of the machine. 169.254.0.0/16 is link-local as a whole; its known ones are
# named here for the message only. fd00:ec2::/32 also holds Amazon's DNS and time, 168.63.129.16 is Azure's "wire
# server", a public address that only leads to the host.
_METADATA: Final = _networks(
    "169.254.169.254/32",  # AWS, Azure, Google, Oracle, OpenStack, DigitalOcean, Hetzner
    "169.254.170.2/32",  # Amazon ECS task roles
    "169.254.170.23/32",  # Amazon EKS pod identity
    "fd00:ec2::/32",  # Amazon: metadata ::254, EKS pod identity ::23
    "fd20:ce::254/128",  # Google
    "fd00:42::42/128",  # Scaleway
    "fe80::a9fe:a9fe/128",  # OpenStack
    "100.100.100.200/32",  # Alibaba
    "192.0.0.192/32",  # Oracle Classic
    "168.63.129.16/32",  # Azure
)

# Not for the public internet by IANA's special-purpose registries, but global to `ipaddress` of some Python 3.11 to
# 3.13 (is_global follows the registry of its release's day).
_NOT_GLOBAL: Final = _networks(
    "192.0.0.0/24",  # IETF protocol assignments
    "192.88.99.0/24",  # 6to4 relays, withdrawn
    "240.0.0.0/4",  # reserved
    "2001:20::/28",  # ORCHIDv2: identifiers, not routed
    "2002::/16",  # 6to4, withdrawn: only ever a detour to the IPv4 address inside
    "3fff::/20",  # documentation
)
_THIS_NETWORK: Final = IPv4Network("0.0.0.0/8")  # Linux connects 0.0.0.0 to itself; the rest is addressed to nobody
_LOOPBACKS: Final = (IPv4Address("127.0.0.1"), IPv6Address("::1"))
_BROADCAST: Final = IPv4Address("255.255.255.255")
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")  # all that IANA has given out; the rest is global to `ipaddress` too
_SITE_LOCAL: Final = IPv6Network("fec0::/10")

# The same destination as the IPv4 address in the last 32 bits: mapped, translated (SIIT), NAT64's well-known prefix
# (RFC 6052), by which an IPv6-only machine reaches the IPv4 internet.
_IS_IPV4: Final = _networks("::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")
# May lead to the IPv4 address in the last 32 bits: IPv4-compatible (withdrawn), NAT64 of this network (RFC 8215).
_MAY_BE_IPV4: Final = _networks("::/96", "64:ff9b:1::/48")
_6TO4: Final = IPv6Network("2002::/16")
_TEREDO: Final = IPv6Network("2001::/32")
_ISATAP: Final = (0x00005EFE, 0x02005EFE)  # bits 64 to 95, before the IPv4 address (RFC 5214)


def kind_of(address: Address) -> AddressKind:
    """Tell what *address* itself is; addresses embedded in it are not looked at."""
    if _in(address, _METADATA):
        return AddressKind.METADATA
    if address.is_loopback:
        return AddressKind.LOOPBACK
    if address.is_link_local:
        return AddressKind.LINK_LOCAL
    if address.is_multicast:
        return AddressKind.MULTICAST
    if address == _BROADCAST:
        return AddressKind.BROADCAST
    if address.is_unspecified or address in _THIS_NETWORK:
        return AddressKind.UNSPECIFIED
    if not address.is_global or _in(address, _NOT_GLOBAL) or address in _SITE_LOCAL:
        return AddressKind.PRIVATE
    if address.version == 6 and address not in _GLOBAL_UNICAST:
        return AddressKind.PRIVATE
    return AddressKind.GLOBAL


def destinations(address: Address) -> tuple[Address, ...]:
    """List the addresses that a packet to *address* may end at: itself, or what a gateway makes of it."""
    if isinstance(address, IPv4Address):
        return (address,)
    number = int(address)
    low = IPv4Address(number & 0xFFFF_FFFF)
    if _in(address, _IS_IPV4):
        return (low,)
    if address.is_loopback or address.is_unspecified:  # of ::/96, and no IPv4 address for that
        return (address,)
    if _in(address, _MAY_BE_IPV4) or (number >> 32) & 0xFFFF_FFFF in _ISATAP:
        return (address, low)
    if address in _6TO4:
        return (address, IPv4Address((number >> 80) & 0xFFFF_FFFF))
    if address in _TEREDO:  # the server, and the client with its bits inverted (RFC 4380)
        return (address, IPv4Address((number >> 64) & 0xFFFF_FFFF), IPv4Address(~number & 0xFFFF_FFFF))
    return (address,)


def _in(address: Address, networks: tuple[Network, ...]) -> bool:
    return any(address in network for network in networks)


@attrs.frozen(kw_only=True)
class Allowed:
    """One entry of URL_ALLOW: a host name (``*.`` in front: any name below it) or a network, at *port* or any."""

    text: str
    host: str | None = None
    network: Network | None = None
    port: int | None = None

    def covers_host(self, host: str, port: int) -> bool:
        """Whether the name is allowed, wherever it leads. *host* is in lower case, without a final dot."""
        if self.host is None or self.port not in (None, port):
            return False
        return host.endswith(self.host[1:]) if self.host.startswith("*.") else host == self.host

    def covers_address(self, address: Address, port: int) -> bool:
        """Whether the address is allowed, however it was spelled."""
        return self.network is not None and self.port in (None, port) and address in self.network


@attrs.frozen(kw_only=True)
class UrlPolicy:
    """What a caller's URL may lead to: the addresses that *mode* permits, and *allow* whatever the mode."""

    mode: PolicyMode = PolicyMode.GUARDED
    allow: tuple[Allowed, ...] = ()

    def allows_host(self, host: str, port: int) -> bool:
        """Whether URL_ALLOW names *host*."""
        name = _plain(host)
        return any(entry.covers_host(name, port) for entry in self.allow)

    def refusal(self, host: str, port: int, address: Address) -> AddressKind | None:
        """Say why a connection to *address*, as which *host* was read or resolved, is refused; None: it is not."""
        if self.allows_host(host, port):
            return None
        if self._allows_address(address, port):
            return None
        for each in destinations(address):  # all of them: an allowed gateway is no pass for what is behind it
            if (kind := kind_of(each)) not in _PERMITTED[self.mode] and not self._allows_address(each, port):
                return kind
        return None

    def _allows_address(self, address: Address, port: int) -> bool:
        return any(entry.covers_address(address, port) for entry in self.allow)

    def why(self, kind: AddressKind) -> str:
        """Put a refusal in words, after "is" or "resolves to"."""
        return f"{kind.value}, which URL_POLICY={self.mode.value} refuses (URL_ALLOW can allow it)"


def check_url(url: str, policy: UrlPolicy) -> None:
    """Refuse what can be told to be wrong without resolving a name.

    Raises:
        UrlRefused: it is no http(s) URL, or its host is an address (in any spelling) that *policy* refuses.
    """
    check_parsed(parse_url(url), policy)


def parse_url(url: str) -> "httpx.URL":
    """Read the URL of a caller, or a redirect's target made absolute.

    Raises:
        UrlRefused: it is too long, or no URL.
    """
    import httpx  # here, as it takes a tenth of a second and loading the configuration needs none of it

    if len(url) > MAX_URL_LENGTH:
        raise UrlRefused(f"the URL is longer than {MAX_URL_LENGTH} characters")
    authority = re.split(r"[/?#]", url.partition("//")[2], maxsplit=1)[0]
    if "\\" in authority or url.partition(":")[2].startswith("\\"):
        # Browsers read it as a slash, httpx does not: nobody writes that by accident.
        raise UrlRefused("the URL has a backslash where its host is")
    try:
        return httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError, ValueError):  # whose texts repeat passwords
        raise UrlRefused("the URL makes no sense") from None


def check_parsed(url: "httpx.URL", policy: UrlPolicy) -> None:
    """Do what :func:`check_url` does with a URL that is parsed already.

    Raises:
        UrlRefused: see there.
    """
    if url.scheme not in ("http", "https"):
        raise UrlRefused("only http:// and https:// are accepted")
    host, port = url.raw_host.decode("ascii"), port_of(url)
    if not host:
        raise UrlRefused("the URL names no host")
    if not 1 <= port <= 65535:
        raise UrlRefused("the URL's port is not from 1 to 65535")
    address = literal_address(host)
    if address is not None:
        meant: tuple[Address, ...] = (address,)
    else:  # localhost is loopback for every resolver (RFC 6761), so it can be refused before a job is made
        meant = _LOOPBACKS if _is_localhost(host) else ()
    refused = [kind for each in meant if (kind := policy.refusal(host, port, each))]
    if meant and len(refused) == len(meant):
        raise UrlRefused(f"{_plain(host)} is {policy.why(refused[0])}")


def port_of(url: "httpx.URL") -> int:
    """The port that is connected to."""
    return url.port if url.port is not None else {"http": 80, "https": 443}.get(url.scheme, 0)


def literal_address(host: str) -> Address | None:
    """Read *host* as an address in any spelling that resolvers take (``127.1``, ``0x7f000001``); None: it is a name.

    Raises:
        UrlRefused: it is neither.
    """
    if "%" in host:  # an encoded character, or the zone of a link-local address; resolvers disagree about both
        raise UrlRefused("the URL's host has a % in it")
    name = _plain(host)
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        pass
    if ":" in name:
        raise UrlRefused("the URL's host makes no sense")
    if _NUMBER.fullmatch(name.rpartition(".")[2]):  # WHATWG's rule: a name never ends in a number
        try:
            return IPv4Address(socket.inet_aton(name))
        except OSError:
            raise UrlRefused(f"{quoted(host)} is neither a host name nor an address") from None
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise UrlRefused(f"{quoted(host)} is not a host name")
    return None


_NUMBER: Final = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*", re.ASCII)
# Underscores are against the rules for hosts and common in compose files.
_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", re.ASCII)


def _plain(host: str) -> str:
    return host.lower().removesuffix(".")


def _is_localhost(host: str) -> bool:
    name = _plain(host)
    return name == "localhost" or name.endswith(".localhost")


def display_url(url: "str | httpx.URL") -> str:
    """*url* for messages and logs: without user-info, query and fragment, which are where secrets are; cut at 200."""
    import httpx

    try:
        parsed = httpx.URL(url)
        host = parsed.raw_host.decode("ascii")
    except (httpx.InvalidURL, UnicodeError, ValueError):
        return "(not a URL)"
    if not parsed.scheme or not host or "%" in host:  # an encoded host is a broken URL: who knows what it shows
        return "(not a URL)"
    port = "" if parsed.port is None else f":{parsed.port}"
    path = parsed.raw_path.partition(b"?")[0].decode("ascii")
    text = f"{parsed.scheme}://{f'[{host}]' if ':' in host else host}{port}{path}"
    return text if len(text) <= 200 else text[:199] + "…"


def parse_policy(policy: str, allow: str) -> UrlPolicy:
    """Read URL_POLICY and URL_ALLOW.

    Raises:
        ValueError: with what is allowed.
    """
    return UrlPolicy(mode=parse_mode(policy), allow=parse_allow(allow))


def parse_mode(text: str) -> PolicyMode:
    """Read URL_POLICY, in any case.

    Raises:
        ValueError: with what is allowed.
    """
    try:
        return PolicyMode(text.strip().lower())
    except ValueError:
        raise ValueError("one of " + ", ".join(mode.value for mode in PolicyMode)) from None


def parse_allow(text: str) -> tuple[Allowed, ...]:
    """Read URL_ALLOW; empty entries do not count.

    Raises:
        ValueError: with what is allowed, and which entry is not.
    """
    return tuple(_entries(text))


def _entries(text: str) -> Iterator[Allowed]:
    for raw in text.split(","):
        entry = raw.strip()
        if entry:
            try:
                yield _parse_entry(entry)
            except (ValueError, UrlRefused) as exc:
                raise ValueError(f"{ALLOW_FORMS}; not {quoted(entry)}: {exc}") from None


def _parse_entry(entry: str) -> Allowed:
    if "://" in entry:
        raise ValueError("write the host without a scheme")
    if "/" in entry:
        return Allowed(text=entry, network=ipaddress.ip_network(entry))
    if (bracketed := re.fullmatch(r"\[([^\]]*)\](?::(.*))?", entry)) is not None:
        return Allowed(
            text=entry, network=ipaddress.ip_network(IPv6Address(bracketed[1])), port=_parse_port(bracketed[2])
        )
    if entry.count(":") > 1:
        return Allowed(text=entry, network=ipaddress.ip_network(IPv6Address(entry)))
    import httpx

    host, colon, port_text = entry.partition(":")
    port = _parse_port(port_text if colon else None)
    star, name = ("*.", host[2:]) if host.startswith("*.") else ("", host)
    if not name or re.search(r"[\s@?#\\]", name):
        raise ValueError("that is no host")
    try:
        name = _plain(httpx.URL(f"http://{name}/").raw_host.decode("ascii"))  # as a URL's host will be: IDNA
    except (httpx.InvalidURL, UnicodeError):
        raise ValueError("that is no host") from None
    address = literal_address(name)
    if address is None:
        return Allowed(text=entry, host=star + name, port=port)
    if star or str(address) != name:
        raise ValueError("write addresses in full, without *")
    return Allowed(text=entry, network=ipaddress.ip_network(address), port=port)


def _parse_port(text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,5}", text, re.ASCII) or not 1 <= int(text) <= 65535:
        raise ValueError("a port is from 1 to 65535")
    return int(text)
