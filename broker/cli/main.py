"""The program `isthmus`: finds the command and imports only what it needs."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import click

from broker import __version__
from broker.cli.common import WRONG, common, complain
from broker.extend.registry import check_layout

_COMMANDS: dict[str, tuple[str, str, str]] = {
    "run": ("broker.cli.run", "run", "Run the broker in the foreground."),
    "check": ("broker.cli.check", "check", "Tell whether this configuration would run."),
    "config": ("broker.cli.config", "config", "Show, compare and describe the configuration."),
    "reload": ("broker.cli.remote", "reload", "Make the running broker read its fragments again."),
    "status": ("broker.cli.remote", "status", "Show what the running broker is doing."),
    "clients": ("broker.cli.remote", "clients", "List, show and disconnect clients."),
    "sinks": ("broker.cli.remote", "sinks", "List, show, pause and resume sinks."),
    "bridges": ("broker.cli.remote", "bridges", "List, show, pause and resume bridges."),
    "queues": ("broker.cli.remote", "queues", "List and drop durable queues."),
    "deadletter": ("broker.cli.dead_letters", "deadletter", "List, show, replay and purge what a destination refused."),
    "store": ("broker.cli.store", "store", "Check, count, export and delete what survives a restart."),
    "auth": ("broker.cli.access", "auth", "Explain who may connect and what they may do."),
    "access": ("broker.cli.access", "access", "Make the running broker ask its backends again."),
    "user": ("broker.cli.accounts", "user", "Add, change, delete and list accounts."),
    "ban": ("broker.cli.accounts", "ban", "Ban client ids, users and addresses."),
    "hash": ("broker.cli.access", "hash_password", "Print the argon2id hash of a password."),
    "import": ("broker.cli.importers", "import_", "Turn the configuration of mosquitto or EMQX into fragments."),
    "bench": ("broker.cli.bench", "bench", "Measure a broker."),
    "worker": ("broker.cli.run", "worker", "Run sinks and bridges against any MQTT 5 broker."),
}
"""Command -> module, name in it, one line of help."""

_ALIASES = {
    "config-show": ("config", "show"),
    "config-diff": ("config", "diff"),
    "config-schema": ("config", "schema"),
    "config-reference": ("config", "reference"),
    "auth-test": ("auth", "test"),
}


class Program(click.Group):
    """Imports a command's module when the command is used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [name for name, (module, _, _) in _COMMANDS.items() if importlib.util.find_spec(module)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in _ALIASES:
            group, inner = _ALIASES[name]
            found = self.get_command(context, group)
            return found.get_command(context, inner) if isinstance(found, click.Group) else None
        if name not in _COMMANDS or not importlib.util.find_spec(_COMMANDS[name][0]):
            return None
        module, attribute, _ = _COMMANDS[name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][2]) for name in self.list_commands(context)])


@click.command(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="isthmus", message="%(prog)s %(version)s")
@common
def program() -> None:
    """An MQTT broker between devices and an enterprise, configured by the fragments in conf.d.

    Exit codes: 0 done, 1 failed, 2 the configuration or command line is wrong, 3 a server cannot be reached, 4 no
    running broker to talk to.
    """


def main() -> None:
    """What the installed command `isthmus` and `python -m broker` call."""
    if sentence := check_layout():
        sys.exit(complain(WRONG, sentence))
    program(prog_name="isthmus")
