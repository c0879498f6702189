"""The checker finds what it is there to find."""

from __future__ import annotations

import pytest

from tests.ledger import Ledger, read_stamp, stamp


def filled(arrivals: list[int], acknowledged: int = 5) -> Ledger:
    ledger = Ledger()
    for _ in range(5):
        number, _ = ledger.next("a")
        if number <= acknowledged:
            ledger.acknowledged("a", number)
    for number in arrivals:
        ledger.arrived(stamp("a", number, 40))
    return ledger


def test_a_stamp_survives_the_way_and_its_filling() -> None:
    assert read_stamp(stamp("device/1", 17, 64)) == ("device/1", 17)
    assert len(stamp("device/1", 17, 64)) == 64


def test_everything_once_and_in_order_passes() -> None:
    report = filled([1, 2, 3, 4, 5]).check()
    assert (report.acknowledged, report.arrived) == (5, 5)


def test_an_unacknowledged_message_may_be_missing() -> None:
    assert filled([1, 2, 3], acknowledged=3).check().unacknowledged == 2


@pytest.mark.parametrize(
    ("arrivals", "finding"),
    [
        ([1, 2, 4, 5], "1 acknowledged messages lost, first ('a', 3)"),
        ([1, 2, 3, 3, 4, 5], "1 arrived more than once"),
        ([1, 3, 2, 4, 5], "1 out of order, first ('a', 2, 3)"),
        ([1, 2, 3, 4, 5, 6], "1 arrived that nobody sent"),
    ],
)
def test_each_fault_is_named(arrivals: list[int], finding: str) -> None:
    with pytest.raises(AssertionError, match="acknowledged") as caught:
        filled(arrivals).check()
    assert finding in str(caught.value)


def test_nothing_acknowledged_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="nothing was acknowledged"):
        filled([], acknowledged=0).check()


def test_a_repeated_message_may_be_allowed_but_not_a_new_one_behind_a_newer() -> None:
    filled([1, 2, 3, 2, 3, 4, 5]).check(duplicates_allowed=True, redelivery=True)
    with pytest.raises(AssertionError, match="out of order"):
        filled([1, 2, 4, 2, 3, 5]).check(duplicates_allowed=True)


def test_an_acknowledgement_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="never sent"):
        Ledger().acknowledged("a", 1)


def test_missing_counts_down_to_nothing() -> None:
    ledger = filled([1, 2])
    assert ledger.missing() == 3
    for number in (3, 4, 5):
        ledger.arrived(stamp("a", number))
    assert ledger.missing() == 0
