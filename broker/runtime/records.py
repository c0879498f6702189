"""Records of what a lane has received."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import orjson

from broker.client.delivery import Delivery
from broker.extend.record import record_from_publish
from broker.extend.sink import Record
from broker.mqtt.packets import Publish

_log = logging.getLogger(__name__)

_MOST_TOPICS = 10_000
_topics: dict[bytes, str] = {}
"""Topics as text: a backlog has few different ones."""


def records(batch: Sequence[Publish], trusted: bool) -> list[Record]:
    """One for each, in order; ``trusted`` when our own broker says who published. Never raises."""
    try:
        return [_vouched(p) if type(p) is Delivery else record_from_publish(p, trusted) for p in batch]
    except Exception:  # one of them cannot be read
        return [_in_any_case(publish, trusted) for publish in batch]


def _vouched(delivery: Delivery) -> Record:
    raw = delivery.topic
    topic = _topics.get(raw)
    if topic is None:
        if len(_topics) >= _MOST_TOPICS:
            _topics.clear()
        topic = _topics[raw] = raw.decode()
    who = orjson.loads(delivery.metadata)
    return Record(
        topic, delivery.payload, who["q"], who["r"] == 1, who["c"], who["u"], who["a"], who["i"] or None, who["t"],
        None, None, None, [], who["n"],
    )  # fmt: skip


def _in_any_case(publish: Publish, trusted: bool) -> Record:
    """A record even of what cannot be read: metadata that nobody vouches for is left out."""
    try:
        return _vouched(publish) if type(publish) is Delivery else record_from_publish(publish, trusted)
    except Exception as error:
        _log.warning("the metadata of a message cannot be read, it is passed on without: %s", error)
    try:
        return record_from_publish(publish, False)
    except Exception as error:
        _log.warning("a message is passed on as far as it can be read: %s", error)
    return Record(topic=publish.topic.decode("utf-8", "replace"), payload=publish.payload)
