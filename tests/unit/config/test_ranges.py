"""Every number that can be configured has limits, and what is outside is refused before anything is started."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, get_args

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from broker.config import listeners, settings
from broker.extend import registry


def models() -> Iterator[tuple[str, type[BaseModel]]]:
    yield from settings.SECTIONS.items()
    yield from ((f"listeners.{kind}", model) for kind, model in listeners.KINDS.items())
    for room in settings.ROOMS:
        yield from ((f"{room}.{kind}", registry.load(room, kind).config) for kind in registry.kinds(room))


def numbers(place: str, model: type[BaseModel], above: tuple[type[BaseModel], ...] = ()) -> Iterator[tuple[str, Any]]:
    """Each field that holds a number, also in tables below, with what it takes."""
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in above:
                yield from numbers(f"{place}.{name}", kind, (*above, model))
        if int in kinds or float in kinds:
            yield f"{place}.{name}", field


NUMBERS = dict(found for place, model in models() for found in numbers(place, model))


@pytest.mark.parametrize("place", NUMBERS)
def test_c20_no_number_may_be_negative_infinite_or_over_2_to_the_63(place: str) -> None:
    field: FieldInfo = NUMBERS[place]
    takes: TypeAdapter[Any] = TypeAdapter(
        Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    )
    for value in (-1, 1 << 63, math.nan, math.inf, "-1s", "5 parsecs"):
        with pytest.raises(ValidationError):
            takes.validate_python(value)


def test_c20_the_numbers_are_found() -> None:
    assert {"limits.max_inflight", "store.min_free", "sinks.kafka.batch.linger", "bridges.mqtt.restart.cap"} <= set(
        NUMBERS
    )
