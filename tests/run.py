"""`make test`: every test, and a second look at the few that failed by the clock.

`python -m tests.run [options of pytest]`. Tests that hold an answer against the clock share their machine with others.
Where at most `FEW` tests failed and all of them are such, they are run once more, with nothing before and
nothing beside them. The end names what failed first and passed then: it is to be looked into, and does not make the
whole fail. A test about what is lost, repeated or out of order has no second chance, nor has a run that ended early.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

FEW = 5
CLOCKS = tuple(
    f"tests/system/test_{name}.py"
    for name in (
        "backend_outage",
        "crowds",
        "listeners",
        "reconnect",
        "resilience_canary",
        "resilience_limits",
        "revocation",
    )
)
"""Files whose tests mostly ask how soon."""
_ENDS_EARLY = ("-x", "--exitfirst", "--maxfail", "--sw", "--stepwise")
_FAILED = Path(".pytest_cache/v/cache/lastfailed")


def main(options: Sequence[str]) -> int:
    """Exit code of pytest: of the second run where there was one. Runs in the current folder."""
    code = _pytest("--cache-clear", *options)
    if code != pytest.ExitCode.TESTS_FAILED or not _FAILED.exists():
        return code
    failed = sorted(json.loads(_FAILED.read_text()))
    if len(failed) > FEW or not all(name.startswith(CLOCKS) for name in failed):
        return code
    if any(option.startswith(_ENDS_EARLY) for option in options):
        return code
    print(f"\n{len(failed)} failed; once more, alone:", *failed, sep="\n  ", flush=True)
    code = _pytest("--last-failed")
    left = set(json.loads(_FAILED.read_text())) if _FAILED.exists() else set()
    for name in failed:
        print(f"{'failed twice' if name in left else 'failed, then passed alone'}: {name}", flush=True)
    return code


def _pytest(*options: str) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", *options], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
