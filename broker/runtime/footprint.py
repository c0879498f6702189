"""What we have left on a foreign broker: sessions and their subscriptions, which no MQTT broker tells when asked.

One small file for each instance in the worker's data folder. Without it a filter that was taken out of the
configuration would go on feeding the sink, and a lane that is no more would go on taking its share.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

_log = logging.getLogger(__name__)


class Footprint:
    """Subscriptions by client id, as far as this data folder knows them, on one broker."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder / "worker"
        self._url = url

    def instances(self) -> list[str]:
        """Names of the instances that have left something on this broker."""
        try:
            names = sorted(path.stem for path in self._folder.glob("*.json"))
        except OSError:
            return []
        return [name for name in names if self.of(name)]

    def of(self, instance: str) -> dict[str, list[str]]:
        """Filters by part of the instance: a lane's number."""
        found = self._read(instance).get(self._url)
        return found if isinstance(found, dict) else {}

    def note(self, instance: str, part: str, filters: Iterable[str] | None) -> None:
        """Remember what ``isthmus/<instance>/<part>`` is subscribed to; None: there is no such session any more."""
        known = self._read(instance)
        parts = dict(self.of(instance))
        if filters is None:
            parts.pop(part, None)
        else:
            parts[part] = sorted(filters)
        if parts == self.of(instance):
            return
        known[self._url] = parts
        path = self._folder / f"{instance}.json"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = path.with_suffix(".draft")
            draft.write_text(json.dumps({url: parts for url, parts in known.items() if parts}, indent=1))
            os.replace(draft, path)
        except OSError as error:
            _log.warning("%s: cannot be written, so a later change of filters leaves old ones behind: %s", path, error)

    def _read(self, instance: str) -> dict[str, dict[str, list[str]]]:
        try:
            known = json.loads((self._folder / f"{instance}.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}
