"""What URL_POLICY and URL_ALLOW say about addresses and about the spellings of a URL."""

import ipaddress
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from comfyd.net import UrlPolicy, UrlRefused, check_url, display_url, parse_allow, parse_mode, parse_policy
from comfyd.net.policy import AddressKind, destinations, kind_of

OPEN, GUARDED, STRICT = (parse_policy(mode, "") for mode in ("open", "guarded", "strict"))

# The weakest policy that refuses the address: "guarded" (then strict does too), "strict", or none.
ADDRESSES = [
    ("8.8.8.8", None),
    ("93.184.216.34", None),
    ("2606:4700:4700::1111", None),
    ("2a00:1450:4001:81b::200e", None),
    ("64:ff9b::808:808", None),
    ("::ffff:8.8.8.8", None),
    ("10.0.0.1", "strict"),
    ("172.16.0.1", "strict"),
    ("172.31.255.255", "strict"),
    ("172.32.0.1", None),
    ("192.168.1.1", "strict"),
    ("100.64.0.1", "strict"),
    ("100.127.255.255", "strict"),
    ("100.128.0.1", None),
    ("198.18.0.1", "strict"),
    ("192.0.2.1", "strict"),
    ("198.51.100.7", "strict"),
    ("203.0.113.9", "strict"),
    ("192.0.0.8", "strict"),
    ("192.88.99.1", "strict"),
    ("240.0.0.1", "strict"),
    ("::ffff:10.0.0.1", "strict"),
    ("64:ff9b::a00:1", "strict"),
    ("fc00::1", "strict"),
    ("fd12:3456::1", "strict"),
    ("fec0::1", "strict"),
    ("100::1", "strict"),
    ("2001:db8::1", "strict"),
    ("3fff::1", "strict"),
    ("2001:20::1", "strict"),
    ("2002:808:808::1", "strict"),
    ("4000::1", "strict"),
    ("::8.8.8.8", "strict"),
    ("2001:0:808:808::f7f7:f7f7", "strict"),
    ("64:ff9b:1::808:808", "strict"),
    ("127.0.0.1", "guarded"),
    ("127.255.255.254", "guarded"),
    ("::1", "guarded"),
    ("::ffff:127.0.0.1", "guarded"),
    ("::ffff:0:127.0.0.1", "guarded"),
    ("::127.0.0.1", "guarded"),
    ("64:ff9b::7f00:1", "guarded"),
    ("64:ff9b::a9fe:a9fe", "guarded"),
    ("64:ff9b:1::7f00:1", "guarded"),
    ("2002:7f00:1::", "guarded"),
    ("2002:a9fe:a9fe::1", "guarded"),
    ("2001:0:7f00:1::", "guarded"),
    ("2001:0:808:808::80ff:fffe", "guarded"),
    ("2606:4700::5efe:7f00:1", "guarded"),
    ("2606:4700::200:5efe:a9fe:a9fe", "guarded"),
    ("0.0.0.0", "guarded"),
    ("0.1.2.3", "guarded"),
    ("::", "guarded"),
    ("::ffff:0.0.0.0", "guarded"),
    ("169.254.0.1", "guarded"),
    ("169.254.169.254", "guarded"),
    ("169.254.170.2", "guarded"),
    ("::ffff:169.254.169.254", "guarded"),
    ("fe80::1", "guarded"),
    ("febf::1", "guarded"),
    ("fd00:ec2::254", "guarded"),
    ("fd00:ec2::23", "guarded"),
    ("fd20:ce::254", "guarded"),
    ("100.100.100.200", "guarded"),
    ("192.0.0.192", "guarded"),
    ("168.63.129.16", "guarded"),
    ("224.0.0.1", "guarded"),
    ("239.255.255.255", "guarded"),
    ("ff02::1", "guarded"),
    ("ff0e::1", "guarded"),
    ("255.255.255.255", "guarded"),
]


@pytest.mark.parametrize(("address", "weakest"), ADDRESSES)
def test_addresses_are_refused_from_the_weakest_policy_on(address: str, weakest: str | None) -> None:
    refusing = {"guarded": [GUARDED, STRICT], "strict": [STRICT], None: []}[weakest]
    for policy in (OPEN, GUARDED, STRICT):
        refused = policy.refusal("some.host", 80, ip_address(address)) is not None
        assert refused == (policy in refusing), policy.mode


@pytest.mark.parametrize("address", [address for address, weakest in ADDRESSES if weakest])
def test_url_allow_opens_exactly_the_address_that_it_names(address: str) -> None:
    policy = parse_policy("strict", f"{address}/{ip_address(address).max_prefixlen}")
    assert policy.refusal("some.host", 80, ip_address(address)) is None
    assert policy.refusal("some.host", 80, ip_address("127.9.9.9")) is AddressKind.LOOPBACK


