"""`python -m tests.chaos --rounds 200`: exit code 1 when something was lost or came twice, or nothing was proved."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests import servers
from tests.build import compiled
from tests.chaos.harness import MOSQUITTO, Plan, run
from tests.chaos.ledger import Report
from tests.chaos.victim import NoAnswer


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="kills, each followed by a start (default: 200)")
    parser.add_argument("--seed", type=int, help="of the random moments; default: another one each time")
    parser.add_argument("--only", choices=("both", "broker", "worker"), default="both", help="what is killed")
    parser.add_argument(
        "--rate", type=int, default=Plan.rate, help="messages per second at most (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder for broker, log and ledger, kept")
    chosen = parser.parse_args()
    seed = chosen.seed if chosen.seed is not None else random.SystemRandom().randrange(1 << 32)
    if chosen.keep is not None:
        chosen.keep.mkdir(parents=True)
    where = chosen.keep.absolute() if chosen.keep is not None else Path(tempfile.mkdtemp(prefix="isthmus-chaos-"))
    built, listed = compiled()
    print(f"chaos: seed {seed}, {len(built)} of {len(listed)} modules compiled, folder {where}", flush=True)
    plan = Plan(rounds=chosen.rounds, seed=seed, only=chosen.only, rate=chosen.rate)
    try:
        with servers.kafka() as kafka, servers.mosquitto(extra=MOSQUITTO, verbose=False) as far:
            report = asyncio.run(run(plan, where, kafka, far, lambda text: print(text, flush=True)))
    except servers.Absent as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, TimeoutError, NoAnswer) as error:  # a broker that does not start is the worst finding
        print(f"FAILED: {error}\nchaos: failed; its broker, log and ledger are in {where}")
        return 1
    print("\n".join(report.lines()))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(as_json(report), indent=1) + "\n")
    failed = bool(report.problems())
    if not failed and chosen.keep is None:
        shutil.rmtree(where)
    print(f"chaos: {f'failed; its broker, log and ledger are in {where}' if failed else 'passed'}")
    return 1 if failed else 0


def as_json(report: Report) -> dict[str, object]:
    """The report with its sums and findings; long lists are cut to their first hundred."""

    def short(value: object) -> object:
        if isinstance(value, dict):
            return {key: short(inner) for key, inner in value.items()}
        return [short(inner) for inner in value[:100]] if isinstance(value, list) else value

    found = short(dataclasses.asdict(report))
    assert isinstance(found, dict)
    counts = {name: {"lost": len(p.lost), "repeated": len(p.repeated)} for name, p in report.paths.items()}
    sums = {"total": report.total, "total_lost": report.lost, "counts": counts, "problems": report.problems()}
    return {**found, **sums}


if __name__ == "__main__":
    sys.exit(main())
