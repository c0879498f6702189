"""`isthmus run` and `isthmus worker`: the two commands that stay."""

from __future__ import annotations

import logging
import sys

import click

from broker.cli.common import WRONG, common, complain, guarded, options
from broker.runtime import logs


@click.command()
@click.option("--accept-loss", is_flag=True, help="Start although the store is damaged: what cannot be read is lost.")
@common
@guarded
def run(accept_loss: bool) -> int:
    """Run the broker in the foreground.

    Standard output gets one line `ready …` once every listener accepts; the log goes to standard error. SIGHUP
    reloads, SIGTERM and SIGINT stop it within ten seconds, a second one at once.
    """
    chosen = options()
    from broker import app

    return app.serve(chosen.load, log_format=chosen.log_format, log_level=chosen.log_level, accept_loss=accept_loss)


@click.command()
@click.option("--broker", "url", required=True, metavar="URL", help="mqtt://, mqtts://, ws://, wss:// or unix://")
@click.option("--only", multiple=True, metavar="NAME", help="Run this sink or bridge alone; repeatable.")
@click.option("--username", help="User name for that broker.")
@click.option("--password-stdin", is_flag=True, help="Read the password for that broker from standard input.")
@common
@guarded
def worker(url: str, only: tuple[str, ...], username: str | None, password_stdin: bool) -> int:
    """Run the configured sinks and bridges against any MQTT 5 broker.

    Standard output gets one line `ready sinks=… bridges=…`.
    """
    chosen = options()
    logs.configure(chosen.log_format, chosen.log_level)
    settings = chosen.load()
    for warning in settings.warnings:
        logging.getLogger("broker.config").warning("%s", warning)
    password = sys.stdin.readline().rstrip("\r\n") if password_stdin else None
    from broker.runtime import foreign

    try:
        return foreign.serve(settings, url, list(only), username=username, password=password)
    except ValueError as error:  # the address
        return complain(WRONG, f"--broker {url}: {error}")
