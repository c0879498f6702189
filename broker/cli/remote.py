"""Commands that ask the running broker: reload, status, clients, sinks, bridges, queues."""

from __future__ import annotations

import click

from broker.cli.common import DONE, ask, common, guarded
from broker.cli.output import print_json, print_record, print_table

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@_as_json
@common
@guarded
def reload(as_json: bool) -> int:
    """Make the running broker read its fragments again; on any error it keeps what it has."""
    answer = ask("reload")
    if as_json:
        print_json(answer)
        return DONE
    for word in ("added", "removed", "changed", "unchanged"):
        click.echo(f"{word}: {' '.join(answer.get(word, ()))}".rstrip())
    for name, queued in answer.get("orphans", {}).items():
        kept = f"{queued} messages of {name} are kept"
        click.echo(f"orphan: {kept}; isthmus queues drop {name} deletes them", err=True)
    return DONE


@click.command()
@_as_json
@common
@guarded
def status(as_json: bool) -> int:
    """Show what the running broker is doing."""
    print_record(ask("status"), as_json)
    return DONE


@click.group()
def clients() -> None:
    """Sessions of clients."""


@clients.command("list")
@_as_json
@common
@guarded
def clients_list(as_json: bool) -> int:
    """List the clients that are connected or have a session."""
    rows = ask("clients.list")
    print_table(rows, ("clientid", "username", "connected", "peer", "listener", "subscriptions", "queued"), as_json)
    return DONE


@clients.command("show")
@click.argument("clientid", metavar="ID")
@_as_json
@common
@guarded
def clients_show(clientid: str, as_json: bool) -> int:
    """Show one client."""
    print_record(ask("clients.show", id=clientid), as_json)
    return DONE


@clients.command("kick")
@click.argument("clientid", metavar="ID")
@common
@guarded
def clients_kick(clientid: str) -> int:
    """Disconnect one client; it may come back."""
    ask("clients.kick", id=clientid)
    return DONE


def _instances(room: str, columns: tuple[str, ...]) -> click.Group:
    """`list`, `show`, `pause` and `resume` for sinks or bridges."""
    group = click.Group(room, help=f"The configured {room}.")

    @group.command("list")
    @_as_json
    @common
    @guarded
    def listing(as_json: bool) -> int:
        print_table(ask(f"{room}.list"), ("name", *columns), as_json)
        return DONE

    @group.command("show")
    @click.argument("name")
    @_as_json
    @common
    @guarded
    def show(name: str, as_json: bool) -> int:
        print_record(ask(f"{room}.show", name=name), as_json)
        return DONE

    @group.command("pause")
    @click.argument("name")
    @common
    @guarded
    def pause(name: str) -> int:
        ask(f"{room}.pause", name=name)
        return DONE

    @group.command("resume")
    @click.argument("name")
    @common
    @guarded
    def resume(name: str) -> int:
        ask(f"{room}.resume", name=name)
        return DONE

    listing.help = f"List the {room} and what they do."
    show.help = f"Show one of the {room}."
    pause.help = "Stop it; its queue goes on filling."
    resume.help = "Let it go on."
    return group


_FLOW = ("state", "worker", "queued", "oldest_s", "per_second", "acked", "retried", "dropped")
sinks = _instances("sinks", (*_FLOW, "dead", "dead_letters", "last_error", "configured"))
bridges = _instances("bridges", (*_FLOW, "last_error", "configured"))


@click.group()
def queues() -> None:
    """Durable queues of sinks, bridges and sessions without a client."""


@queues.command("list")
@_as_json
@common
@guarded
def queues_list(as_json: bool) -> int:
    """List the queues; an orphan is one whose fragment is gone."""
    print_table(ask("queues.list"), ("name", "orphan", "queued", "bytes"), as_json)
    return DONE


@queues.command("drop")
@click.argument("name")
@common
@guarded
def queues_drop(name: str) -> int:
    """Delete a queue and everything in it."""
    answer = ask("queues.drop", name=name)
    click.echo(f"{answer['dropped']} messages deleted")
    return DONE
