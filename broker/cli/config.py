"""`isthmus config show · diff · schema · reference`: what is in force, what would change, what may be written."""

from __future__ import annotations

import click

from broker.cli.common import DONE, FAILED, WRONG, ask, common, complain, guarded, options
from broker.cli.output import print_json
from broker.config.difference import compare
from broker.config.reference import UnknownTopic
from broker.config.reference import reference as describe
from broker.config.schema import schema as build_schema


@click.group()
def config() -> None:
    """Show, compare and describe the configuration."""


@config.command()
@click.argument("key", required=False)
@click.option("--origin", is_flag=True, help="Say where each value was set.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
@common
@guarded
def show(key: str | None, origin: bool, as_json: bool) -> int:
    """Print every value in force, or those of KEY and below it. Secrets are never shown."""
    items = [
        item
        for item in options().load().items()
        if key is None or item.key == key or item.key.startswith((f"{key}.", f"{key}["))
    ]
    if as_json:
        print_json([item._asdict() for item in items])
    else:
        for item in items:
            click.echo(f"{item.key} = {item.value}" + (f"  # {item.origin}" if origin else ""))
    return DONE if items else complain(FAILED, f"there is no key {key}")


@config.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@common
@guarded
def diff(as_json: bool) -> int:
    """Compare what the broker runs with and what the folder says now.

    Exit code 0 when they are the same, 1 when not, 2 when the folder is wrong.
    """
    difference = compare(ask("config.diff"), options().load().fingerprints)
    changes = {word: getattr(difference, word) for word in ("added", "removed", "changed")}
    if as_json:
        print_json({**changes, "unchanged": difference.unchanged})
    else:
        for word, names in changes.items():
            for name in names:
                click.echo(f"{word}: {name}")
    return FAILED if any(changes.values()) else DONE


@config.command()
@common
@guarded
def schema() -> int:
    """Print the JSON Schema of all fragments together, for editors."""
    print_json(build_schema())
    return DONE


@config.command()
@click.argument("kind", required=False)
@common
@guarded
def reference(kind: str | None) -> int:
    """Print the manual of every key as Markdown, or that of KIND.

    KIND is a table (limits), a room (auth), or a kind of one: auth.ldap, or ldap wherever there is one.
    """
    try:
        click.echo(describe(kind), nl=False)
    except UnknownTopic as error:
        return complain(WRONG, str(error))
    return DONE
