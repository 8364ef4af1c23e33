"""Limits on the bytes of media: of one request, and of all that are here."""

import pytest

from services.mm_encoder.received import HeldBytes, Received
from shared.errors import RequestError


def test_requests_share_a_limit_and_give_back_what_they_held() -> None:
    held = HeldBytes(150)
    with Received(100, held, fits=True) as second:
        with Received(100, held, fits=True) as first:
            first.arrive(90)
            second.arrive(60)
            with pytest.raises(RequestError) as busy:
                second.arrive(1)
            assert (busy.value.failure.status, busy.value.failure.code) == (503, "overloaded")
            first.give_back(30)
            second.arrive(30)
        assert held.sum == 90
    assert held.sum == 0


def test_an_upload_is_held_and_never_refused_for_others() -> None:
    held = HeldBytes(100)
    with Received(100, held, fits=True) as link, Received(100, held, fits=True) as upload:
        link.arrive(100)
        upload.count(50)
        upload.hold(50)
        assert held.sum == 150
        link.give_back(100)
        with pytest.raises(RequestError):
            link.arrive(60)


def test_the_limit_of_one_request_comes_first_and_counts_what_is_gone() -> None:
    with Received(100, HeldBytes(50), fits=True) as received:
        received.arrive(50)
        received.give_back(50)
        with pytest.raises(RequestError) as over:
            received.arrive(51)
    assert over.value.failure.status == 400


def test_what_is_only_counted_is_not_held() -> None:
    held = HeldBytes(100)
    with Received(100, held, fits=True) as received:
        received.count(100)
        assert held.sum == 0
