"""`isthmus run` and `isthmus worker`: the two commands that stay."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

import click

from broker.cli.common import WRONG, common, complain, guarded, options
from broker.client.address import parse, split_login
from broker.client.tls import tls_context
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


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_USERNAME, _PASSWORD = "ISTHMUS_WORKER_USERNAME", "ISTHMUS_WORKER_PASSWORD"


@click.command()
@click.option("--broker", "url", required=True, metavar="URL", help="mqtt://, mqtts://, ws://, wss:// or unix://")
@click.option("--only", multiple=True, metavar="NAME", help="Run this sink or bridge alone; repeatable.")
@click.option("--username", envvar=_USERNAME, help=f"User name for that broker.  [{_USERNAME}]")
@click.option("--password-file", type=click.File("r"), help=f"Holds its password; - is standard input.  [{_PASSWORD}]")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
@click.option("--ca", type=_FILE, help="PEM file of who may vouch for the broker; default: the system's authorities.")
@click.option("--certificate", type=_FILE, help="PEM file of our certificate, where the broker asks for one.")
@click.option("--key", type=_FILE, help="PEM file of its key; default: in the same file.")
@click.option("--key-password-file", type=click.File("r"), help="Holds what the key is encrypted with.")
@click.option("--insecure", is_flag=True, help="Take any certificate; send a password over the network in the clear.")
@common
@guarded
def worker(
    url: str,
    only: tuple[str, ...],
    username: str | None,
    password_file: TextIO | None,
    password_stdin: bool,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    key_password_file: TextIO | None,
    insecure: bool,
) -> int:
    """Run the configured sinks and bridges against any MQTT 5 broker.

    Standard output gets one line `ready sinks=… bridges=…`. The broker's certificate is verified unless --insecure.
    """
    chosen = options()
    logs.configure(chosen.log_format, chosen.log_level)
    settings = chosen.load()
    for warning in settings.warnings:
        logging.getLogger("broker.config").warning("%s", warning)
    if password_stdin and password_file is not None:
        return complain(WRONG, "give --password-file or --password-stdin, not both")
    if key is not None and certificate is None:
        return complain(WRONG, "--key needs --certificate")
    try:
        bare, *login = split_login(url)
        secure = parse(bare).secure
    except ValueError as error:
        return complain(WRONG, f"--broker: {error}")
    if not secure and (ca or certificate):
        return complain(WRONG, "--ca and --certificate are for mqtts:// and wss://")
    source = sys.stdin if password_stdin else password_file
    password = _line(source) if source is not None else os.environ.get(_PASSWORD)
    tls = None
    if secure:
        try:
            tls = tls_context(ca, certificate, key, _line(key_password_file) if key_password_file else None, insecure)
        except ValueError as error:
            return complain(WRONG, f"--{error}")
    from broker.runtime import foreign

    return foreign.serve(
        settings,
        bare,
        list(only),
        username=username or login[0],
        password=password or login[1],
        tls=tls,
        insecure=insecure,
    )


def _line(file: TextIO) -> str:
    return file.readline().rstrip("\r\n")
