"""`isthmus import`: the configuration of another broker as fragments."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from broker.cli import check
from broker.cli.common import DONE, FAILED, WRONG, common, complain, guarded, options
from broker.config.problems import ConfigError
from broker.config.settings import load_settings
from broker.importers.emqx import import_emqx
from broker.importers.findings import Findings
from broker.importers.fragments import Fragment, Taken, land, settle
from broker.importers.mosquitto import import_mosquitto
from broker.importers.source import SourceError

_source = click.argument("source", metavar="FILE", type=click.Path(path_type=Path))
_out = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder the fragments are written to, made when it is not there.  [that of --conf]",
)
_OF_LOGS = ("log_format", "log_level")
"""Common options that mean nothing here: what is to be said is the output."""


@click.group("import", short_help="Turn the configuration of mosquitto or EMQX into fragments.")
def import_() -> None:
    """Turn the configuration of another broker into fragments that `isthmus check` accepts.

    Nothing is ever overwritten. Each setting without an equivalent is printed with its file and line as `not carried
    over`; what cannot be used as it is, such as a listener whose certificate is not there, is written with
    enabled = false. Fragments that hold secrets are readable by their owner alone. Sessions and messages of the other
    broker are not read.
    """


def _offer(name: str, read: Callable[[Path], Findings], text: str) -> None:
    """Add the command that imports what `read` reads."""

    @import_.command(name, help=text)
    @_source
    @_out
    @common
    @guarded
    def command(source: Path, out: Path | None) -> int:
        return _import(read, source, out)

    command.params = [one for one in command.params if one.name not in _OF_LOGS]


_offer(
    "mosquitto",
    import_mosquitto,
    "Import mosquitto.conf, with what it includes. Password and rule files are used where and as they are.",
)
_offer(
    "emqx",
    import_emqx,
    "Import emqx.conf of EMQX 5, or of EMQ 2 to 4 with the files in plugins/ beside it; told apart by the text.",
)


def _import(read: Callable[[Path], Findings], source: Path, out: Path | None) -> int:
    folder = out or options().conf
    if folder is None:
        raise click.UsageError("Missing option '--out'.")
    folder = folder.absolute()
    judge = _Judge(folder)
    try:
        found = read(source)
        written = land(settle(found, judge.problems), folder)
    except (SourceError, Taken) as error:
        return complain(WRONG, str(error))
    except OSError as error:
        return complain(FAILED, f"{error.filename or folder}: {error.strerror or error}; nothing was written")
    for line in found.lines():
        click.echo(line)
    for path in written:
        click.echo(f"written: {path}")
    return complain(DONE, *(f"warning: {warning}" for warning in judge.warnings))


class _Judge:
    """What `isthmus check` says about a folder with more fragments in it than there are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.warnings: list[str] = []

    def problems(self, fragments: Mapping[str, Fragment]) -> list[str]:
        """Its problems; raises Taken when the folder has a fragment of the same name."""
        with tempfile.TemporaryDirectory() as where:
            stage = Path(where) / self._folder.name
            stage.mkdir()
            for path in sorted(self._folder.glob("*.toml")) if self._folder.is_dir() else ():
                if path.name in fragments:
                    raise Taken(path)
                (stage / path.name).symlink_to(path)
            for name, fragment in fragments.items():
                (stage / name).write_text(fragment.text, "utf-8")
            chosen = options()
            try:
                settings = load_settings(stage, data=chosen.data, sets=chosen.sets, base=self._folder.parent)
            except ConfigError as error:
                return error.problems
            self.warnings = settings.warnings
            return asyncio.run(check.try_local(settings))  # what it opens: files of users and rules
