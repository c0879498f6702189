"""What every command shares: the common options, before or after the command, and errors turned into exit codes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from broker.admin import control
from broker.config.options import Options
from broker.config.problems import ConfigError

DONE, FAILED, WRONG, UNREACHABLE, NOT_RUNNING = range(5)
"""Exit codes: done, failed, configuration or command line wrong, a server unreachable, no broker to talk to."""

F = TypeVar("F", bound=Callable[..., Any])


def options() -> Options:
    """The common options of the command being run."""
    return click.get_current_context().find_root().ensure_object(Options)


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Store an option where the command finds it, whichever side of the command it was written on."""
    if value is None or value == ():
        return
    target = context.find_root().ensure_object(Options)
    name = str(parameter.name)
    if name == "sets":
        value = (*target.sets, *value)
    setattr(target, name, value)


_PATH = click.Path(file_okay=False, path_type=Path)
_OPTIONS = [
    click.option("--conf", type=_PATH, metavar="DIR", help="Folder of fragments.  [./conf.d, /etc/isthmus/conf.d]"),
    click.option("--data", type=_PATH, metavar="DIR", help="Data folder, in place of the configured one."),
    click.option("--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="Set one value; repeatable."),
    click.option("--log-format", type=click.Choice(["text", "json"]), help="Form of log lines."),
    click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Least log level."),
]


def common(function: F) -> F:
    """Give a command the common options."""
    for option in reversed(_OPTIONS):
        function = option(function)
    for parameter in function.__click_params__[-len(_OPTIONS) :]:  # type: ignore[attr-defined]
        parameter.expose_value = False
        parameter.callback = _keep
    return function


def guarded(function: F) -> F:
    """Turn what a command raises into sentences on standard error and the exit codes above."""

    @functools.wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        try:
            code = function(*arguments, **keywords)
        except ConfigError as error:
            code = complain(WRONG, *error.problems)
        except control.NotRunning as error:
            code = complain(NOT_RUNNING, f"{error}; start it with: isthmus run")
        except control.CommandFailed as error:
            code = complain(error.exit, str(error))
        except TimeoutError:
            code = complain(FAILED, "the broker did not answer in time")
        click.get_current_context().exit(int(code or DONE))

    return run  # type: ignore[return-value]


def complain(code: int, *lines: str) -> int:
    """Write to standard error and return the exit code."""
    for line in lines:
        click.echo(line, err=True)
    return code


def ask(command: str, **arguments: Any) -> Any:
    """What the running broker answers to a command of its control socket."""
    return control.request(options().data_folder() / "control.sock", command, **arguments)
