"""Settings of the evaluation while training."""

from dataclasses import dataclass

from llasa_jax.errors import UserError
from llasa_jax.runtime.settings import setting


@dataclass(frozen=True)
class EvaluateSettings:
    """A few texts that the model speaks while it is trained, and scorers that measure them. The
    codec is log.codec.
    """

    every: int = setting(0, low=0, high=1_000_000_000, resume=True)
    """Steps between evaluations, which come at the last step too; 0, none."""
    texts: list[str] = setting(list, resume=True)
    """What is spoken. Ten sentences or more show more than chance."""
    scorers: list[str] = setting(lambda: ["whisper", "levels"], resume=True)
    """What measures it: pocketsphinx, whisper, paraformer, resemblyzer, wavlm, dnsmos, utmos,
    levels, pocketsphinx:FILE with a JSGF grammar, or asr:ID or speaker:ID with a hub id or
    folder."""
    device: str = setting(
        "cpu",
        pattern=r"(cpu|cuda|mps|xpu|hpu)(:\d{1,3})?",
        words="a device as PyTorch names it, such as cpu or cuda:1",
        resume=True,
    )
    """Device of the scorers, which run in a process of their own."""
    speaker: str = setting("", resume=True)
    """Speaker of the texts, one of the training data; empty, none is named."""
    reference: str = setting("", path=True, resume=True)
    """A recording of that speaker, for scorers of likeness."""
    language: str = setting("", resume=True)
    """Language of the texts, such as en or zh; empty, unknown."""

    def check(self, name: str) -> None:
        if self.every and not (self.texts and self.scorers):
            raise UserError(
                f"{name}.every is {self.every}, but there are no {name}.texts or no"
                f" {name}.scorers; give some of both, or leave {name}.every at 0"
            )
