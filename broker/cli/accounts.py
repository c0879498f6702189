"""`isthmus user` edits the accounts kept on this machine; `isthmus ban` asks the running broker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from broker.admin import control
from broker.cli.access import read_password
from broker.cli.common import DONE, FAILED, WRONG, F, ask, common, complain, guarded, options
from broker.cli.output import print_json, print_table
from broker.config import firstrun
from broker.config.settings import Instance
from broker.config.types import LONGEST, parse_duration
from broker.extend.auth import AccountError, Accounts

_instance = click.option("--instance", metavar="NAME", help="The [auth.NAME] that keeps the accounts, when several do.")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def user() -> None:
    """Accounts kept on this machine: in a file of users or an SQLite file, by [auth.*] of kind file or sqlite.

    A running broker takes a change at once; without one it counts from the next start.
    """


@user.command("add")
@click.argument("name")
@_instance
@common
@guarded
def user_add(name: str, instance: str | None) -> int:
    """Add an account. The password comes from standard input or a prompt."""
    return _edit(name, instance, lambda accounts, hash: accounts.add(name, hash), password=True)


@user.command("passwd")
@click.argument("name")
@click.option("--disconnect", is_flag=True, help="Disconnect who is logged in as this user.")
@_instance
@common
@guarded
def user_passwd(name: str, disconnect: bool, instance: str | None) -> int:
    """Change the password of an account, and end a lock-out. It comes from standard input or a prompt."""

    def edit(accounts: Accounts, hash: str) -> None:
        accounts.passwd(name, hash)

    return _edit(name, instance, edit, password=True, disconnect=disconnect)


@user.command("del")
@click.argument("name")
@_instance
@common
@guarded
def user_del(name: str, instance: str | None) -> int:
    """Delete an account and disconnect who is logged in with it."""
    return _edit(name, instance, lambda accounts, _: accounts.delete(name), disconnect=True)


@user.command("list")
@_instance
@_as_json
@common
@guarded
def user_list(instance: str | None, as_json: bool) -> int:
    """List the accounts and how their passwords are kept."""
    try:
        _, accounts = _find(instance)
        rows = [{"name": one.name, "password": one.scheme, "superuser": one.superuser} for one in accounts.users()]
    except _Unclear as error:
        return complain(WRONG, str(error))
    except (ValueError, OSError) as error:
        return complain(FAILED, str(error))
    print_table(rows, ("name", "password", "superuser"), as_json)
    return DONE


class _Unclear(Exception):
    """Which accounts are meant cannot be told from the configuration and the command line."""


def _find(name: str | None) -> tuple[Instance, Accounts]:
    """The instance that keeps the accounts. Raises _Unclear."""
    configured = options().load().auth
    found: dict[str, Accounts] = {}
    reasons: dict[str, str] = {}
    for key, instance in configured.items():
        make: Callable[[], Accounts] | None = getattr(instance.config, "accounts", None)
        if make is None:
            reasons[key] = f"the users of kind {instance.kind!r} are not kept here"
            continue
        try:
            found[key] = make()
        except AccountError as error:
            reasons[key] = str(error)
    if name is not None and name not in found:
        raise _Unclear(f"auth.{name}: {reasons.get(name, 'there is no such table')}")
    if name is None and len(found) > 1:
        raise _Unclear(f"accounts are kept by {' and '.join(found)}; say which with --instance")
    if not found:
        raise _Unclear(
            'no accounts are kept here: add an [auth.*] with kind = "file" and passwords, or kind = "sqlite"'
        )
    key = name or next(iter(found))
    return configured[key], found[key]


def _edit(
    name: str,
    instance_name: str | None,
    edit: Callable[[Accounts, str], None],
    *,
    password: bool = False,
    disconnect: bool = False,
) -> int:
    try:
        instance, accounts = _find(instance_name)
    except _Unclear as error:
        return complain(WRONG, str(error))
    hash = ""
    if password:
        secret = read_password(confirm=True)
        if not secret:
            return complain(FAILED, "an empty password is no password")
        from broker.access.passwords import hash_password  # takes a tenth of a second to import

        hash = hash_password(secret)
    try:
        edit(accounts, hash)
        rules = firstrun.add_rules(instance)
    except (ValueError, OSError) as error:
        return complain(FAILED, str(error))
    if rules is not None:
        click.echo(f"{rules} is new and gives each user telemetry/USER/#", err=True)
    try:
        answer = ask("accounts.changed", instance=instance.name, file=str(accounts), user=name, disconnect=disconnect)
    except control.NotRunning:
        click.echo(f"{accounts}: done; no broker is running, it counts from the next start")
        return DONE
    except control.CommandFailed as error:
        return complain(FAILED, f"{accounts}: done, but the running broker does not know: {error}")
    click.echo(f"{accounts}: done" + (f", {answer['disconnected']} clients disconnected" if disconnect else ""))
    return DONE


# bans -----------------------------------------------------------------------------------------------------------------


@click.group()
def ban() -> None:
    """Client ids, users and addresses the running broker refuses. They are kept in its store, over restarts."""


def _who(function: F) -> F:
    for option in (
        click.option("--address", metavar="IP[/BITS]", help="An address, or a network such as 10.0.0.0/8."),
        click.option("--user", metavar="NAME", help="A user name."),
        click.option("--client", metavar="ID", help="A client id."),
    ):
        function = option(function)
    return function


def _seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float:
    if value is None:
        return 0.0
    try:
        seconds = parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if not 1 <= seconds <= LONGEST:
        raise click.BadParameter("a ban lasts at least a second; without --for it has no end")
    return seconds


def _one(**who: str | None) -> dict[str, str]:
    given = [{"kind": kind, "name": name} for kind, name in who.items() if name is not None]
    if len(given) != 1:
        raise click.UsageError("give one of --client, --user and --address")
    return given[0]


@ban.command("add")
@_who
@click.option("--for", "seconds", metavar="TIME", callback=_seconds, help='How long, e.g. "10m".  [no end]')
@click.option("--reason", metavar="TEXT", default="", help="Shown in the list and the log, not to the client.")
@common
@guarded
def ban_add(client: str | None, user: str | None, address: str | None, seconds: float, reason: str) -> int:
    """Refuse one, from now on, and disconnect who is connected."""
    answer = ask("ban.add", **_one(client=client, user=user, address=address), seconds=seconds, reason=reason)
    click.echo(f"{answer['banned']} is banned, {answer['disconnected']} clients disconnected")
    return DONE


@ban.command("del")
@_who
@common
@guarded
def ban_del(client: str | None, user: str | None, address: str | None) -> int:
    """Lift a ban; also ends what lock-out and flapping detection imposed."""
    ask("ban.del", **_one(client=client, user=user, address=address))
    return DONE


@ban.command("list")
@_as_json
@common
@guarded
def ban_list(as_json: bool) -> int:
    """List the bans, and who is refused for a while after wrong passwords or for flapping."""
    rows: list[dict[str, Any]] = ask("ban.list")
    if as_json:
        print_json(rows)
        return DONE
    for row in rows:
        row["ends_in_s"] = row.pop("left_s")
    print_table(rows, ("client", "user", "address", "ends_in_s", "by", "reason"), as_json)
    return DONE
