"""Whether a training step fits a machine, and how long it takes there, before anybody rents it.

For TPUs this compiles the real step with XLA's TPU compiler (`libtpu`), which needs no TPU; for
GPUs it estimates from shapes.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from math import ceil, inf, prod

import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from llasa_jax.convert import model_folder
from llasa_jax.errors import UserError
from llasa_jax.model.config import ModelConfig, RopeScaling
from llasa_jax.model.flops import StepShape, all_weights, model_flops, step_seconds
from llasa_jax.model.lora import MODULES, adapter_config
from llasa_jax.model.lora import count as count_parameters
from llasa_jax.model.sharding import make_mesh, mesh_sizes, row_devices
from llasa_jax.plan.compiler import compiled_peak, machine
from llasa_jax.plan.memory import REFERENCE, advice, held_gib, working_gib
from llasa_jax.plan.rollouts import rollouts_gib
from llasa_jax.runtime.hardware import (
    GPUS,
    Device,
    parse_topology,
)
from llasa_jax.runtime.storage import as_path
from llasa_jax.speech.vocab import CODES_PER_SECOND
from llasa_jax.train.offload import check_host_memory
from llasa_jax.train.optimizer import make_optimizer
from llasa_jax.train.settings import Settings
from llasa_jax.train.step import TrainStep

TOKENS_PER_CODE = 1.2  # a clip's text and chat turns add about a fifth to its codes


def _llama(hidden: int, mlp: int, layers: int, heads: int, head: int, tied: bool) -> ModelConfig:
    """Llasa on a Llama 3.2 (1B, 3B) or 3.1 (8B)."""
    return ModelConfig(
        vocab_size=193_800,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head,
        tie_word_embeddings=tied,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
    )


MODELS = {
    "1b": _llama(2048, 8192, 16, 32, 64, True),
    "3b": _llama(3072, 8192, 28, 24, 128, True),
    "8b": _llama(4096, 14336, 32, 32, 128, False),
}


@dataclass(frozen=True)
class Plan:
    """What one step needs on one machine. Sizes are GiB per device; `memory_gib` says what a step's
    peak is made of, `host_gib` what the settings that offload keep in the host's memory besides,
    `rollouts_gib` what GRPO needs beside the weights while it speaks. `peak_hbm_gib` is the larger
    of both peaks.
    """

    topology: str
    device_count: int
    mesh: dict[str, int]
    rows_per_device: float
    estimated: bool
    fits: bool
    peak_hbm_gib: float
    hbm_gib: float | None
    host_gib: float
    memory_gib: dict[str, float]
    tokens_per_step: int
    model_flops_per_step: float
    trained_parameters: int
    step_seconds: dict[str, float]
    step_seconds_roofline: float | None
    steps: int | None = None
    hours_roofline: float | None = None
    rollouts_gib: dict[str, float] = field(default_factory=dict)


def model_geometry(model: str | None, settings: Settings) -> ModelConfig:
    """The geometry of `model`, a size or a folder; by default of `settings.model.path`. UserError
    if there is none.
    """
    if model in MODELS:
        return MODELS[model]
    source = model or settings.model.path
    if as_path(source).exists() and not as_path(source).is_dir():
        raise UserError(f"{source} is a file, not a model's folder; name a folder")
    try:
        return model_folder.open_model(source, weights=False).config
    except UserError as error:
        if "holds no model" not in str(error):
            raise
        raise UserError(
            f"there is no model in {source} to plan for yet; name its size with --model"
            f" {', '.join(MODELS)}, or a model's folder or hub id"
        ) from error


def plan(
    settings: Settings, config: ModelConfig, topology: str, rows_per_device: int | None = None
) -> Plan:
    """Compiles (TPUs, and the machine at hand as "here") or estimates (GPUs) the train step of
    `settings`. UserError on what cannot be.

    `topology` is like v5e:4x4 or h100:8, and is each slice's where `mesh.slices` is more than one.
    """
    device: Device | None
    mesh: Mesh | AbstractMesh
    estimated = topology.partition(":")[0].lower() in GPUS
    if estimated:
        _, device, count = parse_topology(topology)
        assert count  # only a TPU slice has None
        sizes = mesh_sizes(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor, count)
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3)
    else:
        devices, device = machine(topology, settings.mesh.slices)
        mesh = make_mesh(
            settings.mesh.data,
            settings.mesh.fsdp,
            settings.mesh.tensor,
            devices=devices,
            slices=settings.mesh.slices,
        )
    split_over = row_devices(mesh)
    if rows_per_device:
        settings = dataclasses.replace(
            settings,
            train=dataclasses.replace(settings.train, rows=rows_per_device * split_over),
        )
    rows, length, accumulation = (
        settings.train.rows,
        settings.data.max_length,
        settings.train.accumulation,
    )
    row_devices(mesh, rows)
    # What is only estimated has no platform to choose an attention for.
    model = dataclasses.replace(settings.model, attention="xla") if estimated else settings.model
    if isinstance(mesh, Mesh):
        check_host_memory(settings, mesh)
    step = step_on(mesh, dataclasses.replace(settings, model=model), config)
    held, on_host = held_gib(config, settings, step)
    rollouts = {}
    if settings.align.loss == "grpo":
        rollouts = rollouts_gib(step, settings, compiled=not estimated)
    if estimated:
        assert device
        peak = sum(held.values()) + working_gib(config, settings, mesh)
        fits = True
    else:
        peak, fits = compiled_peak(step, accumulation, rows, length)
        # A step is not given the reference's weights, which are there all the same.
        peak = max(peak + held.get(REFERENCE, 0.0), sum(held.values()))
    shape = StepShape(rows, length, accumulation, **mesh.shape, remat=settings.model.remat)
    lora, adapters = settings.lora, step.adapters
    seconds = step_seconds(config, shape, device, adapters, lora.quantize) if device else {}
    working = max(0.0, peak - sum(held.values()))
    there = sum(held.get(name, 0.0) for name in ("parameters", "optimizer state", REFERENCE))
    peak = max(peak, there + sum(rollouts.values()))
    fits = fits and not (device and peak > device.memory)
    return Plan(
        topology=topology,
        device_count=mesh.size,
        mesh=dict(mesh.shape),
        rows_per_device=rows / split_over,
        estimated=estimated,
        fits=fits,
        peak_hbm_gib=round(peak, 4),
        hbm_gib=device.memory if device else None,
        host_gib=round(on_host, 4),
        memory_gib={
            name: round(size, 4) for name, size in (held | {"working memory": working}).items()
        },
        tokens_per_step=shape.tokens,
        model_flops_per_step=model_flops(config, shape, adapters),
        trained_parameters=count_parameters(config, adapters)[0],
        step_seconds=seconds,
        step_seconds_roofline=max(seconds.values()) if seconds else None,
        rollouts_gib={name: round(size, 4) for name, size in rollouts.items()},
    )


def step_on(mesh: Mesh | AbstractMesh, settings: Settings, config: ModelConfig) -> TrainStep:
    """The train step of `settings`, for a model of this geometry."""
    lora = settings.lora
    # A plan has no tokenizer: what rows of single tokens take is next to nothing.
    adapters = adapter_config(
        dataclasses.replace(lora, train_also=[name for name in lora.train_also if name in MODULES]),
        config,
        {},
    )
    optimizer = make_optimizer(settings.optimizer, 1000)
    return TrainStep(
        config, settings.model, optimizer, mesh, adapters=adapters, **settings.step_options
    )


def with_dataset(plan_: Plan, settings: Settings, tokens: float) -> Plan:
    """The plan with steps and hours for a dataset of `tokens`."""
    steps = settings.train.steps or max(
        1, ceil(settings.train.epochs * tokens / plan_.tokens_per_step)
    )
    seconds = plan_.step_seconds_roofline
    return dataclasses.replace(
        plan_, steps=steps, hours_roofline=seconds and steps * seconds / 3600
    )


def dataset_tokens(settings: Settings, speech_hours: float | None = None) -> float | None:
    """Tokens of an epoch, padding included: counted where model and data are here, reckoned from
    `speech_hours`, or None if neither.
    """
    if settings.align.loss == "grpo":
        if speech_hours:
            raise UserError(
                "align.loss is grpo, whose data are texts to speak; leave --speech-hours out"
            )
        return None
    if speech_hours:
        return speech_hours * 3600 * CODES_PER_SECOND * TOKENS_PER_CODE
    paths = [
        as_path(settings.model.path),
        *(as_path(source.path) for source in settings.sources),
    ]
    if not all(path.exists() for path in paths):
        return None
    from llasa_jax.data.batching import measure, sources_of
    from llasa_jax.encode.mixture import open_sources

    tokenizer = model_folder.load_tokenizer(settings.model.path)
    records, _ = open_sources(settings.sources, settings.data.online)
    fit = measure(
        sources_of(settings.sources, tokenizer, records),
        settings.data.max_length,
        **settings.packing,
    )
    return fit.rows * fit.length


def search_rows(settings: Settings, config: ModelConfig, topology: str) -> Plan | None:
    """The plan with the most rows per device that fit; None if not even one does. Tells on stderr
    what it has tried.

    Every row takes about as much as the one before, so two tries say near which number to look.
    UserError without a known limit.
    """
    best = before = None
    rows, refused = 1, inf
    while best is None or best.rows_per_device + 1 < refused:
        tried = _tell(plan(settings, config, topology, rows))
        if tried.hbm_gib is None:
            raise UserError(
                f"a device of {topology} has memory of no known size, so there is no limit to"
                " search for; name a --topology"
            )
        if not tried.fits:
            if best is None:
                return None
            refused = rows
            rows = int(best.rows_per_device + refused) // 2
            continue
        before, best = best, tried
        rows = int(2 * best.rows_per_device)
        if before:
            a_row = (best.peak_hbm_gib - before.peak_hbm_gib) / (
                best.rows_per_device - before.rows_per_device
            )
            left = (tried.hbm_gib - best.peak_hbm_gib) / max(a_row, 1e-6)
            rows = int(
                best.rows_per_device
                + max(1, min(left, 3 * best.rows_per_device, refused - 1 - best.rows_per_device))
            )
    return best


def search_slice(settings: Settings, config: ModelConfig, topology: str) -> Plan | None:
    """The plan on the smallest machine of this kind on which one row a device fits; None if the
    largest known is too small.
    """
    kind, device, gpus = parse_topology(topology)
    # At least: weights in few bits, or weights and gradients; what the optimizer keeps may lie
    # on the host.
    bytes_a_weight = (
        0.5 if settings.lora.rank else 2 * np.dtype(settings.model.param_dtype).itemsize
    )
    for shape in [f"{n}" for n in (1, 2, 4, 8)] if gpus else device.slices:
        name = f"{kind}:{shape}"
        chips = int(shape) if gpus else prod(map(int, shape.split("x"))) * device.devices_per_chip
        at_least = bytes_a_weight * all_weights(config) / chips / 2**30
        if settings.mesh.data == 1 and at_least > device.memory:
            continue
        try:
            tried = _tell(plan(settings, config, name, 1))
        except UserError:
            continue
        if tried.fits:
            return tried
    return None


def _tell(tried: Plan) -> Plan:
    verdict = f"{'fits' if tried.fits else 'does not fit'}, {tried.peak_hbm_gib:.2f} GiB"
    print(
        f"{tried.topology}, {tried.rows_per_device:g} rows per device: {verdict}",
        file=sys.stderr,
        flush=True,
    )
    return tried


def describe(plan_: Plan, settings: Settings) -> str:
    """The plan in words."""
    how = "estimated from shapes, nothing was compiled" if plan_.estimated else "compiled"
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan_.mesh.items())
    of = f" of {plan_.hbm_gib:g}" if plan_.hbm_gib else ""
    lines = [
        (
            f"{'fits' if plan_.fits else 'DOES NOT FIT'}: {plan_.topology}, {plan_.device_count}"
            f" devices ({mesh}), {plan_.rows_per_device:g} rows per device; {how}"
        ),
        (
            "peak memory per device:"
            f" {'' if plan_.fits else 'at least '}{plan_.peak_hbm_gib:.2f}{of} GiB"
        ),
        *(f"  {size:6.2f}  {name}" for name, size in plan_.memory_gib.items()),
        *(
            [
                f"host memory per device: {plan_.host_gib:.2f} GiB; moving it is not in the times"
                " below"
            ]
            if plan_.host_gib
            else []
        ),
        *(
            [
                f"rollouts, between steps: {sum(plan_.rollouts_gib.values()):.2f} GiB per device"
                f" beside the weights, {plan_.rollouts_gib['cache']:.2f} of it the cache of"
                f" {settings.align.grpo.rows} speeches of {settings.data.max_length:,} tokens"
            ]
            if plan_.rollouts_gib
            else []
        ),
        f"a step: {plan_.tokens_per_step:,} tokens, {plan_.model_flops_per_step:.3g} model FLOPs"
        + (f"; {plan_.trained_parameters:,} parameters are trained" if settings.lora.rank else ""),
    ]
    if plan_.step_seconds:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in plan_.step_seconds.items())
        lines.append(
            f"at least {plan_.step_seconds_roofline:.2f} s a step: the longest of {parts} s, each"
            " alone and at its peak rate;"
        )
        lines.append(
            "  half that speed is usual" + ("; speaking is not in it" * bool(plan_.rollouts_gib))
        )
    if plan_.steps:
        hours = plan_.hours_roofline or 0
        time = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        lines.append(
            f"the dataset: {plan_.steps:,} steps" + (f", at least {time}" if hours else "")
        )
    if not plan_.fits:
        lines.append(f"what would help: {advice(settings)}")
    return "\n".join(lines)
