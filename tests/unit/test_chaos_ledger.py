"""The chaos run's books find what they are there to find, in histories broken by hand."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest

from tests.chaos.ledger import Books, Copies, KafkaReport, PathReport, Report, Stored, Stream, compare_kafka
from tests.ledger import stamp

KIND = "devices at QoS 2"


def books(arrivals: Sequence[int], copies: Copies = Copies.ONCE, *, qos: int = 2, acknowledged: int = 5) -> Books:
    """Five messages of stream `a` for the path `p`, each sent once, the first ones acknowledged in round 3."""
    found = Books()
    found.path("p", copies)
    stream = found.stream("a", qos, ["p"], KIND)
    found.round = 3
    for _ in range(5):
        send(found, stream)
    for number in range(1, acknowledged + 1):
        found.promised(stream, number)
    for number in arrivals:
        found.arrived("p", stamp("a", number, 40))
    return found


def send(found: Books, stream: Stream) -> None:
    number, _ = found.next(stream)
    found.sent(stream, number)


def whole(paths: dict[str, PathReport], kafka: KafkaReport | None = None) -> Report:
    """A report in which all else is well."""
    return Report(
        seed=1, rounds=1, acknowledged={KIND: 5}, elsewhere="", kills={"broker": 1}, paths=paths,
        kafka=kafka or KafkaReport(),
    )  # fmt: skip


# --- paths -----------------------------------------------------------------------------------------------------------


def test_everything_once_and_in_order_passes() -> None:
    found = books([1, 2, 3, 4, 5])
    assert found.missing(["p"]) == 0
    assert whole(found.compare()).problems() == []


def test_an_unacknowledged_message_may_be_missing_or_there() -> None:
    assert whole(books([1, 2, 3], acknowledged=3).compare()).problems() == []
    assert whole(books([1, 2, 3, 4], acknowledged=3).compare()).problems() == []


@pytest.mark.parametrize(
    ("arrivals", "problem"),
    [
        ([1, 2, 4, 5], "p: 1 acknowledged messages lost, first a|3 (round 3)"),
        ([1, 2, 3], "p: 2 acknowledged messages lost, first a|4 (round 3)"),
        ([], "p: 5 acknowledged messages lost, first a|1 (round 3)"),
        ([1, 2, 3, 3, 4, 5], "p: 1 came out too often, first a|3 (copies 2)"),
        ([1, 2, 3, 4, 5, 1], "p: 1 came out too often, first a|1 (copies 2)"),
        ([1, 3, 2, 4, 5], "p: 1 out of order, first a|2 (highest 3)"),
        ([1, 2, 3, 4, 5, 6], "p: 1 that nobody sent there, first a|6"),
    ],
)
def test_each_fault_is_found(arrivals: list[int], problem: str) -> None:
    assert whole(books(arrivals).compare()).problems() == [problem]


def test_faults_do_not_hide_each_other() -> None:
    problems = whole(books([2, 2, 1, 9]).compare()).problems()
    assert [text.split(",")[0] for text in problems] == [
        "p: 3 acknowledged messages lost",
        "p: 1 came out too often",
        "p: 1 out of order",
        "p: 1 that nobody sent there",
    ]


def test_what_belongs_elsewhere_or_is_no_message_of_ours_is_a_stranger() -> None:
    found = books([1, 2, 3, 4, 5])
    found.path("q", Copies.ANY)
    found.arrived("q", stamp("a", 1))
    found.arrived("q", b"will")
    assert found.compare()["q"].strangers == ["a|1", "b'will'"]


@pytest.mark.parametrize("copies", [Copies.ANY, Copies.ONCE])
def test_repetitions_at_qos_1_are_counted_and_allowed(copies: Copies) -> None:
    report = books([1, 2, 3, 2, 3, 4, 5], copies, qos=1).compare()
    assert report["p"].extra == 2
    assert whole(report).problems() == []


def test_at_qos_1_too_the_first_copies_keep_their_order() -> None:
    assert whole(books([1, 3, 3, 2, 4, 5], Copies.ANY, qos=1).compare()).problems() == [
        "p: 1 out of order, first a|2 (highest 3)"
    ]


def test_a_row_may_be_there_as_often_as_its_publisher_sent_the_message_at_qos_1() -> None:
    twice = books([1, 2, 3, 3, 4, 5], Copies.AS_SENT, qos=1)
    assert whole(twice.compare()).problems() == ["p: 1 came out too often, first a|3 (copies 2)"]
    twice.sent(twice.streams["a"], 3)
    assert whole(twice.compare()).problems() == []


def test_at_qos_2_a_message_sent_twice_is_still_one_row() -> None:
    twice = books([1, 2, 3, 3, 4, 5], Copies.AS_SENT, qos=2)
    twice.sent(twice.streams["a"], 3)
    assert whole(twice.compare()).problems() == ["p: 1 came out too often, first a|3 (copies 2)"]


@pytest.mark.parametrize(
    ("arrivals", "problems"),
    [
        ([4], []),
        ([5], []),
        ([3], ["p: 1 acknowledged messages lost, first a|4 (round 3)"]),
        ([], ["p: 1 acknowledged messages lost, first a|4 (round 3)"]),
        ([4, 4], ["p: 1 came out too often, first a|4 (copies 2)"]),
    ],
)
def test_of_retained_messages_the_last_acknowledged_or_a_later_one_is_there(
    arrivals: list[int], problems: list[str]
) -> None:
    assert whole(books(arrivals, Copies.LATEST, acknowledged=4).compare()).problems() == problems


def test_missing_counts_down_while_messages_arrive() -> None:
    found = books([1, 2])
    assert found.missing(["p"]) == 3
    for number in (3, 4, 5):
        found.arrived("p", stamp("a", number))
    assert found.missing(["p"]) == 0


def test_a_message_is_acknowledged_once_and_only_after_it_was_sent() -> None:
    found = books([])
    found.promised(found.streams["a"], 1)
    assert found.acknowledged == {KIND: 5}
    number, _ = found.next(found.streams["a"])
    for wrong in (0, number, number + 1):
        with pytest.raises(ValueError, match="never sent"):
            found.promised(found.streams["a"], wrong)


def test_a_stream_is_announced_once_and_to_paths_that_exist() -> None:
    found = books([])
    for name, path in (("a", "p"), ("b", "nowhere")):
        with pytest.raises(ValueError, match="announced"):
            found.stream(name, 1, [path], KIND)


def test_the_record_has_a_line_for_each_acknowledgement_and_receipt() -> None:
    lines = io.BytesIO()
    found = Books(lines)
    found.path("p", Copies.ANY)
    stream = found.stream("a", 1, ["p"], KIND)
    send(found, stream)
    found.arrived("p", stamp("a", 1))
    found.note("kill\tbroker")
    found.promised(stream, 1)
    assert lines.getvalue() == b"got\tp\ta\t1\nkill\tbroker\nack\ta\t1\n"


# --- Kafka -----------------------------------------------------------------------------------------------------------


def records(*batches: tuple[int, str], partition: int = 0) -> list[Stored]:
    """Batches of (when appended, one digit for each message); the message's number is its id."""
    return [Stored(partition, when, f"id{n}", "a", int(n)) for when, numbers in batches for n in numbers]


