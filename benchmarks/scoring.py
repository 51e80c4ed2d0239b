"""Scoring by several processes against one: `python benchmarks/scoring.py`, with nothing else
running. PocketSphinx hears three recordings again and again, eight clips at once, as `prefer` and
GRPO have a text's speeches scored. Processes are started and have loaded before a second counts.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from llasa_jax.evaluate.known import KEYS, recording
from llasa_jax.evaluate.scorers import Scoring

AT_ONCE = 8
NAMES = "rms_1", "rms_2", "slt_2"


def scored(processes: int, clips: int) -> tuple[float, list]:
    """Seconds that `clips` take, and all their numbers."""
    waves = [recording(NAMES[at % len(NAMES)]) for at in range(clips)]
    parts = [waves[at : at + AT_ONCE] for at in range(0, clips, AT_ONCE)]
    with Scoring(["pocketsphinx"], processes=processes) as scoring:
        for _ in range(processes):
            scoring.submit(waves[:1], [KEYS], [None]).result()
        began = time.monotonic()
        futures = [scoring.submit(part, [KEYS] * len(part), [None] * len(part)) for part in parts]
        found = [future.result() for future in futures]
        return time.monotonic() - began, [one.of(at) for one in found for at in range(AT_ONCE)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=96, help="a multiple of 8")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.clips % AT_ONCE:
        parser.error(f"--clips is {options.clips}; give a multiple of {AT_ONCE}")
    one, numbers = scored(1, options.clips)
    several, again = scored(options.processes, options.clips)
    if numbers != again:
        raise SystemExit("several processes found other numbers than one")
    print(
        f"{options.clips} clips: {one:.1f} s in one process, {several:.1f} s in"
        f" {options.processes}: {one / several:.2f} times as fast, the same numbers"
    )


if __name__ == "__main__":
    main()
