"""Lists of topic filters in a table, as rules: what a user, a group or a network may do."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, model_validator

from auth._acl import one_rule
from broker.extend.auth import Action, Rule


class Rights(BaseModel):
    """The keys of every table that gives rights. Denials count before permissions."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, hide_input_in_errors=True)

    publish: tuple[str, ...] = ()
    """Topic filters to which may be published; with ``${username}``, ``${clientid}``, ``${attr.NAME}``. ``eq a/+`` is
    the topic ``a/+`` to the letter."""
    subscribe: tuple[str, ...] = ()
    """Topic filters that may be subscribed to and received from."""
    deny_publish: tuple[str, ...] = ()
    """Topic filters to which may not be published, whatever else is allowed."""
    deny_subscribe: tuple[str, ...] = ()
    """Topic filters that may not be received from, whatever else is allowed."""

    @model_validator(mode="after")
    def _check_filters(self) -> Rights:
        for allow in (False, True):
            self.rules(allow, "")
        return self

    def rules(self, allow: bool, source: str) -> list[Rule]:
        """The permissions or the denials. ValueError."""
        publish, subscribe = (self.publish, self.subscribe) if allow else (self.deny_publish, self.deny_subscribe)
        kinds: tuple[tuple[Action, tuple[str, ...]], ...] = (("publish", publish), ("subscribe", subscribe))
        return [one_rule(allow, action, text, source) for action, texts in kinds for text in texts]


def in_order(tables: Iterable[tuple[str, Rights]]) -> list[Rule]:
    """The rules of several tables, given with what they are called: all denials, then all permissions."""
    named = list(tables)
    return [rule for allow in (False, True) for source, rights in named for rule in rights.rules(allow, source)]