LOOPBACK_SPELLINGS = [
    "http://127.0.0.1/",
    "http://127.0.0.1./",
    "http://127.1/",
    "http://127.0.1/",
    "http://2130706433/",
    "http://2130706433./",
    "http://0x7f000001/",
    "http://0X7F000001/",
    "http://0x7f.1/",
    "http://0x7f.0x0.0x0.0x1/",
    "http://017700000001/",
    "http://0177.1/",
    "http://127.0x1/",
    "http://[::1]/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]:8080/",
    "http://[64:ff9b::127.0.0.1]/",
    "http://localhost/",
    "http://LOCALHOST./",
    "http://a.localhost:99/",
    "https://127.0.0.1:443/x?y#z",
    "HTTP://127.0.0.1",
    "http://example.com@127.0.0.1/",
    "http://example.com:80@127.0.0.1:81/",
    "http://127。0。0。1/",
    "http:// @127.0.0.1/",
]


@pytest.mark.parametrize("url", LOOPBACK_SPELLINGS)
def test_every_spelling_of_loopback_is_refused_at_submission(url: str) -> None:
    for policy in (GUARDED, STRICT):
        with pytest.raises(UrlRefused, match="a loopback address, which URL_POLICY="):
            check_url(url, policy)


@pytest.mark.parametrize(
    "url", [url for url in LOOPBACK_SPELLINGS if "[" not in url and "localhost" not in url.lower()]
)
def test_url_allow_holds_for_every_spelling_of_its_address(url: str) -> None:
    check_url(url, parse_policy("strict", "127.0.0.1"))
    check_url(url, OPEN)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "only http"),
        ("picture.png", "only http"),
        ("//example.com/x", "only http"),
        ("file:///etc/passwd", "only http"),
        ("ftp://example.com/", "only http"),
        ("gopher://127.0.0.1:6379/_x", "only http"),
        ("javascript:alert(1)", "only http"),
        ("http:/example.com/", "no host"),
        ("http:example.com", "no host"),
        ("http:///example.com", "no host"),
        ("http://user@/", "no host"),
        ("http://:80/", "no host"),
        ("http://?x", "no host"),
        ("http://%31%32%37.0.0.1/", "has a % in it"),
        ("http://127.0.0.1%00.example.com/", "has a % in it"),
        ("http://a b/", "has a % in it"),
        ("http://[fe80::1%25eth0]/", "has a % in it"),
        ("http://[::1%25lo]/", "has a % in it"),
        ("http://0177.0.0.1/", "makes no sense"),
        ("http://256.1.1.1/", "makes no sense"),
        ("http://[::1/", "makes no sense"),
        ("http://[::ffff:127.0.0.1:80/", "makes no sense"),
        ("http://[v1.x]/", "makes no sense"),
        ("http://１２７.0.0.1/", "makes no sense"),
        ("http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/", "makes no sense"),
        ("http://exa\tmple.com/", "makes no sense"),
        ("http://example.com/\r\nHost: evil", "makes no sense"),
        ("http://example.com:port/", "makes no sense"),
        ("http://example.com:-1/", "port is not from 1"),
        ("http://example.com:0/", "port is not from 1"),
        ("http://example.com:65536/", "port is not from 1"),
        ("http://1.2.3.4.5/", "neither a host name nor an address"),
        ("http://4294967296/", "neither a host name nor an address"),
        ("http://example.1/", "neither a host name nor an address"),
        ("http://1.2.3.0xfff/", "neither a host name nor an address"),
        ("http://127.0.0.1../", "is not a host name"),
        ("http://./", "is not a host name"),
        ("http://a..b/", "is not a host name"),
        ("http://-a.example/", "is not a host name"),
        ("http://*.example.com/", "is not a host name"),
        ("http://a,b/", "is not a host name"),
        (f"http://{'a' * 64}.example/", "is not a host name"),
        (f"http://{'a.' * 130}example/", "is not a host name"),
        ("http://127.0.0.1\\@example.com/", "backslash"),
        ("http://example.com\\.evil.com/", "backslash"),
        ("http:\\\\127.0.0.1/", "backslash"),
        (f"http://example.com/{'x' * 9000}", "longer than"),
    ],
)
def test_what_is_no_plain_http_url_is_refused_under_every_policy(url: str, reason: str) -> None:
    for policy in (OPEN, GUARDED, STRICT, parse_policy("open", "example.com,*.example.com,127.0.0.1")):
        with pytest.raises(UrlRefused, match=reason):
            check_url(url, policy)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com",
        "HTTPS://EXAMPLE.COM:8443/a%20b?c=d&e#f",
        "http://example.com./x",
        "http://user:p%40ss@example.com/x",
        "http://my_service:3000/a b.png",
        "http://münchen.example/ü.png",
        "http://xn--mnchen-3ya.example/",
        "http://1.2.3.4/",
        "http://16909060/",
        "http://[2606:4700::1]:80/",
        "http://a-b.c1/",
        "http://3com.example/",
        "http://example.com/back\\slash",
        "http://example.com/?u=http://127.0.0.1/",
        "http://notlocalhost/",
    ],
)
def test_public_urls_pass_the_strict_policy(url: str) -> None:
    check_url(url, STRICT)


