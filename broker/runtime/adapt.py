"""What changes in the configuration of an instance that is fed by somebody else's broker."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from broker.config.settings import Instance, Settings, restore
from broker.config.template import Template
from broker.extend.condition import Condition
from broker.extend.record import VOUCHED
from broker.extend.registry import InstanceConfig
from broker.runtime.assignment import Assignment

_BROKERS_OWN = ("ack", "queue")
"""Keys that tell the broker how to keep messages: somebody else's has its own rules."""
_QUOTED = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'[^']*'")
_NAME = re.compile(r"(?<![\w.\]])[A-Za-z_]\w*")


class Refused(ValueError):
    """These instances cannot run beside a foreign broker."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def adapt(instance: Instance, settings: Settings) -> Assignment:
    """What to run of one instance, with defaults that need no metadata.

    Raises Refused with a line for each key that asks for what only our own broker knows.
    """
    assignment = Assignment.of(instance, settings.base)
    config = instance.config
    problems = [
        settings.problem(f"{assignment.key}.{key}", f"${{{name}}} in {text!r}: only Isthmus itself knows it")
        for field in sorted(config.model_fields_set)
        for key, text, names in _questions(field, getattr(config, field, None), _known(config))
        for name in names
    ]
    if "order_key" in config.model_fields_set and getattr(config, "lanes", 1) > 1:
        problems.append(
            settings.problem(
                f"{assignment.key}.order_key",
                "only Isthmus itself gives each lane its own messages; write lanes = 1, or leave order_key out where "
                "their order does not matter",
            )
        )
    if problems:
        raise Refused(problems)
    return replace(assignment, raw={**instance.raw, **_defaults(config)})


def adapt_all(instances: Sequence[Instance], settings: Settings) -> list[Assignment]:
    """What to run of each. Raises Refused with the problems of all of them."""
    adapted: list[Assignment] = []
    problems: list[str] = []
    for instance in instances:
        try:
            assignment = adapt(instance, settings)
            restore(instance.room, instance.name, assignment.raw, settings.base)
            adapted.append(assignment)
        except Refused as error:
            problems += error.problems
        except ValueError as error:  # what was put in place of a default does not fit
            problems.append(settings.problem(f"{instance.room}.{instance.name}", str(error)))
    if problems:
        raise Refused(problems)
    return adapted


def without_effect(instance: Instance, settings: Settings) -> list[str]:
    """A sentence for each key that was written and that only our own broker obeys."""
    return [
        settings.problem(
            f"{instance.room}.{instance.name}.{key}",
            "has no effect here, the broker keeps messages by its own rules and limits",
        )
        for key in _BROKERS_OWN
        if key in instance.config.model_fields_set
    ]


def _defaults(config: InstanceConfig) -> dict[str, Any]:
    """In place of defaults that need metadata: the topic as key, tables without the entries in question."""
    changed: dict[str, Any] = {}
    known = _known(config)
    for field in type(config).model_fields:
        value = getattr(config, field)
        if field in config.model_fields_set or not any(names for _, _, names in _questions(field, value, known)):
            continue
        if isinstance(value, dict):
            changed[field] = {k: t.text for k, t in value.items() if isinstance(t, Template) and not _vouched(t, known)}
        elif isinstance(value, Template):
            changed[field] = "${topic}"
    return changed


def _known(config: InstanceConfig) -> frozenset[str]:
    """What templates can have though the broker does not tell it: an `idempotency_key` is made of what came."""
    return frozenset(("msgid",)) if getattr(config, "idempotency_key", None) is not None else frozenset()


def _questions(key: str, value: object, known: frozenset[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Each template and condition below a key: its place, its text, and what of it nobody vouches for."""
    if isinstance(value, Template):
        yield key, value.text, _vouched(value, known)
    elif isinstance(value, Condition):
        yield key, value.text, [name for name in _NAME.findall(_QUOTED.sub("", value.text)) if name in VOUCHED]
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _questions(f"{key}.{name}", item, known)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _questions(key, item, known)


def _vouched(template: Template, known: frozenset[str]) -> list[str]:
    return [name for name in template.names if name.partition(".")[0].partition("[")[0] in VOUCHED - known]
