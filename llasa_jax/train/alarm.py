"""What a first loss says about the data: people have trained for weeks on codes that were noise."""

import math

EARLY_STEPS = 20
LOWEST, HIGHEST = 2.0, 11.0
CHANCE_MARGIN = 0.5


class LossAlarm:
    """Looks at the losses of a run's first steps, and speaks at most once.

    Finetuning on speech starts at some 5 to 7 nats a token, as users of LLaSA_training report. A
    model that starts at chance, ln(vocabulary), is a new one: only what is worse than chance is
    wrong with it. Batches that are mostly text say nothing.
    """

    def __init__(self, vocab_size: int):
        self._chance = math.log(vocab_size)
        self._highest = HIGHEST
        self._spoken = False

    def listen(self, step: int, loss: float, code_share: float) -> str | None:
        """A warning if the loss (nats a token) of `step` is out of range; `code_share` is the share
        of speech among its targets.
        """
        if step == 1 and abs(loss - self._chance) < CHANCE_MARGIN:
            self._highest = self._chance + CHANCE_MARGIN
        if (
            self._spoken
            or step > EARLY_STEPS + 1
            or code_share < 0.5
            or LOWEST <= loss <= self._highest
        ):
            return None
        self._spoken = True
        return (
            f"the loss is {loss:.2f} nats a token at step {step}, where finetuning on speech starts"
            " at about 5 to 7; "
            + (
                "the codes may be constant or noise (a codec whose weights did not all load)"
                if loss < LOWEST
                else TOO_HIGH
            )
            + ": look at the data before training on"
        )


TOO_HIGH = (
    "the codes may be noise or come from another codec, may lack the vocabulary's offset, or the"
    " tokenizer may not be the model's own"
)
