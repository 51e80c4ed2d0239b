"""What the rest of the project knows of a speech codec: 16 kHz waves to codes and back.

A code is one of 65,536 and stands for 320 samples (20 ms).
"""

from typing import Protocol

import numpy as np

from llasa_jax.speech.audio import SAMPLE_RATE
from llasa_jax.speech.vocab import CODES_PER_SECOND

DEFAULT_CODEC = "HKUSTAudio/xcodec2-hf"
HOP = SAMPLE_RATE // CODES_PER_SECOND


class Codec(Protocol):
    """What the rest of the project knows of a codec."""

    name: str
    fingerprint: str  # equal for two codecs only if their codes mean the same
    sample_rate: int
    hop: int

    def encode(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        """Waves, float32 (samples,), to codes, uint16 (samples // hop + 1,), in the same order."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes, integers (frames,), to the wave, float32 (frames * hop,)."""