@pytest.mark.parametrize("allow", ["localhost", "localhost:8000", "127.0.0.1", "[::1]:8000", "127.0.0.0/8"])
def test_localhost_is_allowed_by_name_or_by_either_of_its_addresses(allow: str) -> None:
    check_url("http://localhost:8000/", parse_policy("strict", allow))


def test_a_private_host_is_refused_by_strict_alone() -> None:
    check_url("http://192.168.0.2:8000/a.png", GUARDED)
    with pytest.raises(UrlRefused, match=r"192\.168\.0\.2 is a private address, which URL_POLICY=strict refuses"):
        check_url("http://192.168.0.2:8000/a.png", STRICT)


@pytest.mark.parametrize(
    ("allow", "host", "port", "address", "allowed"),
    [
        ("minio", "minio", 9000, "10.0.0.5", True),
        ("minio", "MINIO.", 9000, "127.0.0.1", True),
        ("minio", "minio.evil.com", 9000, "10.0.0.5", False),
        ("minio", "xminio", 9000, "10.0.0.5", False),
        ("minio:9000", "minio", 9000, "10.0.0.5", True),
        ("minio:9000", "minio", 9001, "10.0.0.5", False),
        ("*.example.org", "a.example.org", 80, "10.0.0.5", True),
        ("*.example.org", "a.b.example.org", 80, "10.0.0.5", True),
        ("*.example.org", "example.org", 80, "10.0.0.5", False),
        ("*.example.org", "evilexample.org", 80, "10.0.0.5", False),
        ("*.example.org:80", "a.example.org", 443, "10.0.0.5", False),
        ("Münch.example", "xn--mnch-0ra.example", 80, "10.0.0.5", True),
        ("10.0.0.0/8", "any", 80, "10.9.9.9", True),
        ("10.0.0.0/8", "any", 80, "::ffff:10.9.9.9", True),
        ("10.0.0.0/8", "any", 80, "11.0.0.1", True),  # public anyway
        ("10.0.0.0/8", "any", 80, "192.168.0.1", False),
        ("10.0.0.0/8", "any", 80, "64:ff9b::a00:1", True),
        ("10.0.0.1:80", "any", 80, "10.0.0.1", True),
        ("10.0.0.1:80", "any", 81, "10.0.0.1", False),
        ("127.0.0.1", "localhost", 80, "127.0.0.1", True),
        ("::1", "localhost", 80, "::1", True),
        ("[::1]", "localhost", 80, "::1", True),
        ("[::1]:80", "localhost", 81, "::1", False),
        ("fd00::/8", "any", 80, "fd00::5", True),
        ("a, ,b ,", "b", 80, "10.0.0.1", True),
        # Being allowed to one end of a tunnel is no permission for the other.
        ("8.8.8.8", "any", 80, "2001:0:808:808::80ff:fffe", False),
    ],
)
def test_url_allow_covers_what_it_names(allow: str, host: str, port: int, address: str, allowed: bool) -> None:
    policy = parse_policy("strict", allow)
    assert (policy.refusal(host, port, ip_address(address)) is None) == allowed


@pytest.mark.parametrize(
    "entry",
    [
        "http://minio:9000",
        "10.0.0.1/8",
        "10.0.0.0/33",
        "10.0.0.0/8:80",
        "minio:",
        "minio:0",
        "minio:65536",
        "minio:http",
        "a b",
        "u@host",
        "*",
        "*.",
        "*.10.0.0.1",
        "*x.example",
        "a.*.example",
        "127.1",
        "0x7f000001",
        "1.2.3.4.5",
        "[::1",
        "[10.0.0.1]",
        "[::1]80",
        "::1:",
        ":80",
        "[fe80::1%eth0]:x",
        "a#b",
    ],
)
def test_url_allow_tells_which_entry_is_wrong_and_what_is_allowed(entry: str) -> None:
    with pytest.raises(ValueError, match=r"hosts, .*CIDRs, separated by commas; not ") as caught:
        parse_allow(f"good.example,{entry}")
    assert entry in str(caught.value)


