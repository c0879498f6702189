"""What the command line says about the configuration: which folder, what is set on top, how to log."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from broker.config import fragments
from broker.config.secrets import Substitution
from broker.config.settings import Settings, load_settings

SYSTEM = Path("/etc/isthmus/conf.d")
PACKAGED = Path(__file__).resolve().parent.parent / "defaults" / "conf.d"


@dataclass(slots=True)
class Options:
    """The options every command takes."""

    conf: Path | None = None
    """Folder of fragments; None: `./conf.d`, else `/etc/isthmus/conf.d`, else the packaged ones."""
    data: Path | None = None
    """Data folder in place of the configured one."""
    sets: tuple[str, ...] = ()
    """``section.key=value``, each of which wins over fragments and environment."""
    log_format: Literal["text", "json"] = "text"
    log_level: str = "info"

    def folder(self) -> tuple[Path, Path]:
        """The folder of fragments and the folder where relative paths start.

        With the packaged fragments that is the current folder.
        """
        if self.conf is not None:
            conf = self.conf.absolute()
            return conf, conf.parent
        for conf in (Path.cwd() / "conf.d", SYSTEM):
            if conf.is_dir():
                return conf, conf.parent
        return PACKAGED, Path.cwd()

    def load(self) -> Settings:
        """The validated configuration; raises ConfigError. Reads everything again each time."""
        conf, base = self.folder()
        return load_settings(conf, data=self.data, sets=self.sets, base=base)

    def data_folder(self) -> Path:
        """Where the running broker's control socket is, also when a fragment is broken at the moment."""
        if self.data is not None:
            return self.data.absolute()
        conf, base = self.folder()
        value: Any = fragments.read(conf, self.sets).values.get("broker", {})
        data = value.get("data", "data") if isinstance(value, dict) else "data"
        return base / str(Substitution(base, os.environ).apply(data, ()))
