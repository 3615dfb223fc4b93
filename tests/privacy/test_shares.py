"""Any `threshold` shares tell the secret, one fewer tells nothing about it."""

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy import shares

FIELD = 2**255 - 19


@given(st.integers(0, FIELD - 1), st.integers(1, 12), st.data())
def test_any_threshold_of_shares_tell_the_secret(number: int, threshold: int, data: st.DataObject) -> None:
    secret = number.to_bytes(32, "little")
    places = data.draw(st.lists(st.integers(1, 1000), min_size=threshold, max_size=15, unique=True))
    dealt = dict(zip(places, shares.split(secret, threshold, places), strict=True))
    some = data.draw(st.permutations(places))[:threshold]
    assert shares.join({place: dealt[place] for place in some}) == secret
    assert all(map(shares.valid, dealt.values()))


@given(st.integers(0, FIELD - 1))
def test_one_share_fewer_fits_every_secret(other: int) -> None:
    dealt = shares.split(shares.draw(), 3, [1, 2, 3])
    # the polynomial through two shares and any other secret is one that might have been drawn
    s1, s2 = (int.from_bytes(share, "little") for share in dealt[:2])
    third = (3 * s2 - 3 * s1 + other) % FIELD
    fitting = {1: dealt[0], 2: dealt[1], 3: third.to_bytes(32, "little")}
    assert shares.join(fitting) == other.to_bytes(32, "little")


def test_one_share_fewer_or_a_wrong_one_gives_another_secret() -> None:
    secret = shares.draw()
    dealt = dict(enumerate(shares.split(secret, 3, [1, 2, 3, 4]), 1))
    assert shares.join({i: dealt[i] for i in (1, 2)}) != secret
    assert shares.join({1: dealt[1], 2: dealt[2], 3: shares.draw()}) != secret


def test_secrets_and_polynomials_are_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = shares.draw()
    assert secret != shares.draw()
    assert shares.split(secret, 2, [1, 2]) != shares.split(secret, 2, [1, 2])
    monkeypatch.setattr(secrets, "randbelow", lambda limit: limit - 1)
    assert shares.draw() == (FIELD - 1).to_bytes(32, "little")


@pytest.mark.parametrize(("threshold", "places"), [(3, [1, 2]), (2, [1, 1, 2]), (1, [0, 1]), (0, [1])])
def test_places_that_cannot_be_are_refused(threshold: int, places: list[int]) -> None:
    with pytest.raises(ValueError, match="shares at these places"):
        shares.split(bytes(32), threshold, places)


@pytest.mark.parametrize("value", [b"", bytes(31), bytes(33), FIELD.to_bytes(32, "little"), b"\xff" * 32])
def test_bytes_that_are_no_number_of_the_field_are_refused(value: bytes) -> None:
    assert not shares.valid(value)
    with pytest.raises(ValueError, match="not a number of the field"):
        shares.join({1: value})
