"""`tests/run.py`: what a second run forgives, and what it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run import CLOCKS, FEW

CHANCE = """
from pathlib import Path
def test_{n}():
    ran = Path("ran-{n}")
    ran.write_text(ran.read_text() + "x" if ran.exists() else "x")
    assert len(ran.read_text()) {how}
"""


@pytest.fixture
def run(tmp_path: Path, root: Path):
    """Runs these tests as `make test` does; answers the exit code, what was printed, and how often each ran."""

    def run(*how: str, options: tuple[str, ...] = (), files: tuple[str, ...] = CLOCKS) -> tuple[int, str, list[int]]:
        for n, condition in enumerate(how):
            (tmp_path / files[n]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / files[n]).write_text(CHANCE.format(n=n, how=condition))
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        ended = subprocess.run(
            [sys.executable, "-m", "tests.run", *options], cwd=tmp_path, capture_output=True, text=True, timeout=50,
            env={**os.environ, "PYTHONPATH": str(root), "PYTEST_ADDOPTS": ""},
        )  # fmt: skip
        marks = [tmp_path / f"ran-{n}" for n in range(len(how))]
        ran = [len(mark.read_text()) if mark.exists() else 0 for mark in marks]
        return ended.returncode, ended.stdout, ran

    return run


def test_what_passes_is_run_once(run) -> None:
    assert run("> 0", "> 0")[::2] == (0, [1, 1])


def test_what_fails_first_and_passes_alone_is_named_and_forgiven(run) -> None:
    code, said, ran = run("> 0", "> 1")
    assert (code, ran) == (0, [1, 2])
    assert f"failed, then passed alone: {CLOCKS[1]}::test_1" in said


def test_what_fails_twice_fails(run) -> None:
    code, said, ran = run("> 1", "> 2")
    assert (code, ran) == (1, [2, 2])
    assert f"failed, then passed alone: {CLOCKS[0]}::test_0" in said
    assert f"failed twice: {CLOCKS[1]}::test_1" in said


def test_many_failures_are_no_chance(run) -> None:
    code, said, ran = run(*["> 1"] * (FEW + 1))
    assert (code, ran) == (1, [1] * (FEW + 1))
    assert "once more" not in said


def test_options_of_pytest_are_taken(run) -> None:
    assert run("> 0", "> 9", options=("--deselect", CLOCKS[1]))[::2] == (0, [1, 0])


def test_a_wrong_option_is_no_failed_test(run) -> None:
    code, said, ran = run("> 0", options=("--no-such-option",))
    assert (code, ran) == (pytest.ExitCode.USAGE_ERROR, [0])
    assert "once more" not in said


def test_another_kind_of_test_has_no_second_chance(run) -> None:
    code, said, ran = run("> 1", "> 1", files=(CLOCKS[0], "tests/system/test_chaos.py"))
    assert (code, ran) == (1, [1, 1])
    assert "once more" not in said


def test_a_run_that_ended_early_is_not_forgiven(run) -> None:
    code, _, ran = run("> 1", "> 0", options=("-x",))
    assert code == 1
    assert sum(ran) <= 2