def compared(stored: list[Stored], kills: list[float]) -> list[str]:
    return compare_kafka(stored, kills, books([]), slack=100).problems()


def test_one_batch_stored_again_after_a_kill_is_allowed() -> None:
    report = compare_kafka(records((1_000, "12"), (2_000, "123"), (3_000, "45")), [1_050], books([]))
    assert (report.records, report.repeated, report.batches) == (7, 2, 1)
    assert whole({}, report).problems() == []


def test_a_batch_stored_again_in_parts_is_one() -> None:
    assert compared(records((1_000, "123"), (2_000, "12"), (2_050, "34")), [1_500]) == []


def test_a_batch_on_its_way_is_appended_shortly_after_the_kill() -> None:
    assert compared(records((1_090, "12"), (2_000, "12")), [1_000]) == []
    assert compared(records((1_200, "12"), (2_000, "12")), [1_000]) != []


@pytest.mark.parametrize("kills", [[], [500.0], [2_500.0]])
def test_a_batch_stored_again_without_a_kill_in_between_is_found(kills: list[float]) -> None:
    assert compared(records((1_000, "12"), (2_000, "12")), kills) == [
        "1 batches stored twice beyond one per partition and kill, first partition 0, appended at 1000"
    ]


def test_two_batches_stored_again_for_one_kill_are_one_too_many() -> None:
    stored = records((1_000, "12"), (1_020, "34"), (2_000, "1234"))
    assert len(compared(stored, [1_050])) == 1
    assert compared(stored, [1_050, 1_900]) == []  # the batch and what came of it, each killed


