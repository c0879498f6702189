"""What becomes of the records of a batch, remembered until all are settled; and texts that name a place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from broker.config.template import MissingValue, Template
from broker.extend.record import compile_template, to_text
from broker.extend.sink import BatchFailed, Record

_MOST = 262_144


class Progress:
    """A batch that cannot be finished comes again, whole: what of it is stored or refused already is not sent twice."""

    def __init__(self) -> None:
        self._known: dict[str | int, tuple[Record, str | None]] = {}  # it keeps the record: no other gets its identity

    def of(self, batch: Sequence[Record]) -> Work:
        """`with progress.of(batch) as work:`, in which an exception means that the batch comes again."""
        return Work(batch, self._known)


class Work:
    """One write. Leaving it with refused records raises BatchFailed."""

    def __init__(self, batch: Sequence[Record], known: dict[str | int, tuple[Record, str | None]]) -> None:
        self.batch = batch
        self.todo: Sequence[int] = range(len(batch))
        """Positions that are neither stored nor refused."""
        self._known = known
        self._stored: list[int] = []
        self._refused: dict[int, str] = {}
        if known:
            before = [known.get(record.identity) for record in batch]
            self.todo = [position for position, entry in enumerate(before) if entry is None]
            self._refused = {p: entry[1] for p, entry in enumerate(before) if entry is not None and entry[1]}

    def stored(self, positions: Sequence[int]) -> None:
        """The target has these."""
        self._stored += positions

    def refuse(self, position: int, reason: str) -> None:
        """The target can never take this one."""
        self._refused[position] = reason

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        known, batch = self._known, self.batch
        if kind is not None:
            if len(known) > _MOST:  # of records that never came again: their queue was dropped
                known.clear()
            known.update((batch[p].identity, (batch[p], None)) for p in self._stored)
            known.update((batch[p].identity, (batch[p], reason)) for p, reason in self._refused.items())
            return
        if known:
            for record in batch:
                known.pop(record.identity, None)
        if self._refused:
            raise BatchFailed(self._refused)


def naming(template: Template) -> Callable[[Record], str]:
    """As `compile_template`, for what names a place: MissingValue where a placeholder has no value, ValueError where
    one is no text."""
    render = compile_template(template)
    needed = [(name, compile_template(Template(f"${{{name}}}"))) for name in template.names]

    def name_of(record: Record) -> str:
        for name, find in needed:
            if find(record) is None:
                raise MissingValue(name)
        text = to_text(render(record))
        if isinstance(text, bytes):
            raise ValueError(f"{template.text}: the value is no text")
        return text

    return name_of