def test_url_policy_is_read_in_any_case_and_tells_the_choices() -> None:
    assert parse_mode(" Strict ").value == "strict"
    with pytest.raises(ValueError, match=r"^one of open, guarded, strict$"):
        parse_mode("closed")
    assert parse_policy("guarded", "") == UrlPolicy()


any_address = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
any_v4 = st.ip_addresses(v=4)
SHAPES = {
    "::ffff:0:0": lambda n: n,
    "64:ff9b::": lambda n: n,
    "64:ff9b:1::": lambda n: n,
    "::": lambda n: n,
    "2002::": lambda n: n << 80,
    "2606:4700::5efe:0:0": lambda n: n,
    "2001::": lambda n: (0x08080808 << 64) | (~n & 0xFFFF_FFFF),
}


@given(any_address)
@example(IPv4Address("224.0.0.1"))  # is_global
@example(IPv6Address("ff0e::1"))  # is_global
@example(IPv6Address("fec0::1"))  # is_global
def test_strict_permits_only_what_ipaddress_calls_global_and_nothing_special(
    address: IPv4Address | IPv6Address,
) -> None:
    if STRICT.refusal("h", 80, address) is None:
        for each in destinations(address):
            assert each.is_global
            assert not any((each.is_multicast, each.is_reserved, each.is_loopback, each.is_link_local))
        assert GUARDED.refusal("h", 80, address) is None  # each policy permits what the stricter one does


@given(any_v4)
def test_guarded_permits_a_plain_address_unless_it_is_special(address: IPv4Address) -> None:
    special = (
        address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address in ipaddress.ip_network("0.0.0.0/8")
        or kind_of(address) in (AddressKind.METADATA, AddressKind.BROADCAST)
    )
    assert (GUARDED.refusal("h", 80, address) is not None) == special


@given(any_v4, st.sampled_from(sorted(SHAPES)))
@example(IPv4Address("127.0.0.1"), "2001::")
@example(IPv4Address("0.0.0.0"), "::")
def test_an_address_in_an_address_is_refused_wherever_it_is_refused_alone(inner: IPv4Address, shape: str) -> None:
    outer = IPv6Address(int(IPv6Address(shape)) | SHAPES[shape](int(inner)))
    for policy in (GUARDED, STRICT):
        if policy.refusal("h", 80, inner) is not None:
            assert policy.refusal("h", 80, outer) is not None


@given(any_v4)
def test_every_spelling_of_an_address_is_judged_like_the_address(address: IPv4Address) -> None:
    number = int(address)
    parts = address.packed
    spellings = [
        str(address),
        f"{address}.",
        str(number),
        hex(number),
        f"0{number:o}",
        f"{parts[0]}.{number & 0xFFFFFF}",
        f"{parts[0]:#x}.{parts[1]}.{number & 0xFFFF}",
    ]
    for spelling in spellings:
        for policy in (GUARDED, STRICT):
            refused = policy.refusal("h", 80, address) is not None
            assert _is_refused(f"http://{spelling}/", policy) == refused, spelling


@given(st.text(max_size=60))
def test_any_text_is_a_url_or_refused(text: str) -> None:
    for url in (text, f"http://{text}", f"http://{text}/x"):
        assert display_url(url)
        if not _is_refused(url, STRICT):
            assert not _is_refused(url, GUARDED)


def test_display_url_leaves_out_what_may_be_secret() -> None:
    assert (
        display_url("https://user:secret@Host.example:8443/a b?token=secret#secret")
        == "https://host.example:8443/a%20b"
    )
    assert display_url("http://[::1]:81/x") == "http://[::1]:81/x"
    assert display_url("not a url, secret") == "(not a URL)"
    assert display_url("http://[secret") == "(not a URL)"
    assert len(display_url("http://host/" + "x" * 500)) == 200


@pytest.mark.parametrize(
    "url", ["http://u:secret@[::1", "http://u:secret@host:x/", "http://u:secret@127.0.0.1/?secret"]
)
def test_a_refusal_repeats_no_secret(url: str) -> None:
    with pytest.raises(UrlRefused) as caught:
        check_url(url, GUARDED)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def _is_refused(url: str, policy: UrlPolicy) -> bool:
    try:
        check_url(url, policy)
    except UrlRefused:
        return True
    return False
