"""
Kills each trainer many times, at every moment, and prints how often it survived.

    python tests/faults/many.py [--interruptions N] [--trainer NAME ...] [--seed SEED]

A failure names the moments and the seed: with the same arguments and seed the same trainings are killed in the same
way, as far as the machine is as fast.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from support.interrupting import STEPS, Interrupter, moments_of
from support.moments import MOMENTS, SCORING

#: Kills of one training at most.
LONGEST = 3


def interrupt(interrupter: Interrupter, trainer: str, interruptions: int, rng: random.Random) -> tuple[Counter, list]:
    """Kill a trainer so often, at all of its moments in turn; how often at each, and what went wrong."""
    turns = itertools.cycle(rng.sample(moments_of(trainer), len(moments_of(trainer))))
    tried: Counter[str] = Counter()
    errors = []
    while tried.total() < interruptions:
        # Scoring last: it is for an epoch late in the run.
        moments = sorted(itertools.islice(turns, rng.randint(1, LONGEST)), key=lambda moment: moment in SCORING)
        seed = rng.randrange(2**32)
        before = Counter(interrupter.killed)
        try:
            interrupter.check_survives(trainer, moments, seed)
        except AssertionError as error:
            errors.append(str(error))
            print(error, flush=True)
            tried.update(moments)
        else:
            made = Counter(interrupter.killed) - before
            tried.update({moment: count for (_, moment), count in made.items()})
    return tried, errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interruptions", type=int, default=27, help="of each trainer, at least (default: 27)")
    parser.add_argument("--trainer", nargs="+", choices=STEPS, default=list(STEPS), help="default: all")
    parser.add_argument("--seed", type=int, help="default: another one each time")
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    start, failed = time.monotonic(), []
    tried: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder, Interrupter(Path(folder)) as interrupter:
        for trainer in options.trainer:
            rng = random.Random(f"{seed} {trainer}")
            tried[trainer], errors = interrupt(interrupter, trainer, options.interruptions, rng)
            failed += errors
            print(f"{trainer}: {tried[trainer].total()} interruptions, {len(errors)} failures", flush=True)
        survived = Counter(interrupter.killed)
    print("\nSurvived, of those tried:\n\n| moment |", " | ".join(options.trainer), "|")
    print("|---|" + "---|" * len(options.trainer))
    for moment in MOMENTS:
        cells = (
            f"{survived[trainer, moment]} of {tried[trainer][moment]}" if moment in moments_of(trainer) else ""
            for trainer in options.trainer
        )
        print(f"| {moment} |", " | ".join(cells), "|")
    print(f"\n{sum(count.total() for count in tried.values())} in {(time.monotonic() - start) / 60:.0f} minutes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
