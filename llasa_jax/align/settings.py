"""Settings of preference training."""

from dataclasses import dataclass
from typing import Literal

from llasa_jax.errors import UserError
from llasa_jax.runtime.settings import group, setting


@dataclass(frozen=True)
class DpoSettings:
    """Direct preference optimisation, where align.loss is dpo."""

    beta: float = setting(0.1, above=0, high=1000)
    """How strongly the model is held at the one that training begins with: the rewards are beta
    times the log-probabilities relative to that model's. For length_normalized and ipo, whose
    log-probabilities are means over tokens, larger ones are usual."""
    form: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid is DPO's own loss, -log sigmoid of the margin of the rewards (arXiv 2305.18290); ipo
    is the squared distance of the mean log-probabilities' margin from 1 / (2 beta) (arXiv
    2310.12036)."""
    label_smoothing: float = setting(0.0, low=0, below=0.5)
    """Share of the pairs that are taken to be ranked wrongly (conservative DPO); sigmoid alone has
    it."""
    length_normalized: bool = False
    """Divide the log-probability of each speech by its number of tokens, so that a long one does
    not count for more; ipo always does."""
    supervised: float = setting(0.0, low=0, high=1000)
    """Weight of the supervised loss on the better speeches, in nats a token, which is added: it
    keeps their log-probability from falling."""

    def check(self, name: str) -> None:
        if self.form == "ipo" and (self.label_smoothing or self.length_normalized):
            raise UserError(
                f"{name}.form ipo has no label_smoothing, and is length_normalized in any case;"
                " leave both out"
            )


@dataclass(frozen=True)
class RewardSettings:
    """One part of the reward of GRPO."""

    score: str = "cer"
    """A number that one of align.grpo.scorers measures, such as cer, wer, similarity or ovrl."""
    shape: Literal["tanh", "exp", "plain"] = "plain"
    """What becomes of it: tanh is 1 - tanh(scale x score) and exp is e^(-scale x score), for what
    is better low; plain is scale x score, for what is better high. Below 0 is 0."""
    scale: float = setting(1.0, above=0, high=1_000_000)
    """What the score is multiplied by first."""
    weight: float = setting(1.0, above=0, high=1_000_000)
    """What the part counts, relative to the others."""


@dataclass(frozen=True)
class GuardSettings:
    """One number of GRPO's speech that is not rewarded, and where it may lie."""

    scorer: str = "levels"
    """What measures it, as evaluate.scorers: another one than is rewarded."""
    score: str = "silence"
    """The number, such as silence of levels or similarity of resemblyzer."""
    least: float = setting(-1e9, low=-1e9, high=1e9)
    """A round is astray where its mean is lower."""
    most: float = setting(1e9, low=-1e9, high=1e9)
    """And where it is higher."""

    def check(self, name: str) -> None:
        if not self.least <= self.most:
            raise UserError(f"{name}.least is above {name}.most; lower it")


REWARDS = [RewardSettings("cer", "tanh", 3.0), RewardSettings("similarity")]


