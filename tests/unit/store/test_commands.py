"""`isthmus store …`: what it prints and how it ends."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from broker import identity
from broker.cli.main import program
from broker.engine import records
from broker.engine.message import Message, Origin
from broker.store.frames import HEADER, SEGMENT
from tests.unit.store.parts import fill, record

Invoke = Callable[..., Result]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    return data


@pytest.fixture
def store(data: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.chdir(data.parent)

    def run(*arguments: str, **options: Any) -> Result:
        return CliRunner().invoke(program, ["store", *arguments, "--data", str(data)], **options)

    return run


def put(topic: bytes, retained: bool, *takers: tuple[int, int], payload: bytes = b"21.5") -> bytes:
    message = Message(topic, payload, 1, retained, b"", 0.0, Origin("meter-7", "u", "10.0.0.1", None, None, "n1"))
    message.ident = "0123456789abcdef0123456789abcdef"
    message.time_ms = 1_700_000_000_000
    raw = b"".join(records.encode_taker(session, seq, 1, False, None) for session, seq in takers)
    return records.encode_put(message, retained, 0, 0, 0, len(takers), raw, records.encode_origin(message.origin))


def session(number: int, **fields: Any) -> bytes:
    return records.encode_json(records.META, number, {"c": f"client-{number}", "f": 1, **fields})


def filled(data: Path) -> list[bytes]:
    """Three sessions, one of them ended; nine queue entries handed out, three left; two retained messages, one left."""
    bodies = [
        session(1) + session(2) + session(3),
        put(b"a", True, (1, 1), (2, 1)) + put(b"b", False, (1, 2), (3, 1)) + put(b"c", True, (1, 3)),
        put(b"d", False, (1, 4), (2, 2)) + put(b"e", False, (1, 5)) + put(b"e", False, (2, 3)),
        records.encode_acked(1, 3, [4]) + records.encode_cleared(b"c"),
        records.encode_session(records.END, 3) + records.encode_released(2, 1) + session(2, f=2, gone=[2], rel=[]),
    ]
    fill(data / "store", *bodies)
    return bodies


def test_check_of_a_clean_store(data: Path, store: Invoke) -> None:
    filled(data)
    size = (data / "store" / "00000001.log").stat().st_size
    result = store("check")
    assert (result.exit_code, result.stdout) == (0, f"ok: 1 segments, 5 frames, {size} bytes, 0 lost\n")
    result = store("check", "--json")
    assert json.loads(result.stdout) == {
        "ok": True, "segments": 1, "frames": 5, "bytes": size, "torn": 0, "damage": [], "bad_records": [],
        "lost": 0,
    }  # fmt: skip


def test_d08_check_names_the_damage_and_what_to_do(data: Path, store: Invoke) -> None:
    """D-08"""
    bodies = filled(data)
    path = data / "store" / "00000001.log"
    raw = bytearray(path.read_bytes())
    raw[SEGMENT + HEADER + 3] ^= 1
    path.write_bytes(raw)
    result = store("check")
    assert result.exit_code == 1
    length = HEADER + len(bodies[0])
    assert f"{path}: {length} bytes at offset 32 are damaged, 1 queue entry lost" in result.stderr
    assert "isthmus run --accept-loss" in result.stderr
    assert result.stdout.startswith("damaged: 1 segments, 4 frames")
    result = store("check", "--json")
    assert result.exit_code == 1
    (found,) = json.loads(result.stdout)["damage"]
    assert (found["file"], found["offset"], found["length"], found["entries"]) == (str(path), 32, length, 1)


def test_check_says_what_the_next_start_cuts_off(data: Path, store: Invoke) -> None:
    filled(data)
    with (data / "store" / "00000001.log").open("ab") as file:
        file.write(b"half a frame")
    result = store("check")
    assert result.exit_code == 0
    assert "12 bytes of an unfinished write" in result.stdout


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (record(b"\xff" * 30, records.PUT), "a message cannot be read"),
        (record(b"null", records.META), "a session cannot be read"),
        (record(b"\0\0\0\0null", records.META), "is not an object"),
        (record(b"\0\0", records.END), "without its session"),
        (record(b"\0\0\0\0" + b"\xff" * 12, records.ACKED), "acknowledgements cannot be read"),
        (b"\1\xff\xff\xff\x7f", "longer than its frame"),
        (b"\1\0", "cut off"),
    ],
)
def test_d11_check_names_records_that_make_no_sense(data: Path, store: Invoke, bad: bytes, why: str) -> None:
    """D-11: in a frame that is as it was written; what is beside them is counted and exported."""
    good = records.encode_cleared(b"topic")
    fill(data / "store", good + bad, good)
    result = store("check")
    assert result.exit_code == 1
    assert f"the record at offset {SEGMENT + HEADER + len(good)} makes no sense" in result.stderr
    assert why in result.stderr
    assert "starts without these records" in result.stderr
    assert "--accept-loss" not in result.stderr
    counted = json.loads(store("stats", "--json").stdout)
    assert counted["segments"][0]["records"]["retained-clear"] == 2
    lines = [json.loads(line) for line in store("export", "-").stdout.splitlines()]
    assert [line["kind"] for line in lines].count("retained-clear") == 2


def test_stats_count_records_sessions_queues_and_retained_messages(data: Path, store: Invoke) -> None:
    filled(data)
    size = (data / "store" / "00000001.log").stat().st_size
    assert json.loads(store("stats", "--json").stdout) == {
        "segments": [
            {
                "segment": 1,
                "bytes": size,
                "frames": 5,
                "records": {
                    "session": 4, "message": 6, "acknowledged": 1, "retained-clear": 1, "session-end": 1, "released": 1,
                },
            }
        ],
        "sessions": 2,
        "queued": 3,
        "retained": 1,
    }  # fmt: skip
    result = store("stats")
    assert result.exit_code == 0
    words = result.stdout.split()
    assert [words[words.index(name) + 1] for name in ("sessions", "queued", "retained")] == ["2", "3", "1"]
    assert "acknowledged" in words


def test_export_writes_every_record_in_order_for_the_owner_alone(data: Path, store: Invoke, tmp_path: Path) -> None:
    bodies = filled(data)
    file = tmp_path / "out.jsonl"
    result = store("export", str(file))
    assert (result.exit_code, result.stderr) == (0, "14 records written\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kinds = ["session"] * 3 + ["message"] * 6 + ["acknowledged", "retained-clear", "session-end", "released", "session"]
    assert [line["kind"] for line in lines] == kinds
    assert (lines[0]["segment"], lines[0]["offset"]) == (1, SEGMENT + HEADER)
    assert lines[3]["offset"] == SEGMENT + 2 * HEADER + len(bodies[0])
    assert (lines[3]["topic"], lines[3]["clientid"], lines[3]["payload"]) == ("a", "meter-7", "21.5")
    assert store("export", "-").stdout == file.read_text()


def test_export_never_overwrites_and_leaves_nothing_half_done(
    data: Path, store: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(data)
    file = tmp_path / "out.jsonl"
    file.write_text("precious")
    result = store("export", str(file))
    assert result.exit_code == 1
    assert "File exists" in result.stderr
    assert file.read_text() == "precious"
    (data / "store" / "format").write_text('{"version": 9}')
    other = tmp_path / "other.jsonl"
    assert store("export", str(other)).exit_code == 1
    assert not other.exists()


def test_reset_deletes_only_when_told_and_says_what_went(data: Path, store: Invoke) -> None:
    filled(data)
    (data / "store.new").mkdir()
    (data / "node.json").write_text("{}")
    result = store("reset")
    assert result.exit_code == 2
    assert "would be deleted for good; say --yes" in result.stderr
    assert (data / "store" / "00000001.log").exists()
    size = sum(p.stat().st_size for p in (data / "store").iterdir())
    result = store("reset", "--yes")
    assert (result.exit_code, result.stdout) == (0, f"deleted {data}/store: 1 segments, {size} bytes\n")
    assert sorted(p.name for p in data.iterdir()) == ["isthmus.lock", "node.json"]
    assert store("reset", "--yes").exit_code == 1


@pytest.mark.parametrize("command", [["check"], ["stats"], ["export", "-"], ["reset", "--yes"]])
def test_d21_every_command_refuses_while_a_broker_runs(data: Path, store: Invoke, command: list[str]) -> None:
    """D-21: by the lock a broker holds, which a killed one leaves behind without effect."""
    filled(data)
    node = identity.take(data)
    result = store(*command)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"{data}: a broker uses this data folder; stop it first\n"
    assert (data / "store" / "00000001.log").exists()
    node.release()
    assert store(*command).exit_code == 0
    identity.take(data).release()


@pytest.mark.parametrize("command", [["check"], ["stats"], ["export", "-"], ["reset", "--yes"]])
def test_without_a_store_every_command_says_so_and_makes_none(data: Path, store: Invoke, command: list[str]) -> None:
    result = store(*command)
    assert (result.exit_code, result.stderr) == (1, f"{data}/store: there is no store\n")
    assert not (data / "store").exists()
    (data / "isthmus.lock").unlink()
    data.rmdir()
    result = store(*command)
    assert (result.exit_code, result.stderr) == (1, f"{data}: there is no such data folder\n")
    assert not data.exists()
