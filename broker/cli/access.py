"""`isthmus auth test`, `isthmus hash` and `isthmus access flush`."""

from __future__ import annotations

import asyncio
import sys

import click

from broker.cli.common import DONE, FAILED, UNREACHABLE, WRONG, ask, common, complain, guarded, options
from broker.cli.output import print_json


@click.group()
def auth() -> None:
    """Who may connect, and what they may do."""


@auth.command("test")
@click.option("--user", "username", metavar="NAME", help="User name; without it the client is anonymous.")
@click.option("--client", "clientid", required=True, metavar="ID", help="Client id.")
@click.option("--peer", "peerhost", default="127.0.0.1", metavar="IP", show_default=True, help="The client's address.")
@click.option("--publish", metavar="TOPIC", help="Also ask for the right to publish to this topic.")
@click.option("--subscribe", metavar="FILTER", help="Also ask for the right to subscribe to this filter.")
@click.option("--qos", type=click.IntRange(0, 2), help="With this QoS only; without it, with every QoS.")
@click.option("--retain/--no-retain", default=None, help="Only retained or only not; without it, both.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@common
@guarded
def auth_test(
    username: str | None,
    clientid: str,
    peerhost: str,
    publish: str | None,
    subscribe: str | None,
    qos: int | None,
    retain: bool | None,
    as_json: bool,
) -> int:
    """Explain a verdict step by step. Needs no running broker; the password comes from standard input or a prompt.

    The last line is allow, deny or error; the exit code 0, 1 or 3.
    """
    if publish is not None and subscribe is not None:
        return complain(WRONG, "give --publish or --subscribe, not both")
    settings = options().load()
    password = read_password() if username is not None else None
    from broker.access.explain import explain

    explanation = asyncio.run(
        explain(
            settings,
            username=username,
            password=password,
            clientid=clientid,
            peerhost=peerhost,
            publish=publish,
            subscribe=subscribe,
            qos=qos,
            retain=retain,
        )
    )
    if as_json:
        print_json({"verdict": explanation.verdict, "lines": list(explanation.lines)})
    else:
        for line in explanation.lines:
            click.echo(line)
        click.echo(explanation.verdict)
    codes: dict[str, int] = {"allow": DONE, "deny": FAILED}
    return codes.get(explanation.verdict, UNREACHABLE)


@click.command("hash")
@common
@guarded
def hash_password() -> int:
    """Read a password from standard input and print its argon2id hash, for a passwords file."""
    password = read_password(confirm=True)
    if not password:
        return complain(FAILED, "an empty password is no password")
    import argon2

    click.echo(argon2.PasswordHasher().hash(password))
    return DONE


@click.group()
def access() -> None:
    """What the running broker remembers about users and their rights."""


@access.command("flush")
@click.option("--user", metavar="NAME", help="Of this user.")
@click.option("--client", metavar="ID", help="Of the user of this client.")
@click.option("--all", "everybody", is_flag=True, help="Of everybody.")
@common
@guarded
def access_flush(user: str | None, client: str | None, everybody: bool) -> int:
    """Make the running broker ask the backends again: forget verdicts, read the rights of connected clients.

    Who is no longer known there, or no longer allowed, is disconnected or loses the subscription.
    """
    if [user is not None, client is not None, everybody].count(True) != 1:
        return complain(WRONG, "give one of --user, --client and --all")
    answer = ask("access.flush", user=user, client=client, all=everybody)
    click.echo(f"{answer['forgotten']} verdicts forgotten; rights are read again")
    return DONE


def read_password(confirm: bool = False) -> bytes:
    """One line of standard input without its end, or what is typed at a prompt that does not show it."""
    if sys.stdin.isatty():
        typed: str = click.prompt("Password", hide_input=True, confirmation_prompt=confirm, default="", err=True)
        return typed.encode()
    line = sys.stdin.buffer.readline()
    return line.removesuffix(b"\n").removesuffix(b"\r")
