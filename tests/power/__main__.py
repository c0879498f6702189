"""`python -m tests.power --states 200`: pull the plug many times, count what is lost. Exit code 1 for a loss."""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
from pathlib import Path

from tests.power import ext4, rounds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.power", description=__doc__)
    parser.add_argument("--states", type=int, default=200, help="states rebuilt from the log of one run")
    parser.add_argument("--ext4", type=int, default=0, metavar="ROUNDS", help="rounds on a real file system (root)")
    parser.add_argument("--seconds", type=float, default=3, help="of load")
    parser.add_argument("--rate", type=float, default=150, help="messages a second of each of the four publishers")
    parser.add_argument("--recovery", type=int, default=4, help="one state in so many loses power again while starting")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.add_argument("--lie", action="store_true", help="a disk that only pretends to sync: losses are wanted")
    parser.add_argument("--conf", type=Path, help="a fragment for the broker")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for what is left of bad states; must not exist")
    options = parser.parse_args()
    configuration = options.conf.read_text() if options.conf else ""
    print(f"seed {options.seed}")
    bad = False
    with tempfile.TemporaryDirectory(prefix="isthmus-power-") as temporary:
        where = options.keep or Path(temporary)
        where.mkdir(parents=True, exist_ok=options.keep is None)
        if options.states:
            bad |= _states(where, options, configuration)
        if options.ext4:
            outcome = ext4.rounds(where / "ext4", options.ext4, options.seed, configuration=configuration)
            print(outcome.problem() or outcome.summary())
            bad |= bool(outcome.problem())
    return int(bad)


def _states(where: Path, options: argparse.Namespace, configuration: str) -> bool:
    began = time.monotonic()
    recording = rounds.record(
        where / "run", seconds=options.seconds, rate=options.rate, seed=options.seed, configuration=configuration,
        lie=options.lie,
    )  # fmt: skip
    recorded = time.monotonic()
    chosen = rounds.cuts(recording, options.states, options.seed, recovery=options.recovery)
    outcome = rounds.survey(where / "states", recording, chosen, configuration=configuration, jobs=options.jobs)
    problem = outcome.problem()
    print(problem or outcome.summary())
    print(f"recorded in {recorded - began:.1f} s, read in {time.monotonic() - recorded:.1f} s")
    return bool(problem)


if __name__ == "__main__":
    sys.exit(main())
