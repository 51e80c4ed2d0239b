"""A round of GRPO's speeches: drawn, and not rated yet."""

import base64
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from llasa_jax.evaluate.scorers import Scores
from llasa_jax.generate.speaker import Said
from llasa_jax.runtime import hosts


@dataclass
class Round:
    """The speeches of the texts of round `number`, by the texts' places in their list; `scored` are
    the scores of those that this host rates, by each scorer, as they come. `old` is float32 of a
    batch's shape, the log-probabilities of the targets when they were drawn, nats, where the loss
    takes them.
    """

    number: int
    said: dict[int, list[Said]]
    old: np.ndarray | None = None
    scored: dict[int, Future[list[Future[Scores]]]] = field(default_factory=dict)

    def written(self) -> dict:
        """For JSON, without the scores, which are measured again."""
        return {
            "number": self.number,
            "old": None if self.old is None else written(self.old),
            "said": [
                [
                    at,
                    [
                        [
                            *(written(one.prompt), [written(piece) for piece in one.pieces]),
                            *(bool(one.stopped), int(one.tokens), float(one.logprob)),
                        ]
                        for one in speeches
                    ],
                ]
                for at, speeches in self.said.items()
            ],
        }

    @classmethod
    def read(cls, found: dict) -> "Round":
        """What `written` gave."""
        said = {
            at: [
                Said(read(prompt), [read(piece) for piece in pieces], *rest)
                for prompt, pieces, *rest in speeches
            ]
            for at, speeches in found["said"]
        }
        return cls(found["number"], said, found["old"] and read(found["old"]))


def together(scores: dict[int, Scores], texts: Sequence[int]) -> Scores:
    """All hosts' scores, those of one text after those of another. All hosts must ask."""
    own = {
        at: [{name: values.tolist() for name, values in found.numbers.items()}, found.transcripts]
        for at, found in scores.items()
    }
    known = {int(at): found for part in hosts.everyones(own) for at, found in part.items()}
    numbers = {
        name: np.concatenate([known[at][0][name] for at in texts]) for name in known[texts[0]][0]
    }
    return Scores(numbers, [text for at in texts for text in known[at][1]])


def written(array: np.ndarray) -> list:
    """An array for JSON: its type, shape and bytes."""
    return [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode()]


def read(found: list) -> np.ndarray:
    """What `written` gave."""
    dtype, shape, text = found
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape).copy()
