"""Settings of the training data: which datasets, how rows are filled, and how audio becomes codes
while training.
"""

import posixpath
from dataclasses import dataclass
from typing import Literal

from llasa_jax.data.settings import SourceSettings, check_splits
from llasa_jax.errors import UserError
from llasa_jax.runtime.settings import CODEC_DEVICE, DEVICE_WORDS, MAX_SEED, group, setting


@dataclass(frozen=True)
class OnlineSettings:
    """How audio becomes codes while training, where data.mode is online."""

    codec: str = setting("HKUSTAudio/xcodec2-hf", path=True, resume=True)
    """Codec that makes the codes: an XCodec2 checkpoint's hub id or folder."""
    device: str = setting("cpu", pattern=CODEC_DEVICE, words=DEVICE_WORDS, resume=True)
    """Device on which the codec runs, as PyTorch names it; or jax, the codec in JAX on all of this
    process's devices, or jax:2,3 on some."""
    precision: Literal["float32", "bfloat16_3x", "bfloat16"] = setting("float32")
    """How the codec in JAX multiplies on TPUs. Less than float32 is faster and changes codes."""
    columns: str = setting("")
    """Columns of a Hugging Face or TFDS dataset or a JSONL manifest: audio=COLUMN,text=COLUMN and
    any of id, speaker, language, description; or id,text,speaker of a manifest with |. Empty, the
    usual names are looked for."""
    queue: int = setting(4, low=1, high=1024, resume=True)
    """Finished batches that may wait for the devices; as many are planned ahead of them."""
    workers: int = setting(4, low=1, high=1024, resume=True)
    """Processes that read audio."""
    read_ahead: float = setting(600.0, above=0, high=86_400, resume=True)
    """Seconds of audio that may be read before they are encoded."""
    cache: str = setting("", path=True, resume=True)
    """Folder that keeps the codes as they are made, and becomes a dataset once all are there;
    empty, codes are made again in every epoch. It holds nothing else, and must not lie in the run's
    folder nor hold it."""
    max_bad_share: float = setting(0.05, low=0, below=1, resume=True)
    """Share of unreadable clips above which training stops."""
    stall_seconds: float = setting(30.0, above=0, high=86_400, resume=True)
    """Seconds that training may wait for data before it warns."""
    validation_share: float = setting(0.0, low=0, below=1)
    """Share of the clips without a split that becomes the split validation, as in encode."""
    split_seed: int = setting(0, low=0, high=MAX_SEED)
    """Seed of the choice of validation clips."""
    torch_threads: int = setting(0, low=0, high=1024, resume=True)
    """Cores that the codec uses; 0 is all of them, or half where JAX computes on the CPU too."""
    gpu_memory: float = setting(0.2, low=0, high=0.9, resume=True)
    """The codec's share of its GPU's memory; JAX takes the rest, less 5%. 0 sets the codec no
    limit."""
    max_clip_seconds: float = setting(120.0, above=0, high=3600)
    """Seconds above which a clip counts as bad: the codec's memory grows with the square of its
    length."""


@dataclass(frozen=True)
class DataSettings:
    """The training data: one dataset at data.path, or several in data.sources."""

    mode: Literal["offline", "online"] = "offline"
    """offline: data.path is a dataset of codes. online: it is audio, which becomes codes while
    training."""
    path: str = setting("", path=True, resume=True)
    """A folder that encode or an import made; with mode online a manifest as encode takes it, a
    Hugging Face dataset's folder or hub id (NAME:CONFIG), or tfds:NAME."""
    train_split: str = setting("train")
    """Split to train on."""
    validation_split: str = setting("")
    """Split to validate on; empty, there is no validation."""
    sources: list[SourceSettings] = setting(list)
    """Several datasets, mixed, in place of data.path: each with path, split, validation_split,
    weight, prompt and mode. An epoch is one pass over the first."""
    max_length: int = setting(2048, low=2, high=1_048_576)
    """Tokens of a row; 2,048 hold about 40 seconds of speech."""
    too_long: Literal["drop", "cut"] = "drop"
    """Clips longer than a row are dropped and counted, or cut."""
    pack: bool = True
    """Fill a row with as many clips as fit; no clip sees another. Otherwise a row holds one."""
    streams: int = setting(0, low=0, high=65_536, resume=True)
    """Parts that the data is cut into, each planned by the hosts that need it; together they give
    the same batches on any number of hosts. Must divide train.rows, and is kept by a run; 0 means
    one for every 16 rows. More streams spread the reading over more hosts."""
    cache_dir: str = setting("", path=True, resume=True)
    """Folder of this machine for copies of what is read from buckets, shared by its processes;
    empty, $LLASA_JAX_CACHE or ~/.cache/llasa-jax. It may be deleted between runs."""
    doctor: Literal["stop", "warn", "off"] = setting("stop", resume=True)
    """What a bad finding of the quick look at the records before training does."""
    online: OnlineSettings = group(OnlineSettings)
    """How audio becomes codes while training."""

    def check(self, name: str) -> None:
        if not self.sources:
            if not self.path:
                raise UserError(
                    f"{name}.path is not set; give it in the config or as --{name}.path=FOLDER"
                )
            check_splits(name, "train_split", self.train_split, self.validation_split)
        elif self.path or self.validation_split:
            raise UserError(
                f"{name}.sources lists the datasets and their splits; leave {name}.path and"
                f" {name}.validation_split out"
            )
        seen, trained = [], set()
        for at, source in enumerate(self.sources):
            path = posixpath.normpath(source.path)
            # The same clips may be trained on twice under different prompts.
            key = (path, source.split, source.prompt, source.mode)
            if key in seen:
                raise UserError(
                    f"{name}.sources[{at}] is {source.path} a second time; list it once, and raise"
                    " its weight to draw more from it"
                )
            seen.append(key)
            trained.add((path, source.split))
        for at, source in enumerate(self.sources):
            held_out = (posixpath.normpath(source.path), source.validation_split)
            if source.validation_split and held_out in trained:
                raise UserError(
                    f"{name}.sources[{at}].validation_split is {source.validation_split} of"
                    f" {source.path}, which another source trains on; name another split"
                )
