"""`mirage worldscore`: WorldScore's videos, in the folders that its scripts read."""

from __future__ import annotations

from ..evaluation.worldscore import OUTPUT, run_worldscore
from ..evaluation.worldscore import WorldScoreOptions as Options


def run(options: Options) -> int:
    """Generate WorldScore's videos and print how many."""
    report = run_worldscore(options)
    where = options.out / OUTPUT
    print(f"{report['written']} videos written to {where}, {report['present']} were there already")
    return 0
