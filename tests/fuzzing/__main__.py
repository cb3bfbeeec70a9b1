"""`python -m tests.fuzzing`: fuzzes each kind of file in a process of its own, for a time or a number of inputs, and prints what was found.

A finding is an exception that is not the product's, a failed check, a crash, more than 2 GB of memory, more than 10 s of processor time or
60 s of waiting for one input, or files that stay open. The first inputs of each finding are saved in `.fuzz/findings/`, with the traceback.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import tempfile
import traceback
from pathlib import Path

from tests.fuzzing import KINDS
from tests.fuzzing.campaign import Campaign


def main() -> int:
    """Exit status: 0 if nothing was found, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, action="append", help="one kind of file; repeatable (all)")
    parser.add_argument("--seconds", type=float, default=600, help="time for all kinds together (600)")
    parser.add_argument("--examples", type=int, help="number of inputs of each kind, if it is reached before the time is over")
    parser.add_argument("--seed", type=int, help="of the inputs (random); printed with the results")
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="check the input in this folder again; needs --kind")
    options = parser.parse_args()
    kinds = options.kind or KINDS
    if options.replay is not None:
        return _replay(kinds[0], options.replay)
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    found = 0
    for kind in kinds:
        campaign = Campaign(kind, Path(".fuzz"), seed)
        campaign.run(options.seconds / len(kinds), options.examples)
        print(campaign.summary(), flush=True)
        found += sum(campaign.findings.values())
    return int(found > 0)


def _replay(kind: str, folder: Path) -> int:
    module = importlib.import_module(f"tests.fuzzing.{kind}")
    with tempfile.TemporaryDirectory() as copy:
        for path in folder.rglob("*"):
            if path.is_file():
                target = Path(copy, path.relative_to(folder))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        try:
            print("accepted" if module.check(Path(copy)) else "refused")
        except Exception:
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
