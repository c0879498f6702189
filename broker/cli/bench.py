"""`isthmus bench`: measures a broker, ours or any other, with our own client."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from broker.cli.common import DONE, FAILED, UNREACHABLE, WRONG, complain
from broker.cli.output import print_json, print_table
from broker.client import load
from broker.client.address import parse
from broker.client.tls import tls_context

F = TypeVar("F", bound=Callable[..., Any])

_VERSIONS = {"3.1": 3, "3.1.1": 4, "5": 5}


@click.group(short_help="Measure a broker.")
def bench() -> None:
    """Measure a broker with our own client, one process, one event loop.

    Exit codes: 0 done, 1 a message was lost or a connection failed, 2 the command line is wrong, 3 the broker cannot be
    reached.
    """


def _options(clients: int) -> Callable[[F], F]:
    """What every measurement understands."""

    def give(function: F) -> F:
        for option in reversed(
            [
                click.option("--url", default="mqtt://127.0.0.1:1883", show_default=True, help="The broker."),
                click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(min=0.1)),
                click.option("--clients", default=clients, show_default=True, type=click.IntRange(1, 50_000)),
                click.option("--protocol", default="5", show_default=True, type=click.Choice(list(_VERSIONS))),
                click.option("--username", help="User name."),
                click.option("--password-file", type=click.File("r"), help="Holds the password; - is standard input."),
                click.option("--ca", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="PEM file."),
                click.option("--insecure", is_flag=True, help="Do not verify the server's certificate."),
                click.option("--json", "as_json", is_flag=True, help="The closing table as JSON."),
            ]
        ):
            function = option(function)
        return function

    return give


def _message_options(function: F) -> F:
    for option in reversed(
        [
            click.option("--qos", default=0, show_default=True, type=click.IntRange(0, 2)),
            click.option("--size", default=64, show_default=True, type=click.IntRange(load.SMALLEST, 1 << 24)),
            click.option("--window", default=1_000, show_default=True, type=click.IntRange(1, 60_000),
                         help="Messages of one publisher under way at once."),
            click.option("--topic", default="bench", show_default=True, help="First levels of the topics used."),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


@bench.command()
@_options(clients=50)
def connect(**arguments: Any) -> None:
    """Connections a second: CLIENTS connect and leave again and again."""

    def go(progress: load.Progress, options: dict[str, Any]) -> Coroutine[Any, Any, load.Result]:
        return load.connect_many(arguments["seconds"], arguments["clients"], arguments["url"], progress, **options)

    _finish("connections", arguments, go)


@bench.command()
@_options(clients=10)
@_message_options
def publish(**arguments: Any) -> None:
    """Messages a second the broker takes from CLIENTS publishers; nobody is subscribed."""
    _put("publish", arguments)


@bench.command()
@_options(clients=10)
@_message_options
def subscribe(**arguments: Any) -> None:
    """Messages a second through the broker: CLIENTS subscribers, each with a publisher of its own."""
    _put("subscribe", arguments)


@bench.command()
@_options(clients=100)
@_message_options
def fanout(**arguments: Any) -> None:
    """Deliveries a second from one publisher to CLIENTS subscribers."""
    _put("fanout", arguments)


@bench.command()
@_options(clients=10)
@_message_options
@click.option("--rate", default=1_000.0, show_default=True, type=click.FloatRange(min=0.1), help="Messages a second.")
def latency(**arguments: Any) -> None:
    """Time from publisher to subscriber at a steady rate, over CLIENTS pairs."""
    _put("latency", arguments)


def _put(shape: load.Shape, arguments: dict[str, Any]) -> None:
    wanted = load.Load(
        shape,
        arguments["seconds"],
        arguments["clients"],
        arguments["qos"],
        arguments["size"],
        arguments["window"],
        arguments.get("rate", 0.0),
        arguments["topic"],
    )

    def go(progress: load.Progress, options: dict[str, Any]) -> Coroutine[Any, Any, load.Result]:
        return load.put(wanted, arguments["url"], progress, **options)

    _finish("messages", arguments, go)


def _finish(
    what: str,
    arguments: dict[str, Any],
    go: Callable[[load.Progress, dict[str, Any]], Coroutine[Any, Any, load.Result]],
) -> None:
    """Run with a progress bar on standard error, print the closing table, leave with the exit code."""
    try:
        options = _connect_options(arguments)
    except (ValueError, OSError) as error:
        sys.exit(complain(WRONG, str(error)))
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]:,} " + what),
               TimeRemainingColumn())  # fmt: skip
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(arguments["url"], total=1.0, count=0)
            result = _run(go(lambda share, count: bar.update(task, completed=share, count=count), options))
    except ConnectionError as error:
        sys.exit(complain(UNREACHABLE, str(error)))
    figures = result.figures()
    if arguments["as_json"]:
        print_json(figures)
    else:
        print_table([figures], list(figures), False)
    if result.lost or result.failed:
        sys.exit(complain(FAILED, f"{result.lost} messages lost, {result.failed} connections failed"))
    sys.exit(DONE)


def _connect_options(arguments: dict[str, Any]) -> dict[str, Any]:
    address = parse(arguments["url"])
    tls = None
    if address.secure:
        tls = tls_context(arguments["ca"], insecure=arguments["insecure"])
    elif arguments["ca"] or arguments["insecure"]:
        raise ValueError("--ca and --insecure are for mqtts:// and wss://")
    file = arguments["password_file"]
    return {
        "version": _VERSIONS[arguments["protocol"]],
        "username": arguments["username"],
        "password": file.read().rstrip("\r\n") if file is not None else None,
        "tls": tls,
    }


def _run(work: Coroutine[Any, Any, load.Result]) -> load.Result:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)
