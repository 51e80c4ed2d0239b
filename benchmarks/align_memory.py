"""Memory of preference training: DPO's and GRPO's LoRA steps and GRPO's rollouts, beside the
supervised LoRA step.

Each program is compiled by XLA's TPU compiler (`pip install 'llasa-jax[plan]'`) at Llasa-1B's
shapes for one TPU v5e, with the rows, adapters and optimizer of configs/llasa_1b_grpo_lora.yaml;
nothing is run. What lies on the device without being an argument of a program, such as the
optimizer's state while the model speaks, is added.

    python benchmarks/align_memory.py
"""

import dataclasses
from pathlib import Path

import jax

from llasa_jax.align.settings import AlignSettings
from llasa_jax.model.sharding import make_mesh
from llasa_jax.plan.compiler import compiled_peak, machine
from llasa_jax.plan.memory import gib_of
from llasa_jax.plan.plan import MODELS, step_on
from llasa_jax.plan.rollouts import rollouts_gib
from llasa_jax.train.parsing import parse_settings
from llasa_jax.train.step import TrainStep

RECIPE = Path(__file__).parents[1] / "configs" / "llasa_1b_grpo_lora.yaml"
TOPOLOGY, ROWS = "v5e:1x1", 4
CONFIG = MODELS["1b"]


def log_probs_gib(step: TrainStep, *shape: int) -> float:
    """The peak of what gives the log-probabilities of a round's speeches."""
    traced = step.log_probs.trace(step.frozen, step.trainable, step.shapes(step.BATCH, *shape))
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    return compiled.memory_analysis().peak_memory_in_bytes / 2**30


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    settings = parse_settings([f"--config={RECIPE}", f"--train.rows={ROWS}"])
    mesh = make_mesh(1, -1, 1, devices=machine(TOPOLOGY, 1)[0])
    shape = settings.train.accumulation, ROWS, settings.data.max_length
    more = dataclasses.replace(settings.align.grpo, updates=2, kl=0.1)
    print(f"Llasa-1B, LoRA, {TOPOLOGY}, {shape[0]} x {shape[1]} rows of {shape[2]:,} tokens; GiB")
    found = {}
    for name, align in {
        "supervised step": AlignSettings(),
        "DPO step": AlignSettings("dpo"),
        "GRPO step": settings.align,
        "GRPO step, 2 updates, kl 0.1": AlignSettings("grpo", grpo=more),
    }.items():
        step = step_on(mesh, dataclasses.replace(settings, align=align), CONFIG)
        reference = gib_of(step.trainable) if align.grpo.kl else 0.0
        found[name] = compiled_peak(step, *shape)[0] + reference
        print(f"{found[name]:6.2f}  {name}", flush=True)
    beside = gib_of(step.opt_state) + reference
    found["log-probabilities"] = log_probs_gib(step, *shape) + beside
    speaking = rollouts_gib(step, settings, compiled=True)
    weights = gib_of((step.frozen, step.trainable))
    found["rollouts"] = weights + beside + sum(speaking.values())
    for name in ("log-probabilities", "rollouts"):
        print(f"{found[name]:6.2f}  {name}")
    for name, size in speaking.items():
        print(f"{size:8.2f}  {name}")
    supervised = found.pop("supervised step")
    largest = max(size for name, size in found.items() if name != "DPO step")
    allowed = 1.3 * supervised + speaking["cache"]
    print(f"GRPO at its peak: {largest:.2f}, {largest / supervised:.2f} times the supervised step")
    print(f"allowed, 1.3 times the supervised step and the cache: {allowed:.2f}")


if __name__ == "__main__":
    main()
