"""Prints plans.md: what the recipes need on the machines of configs/machines.

    python docs/make_plans.py --keep build/plans.json > docs/plans.md

GPUs are estimated in a second each; a TPU slice is compiled, in one to five minutes each (`pip
install 'llasa-jax[plan]'`). `--keep` writes each plan to a file as it is made, and takes from there
what is made already.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax

from llasa_jax.plan.plan import MODELS, Plan, plan, with_dataset
from llasa_jax.plan.plan import TOKENS_PER_CODE as TOKENS
from llasa_jax.speech.vocab import CODES_PER_SECOND
from llasa_jax.train.parsing import parse_settings

CONFIGS = Path(__file__).parents[1] / "configs"
HOURS = 24
# An overlay's machine, where its name is not that of a TPU slice.
GPUS = {"1x24gb": "rtx4090:1", "1x80gb": "h100:1", "8x80gb": "h100:8"}
# The machines on which each recipe is planned: overlays, or machines without one.
PLANNED = {
    "llasa_1b_full": ["1x24gb", "1x80gb", "8x80gb", "v5e_2x4", "v5p_2x2x1", "v6e_2x2"],
    "llasa_3b_full": ["h100:1", "8x80gb", "v5e:2x4", "v5p_2x2x1", "v6e:2x2"],
    "llasa_8b_full": ["8x80gb", "v5e:4x4", "v5p_2x2x2", "v6e:2x4"],
    "llasa_1b_lora": ["rtx4090:1", "h100:1", "v5e:1x1"],
    "llasa_3b_lora": ["rtx4090:1", "h100:1", "v5e:2x2", "v6e:1x1"],
    "llasa_8b_lora": ["h100:1", "v5e:2x2", "v6e:1x1"],
    "llasa_8b_qlora": ["rtx4090:1", "h100:1", "v5e:1x1", "v5e:2x2"],
    "llasa_1b_grpo_lora": ["8x80gb", "v5e:4x4", "v6e:2x4"],
    "llasa_1b_grpo_full": ["8x80gb", "v5e:4x4", "v6e:2x4"],
    "llasa_3b_grpo_lora": ["8x80gb", "v5e:4x4", "v6e:2x4"],
    "llasa_3b_grpo_full": ["8x80gb", "v5e:4x4", "v6e:2x4"],
}
# Recipes on pods: more devices than the recipe has rows, so these take larger batches.
PODS = [
    ("llasa_1b_full", "v5e:16x16", "train.rows=256 mesh.data=16 mesh.fsdp=16"),
    ("llasa_8b_full", "v5e:16x16", "train.rows=256 mesh.data=16 mesh.fsdp=16"),
    ("llasa_8b_full", "v5p:2x2x4", "train.rows=64 mesh.slices=2 mesh.data=2 mesh.fsdp=16"),
]
COLUMNS = ["machine", "overlay", "devices", "rows per device", "peak GiB", "of GiB", ""]
COLUMNS += ["step (s)", "minutes"]
HEAD = f"""# The recipes on machines

`llasa-jax train --config configs/RECIPE.yaml --config configs/machines/OVERLAY.yaml` trains a
recipe with a machine's settings; no overlay changes the batch or what is learned, but for
`1x24gb`, which trains with AdaFactor. The other recipes (`llasa_1b_asr`, `llasa_1b_description`,
`llasa_1b_keep_chat`, `llasa_1b_online`) need what `llasa_1b_full` needs.

Recipes recompute most of the forward pass (`model.remat=full`), which fits the smallest machines;
overlays keep more where there is room. Memory and times are per device, for rows of 2,048 tokens.
TPU plans are compiled by XLA's TPU compiler; GPU plans are **estimates** from shapes, which no GPU
has confirmed. The time of a step is a lower bound (the longest of arithmetic, memory and links at
their peak rates); half that speed is usual. The last column is that bound for {HOURS} hours of
speech, for as many epochs as the recipe says; GRPO's recipes have texts instead, and their peak is
that of a step or of the rollouts, whichever is more. This page is printed by `docs/make_plans.py`.
"""


POD_HEAD = """## Pods

With the settings of the second column besides the recipe's. Where `mesh.slices` is 2, the machine
is that of each slice, and the copies of the model lie on one slice each: only the gradients cross.

| recipe | settings | machine | devices | rows per device | peak GiB | of GiB |  | step (s) |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def topology(machine: str) -> str:
    """The topology that `plan` takes, of an overlay or a machine without one."""
    return GPUS.get(machine, machine.replace("_", ":"))


def arguments(recipe: str, machine: str, changes: str = "") -> list[str]:
    """The config files of a recipe on a machine, and settings beside them."""
    overlay = CONFIGS / "machines" / f"{machine}.yaml"
    configs = [CONFIGS / f"{recipe}.yaml", *([overlay] if overlay.is_file() else [])]
    return [f"--config={config}" for config in configs] + [f"--{it}" for it in changes.split()]


def planned(recipe: str, machine: str, changes: str = "") -> Plan:
    """The plan of a recipe on a machine, with the steps of `HOURS` of speech."""
    settings = parse_settings(arguments(recipe, machine, changes))
    found = plan(settings, MODELS[recipe.split("_")[1]], topology(machine))
    if settings.align.loss == "grpo":
        return found
    return with_dataset(found, settings, HOURS * 3600 * CODES_PER_SECOND * TOKENS)


def section(recipe: str, plans: dict[str, Plan]) -> str:
    lines = [
        f"## {recipe}\n",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
        *(row(machine, found) for machine, found in plans.items()),
    ]
    return "\n".join(lines) + "\n"


def pod_row(recipe: str, changes: str, found: Plan) -> str:
    settings = " ".join(f"`{change}`" for change in changes.split())
    how = "compiled" if found.fits else "does not fit"
    return (
        f"| {recipe} | {settings} | {found.topology} | {found.device_count}"
        f" | {found.rows_per_device:g} | {found.peak_hbm_gib:.2f} | {found.hbm_gib:g} | {how}"
        f" | {found.step_seconds_roofline:.2f} |"
    )


def row(machine: str, found: Plan) -> str:
    """A line of a recipe's table."""
    overlay = "" if ":" in machine else f"`{machine}`"
    minutes = "" if found.hours_roofline is None else f"{60 * found.hours_roofline:.1f}"
    how = ("estimate" if found.estimated else "compiled") + ("" if found.fits else ", does not fit")
    return (
        f"| {found.topology} | {overlay} | {found.device_count} | {found.rows_per_device:g}"
        f" | {found.peak_hbm_gib:.2f} | {found.hbm_gib:g} | {how}"
        f" | {found.step_seconds_roofline:.2f} | {minutes} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="a JSON file of the plans made so far")
    keep = parser.parse_args().keep
    jax.config.update("jax_platforms", "cpu")
    kept = json.loads(keep.read_text()) if keep and keep.is_file() else {}

    def made(*what: str) -> Plan:
        name = " ".join(what)
        if name not in kept:
            kept[name] = dataclasses.asdict(planned(*what))
            if keep:
                keep.parent.mkdir(parents=True, exist_ok=True)
                keep.write_text(json.dumps(kept, indent=1))
        return Plan(**kept[name])

    sections = [
        section(recipe, {machine: made(recipe, machine) for machine in machines})
        for recipe, machines in PLANNED.items()
    ]
    pods = [pod_row(recipe, changes, made(recipe, on, changes)) for recipe, on, changes in PODS]
    print("\n".join([HEAD, *sections, POD_HEAD + "\n".join(pods)]))


if __name__ == "__main__":
    main()
