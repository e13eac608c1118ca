"""Signatures against the vectors of Standard Webhooks' own libraries, and what is taken as a secret."""

import base64
import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.webhooks.signature import MIN_SECRET_BYTES, Signer, parse_secrets

# libraries/javascript/src/webhook.test.ts ("sign function works") and libraries/go/webhook_symmetric_test.go of
# github.com/standard-webhooks/standard-webhooks
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
MESSAGE_ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
TIMESTAMP = 1614265330
PAYLOAD = b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def signed(secrets: tuple[bytes, ...], *pieces: bytes) -> dict[str, str]:
    signer = Signer(secrets, MESSAGE_ID, TIMESTAMP)
    for piece in pieces:
        signer.update(piece)
    return signer.headers()


def test_signature_is_that_of_the_reference_libraries() -> None:
    assert signed(parse_secrets(SECRET), PAYLOAD) == {
        "webhook-id": MESSAGE_ID,
        "webhook-timestamp": str(TIMESTAMP),
        "webhook-signature": SIGNATURE,
    }


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_pieces_are_signed_as_the_whole(pieces: list[bytes]) -> None:
    secrets = parse_secrets(SECRET)
    body = b"".join(pieces)
    digest = hmac.new(secrets[0], f"{MESSAGE_ID}.{TIMESTAMP}.".encode() + body, hashlib.sha256).digest()
    assert signed(secrets, *pieces)["webhook-signature"] == "v1," + base64.b64encode(digest).decode()


def test_each_secret_signs_so_that_either_verifies_while_they_are_rotated() -> None:
    other = "whsec_" + base64.b64encode(b"n" * 24).decode()
    both = signed(parse_secrets(f"{other}, {SECRET}"), PAYLOAD)["webhook-signature"].split(" ")
    assert both == [signed(parse_secrets(other), PAYLOAD)["webhook-signature"], SIGNATURE]
    assert both[0] != SIGNATURE


def test_without_a_secret_there_is_no_signature_header() -> None:
    assert parse_secrets("") == ()
    assert signed((), PAYLOAD) == {"webhook-id": MESSAGE_ID, "webhook-timestamp": str(TIMESTAMP)}


@pytest.mark.parametrize("bad_id", ["", "a.b", "a b", "a\r\nx: y", "é", "x" * 256])
def test_an_id_that_could_be_read_in_two_ways_is_refused(bad_id: str) -> None:
    with pytest.raises(ValueError, match="not a webhook id"):
        Signer((), bad_id, TIMESTAMP)


def test_a_signer_shows_no_secret() -> None:
    secrets = parse_secrets(SECRET)
    assert "HMAC" not in repr(Signer(secrets, MESSAGE_ID, TIMESTAMP))


@given(st.binary(min_size=MIN_SECRET_BYTES, max_size=70), st.booleans(), st.booleans(), st.booleans())
def test_a_secret_is_read_in_every_spelling(secret: bytes, prefix: bool, url_safe: bool, padded: bool) -> None:
    text = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(secret).decode()
    text = text if padded else text.rstrip("=")
    if text.startswith(("whsec_", "whsk_", "whpk_")):  # then it is what another test refuses
        return
    assert parse_secrets(f"{'whsec_' if prefix else ''}{text}") == (secret,)
    assert parse_secrets(f" {text} ,, {text},") == (secret, secret)


LONG = base64.b64encode(b"k" * 32).decode()
BARE = LONG.rstrip("=")  # after a prefix of five letters still a length that bytes have


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("pässwörd-that-is-long-enough-for-all", id="not ASCII"),
        pytest.param("a secret of several words, really", id="spaces"),
        pytest.param(base64.b64encode(b"k" * 15).decode(), id="15 bytes"),
        pytest.param("whsec_", id="prefix alone"),
        pytest.param("whsk_" + BARE, id="private key of the asymmetric scheme"),
        pytest.param("whpk_" + BARE, id="public key of the asymmetric scheme"),
        pytest.param("whsec_" + SECRET, id="prefix twice"),
        pytest.param("A" * 33, id="a length that no bytes have"),
        pytest.param("A" * 30 + "=", id="too little padding"),
        pytest.param("A" * 32 + "==", id="padding where none belongs"),
        pytest.param("=" * 40, id="padding alone"),
        pytest.param("A+" * 10 + "A_" * 10, id="both alphabets"),
        pytest.param(f"{LONG},oops", id="second of two"),
        pytest.param(f"{LONG}\n{LONG}", id="newline between"),
    ],
)
def test_anything_else_is_refused_with_what_is_allowed_and_without_itself(text: str) -> None:
    with pytest.raises(ValueError, match="base64 of at least 16 bytes") as caught:
        parse_secrets(text)
    shown = repr(caught.value)
    assert not any(part.strip() in shown for part in text.split(",") if len(part) > 8)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
