"""What tells repetitions where the broker's message id cannot: ``idempotency_key = "${clientid}:${payload.id}"``.

A device whose acknowledgement was lost may publish an event anew, which is a new message with a new id. The values of
a key are the same in both. They become a digest in the form of a message id, so that whatever can hold one can hold the
other and no device decides how long it is.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from broker.config.template import MissingValue, Placeholder, Template

if TYPE_CHECKING:
    from broker.extend.sink import Record

Key = Callable[["Record"], str]

_BYTES = 16  # of a message id
_NEW = frozenset(("msgid", "ts", "ts_iso", "."))
_SHARED = frozenset(("clientid", "username", "peerhost", "node", "qos", "retain", "content_type"))


def compile_key(template: Template) -> Key:
    """A function of a record: 32 hex digits, the same where each placeholder has the same value. What a device writes
    into one of them never looks like a part of the next.

    ValueError for a template that could not tell a repetition from another message. The function raises MissingValue
    where a placeholder has no value, or an empty one.
    """
    # not at the top: records stand beside the sinks' configuration, which has keys
    from broker.extend.record import compile_template, to_bytes

    placeholders = [segment for segment in template.segments if isinstance(segment, Placeholder)]
    finds = [(one.name, compile_template(Template(f"${{{one.name}}}"))) for one in placeholders]
    for placeholder in placeholders:
        if placeholder.root in _NEW:
            raise ValueError(f"{placeholder!r} is another each time a message is published: it tells no repetition")
    if all(placeholder.root in _SHARED for placeholder in placeholders):
        raise ValueError(f"{template.text!r} does not tell a client's messages apart; add ${{payload.id}} or the like")
    begin = blake2b(template.text.encode(), digest_size=_BYTES)

    def key(record: Record) -> str:
        digest = begin.copy()
        for name, find in finds:
            value = to_bytes(find(record))
            if not value:
                raise MissingValue(name)
            digest.update(b"%d:%b" % (len(value), value))
        return digest.hexdigest()

    return key


def _check(template: Template) -> Template:
    compile_key(template)
    return template


KeyTemplate = Annotated[Template, AfterValidator(_check)]
"""A template of which `compile_key` makes a key: the type of `idempotency_key`."""
