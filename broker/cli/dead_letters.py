"""`isthmus deadletter`: what a sink's destination refused for good."""

from __future__ import annotations

import click

from broker.cli.common import DONE, FAILED, ask, common, complain, guarded
from broker.cli.output import print_record, print_table

_TIMEOUT = 600.0
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_ids = click.argument("ids", metavar="[ID]...", nargs=-1)


@click.group()
def deadletter() -> None:
    """Records that the destination of a sink will never take, with the reason."""


@deadletter.command("list")
@click.argument("name")
@click.option("--limit", type=click.IntRange(1, 65_535), default=100, show_default=True, help="At most so many.")
@_as_json
@common
@guarded
def listing(name: str, limit: int, as_json: bool) -> int:
    """List the oldest dead letters of a sink."""
    rows = ask("deadletter.list", timeout=_TIMEOUT, name=name, limit=limit)
    print_table(rows, ("id", "topic", "clientid", "attempts", "bytes", "error"), as_json)
    return DONE


@deadletter.command("show")
@click.argument("name")
@click.argument("id")
@_as_json
@common
@guarded
def show(name: str, id: str, as_json: bool) -> int:
    """Show one dead letter with its payload."""
    print_record(ask("deadletter.show", timeout=_TIMEOUT, name=name, id=id), as_json)
    return DONE


@deadletter.command("replay")
@click.argument("name")
@_ids
@common
@guarded
def replay(name: str, ids: tuple[str, ...]) -> int:
    """Put dead letters, all or some, back into the queue of their sink."""
    answer = ask("deadletter.replay", timeout=_TIMEOUT, name=name, ids=ids)
    click.echo(f"{answer['replayed']} replayed, {answer['left']} left")
    return complain(FAILED, answer["problem"]) if answer["problem"] else DONE


@deadletter.command("purge")
@click.argument("name")
@_ids
@common
@guarded
def purge(name: str, ids: tuple[str, ...]) -> int:
    """Delete dead letters, all or some."""
    answer = ask("deadletter.purge", timeout=_TIMEOUT, name=name, ids=ids)
    click.echo(f"{answer['purged']} deleted, {answer['left']} left")
    return DONE
