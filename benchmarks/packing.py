"""Clips a second in training: rows packed by llasa-jax, against upstream's way in PyTorch, on this CPU. Both sides run in turns.

Upstream (LLaSA_training) pads every clip to 2,048 tokens and leaves the loss to HF's `LlamaForCausalLM`, which builds all logits. Here the
same clips, of LJSpeech-like lengths, are packed into rows of 2,048, and the loss is taken in chunks. Same weights, same geometry (Llasa's
own vocabulary of 193,800, narrow and shallow so that a CPU can do it), float32, AdamW, all cores for either side.
"""

import argparse
import os
import time

os.environ.pop("OMP_NUM_THREADS", None)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM

from llasa_jax.batching import pack_rows
from llasa_jax.config import ModelConfig
from llasa_jax.model import Llama
from llasa_jax.optimizer import make_optimizer
from llasa_jax.settings import ModelSettings, OptimizerSettings
from llasa_jax.sharding import make_mesh
from llasa_jax.train_step import TrainStep

VOCAB, CODE_BASE, LENGTH = 193_800, 128_264, 2048
PROMPT, TEXT = 42, 25  # tokens of the chat template, and of a sentence
GEOMETRY = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def clip_lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of clips of 1.1 to 10.1 s, 6.6 s on average, as LJSpeech's are."""
    seconds = 1.1 + 9.0 * rng.beta(2.2, 1.4, count)
    return PROMPT + TEXT + (50 * seconds).astype(int)


def make_clips(lengths: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    return [
        np.concatenate([rng.integers(0, CODE_BASE, PROMPT + TEXT), rng.integers(CODE_BASE, VOCAB, length - PROMPT - TEXT)])
        for length in lengths
    ]


class Upstream:
    """A clip padded to 2,048 with an attention mask, HF's loss, `torch.optim.AdamW`."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(**GEOMETRY, tie_word_embeddings=True, max_position_embeddings=LENGTH))
        self.adamw = torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01)

    def step(self, clips: list[np.ndarray]) -> None:
        for clip in clips:  # one at a time: the logits of a row take 1.6 GB, and their gradient as much again
            ids, labels = np.zeros(LENGTH, np.int64), np.full(LENGTH, -100)
            ids[: len(clip)] = clip
            labels[PROMPT + TEXT : len(clip)] = clip[PROMPT + TEXT :]
            mask = np.arange(LENGTH) < len(clip)
            batch = {"input_ids": ids, "labels": labels, "attention_mask": mask.astype(np.int64)}
            loss = self.model(**{name: torch.from_numpy(array)[None] for name, array in batch.items()}, use_cache=False).loss
            (loss / len(clips)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adamw.step()
        self.adamw.zero_grad()


class Packed:
    """The train step of llasa-jax over one row that holds many clips."""

    def __init__(self):
        config = ModelConfig(**GEOMETRY, rope_theta=10_000.0)
        settings = ModelSettings(dtype="float32", remat="none", loss_chunk=128)
        self.functions = TrainStep(config, settings, make_optimizer(OptimizerSettings(), 1000), make_mesh())
        model = Llama(config, rngs=nnx.Rngs(0))
        self.params = jax.device_put(nnx.to_pure_dict(nnx.state(model)), jax.tree.map(lambda leaf: leaf.sharding, self.functions.trainable))
        self.opt_state = self.functions.init(self.params)

    def step(self, clips: list[np.ndarray]) -> None:
        row = {name: np.zeros(LENGTH, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
        row["loss_mask"] = np.zeros(LENGTH, bool)
        at = 0
        for number, clip in enumerate(clips):
            here = slice(at, at + len(clip))
            row["tokens"][here], row["targets"][here] = clip, np.append(clip[1:], 0)
            row["segment_ids"][here], row["positions"][here] = number + 1, np.arange(len(clip))
            row["loss_mask"][at + PROMPT + TEXT - 1 : at + len(clip) - 1] = True
            at += len(clip)
        batch = jax.device_put({name: array[None, None] for name, array in row.items()}, self.functions.batch_sharding)
        self.params, self.opt_state, numbers = self.functions.train({}, self.params, self.opt_state, batch)
        jax.block_until_ready(numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds: one padded clip, one packed row")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    lengths = clip_lengths(400, rng)
    clips = make_clips(lengths, rng)
    rows = pack_rows(lengths.tolist(), LENGTH)
    fill = lengths.sum() / (len(rows) * LENGTH)
    cores = os.cpu_count()
    torch.set_num_threads(cores)
    print(f"{cores} cores; torch {torch.__version__} with {torch.get_num_threads()} threads, jax {jax.__version__}; float32")
    print(f"clips of {lengths.mean():.0f} tokens on average; packed rows {fill:.1%} full, padded rows {lengths.mean() / LENGTH:.1%}")
    upstream, packed = Upstream(), Packed()
    parameters = sum(weight.numel() for weight in upstream.model.parameters())
    print(
        f"{parameters / 1e6:.1f}M parameters: width {GEOMETRY['hidden_size']}, {GEOMETRY['num_hidden_layers']} layers, vocabulary {VOCAB:,}"
    )

    seconds, done = {"upstream": 0.0, "packed": 0.0}, {"upstream": 0, "packed": 0}
    for turn in range(args.rounds + 1):
        # Turn about, so that whatever else the machine does meets both alike; the first round compiles and warms up.
        for name, side, work in (("upstream", upstream, [turn]), ("packed", packed, rows[turn])):
            began = time.perf_counter()
            side.step([clips[i] for i in work])
            if turn:
                seconds[name] += time.perf_counter() - began
                done[name] += len(work)
    for name, what in (("upstream", f"PyTorch, every clip padded to {LENGTH:,}"), ("packed", "llasa-jax, packed")):
        print(f"{what + ':':39}{done[name] / seconds[name]:8.3f} clips/s  ({done[name]} clips in {seconds[name]:.1f} s)")
    print(f"ratio: {done['packed'] / seconds['packed'] / (done['upstream'] / seconds['upstream']):.2f}")


if __name__ == "__main__":
    main()