@dataclass(frozen=True)
class GrpoSettings:
    """Group relative policy optimisation, where align.loss is grpo. The texts are data.path, in any
    form that evaluate takes, and the codec is log.codec.
    """

    samples: int = setting(8, low=2, high=1024)
    """Speeches of each text; 4 to 12 are usual."""
    texts: int = setting(4, low=1, high=65536)
    """Texts of a round. All their speeches must fit into one step's rows."""
    temperature: float = setting(1.1, above=0, high=1000)
    """Of the sampling: speeches must differ. What is learned from are the log-probabilities at this
    temperature."""
    top_k: int = setting(75, low=0, high=1_000_000)
    """Draw among the so many most probable codes alone; 0, among all."""
    top_p: float = setting(0.9, above=0, high=1)
    """Draw among the most probable codes that together have this probability."""
    max_seconds: float = setting(0.0, low=0, high=3600)
    """Longest speech; one that goes on is cut there and counts as not ended. A step has room for
    all of a round's at this length. 0 is three times what reading the text takes, and 3 seconds."""
    rows: int = setting(8, low=1, high=1024, resume=True)
    """Speeches drawn at once; more are faster where memory allows."""
    scorers: list[str] = setting(lambda: ["whisper", "wavlm"])
    """What measures the speech, as evaluate.scorers. Judge the result by others."""
    device: str = setting(
        "cpu",
        pattern=r"(cpu|cuda|mps|xpu|hpu)(:\d{1,3})?",
        words="a device as PyTorch names it, such as cpu or cuda:1",
        resume=True,
    )
    """Device of the scorers, which run in processes of their own."""
    processes: int = setting(1, low=1, high=1024, resume=True)
    """Processes of the scorers on each host, each with a copy of them all, and as many for each
    scorer of a guard. The texts of a round are scored by turns, so more shorten a round where
    scorers on the CPU take longer than the devices."""
    language: str = setting("")
    """Language of the texts, such as en or zh; empty, unknown."""
    rewards: list[RewardSettings] = setting(list)
    """The parts of the reward; none given, 1 - tanh(3 x cer) and similarity."""
    combine: Literal["harmonic", "mean"] = "harmonic"
    """How they become one: their harmonic mean, in which a bad part cannot be made up for, or the
    plain one."""
    unstopped: float = setting(1.0, low=0, high=1000)
    """What is taken off the reward of a speech that the model did not end by itself."""
    pace: float = setting(0.0, low=0, high=1000)
    """What is taken off for each factor of e by which a speech is longer or shorter than
    free_pace allows."""
    free_pace: float = setting(2.0, low=1, high=1000)
    """A speech may be this many times as long as reading the text takes, or as short, for free."""
    guards: list[GuardSettings] = setting(list, resume=True)
    """Numbers that the model is not rewarded for, which say whether it has found a way to be
    rewarded for worse speech."""
    patience: int = setting(20, low=0, high=1_000_000, resume=True)
    """Stop after so many rounds in a row in which no text's speeches differ in reward, or which
    the guards or the two settings below call astray; 0, never."""
    least_stopped: float = setting(0.2, low=0, high=1, resume=True)
    """A round is astray where the model has ended less than this share of its speeches."""
    most_pace: float = setting(4.0, low=1, high=1000, resume=True)
    """And where the median speech takes this many times as long as reading its text, or as
    short."""
    audio_every: int = setting(0, low=0, high=1_000_000_000, resume=True)
    """Keep the sound of every so many rounds beside their codes and scores, which are always kept;
    0, none."""

    epsilon_low: float = setting(0.2, above=0, below=1)
    """A speech is made less probable only until the ratio of its tokens' probabilities to those
    when it was drawn has fallen by this. Without effect where updates is 1 and
    ahead is off."""
    epsilon_high: float = setting(0.2, above=0, high=100)
    """And more probable until it has risen by this; DAPO takes 0.28. Without effect where updates
    is 1 and ahead is off."""
    kl: float = setting(0.0, low=0, high=1000)
    """Weight of the divergence from the model that training begins with, in nats a token; 0, as
    DAPO and Dr. GRPO have it, needs no reference. In full finetuning above 0 a second copy of the
    weights is in memory."""
    normalize: Literal["speeches", "tokens", "length"] = "tokens"
    """What the loss is a mean over. speeches: each speech counts as much as another (GRPO); tokens:
    each token does (DAPO); length: the sum of a speech is divided by data.max_length, whatever its
    own length (Dr. GRPO)."""
    scale: bool = True
    """Divide rewards by their standard deviation among the speeches of a text; Dr. GRPO does
    not."""
    updates: int = setting(1, low=1, high=64)
    """Steps on the same speeches, before new ones are drawn."""
    ahead: bool = False
    """Speak a round before the first step on the round before it, so that scorers work while the
    devices train. The weights that speak are then older by a round's steps, for which the ratio of
    the probabilities makes up."""

    def check(self, name: str) -> None:
        if not self.scorers:
            raise UserError(f"{name}.scorers is empty; name one at least")

    @property
    def parts(self) -> list[RewardSettings]:
        """The parts of the reward, those by default included."""
        return self.rewards or REWARDS


@dataclass(frozen=True)
class AlignSettings:
    """Which loss is trained with."""

    loss: Literal["supervised", "dpo", "grpo"] = "supervised"
    """supervised: cross-entropy of every clip. dpo: of pairs, which `llasa-jax prefer` makes, the
    better one is made more probable than the worse one. grpo: the model speaks texts while it is
    trained, and what is rated above the mean of its text becomes more probable."""
    dpo: DpoSettings = group(DpoSettings)
    grpo: GrpoSettings = group(GrpoSettings)

    def check(self, name: str) -> None:
        for loss, given, default in (
            ("dpo", self.dpo, DpoSettings()),
            ("grpo", self.grpo, GrpoSettings()),
        ):
            if self.loss != loss and given != default:
                raise UserError(
                    f"{name}.{loss} is set, but {name}.loss is {self.loss}; set it to {loss}"
                )