def test_each_partition_may_have_a_batch_of_its_own() -> None:
    one = records((1_000, "12"), (2_000, "12"))
    other = records((1_001, "34"), (2_001, "34"), partition=1)
    assert compared(one + other, [1_500]) == []


def test_a_batch_stored_three_times_needs_two_kills() -> None:
    stored = records((1_000, "12"), (2_000, "12"), (3_000, "12"))
    assert len(compared(stored, [1_500])) == 1
    assert compared(stored, [1_500, 2_500]) == []


def test_kills_are_given_to_the_batches_that_need_them() -> None:
    stored = records((1_000, "1"), (1_500, "2"), (2_000, "2"), (3_000, "1"))
    assert compared(stored, [1_700, 2_500]) == []


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        ([Stored(0, 1, "", "a", 1)], "a|1 has none"),
        ([Stored(0, 1, "x", "a", 1), Stored(0, 9, "y", "a", 1)], "a|1 has 2"),
        ([Stored(0, 1, "x", "a", 1), Stored(1, 9, "x", "a", 1)], "a|1 is in two partitions"),
        ([Stored(0, 1, "x", "a", 1), Stored(0, 9, "x", "a", 2)], "a|1 and a|2 share one"),
    ],
)
def test_messages_keep_one_id_of_their_own(stored: list[Stored], problem: str) -> None:
    assert compared(stored, [5]) == [f"1 messages with wrong ids, first {problem}"]


def test_at_qos_1_a_message_sent_twice_may_have_two_ids() -> None:
    found = books([], qos=1)
    stored = [Stored(0, 1, "x", "a", 1), Stored(0, 9, "y", "a", 1)]
    assert compare_kafka(stored, [], found).problems() == ["1 messages with wrong ids, first a|1 has 2"]
    found.sent(found.streams["a"], 1)
    assert compare_kafka(stored, [], found).problems() == []


# --- the whole -------------------------------------------------------------------------------------------------------


def test_a_run_without_acknowledgements_or_kills_fails() -> None:
    report = whole({})
    assert report.problems() == []
    report.kills = {"broker": 0}
    assert report.problems() == ["no kill was seen"]
    report.acknowledged = {KIND: 0, "devices at QoS 1": 7}
    assert report.problems() == [f"no message was acknowledged: {KIND}", "no kill was seen"]
    report.acknowledged = {}
    assert report.problems() == ["no message was acknowledged", "no kill was seen"]


def test_everything_else_that_must_not_be_fails_too() -> None:
    report = whole({})
    report.refused = 2
    report.sessions_lost = {"publishers": 1, "subscribers": 0}
    report.left_behind = ["worker 7"]
    report.unfinished = ["queued"]
    report.defects = ["the bridge failed", "it failed again"]
    report.errors = ["a rule was broken"]
    assert report.problems() == [
        "2 messages were refused",
        "1 sessions of publishers were lost",
        "left behind: worker 7",
        "not at rest: queued",
        "2 tracebacks in the log, first: the bridge failed",
        "a rule was broken",
    ]
    assert sum(line.startswith("FAILED: ") for line in report.lines()) == 6


def test_what_another_broker_acknowledged_is_not_in_the_sum() -> None:
    report = whole({})
    report.acknowledged = {KIND: 5, "elsewhere": 7}
    report.elsewhere = "elsewhere"
    assert report.total == 5
