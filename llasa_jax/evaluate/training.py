"""The evaluation of a model while it is trained: a few texts, spoken and scored."""

import warnings
from concurrent.futures.process import BrokenProcessPool

import jax
import numpy as np
from flax import nnx

from llasa_jax.codec import load_codec
from llasa_jax.errors import UserError, first_line
from llasa_jax.evaluate.checkpoints import mentioned_by
from llasa_jax.evaluate.scorers import Scoring
from llasa_jax.evaluate.settings import EvaluateSettings
from llasa_jax.generate.speaker import Line, Speaker, Speech
from llasa_jax.speech.audio import read_audio
from llasa_jax.speech.prompts import Prompter

PREFIX = "evaluate_"  # of the numbers' names in the metrics


class TrainingEvaluation:
    """Speaks `evaluate.texts` and scores them. A context, which ends the scorers' process.

    `higher_is_better` are the numbers by the names that they have in the metrics. UserError, before
    any training, where that cannot work.
    """

    def __init__(
        self, settings: EvaluateSettings, prompter: Prompter, codec: str, codec_device: str
    ):
        if jax.process_count() > 1:
            raise UserError(
                "evaluate.every works on one host only; leave it at 0, and use `llasa-jax evaluate`"
                " on the checkpoints"
            )
        self._prompter = prompter
        # The scorers know the language, whether the prompt mentions it or not.
        language = settings.language if "language" in mentioned_by(prompter) else ""
        self._lines = [
            Line(text, speaker=settings.speaker, language=language, id=str(at))
            for at, text in enumerate(settings.texts)
        ]
        for line in self._lines:
            prompter.opening(line.text, **line.named)
        self._reference = read_audio(settings.reference) if settings.reference else None
        self._codec = load_codec(codec, codec_device)
        self._scoring = Scoring(settings.scorers, settings.device, settings.language)
        known = {**self._scoring.higher_is_better, "stopped": True}
        self.higher_is_better = {PREFIX + name: higher for name, higher in known.items()}

    def speak(self, graphdef: nnx.GraphDef, params: dict) -> list[Speech]:
        """What the model says of the texts now."""
        rows = min(8, len(self._lines))
        speaker = Speaker(graphdef, params, self._prompter, self._codec, rows=rows)
        said = dict(speaker.say(self._lines))
        return [said[at] for at in range(len(self._lines))]

    def numbers(self, said: list[Speech]) -> dict[str, float]:
        """The means of all numbers over the clips that have them. Scorers that fail, as for want of
        memory, are a warning: a run is worth more.
        """
        waves, texts = [each.wave for each in said], [line.text for line in self._lines]
        try:
            scores = self._scoring.submit(waves, texts, [self._reference] * len(waves)).result()
        except (UserError, RuntimeError, MemoryError, ValueError, BrokenProcessPool) as error:
            warnings.warn(f"an evaluation is left out: {first_line(error)}", stacklevel=2)
            return {}
        found = {**scores.numbers, "stopped": np.array([each.stopped for each in said], float)}
        return {
            PREFIX + name: float(values[~np.isnan(values)].mean())
            for name, values in found.items()
            if not np.isnan(values).all()
        }

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._scoring.__exit__(*error)
