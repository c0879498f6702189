"""A question the driver does not know: who produces into a partition, which transactions are open there (KIP-664)."""

from __future__ import annotations

from collections.abc import Iterable

from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import CompactArray, CompactString, Int16, Int32, Int64, Schema, TaggedFields

from sinks._kafka_part import Place

_TAGS = ("tags", TaggedFields)


class _Answer(Response):  # type: ignore[misc]
    API_KEY = 61
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("topics", CompactArray(
            ("name", CompactString("utf-8")),
            ("partitions", CompactArray(
                ("partition", Int32), ("error_code", Int16), ("error_message", CompactString("utf-8")),
                ("producers", CompactArray(
                    ("producer_id", Int64), ("producer_epoch", Int32), ("last_sequence", Int32),
                    ("last_timestamp", Int64), ("coordinator_epoch", Int32), ("open_since", Int64), _TAGS,
                )),
                _TAGS,
            )),
            _TAGS,
        )),
        _TAGS,
    )  # fmt: skip


class _Question(RequestStruct):  # type: ignore[misc]
    FLEXIBLE_VERSION = True
    API_KEY = 61
    API_VERSION = 0
    RESPONSE_TYPE = _Answer
    SCHEMA = Schema(
        ("topics", CompactArray(("name", CompactString("utf-8")), ("partitions", CompactArray(Int32)), _TAGS)), _TAGS
    )


class DescribeProducers(Request[_Question]):  # type: ignore[misc]
    """Which producers a leader remembers in each of these partitions, and since which offset a transaction is open."""

    API_KEY = 61

    def __init__(self, places: Iterable[Place]) -> None:
        self._topics: dict[str, list[int]] = {}
        for topic, partition in places:
            self._topics.setdefault(topic, []).append(partition)

    def build(self, request_struct_class: type[_Question]) -> _Question:
        return request_struct_class([(topic, numbers, {}) for topic, numbers in self._topics.items()], {})
