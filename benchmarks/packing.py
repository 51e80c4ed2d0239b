"""Clips per second in training: rows packed by llasa-jax, against upstream's way in PyTorch, on the
same machine. Both sides run in turns.

Upstream (LLaSA_training) pads every clip to 2,048 tokens and leaves the loss to HF's
`LlamaForCausalLM`, which builds all logits. Here the same clips, of LJSpeech's lengths, are packed
into rows of 2,048, and the loss is taken in chunks. Same geometry, with Llasa's vocabulary of
193,800.

On a CPU the model is narrow and shallow, in float32, with all cores for either side. `--gpu` trains
Llasa-1B's geometry in bfloat16 on one GPU, PyTorch as fast as it goes: weights in bfloat16, SDPA,
fused AdamW, four clips at once without recomputing and four times that for an update, which is
upstream's own setting. llasa-jax runs `configs/llasa_1b_full.yaml` with
`configs/machines/1x80gb.yaml`, with float32 weights and optimizer, and prints its share of the
GPU's peak.
"""

import argparse
import os
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path

os.environ.pop("OMP_NUM_THREADS", None)
os.environ["JAX_PLATFORMS"] = "cuda" if "--gpu" in sys.argv else "cpu"
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # the other half is PyTorch's
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import torch
from flax import nnx
from lengths import ljspeech_seconds
from transformers import LlamaConfig, LlamaForCausalLM

from llasa_jax.data.batching import pack_rows
from llasa_jax.model.config import ModelConfig
from llasa_jax.model.flops import model_flops_per_token
from llasa_jax.model.llama import Llama
from llasa_jax.model.settings import ModelSettings
from llasa_jax.model.sharding import make_mesh
from llasa_jax.plan.plan import MODELS
from llasa_jax.runtime.hardware import device_of_kind
from llasa_jax.train.optimizer import make_optimizer
from llasa_jax.train.parsing import parse_settings
from llasa_jax.train.settings import OptimizerSettings
from llasa_jax.train.step import TrainStep

VOCAB, CODE_BASE, LENGTH = 193_800, 128_264, 2048
PROMPT, TEXT = 42, 25  # tokens of the chat template, and of a sentence
NARROW = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=10_000.0,
)


@dataclass(frozen=True)
class Sides:
    """What either side is given. `rows` and `clips` are those of a step, ours and upstream's: (one
    after another, at once).
    """

    config: ModelConfig
    model: ModelSettings
    optimizer: OptimizerSettings
    rows: tuple[int, int]
    clips: tuple[int, int]
    dtype: torch.dtype
    device: str


def sides(gpu: bool) -> Sides:
    if not gpu:
        ours = ModelSettings(dtype="float32", remat="none", loss_chunk=128)
        return Sides(NARROW, ours, OptimizerSettings(), (1, 1), (1, 1), torch.float32, "cpu")
    configs = Path(__file__).parent.parent / "configs"
    recipe = parse_settings(
        [f"--config={configs}/llasa_1b_full.yaml", f"--config={configs}/machines/1x80gb.yaml"]
    )
    rows = recipe.train.accumulation, recipe.train.rows
    return Sides(MODELS["1b"], recipe.model, recipe.optimizer, rows, (4, 4), torch.bfloat16, "cuda")


