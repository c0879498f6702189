"""`isthmus check`: the verdict of `run` and `reload` without doing either."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import click

from broker.cli.common import DONE, UNREACHABLE, WRONG, common, complain, guarded, options
from broker.cli.output import print_json
from broker.config import firstrun
from broker.config.problems import ConfigError
from broker.config.settings import ROOMS, Instance, Settings
from broker.runtime import adapt

LOCAL = {"auth.file"}
DEADLINE = 10.0
"""Seconds one backend has to open, answer and close."""


@click.command()
@click.option("--connect", is_flag=True, help="Open each backend, ask it to answer, close it.")
@click.option("--strict", is_flag=True, help="Treat warnings as errors.")
@click.option("--worker", is_flag=True, help="Judge it as isthmus worker would, beside somebody else's broker.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@common
@guarded
def check(connect: bool, strict: bool, worker: bool, as_json: bool) -> int:
    """Tell whether this configuration would run. Changes nothing."""
    settings: Settings | None = None
    problems: list[str] = []
    try:
        settings = options().load()
    except ConfigError as error:
        problems = error.problems
    warnings = list(settings.warnings) if settings else []
    if settings and worker:
        refused, without_effect = _beside_another(settings)
        problems += refused
        warnings += without_effect
    wrong = bool(problems or (strict and warnings))
    results: list[dict[str, Any]] = []
    if settings and not wrong:
        problems = asyncio.run(try_local(settings))
        wrong = bool(problems)
    if settings and connect and not wrong:
        results = asyncio.run(_try_all(settings, quiet=as_json))
    code = WRONG if wrong else UNREACHABLE if any(not r["ok"] for r in results) else DONE
    if as_json:
        print_json({"ok": code == DONE, "problems": problems, "warnings": warnings, "backends": results})
        return code
    complain(code, *problems, *(f"{'error' if strict else 'warning'}: {warning}" for warning in warnings))
    if not wrong and settings is not None and not connect:
        click.echo(_summary(settings))
    return code


def _summary(settings: Settings) -> str:
    parts = [f"{room} {','.join(getattr(settings, room)) or '-'}" for room in ("listeners", *ROOMS)]
    return f"ok: {'; '.join(parts)}"


def _beside_another(settings: Settings) -> tuple[list[str], list[str]]:
    """Of sinks and bridges that a foreign broker feeds: what it cannot give them, and what it will not obey."""
    instances = [*settings.sinks.values(), *settings.bridges.values()]
    try:
        adapt.adapt_all(instances, settings)
    except adapt.Refused as error:
        return error.problems, []
    return [], [sentence for instance in instances for sentence in adapt.without_effect(instance, settings)]


async def try_local(settings: Settings) -> list[str]:
    """What start and reload would say about backends whose opening reads files and does nothing else."""
    new = firstrun.pending(settings)
    found = []
    for instance in settings.auth.values():
        if instance.backend.name in LOCAL and instance is not new and (error := await _try(instance)):
            found.append(settings.problem(f"auth.{instance.name}", error))
    return found


async def _try_all(settings: Settings, quiet: bool) -> list[dict[str, Any]]:
    """One backend after the other, in the order they are read."""
    new = firstrun.pending(settings)
    results = []
    for room in ROOMS:
        for instance in getattr(settings, room).values():
            started = time.monotonic()
            error = None if instance is new else await _try(instance)
            took = round((time.monotonic() - started) * 1000)
            note = "the first run makes its files" if instance is new else error or ""
            if error:
                note = f"{note} ({instance.origin})"
            name = f"{room}.{instance.name}"
            results.append({"name": name, "ok": error is None, "ms": took, "text": note})
            if not quiet:
                click.echo(f"{name} {'failed' if error else 'ok'} {took} {note}".rstrip())
    return results


async def _try(instance: Instance) -> str | None:
    """Why the backend cannot be used, or None."""
    opened: Any = None
    try:
        async with asyncio.timeout(DEADLINE):
            opened = await instance.backend.open(instance.config)
            await opened.check()
    except TimeoutError:
        return f"no answer within {DEADLINE:.0f} s"
    except ValueError as error:  # of our own
        return " ".join(str(error).split())
    except Exception as error:  # whatever a driver raises is the answer to the question
        return " ".join(f"{type(error).__name__}: {error}".split()) if str(error) else type(error).__name__
    finally:
        if opened is not None:
            try:
                async with asyncio.timeout(DEADLINE):
                    await opened.close()
            except Exception as error:
                complain(DONE, f"{instance.room}.{instance.name}: close: {type(error).__name__}: {error}")
    return None
