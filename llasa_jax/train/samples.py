"""Speech from a model while it learns: the same texts every time, as wav files in the run's folder,
to hear it change.
"""

import warnings
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from llasa_jax.codec import load_codec
from llasa_jax.errors import UserError
from llasa_jax.generate.decode import generate_codes, plausible_limit
from llasa_jax.speech.audio import SAMPLE_RATE, write_audio
from llasa_jax.speech.prompts import Prompter
from llasa_jax.train.metrics import Metrics
from llasa_jax.train.settings import LogSettings


class Samples:
    """Speaks `log.samples` with `log.codec`. UserError, before any training, where that cannot
    work.
    """

    def __init__(self, run: Path, settings: LogSettings, prompter: Prompter):
        self._folder, self._texts = run / "samples", settings.samples
        self._prompts = [
            prompter.opening(text, speaker=settings.samples_speaker) for text in settings.samples
        ]
        self._vocab = prompter.vocab
        # All hosts speak, as each has a part of the model; the first one decodes and writes.
        self._codec = None
        if jax.process_index() == 0:
            self._codec = load_codec(settings.codec, settings.codec_device)

    def speak(self, graphdef: nnx.GraphDef, params: dict) -> dict[int, np.ndarray]:
        """The numbers of the texts that the model has speech for, and their waves, float32
        (samples,); none but on the first host. All hosts must speak.
        """
        limits = [plausible_limit(text) for text in self._texts]
        spoken = generate_codes(graphdef, params, self._prompts, self._vocab, limits)
        return {
            number: self._codec.decode(result.codes)
            for number, result in enumerate(spoken)
            if self._codec and len(result.codes)
        }

    def write(self, step: int, waves: dict[int, np.ndarray], metrics: Metrics) -> None:
        """Writes them as `samples/STEP_NUMBER.wav`, and gives them to TensorBoard and W&B."""
        for number, wave in waves.items():
            metrics.audio(step, f"sample_{number}", wave, SAMPLE_RATE)
            try:
                write_audio(self._folder / f"{step:06}_{number}.wav", wave, SAMPLE_RATE)
            except (OSError, UserError) as error:  # a full disk: not worth a run
                warnings.warn(f"a sample is left out: {error}", stacklevel=2)
