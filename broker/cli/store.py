"""`isthmus store check · stats · export · reset`: what survives a restart, looked at while no broker runs; and
`backup`, which asks the running one."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import click

from broker.cli.common import DONE, FAILED, WRONG, ask, common, complain, guarded, options
from broker.cli.output import print_json, print_record, print_table
from broker.store import inspect, segments
from broker.store.errors import REMEDY, StoreUnusable

_PATIENCE = 3600.0
"""Seconds a backup may take: another disk may be slow."""

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def store() -> None:
    """What survives a restart. All but backup refuse while a broker runs."""


@store.command()
@_as_json
@common
@guarded
def check(as_json: bool) -> int:
    """Read the whole store and tell what is damaged. Changes nothing.

    Exit code 0 when it is clean, 1 when it is damaged or cannot be read.
    """
    try:
        with _alone() as folder:
            report = inspect.check(folder)
    except (StoreUnusable, OSError) as error:
        return complain(FAILED, str(error))
    code = DONE if report.clean else FAILED
    if as_json:
        print_json({"ok": report.clean, **dataclasses.asdict(report), "lost": report.lost})
        return code
    complain(code, *(str(found) for found in (*report.damage, *report.bad_records)))
    if report.damage:
        complain(code, REMEDY)
    elif report.bad_records:
        complain(code, "the broker starts without these records")
    word = "ok" if report.clean else "damaged"
    click.echo(f"{word}: {report.segments} segments, {report.frames} frames, {report.bytes} bytes, {report.lost} lost")
    if report.torn:
        click.echo(f"{report.torn} bytes of an unfinished write: nobody was told it was safe, the next start drops it")
    return code


@store.command()
@_as_json
@common
@guarded
def stats(as_json: bool) -> int:
    """Count segments, records by kind, sessions, queued and retained messages."""
    try:
        with _alone() as folder:
            counted = inspect.stats(folder)
    except (StoreUnusable, OSError) as error:
        return complain(FAILED, str(error))
    if as_json:
        print_json(dataclasses.asdict(counted))
        return DONE
    kinds = sorted({kind for row in counted.segments for kind in row.records})
    rows = [
        {"segment": row.segment, "bytes": row.bytes, "frames": row.frames, **{k: row.records.get(k, 0) for k in kinds}}
        for row in counted.segments
    ]
    print_table(rows, ("segment", "bytes", "frames", *kinds), False)
    print_record({"sessions": counted.sessions, "queued": counted.queued, "retained": counted.retained}, False)
    return DONE


@store.command()
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True))
@common
@guarded
def export(file: str) -> int:
    """Write every record to FILE, one JSON object a line, in order; - is standard output. Never overwrites.

    The file holds what clients sent: it is readable by its owner only.
    """
    count = 0
    try:
        with _alone() as folder, _target(file) as target:
            for record in inspect.export(folder):
                target.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
                count += 1
    except (StoreUnusable, OSError) as error:
        return complain(FAILED, str(error))
    return complain(DONE, f"{count} records written")


@store.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@_as_json
@common
@guarded
def backup(folder: Path, as_json: bool) -> int:
    """Copy the store of the running broker to FOLDER, which must be new or empty.

    Everything acknowledged before is in the copy. FOLDER is a data folder: restore with isthmus run --data FOLDER.
    On the same disk the copy shares what cannot change any more; only one on another disk survives the loss of the
    disk.
    """
    answer = ask("store.backup", timeout=_PATIENCE, folder=str(folder.absolute()))
    if as_json:
        print_json(answer)
        return DONE
    size, shared = answer["bytes"], answer["linked"]
    click.echo(f"{folder}: {answer['segments']} segments ({shared} shared), {size} bytes in {answer['seconds']:.1f} s")
    return DONE


@store.command()
@click.option("--yes", is_flag=True, help="Really delete it.")
@common
@guarded
def reset(yes: bool) -> int:
    """Delete the store: sessions, queues and retained messages. The next start begins with none."""
    try:
        with _alone() as folder:
            if not folder.is_dir():
                return complain(FAILED, f"{folder}: there is no store")
            count, size = inspect.size(folder)
            went = f"{folder}: {count} segments, {size} bytes"
            if not yes:
                return complain(WRONG, f"{went} would be deleted for good; say --yes to do it")
            _delete(folder)
    except (StoreUnusable, OSError) as error:
        return complain(FAILED, str(error))
    click.echo(f"deleted {went}")
    return DONE


@contextlib.contextmanager
def _alone() -> Iterator[Path]:
    """The store's folder, with the lock of the data folder held as a broker would hold it."""
    data = options().data_folder()
    if not data.is_dir():
        raise StoreUnusable(f"{data}: there is no such data folder")
    lock = os.open(data / "isthmus.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreUnusable(f"{data}: a broker uses this data folder; stop it first") from None
        yield data / "store"
    finally:
        os.close(lock)


@contextlib.contextmanager
def _target(file: str) -> Iterator[IO[bytes]]:
    """A new file, 0600, which stays only if all goes well."""
    if file == "-":
        yield sys.stdout.buffer
        return
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as target:
        try:
            yield target
        except BaseException:
            os.unlink(file)
            raise


def _delete(folder: Path) -> None:
    """Move it out of the way first: killed half-way, the next start must not meet half a store. With it goes the copy
    an interrupted migration left behind, which would take its place."""
    going = folder.with_name(f"{folder.name}.deleted")
    for path in (going, folder.with_name(f"{folder.name}.new")):
        if path.exists():
            shutil.rmtree(path)
    os.rename(folder, going)
    segments.sync_folder(folder.parent)
    shutil.rmtree(going)
