"""`make test`: every test, and a second look at the few that failed.

`python -m tests.run [options of pytest]`. Tests of real servers and real clocks share their machine with whoever else
is on it. Where at most `FEW` of all failed, those are run once more, with nothing before and nothing beside them. The
end names what failed first and passed then: it is to be looked into, and does not make the whole fail. What fails twice
does, and so do many failures, a crash, an interruption.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

FEW = 5
_FAILED = Path(".pytest_cache/v/cache/lastfailed")


def main(options: Sequence[str]) -> int:
    """Exit code of pytest: of the second run where there was one. Runs in the current folder."""
    code = _pytest("--cache-clear", *options)
    if code != pytest.ExitCode.TESTS_FAILED or not _FAILED.exists():
        return code
    failed = sorted(json.loads(_FAILED.read_text()))
    if len(failed) > FEW:
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
