"""Settings of the training data: which datasets, how rows are filled, and how audio becomes codes
while training.
"""

from dataclasses import dataclass, field
from typing import Literal

from llasa_jax.data.settings import SourceSettings


@dataclass(frozen=True)
class OnlineSettings:
    """How audio becomes codes while training, where `data.mode` is online. `codec` and `device` are
    those of `encode`.

    `columns`: audio=COLUMN,text=COLUMN and so on, of Hugging Face's and TFDS's datasets (empty, the
    usual names are looked for) and of JSONL manifests; or id,text,speaker, of
    manifests with |. `queue`: finished batches that may wait for the devices, and as many
    that are planned ahead of them. `workers`: processes that read audio, no more than `read_ahead`
    seconds of it before it is encoded. `cache`: a folder of codes, written as they are made and a
    dataset once all are there. More than `max_bad_share` bad clips stop training. A warning comes
    when training has waited `stall_seconds` for data. `validation_share` of the clips without a
    split, chosen by `split_seed`, are the split validation, as `encode` does it. `torch_threads` is
    how many cores the codec takes; 0 is all, or half where JAX computes on them too. `gpu_memory`
    is the codec's share of its GPU; JAX takes the rest, less 5%.
    """

    codec: str = "HKUSTAudio/xcodec2-hf"
    device: str = "cpu"
    columns: str = ""
    queue: int = 4
    workers: int = 4
    read_ahead: float = 600.0
    cache: str = ""
    max_bad_share: float = 0.05
    stall_seconds: float = 30.0
    validation_share: float = 0.0
    split_seed: int = 0
    torch_threads: int = 0
    gpu_memory: float = 0.2


@dataclass(frozen=True)
class DataSettings:
    """`path`: a folder that `encode` made; or, for a mixture of several, `sources`. An epoch is one
    pass over the first of them.

    With `mode` online, paths are of audio: a manifest as `encode` takes it, a Hugging Face
    dataset's folder or hub id (`NAME:CONFIG`), or `tfds:NAME`; a source may have its own mode.
    Clips longer than a row of `max_length` tokens are dropped and counted, or cut. With `pack` a
    row holds as many clips as fit. `doctor`: what a bad finding of the quick look at the records
    before training does.
    """

    mode: Literal["offline", "online"] = "offline"
    path: str = ""
    train_split: str = "train"
    validation_split: str = ""
    sources: list[SourceSettings] = field(default_factory=list)
    max_length: int = 2048
    too_long: Literal["drop", "cut"] = "drop"
    pack: bool = True
    doctor: Literal["stop", "warn", "off"] = "stop"
    online: OnlineSettings = field(default_factory=OnlineSettings)
