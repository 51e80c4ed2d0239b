"""A round of GRPO's speeches: drawn, and not rated yet."""

import base64
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from llasa_jax.evaluate.scorers import Scores
from llasa_jax.generate.speaker import Said


@dataclass
class Round:
    """The speeches of the texts of round `number`, by the texts' places in their list; `scored` are
    their waves and scores, as they come. `old` is float32 of a batch's shape, the log-probabilities
    of the targets when they were drawn, nats, where the loss takes them.
    """

    number: int
    said: dict[int, list[Said]]
    old: np.ndarray | None = None
    scored: dict[int, Future[tuple[list[np.ndarray], Scores]]] = field(default_factory=dict)

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


def written(array: np.ndarray) -> list:
    """An array for JSON: its type, shape and bytes."""
    return [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode()]


def read(found: list) -> np.ndarray:
    """What `written` gave."""
    dtype, shape, text = found
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape).copy()
