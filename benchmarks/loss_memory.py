"""Memory of a training step over the whole vocabulary: ours, and PyTorch's with the loss that
upstream's training uses.

Both train one narrow layer over 193,800 classes on the CPU in float32, each in a process of its
own; what is compared is the peak of resident memory above what the process held before its step.
PyTorch's logits of 8 rows of 2,048 tokens alone take 12.7 GB several times over, so PyTorch runs at
two smaller sizes and the line through them is followed to the whole batch; ours runs the whole
batch.

    python benchmarks/loss_memory.py
"""

import resource
import subprocess
import sys

VOCAB, WIDTH, ROWS, LENGTH = 193_800, 64, 8, 2048
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(rows: int, length: int) -> float:
    import jax
    import numpy as np
    from flax import nnx

    from llasa_jax.model.config import ModelConfig
    from llasa_jax.model.llama import Llama
    from llasa_jax.model.settings import ModelSettings
    from llasa_jax.model.sharding import make_mesh
    from llasa_jax.train.optimizer import make_optimizer
    from llasa_jax.train.settings import OptimizerSettings
    from llasa_jax.train.step import TrainStep

    config = ModelConfig(vocab_size=VOCAB, head_dim=WIDTH // 2, **SIZES)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    step = TrainStep(
        config,
        ModelSettings(dtype="float32", loss_chunk=64),
        make_optimizer(OptimizerSettings(), 10),
        mesh,
    )
    params = nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(0))))
    opt_state = jax.block_until_ready(step.init(params))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, rows, length)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, -1),
        "segment_ids": np.ones_like(tokens),
    }
    batch |= {
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        "loss_mask": tokens > 0,
    }
    before = peak_gib()
    jax.block_until_ready(step.train({}, params, opt_state, batch))
    return peak_gib() - before


def pytorch(rows: int, length: int) -> float:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=True, **SIZES))
    adamw = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, VOCAB, (rows, length))
    before = peak_gib()
    model(tokens, labels=tokens).loss.backward()
    adamw.step()
    return peak_gib() - before


def measure(side: str, rows: int, length: int) -> float:
    run = subprocess.run(
        [sys.executable, __file__, side, str(rows), str(length)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout.split()[-1])


def main() -> None:
    half, whole = measure("pytorch", 1, LENGTH // 2), measure("pytorch", 1, LENGTH)
    theirs = half + (whole - half) * (2 * ROWS - 1)
    mine = measure("ours", ROWS, LENGTH)
    print(f"PyTorch  1 x {LENGTH // 2}: {half:6.2f} GiB")
    print(f"PyTorch  1 x {LENGTH}: {whole:6.2f} GiB")
    print(f"PyTorch  {ROWS} x {LENGTH}: {theirs:6.2f} GiB (the line through the two)")
    print(f"ours     {ROWS} x {LENGTH}: {mine:6.2f} GiB")
    print(f"ours / PyTorch: {mine / theirs:.3f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print({"ours": ours, "pytorch": pytorch}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3])))
    else:
        main()