def make_clips(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    lengths = PROMPT + TEXT + (50 * ljspeech_seconds(count, rng)).astype(int)
    return [
        np.concatenate(
            [
                rng.integers(0, CODE_BASE, PROMPT + TEXT),
                rng.integers(CODE_BASE, VOCAB, length - PROMPT - TEXT),
            ]
        )
        for length in lengths
    ]


class Upstream:
    """Clips padded to 2,048 with an attention mask, HF's loss, `torch.optim.AdamW`."""

    def __init__(self, given: Sides):
        torch.manual_seed(0)
        its = {
            name: value for name, value in asdict(given.config).items() if name != "rope_scaling"
        }
        config = LlamaConfig(
            **its | {"max_position_embeddings": LENGTH, "attn_implementation": "sdpa"}
        )
        with torch.device(given.device):
            self.model = LlamaForCausalLM(config).to(given.dtype)
        options = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.01, "fused": True}
        self.adamw = torch.optim.AdamW(self.model.parameters(), **options)
        self.device, self.at_once = given.device, given.clips[1]

    def step(self, clips: list[np.ndarray]) -> None:
        for at in range(0, len(clips), self.at_once):
            (self._loss(clips[at : at + self.at_once]) * self.at_once / len(clips)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adamw.step()
        self.adamw.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _loss(self, clips: list[np.ndarray]) -> torch.Tensor:
        rows = {
            name: np.zeros((len(clips), LENGTH), np.int64)
            for name in ("input_ids", "labels", "attention_mask")
        }
        rows["labels"] -= 100
        for row, clip in enumerate(clips):
            rows["input_ids"][row, : len(clip)] = clip
            rows["labels"][row, PROMPT + TEXT : len(clip)] = clip[PROMPT + TEXT :]
            rows["attention_mask"][row, : len(clip)] = 1
        batch = {name: torch.from_numpy(array).to(self.device) for name, array in rows.items()}
        return self.model(**batch, use_cache=False).loss


class Packed:
    """The train step of llasa-jax over rows that hold many clips."""

    def __init__(self, given: Sides):
        optimizer = make_optimizer(given.optimizer, 1000)
        self.functions = TrainStep(
            given.config, given.model, optimizer, make_mesh(1, 1, 1, devices=jax.devices()[:1])
        )
        create = jax.jit(
            lambda: nnx.to_pure_dict(nnx.state(Llama(given.config, rngs=nnx.Rngs(0)))),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.functions.trainable),
        )
        self.params = create()
        self.rows = given.rows
        self.opt_state = self.functions.init(self.params)

    def step(self, rows: list[list[np.ndarray]]) -> None:
        batch = {
            name: np.zeros((len(rows), LENGTH), np.int32)
            for name in ("tokens", "targets", "segment_ids", "positions")
        }
        batch["loss_mask"] = np.zeros((len(rows), LENGTH), bool)
        for row, clips in enumerate(rows):
            at = 0
            for number, clip in enumerate(clips):
                here = row, slice(at, at + len(clip))
                batch["tokens"][here], batch["targets"][here] = clip, np.append(clip[1:], 0)
                batch["segment_ids"][here], batch["positions"][here] = (
                    number + 1,
                    np.arange(len(clip)),
                )
                batch["loss_mask"][row, at + PROMPT + TEXT - 1 : at + len(clip) - 1] = True
                at += len(clip)
        batch = {name: array.reshape(*self.rows, LENGTH) for name, array in batch.items()}
        batch = jax.device_put(batch, self.functions.batch_sharding)
        self.params, self.opt_state, numbers = self.functions.train(
            {}, self.params, self.opt_state, batch
        )
        jax.block_until_ready(numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed rounds: a padded step and a packed one"
    )
    parser.add_argument("--gpu", action="store_true", help="Llasa-1B's geometry on one GPU")
    args = parser.parse_args()
    given, rng = sides(args.gpu), np.random.default_rng(0)
    per_step, rows_per_step = prod(given.clips), prod(given.rows)
    clips = make_clips(
        max(400, 7 * rows_per_step * (args.rounds + 1), per_step * (args.rounds + 1)), rng
    )
    lengths = np.array(list(map(len, clips)))
    rows = pack_rows(lengths.tolist(), LENGTH)
    fill = lengths.sum() / (len(rows) * LENGTH)
    torch.set_num_threads(os.cpu_count())
    peak = device_of_kind(jax.devices()[0].device_kind)
    print(f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores; {jax.devices()[0].device_kind}")
    print(
        f"torch {torch.__version__}, transformers {version('transformers')}, jax {jax.__version__}"
    )
    print(f"PyTorch: {given.dtype}, {given.clips[1]} clips at once, {per_step} an update")
    print(
        f"llasa-jax: {given.model.dtype} over {given.model.param_dtype}, {given.rows[1]} rows at"
        f" once, {rows_per_step} an update"
    )
    print(
        f"clips of {lengths.mean():.0f} tokens on average; packed rows {fill:.1%} full, padded rows"
        f" {lengths.mean() / LENGTH:.1%}"
    )
    upstream, packed = Upstream(given), Packed(given)
    parameters = sum(weight.numel() for weight in upstream.model.parameters())
    width, layers = given.config.hidden_size, given.config.num_hidden_layers
    print(
        f"{parameters / 1e6:.1f}M parameters: width {width}, {layers} layers, vocabulary {VOCAB:,}"
    )

    seconds, done, flops = {"upstream": 0.0, "packed": 0.0}, {"upstream": 0, "packed": 0}, 0.0
    for turn in range(args.rounds + 1):
        # Turn about, so that whatever else the machine does meets both alike; the first round
        # compiles and warms up.
        padded = clips[turn * per_step : (turn + 1) * per_step]
        mine = [
            [clips[i] for i in row]
            for row in rows[turn * rows_per_step : (turn + 1) * rows_per_step]
        ]
        for name, work, step in (
            ("upstream", padded, upstream.step),
            ("packed", mine, packed.step),
        ):
            began = time.perf_counter()
            step(work)
            if turn:
                seconds[name] += time.perf_counter() - began
                done[name] += sum(map(len, mine)) if work is mine else len(padded)
        if turn:
            flops += sum(
                len(clip) * model_flops_per_token(given.config, (len(clip) + 1) / 2)
                for row in mine
                for clip in row
            )
    for name, what in (
        ("upstream", f"PyTorch, every clip padded to {LENGTH:,}"),
        ("packed", "llasa-jax, packed"),
    ):
        print(
            f"{what + ':':39}{done[name] / seconds[name]:8.3f} clips/s  ({done[name]} clips in"
            f" {seconds[name]:.1f} s)"
        )
    if peak:
        print(
            "llasa-jax's share of the device's peak (MFU):"
            f" {flops / seconds['packed'] / peak.flops:.1%}"
        )
    print(
        "ratio:"
        f" {done['packed'] / seconds['packed'] / (done['upstream'] / seconds['upstream']):.2f}"
    )


if __name__ == "__main__":
    main()
