"""When a webhook is tried again, and what a receiver may ask for."""

import email.utils

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.webhooks.retry import RetryPolicy, parse_retry_after

NOW = 784111777.0  # Sun, 06 Nov 1994 08:49:37 GMT, the date of RFC 9110's examples


def test_delays_double_up_to_their_bound_and_end_after_the_last_retry() -> None:
    policy = RetryPolicy(retries=9)
    delays = [policy.delay_s(attempt, retry_after_s=None, jitter=lambda: 0.0) for attempt in range(1, 11)]
    assert delays == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, None]


def test_no_retries_is_one_attempt() -> None:
    assert RetryPolicy(retries=0).delay_s(1, retry_after_s=5.0) is None


def test_negative_retries_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="retries"):
        RetryPolicy(retries=-1)


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_jitter_takes_off_up_to_half_and_adds_nothing(attempt: int, jitter: float) -> None:
    policy = RetryPolicy(retries=10**6)
    whole = policy.delay_s(attempt, retry_after_s=None, jitter=lambda: 0.0)
    delay = policy.delay_s(attempt, retry_after_s=None, jitter=lambda: jitter)
    assert whole is not None
    assert delay is not None
    assert whole / 2 <= delay <= whole <= 30


@pytest.mark.parametrize(("asked_s", "delay_s"), [(0.0, 0.5), (0.2, 0.5), (7.0, 7.0), (601.0, 600.0), (1e308, 600.0)])
def test_retry_after_is_obeyed_up_to_ten_minutes_and_never_shortens(asked_s: float, delay_s: float) -> None:
    assert RetryPolicy(retries=1).delay_s(1, retry_after_s=asked_s, jitter=lambda: 0.0) == delay_s


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("Sun, 06 Nov 1994 08:49:42 GMT", 5.0),
        ("Sunday, 06-Nov-94 08:49:42 GMT", 5.0),  # RFC 850
        ("Sun Nov  6 08:49:42 1994", 5.0),  # asctime
        ("Sun, 06 Nov 1994 07:00:00 GMT", 0.0),  # over
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("٣", None),  # a digit, not an ASCII one
        ("Sun, 99 Nov 1994 08:49:42 GMT", None),
        ("Sun, 06 Nov 99999 08:49:42 GMT", None),
        ("9" * 5000, float("inf")),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_any_http_date(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, NOW) == seconds


@given(st.one_of(st.text(), st.datetimes().map(email.utils.format_datetime), st.just("1 GMT")))
def test_no_header_raises_or_asks_for_less_than_nothing(value: str) -> None:
    seconds = parse_retry_after(value, NOW)
    assert seconds is None or seconds >= 0
