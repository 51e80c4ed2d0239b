"""How long clips are, for benchmarks."""

import numpy as np


def ljspeech_seconds(count: int, rng: np.random.Generator) -> np.ndarray:
    """Durations spread as LJSpeech's: 1.1 to 10.1 s, most of them long, 6.6 s on average."""
    return 1.1 + 9.0 * rng.beta(2.2, 1.4, count)
