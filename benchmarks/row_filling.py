"""How full rows are on LJSpeech-like lengths: our packing beside Grain's packers and upstream's
padding.

    python benchmarks/row_filling.py

LJSpeech's 13,100 clips are not here; their published figures are: 1.11 to 10.10 s, 6.57 s and 100
characters on average. Lengths are drawn from a beta distribution with these ends, that mean and a
deviation of 2.2 s. Every packer gets the same clips in the same order.
"""

import platform
from importlib.metadata import version

import grain
import numpy as np

from llasa_jax.data.batching import WINDOW, pack_rows

LENGTH = 2048
CLIPS = 13_100


def lengths() -> np.ndarray:
    """Tokens of each clip: 44 of the prompt, one for about 4.4 characters, 50 a second."""
    rng = np.random.default_rng(0)
    seconds = 1.11 + 8.99 * rng.beta(1.83, 1.19, CLIPS)
    text = np.round(seconds * 15.2 / 4.4 * rng.normal(1, 0.1, CLIPS))
    return (44 + text + np.floor(seconds * 50) + 1).astype(int)


def with_grain(packer: type, open_rows: int, sizes: np.ndarray) -> int:
    clips = grain.MapDataset.source(
        [{"tokens": np.ones(size, np.int32)} for size in sizes]
    ).to_iter_dataset(grain.ReadOptions(1, 16))
    rows = packer(
        clips, length_struct={"tokens": LENGTH}, num_packing_bins=open_rows, shuffle_bins=False
    )
    return sum(1 for _ in rows)


def ours(window: int, sizes: np.ndarray) -> int:
    return sum(
        len(pack_rows(sizes[at : at + window].tolist(), LENGTH))
        for at in range(0, len(sizes), window)
    )


def main() -> None:
    sizes = lengths()
    print(
        f"{platform.machine()}, Python {platform.python_version()}, grain {version('grain')}, numpy"
        f" {np.__version__}"
    )
    print(f"{CLIPS} clips of {sizes.mean():.0f} tokens on average into rows of {LENGTH}\n")
    first, best = (
        grain.experimental.FirstFitPackIterDataset,
        grain.experimental.BestFitPackIterDataset,
    )
    results = {
        "padded, one clip a row (upstream)": CLIPS,
        "grain's first fit, 64 open rows": with_grain(first, 64, sizes),
        "grain's first fit, 256 open rows": with_grain(first, 256, sizes),
        "grain's best fit, 64 open rows": with_grain(best, 64, sizes),
        "grain's best fit, 256 open rows": with_grain(best, 256, sizes),
        "longest first, best fit, windows of 256 clips": ours(256, sizes),
        f"longest first, best fit, windows of {WINDOW} clips (ours)": ours(WINDOW, sizes),
        "longest first, best fit, windows of 4096 clips": ours(4096, sizes),
    }
    print(f"{'':56} {'rows':>6} {'full':>7} {'upstream / this':>17}")
    for name, rows in results.items():
        print(f"{name:56} {rows:6} {sizes.sum() / LENGTH / rows:7.1%} {CLIPS / rows:16.2f}x")


if __name__ == "__main__":
    main()
