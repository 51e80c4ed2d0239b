"""Plans: what they say of machines that are not here. One tiny step is compiled by the TPU
compiler, where libtpu is installed.
"""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llasa_jax import cli
from llasa_jax.align.prefer import SPEECH
from llasa_jax.align.rollouts import sampling_of
from llasa_jax.align.settings import AlignSettings, GrpoSettings
from llasa_jax.encode.settings import DataSettings
from llasa_jax.errors import UserError
from llasa_jax.generate.decode import SHORTEST_BUCKET, Rows
from llasa_jax.model.config import ModelConfig
from llasa_jax.model.flops import StepShape, all_weights, model_flops, step_seconds
from llasa_jax.model.settings import LoraSettings, MeshSettings, ModelSettings
from llasa_jax.plan import compiler, plan
from llasa_jax.plan.rollouts import _program
from llasa_jax.runtime.hardware import TPUS, parse_topology
from llasa_jax.speech.vocab import NUM_CODES, SpeechVocab
from llasa_jax.train.offload import check_host_memory
from llasa_jax.train.parsing import parse_settings
from llasa_jax.train.settings import OptimizerSettings, Settings, TrainSettings
from llasa_jax.train.step import TrainStep

TINY = ModelConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
)
SETTINGS = Settings(
    out="run",
    model=ModelSettings(path="no_model", loss_chunk=64),
    data=DataSettings(path="no_data", max_length=256),
    train=TrainSettings(rows=8),
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (pip install 'llasa-jax[plan]')",
)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("out: run\nmodel: {path: no_model}\ndata: {path: no_data}\ntrain: {rows: 16}\n")
    return str(path)


def test_weights_are_those_of_the_published_models():
    # Llama 3.2's 1.24 and 3.21 billion and Llama 3.1's 8.03, which have 128,256 rows in each table
    # instead of 194,048.
    for size, published, tables in (
        ("1b", 1_235_814_400, 1),
        ("3b", 3_212_749_824, 1),
        ("8b", 8_030_261_248, 2),
    ):
        config = plan.MODELS[size]
        assert (
            all_weights(config) - tables * (config.padded_vocab_size - 128_256) * config.hidden_size
            == published
        )


def test_model_flops_are_six_a_weight_and_token():
    config = plan.MODELS["8b"]
    shape = StepShape(16, 2048, 2, 1, 8, 1, "full")
    per_token = model_flops(config, shape) / (16 * 2048 * 2)
    used = all_weights(config) - config.vocab_size * config.hidden_size  # a look-up costs nothing
    # Attention over 1,024 tokens on average adds some 3%.
    assert 1.02 * 6 * used < per_token < 1.05 * 6 * used


def test_the_roofline_grows_as_it_must():
    config, device = plan.MODELS["1b"], TPUS["v5e"]
    one = step_seconds(config, StepShape(16, 2048, 1, 1, 16, 1, "full"), device)
    twice = step_seconds(config, StepShape(32, 2048, 1, 1, 16, 1, "full"), device)
    assert twice["arithmetic"] == 2 * one["arithmetic"]
    none, dots = (
        step_seconds(config, StepShape(16, 2048, 1, 1, 16, 1, remat), device)["arithmetic"]
        for remat in ("none", "dots")
    )
    assert none < dots < 0.85 * one["arithmetic"]
    assert step_seconds(config, StepShape(1, 2048, 1, 1, 1, 1, "full"), device)["links"] == 0


@pytest.mark.parametrize("name", ["v9:2x2", "h100:x", "v5e", "v5e:4", "gpu"])
def test_unknown_topologies_list_the_known(name):
    with pytest.raises(UserError, match=r"is not known; known are .*v5e:.*4x4.*tpu7x:.*h100"):
        parse_topology(name)


def test_gpus_are_estimated(config_file, capsys):
    assert (
        cli.main(
            [
                "plan",
                "--config",
                config_file,
                "--model",
                "8b",
                "--topology",
                "h100:8",
                "--json",
                "--speech-hours",
                "24",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["estimated"]
    assert found["fits"]
    assert found["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    # 8.57 billion weights with gradients and two moments, 16 bytes each, over 8 devices are 16 GiB.
    assert 16 < found["peak_hbm_gib"] < 25
    assert found["step_seconds_roofline"] == max(found["step_seconds"].values())
    assert found["steps"] == 317
    assert (
        cli.main(
            [
                "plan",
                "--config",
                config_file,
                "--model",
                "8b",
                "--topology",
                "l4:4",
                "--train.accumulation=2",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said
    assert "estimated from shapes" in said
    assert "train.rows=8 with train.accumulation=4" in said


def test_search_over_gpus(config_file, capsys):
    assert (
        cli.main(
            [
                "plan",
                "--config",
                config_file,
                "--model",
                "1b",
                "--topology",
                "h100:8",
                "--search",
                "--json",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["smallest_slice"] == "h100:1"
    assert found["fits"]
    rows = found["rows_per_device"]
    assert rows >= 16
    settings = parse_settings([f"--config={config_file}"])
    one_more = plan.plan(settings, plan.MODELS["1b"], "h100:8", int(rows) + 1)
    assert (one_more.rows_per_device, one_more.fits) == (rows + 1, False)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 100, 1000])
@pytest.mark.parametrize("constant", [0.1, 5.0])
@pytest.mark.parametrize("bend", [0.7, 1.0, 1.4])
def test_search_finds_the_most_rows_in_few_tries(monkeypatch, most, constant, bend):
    """Whatever a row takes: the same as the one before, more or less."""
    tries = []

    def pretend(settings, config, topology, rows):
        tries.append(rows)
        takes = constant + (16 - constant) * (rows / (most + 0.5)) ** bend
        return dataclasses.replace(
            known, rows_per_device=float(rows), peak_hbm_gib=takes, hbm_gib=16, fits=takes <= 16
        )

    known = plan.plan(SETTINGS, TINY, "h100:1")
    monkeypatch.setattr(plan, "plan", pretend)
    found = plan.search_rows(SETTINGS, TINY, "v5e:1x1")
    assert (found.rows_per_device if found else 0) == most
    assert len(tries) == len(set(tries)) <= 14
    monkeypatch.setattr(plan, "plan", lambda *_: dataclasses.replace(known, hbm_gib=None))
    with pytest.raises(UserError, match="no limit to search for"):
        plan.search_rows(SETTINGS, TINY, "here")


def test_search_passes_over_slices_that_cannot_hold_the_weights_alone(monkeypatch):
    tries = []

    def pretend(settings, config, topology, rows):
        tries.append(topology)
        return dataclasses.replace(known, topology=topology, fits=topology == "v5e:4x4")

    known = plan.plan(SETTINGS, TINY, "h100:1")
    monkeypatch.setattr(plan, "plan", pretend)
    # 64 GiB of weights and gradients on 8 chips of 15.75: with the optimizer's state on the host
    # these are enough.
    assert plan.search_slice(SETTINGS, plan.MODELS["8b"], "v5e:1x1").topology == "v5e:4x4"
    assert tries == ["v5e:2x4", "v5e:4x4"]


def test_what_cannot_be_planned(config_file, capsys):
    for arguments, said in (
        (["--topology", "h100:8"], "name its size with --model 1b, 3b, 8b"),
        (
            ["--topology", "h100:3", "--model", "1b", "--train.rows=12"],
            "mesh.fsdp=3 does not divide the model's hidden_size",
        ),
        (
            ["--topology", "h100:8", "--model", "1b", "--train.rows=12"],
            "train.rows=12 does not divide over",
        ),
        (["--topology", "h100:8", "--model", "1b", "--nonsense.x=1"], "unknown setting nonsense.x"),
    ):
        assert cli.main(["plan", "--config", config_file, *arguments]) == 2
        assert said in capsys.readouterr().err


def test_without_libtpu_a_sentence_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'llasa-jax\[plan\]'"):
        plan.plan(SETTINGS, TINY, "v5e:2x2")


def test_here_compiles_for_this_machine():
    result = plan.plan(SETTINGS, TINY, "here")
    assert result.fits
    assert result.device_count == 8
    assert result.peak_hbm_gib > 0


def test_too_large_is_no_error(monkeypatch):
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required (35.44G) exceeds"
        " available HBM (15.75G)."
    )

    def refuse(*_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(TrainStep, "compile", refuse)
    result = plan.plan(SETTINGS, TINY, "here")
    assert not result.fits
    assert result.peak_hbm_gib == 35.44
    assert "at least 35.44" in plan.describe(result, SETTINGS)


def speaking(settings=SETTINGS, **grpo):
    align = AlignSettings("grpo", grpo=GrpoSettings(**grpo))
    log = dataclasses.replace(settings.log, codec="no_codec")
    return dataclasses.replace(settings, align=align, log=log)


def test_rollouts_are_part_of_a_plan():
    data = dataclasses.replace(SETTINGS.data, max_length=2048)
    lora = LoraSettings(rank=16, dropout=0.0, targets=["q", "v"])
    settings = dataclasses.replace(SETTINGS, data=data, lora=lora)
    supervised = plan.plan(settings, plan.MODELS["1b"], "h100:1")
    assert not supervised.rollouts_gib
    assert "rollouts" not in plan.describe(supervised, settings)
    few, many = speaking(settings), speaking(settings, rows=512)
    found = plan.plan(few, plan.MODELS["1b"], "h100:1")
    # A token has keys and values of 16 layers, 8 heads and 64 numbers of two bytes: 32 KiB.
    assert found.rollouts_gib["cache"] == 0.5
    assert found.rollouts_gib["head"] == pytest.approx(65_536 * 2048 * 2 / 2**30, rel=0.01)
    assert found.peak_hbm_gib == supervised.peak_hbm_gib
    assert "0.50 of it the cache of 8 speeches of 2,048 tokens" in plan.describe(found, few)
    found = plan.plan(many, plan.MODELS["1b"], "h100:1")
    weights = found.memory_gib["parameters"] + found.memory_gib["optimizer state"]
    speech = sum(found.rollouts_gib.values())
    assert found.peak_hbm_gib == pytest.approx(weights + speech, abs=1e-3)
    assert found.memory_gib == supervised.memory_gib
    assert not plan.plan(speaking(settings, rows=1024), plan.MODELS["3b"], "h100:1").fits
    # A reference is a second copy of what is trained.
    found = plan.plan(speaking(kl=0.1), plan.MODELS["1b"], "h100:1")
    assert found.memory_gib["weights of the reference"] == found.memory_gib["parameters"]
    with pytest.raises(UserError, match="leave --speech-hours out"):
        plan.dataset_tokens(few, 24)
    assert plan.dataset_tokens(few) is None


def test_planned_rollouts_have_the_shapes_of_real_ones():
    markers = {"<|SPEECH_GENERATION_END|>": 300}
    vocab = SpeechVocab(markers, 308, 308 + NUM_CODES)
    config = dataclasses.replace(TINY, vocab_size=vocab.size, hidden_size=32, head_dim=8)
    data = dataclasses.replace(SETTINGS.data, max_length=SHORTEST_BUCKET)
    settings = speaking(dataclasses.replace(SETTINGS, data=data))
    mesh = plan.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    program, given = _program(plan.step_on(mesh, settings, config), settings)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), given.pop("params"))
    rows = Rows(
        program["graphdef"],
        params,
        vocab,
        8,
        sampling_of(settings.align.grpo),
        None,
        round(SPEECH.loop_seconds * 50),
    )
    assert program == rows._program
    real = {name: rows._fixed[name] for name in ("tables", "first", "allowed", "stops")}
    for planned, there in ((given, real), (given["state"], rows._state)):
        found = [
            (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves({n: planned[n] for n in there})
        ]
        assert found == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(there)]


@needs_libtpu
def test_rollouts_compile_for_a_tpu_that_is_not_here():
    found = plan.plan(speaking(), TINY, "v5e:1x1").rollouts_gib
    assert found["cache"] == pytest.approx(2 * 2 * 8 * 256 * 2 * 128 * 2 / 2**30, abs=1e-4)
    assert 0 <= found["working memory"] < 0.5


@needs_libtpu
def test_a_step_compiles_for_a_tpu_that_is_not_here():
    result = plan.plan(SETTINGS, TINY, "v5e:2x2", rows_per_device=1)
    assert result.fits
    assert result.mesh == {"data": 1, "fsdp": 4, "tensor": 1}
    assert 0 < result.peak_hbm_gib < 1
    assert not result.estimated


@needs_libtpu
def test_slices_are_apart_along_data_only():
    settings = MeshSettings(data=2, fsdp=4, tensor=2, slices=2)
    devices, _ = compiler.machine("v5e:2x4", settings.slices)
    mesh = plan.make_mesh(settings.data, settings.fsdp, settings.tensor, devices, settings.slices)
    assert [{device.slice_index for device in of_data.flat} for of_data in mesh.devices] == [
        {0},
        {1},
    ]


@needs_libtpu
def test_a_shape_that_the_compiler_does_not_take():
    with pytest.raises(UserError, match="does not take the topology v5e:3x3"):
        plan.plan(SETTINGS, TINY, "v5e:3x3")


def test_adafactor_needs_less():
    lean = dataclasses.replace(SETTINGS, optimizer=OptimizerSettings(name="adafactor"))
    sizes = [
        plan.plan(s, plan.MODELS["1b"], "h100:1").memory_gib["optimizer state"]
        for s in (SETTINGS, lean)
    ]
    # Query and output weights stay unfactored, as heads of 64 are too narrow.
    assert sizes[1] < 0.1 * sizes[0]


def test_levers_are_reckoned_with():
    def planned(remat="full", **optimizer):
        model = dataclasses.replace(SETTINGS.model, remat=remat)
        settings = dataclasses.replace(
            SETTINGS, model=model, optimizer=OptimizerSettings(**optimizer)
        )
        return plan.plan(settings, plan.MODELS["1b"], "h100:8")

    plain, half, on_host, inputs = (
        planned(),
        planned(state_dtype="bfloat16"),
        planned(offload=True),
        planned("offload"),
    )
    state, kept = "optimizer state", "activations kept for the backward pass"
    assert half.memory_gib[state] == pytest.approx(plain.memory_gib[state] / 2, rel=1e-3)
    assert (on_host.memory_gib[state], inputs.memory_gib[kept]) == (0, 0)
    assert on_host.host_gib == pytest.approx(plain.memory_gib[state], abs=1e-3)
    assert inputs.host_gib == pytest.approx(plain.memory_gib[kept], abs=1e-3)
    assert plain.host_gib == 0
    assert on_host.peak_hbm_gib == pytest.approx(plain.peak_hbm_gib - on_host.host_gib, abs=1e-3)
    assert "host memory per device" in plan.describe(on_host, SETTINGS)


def test_what_needs_the_hosts_memory_is_refused_without():
    class Device:
        device_kind = "abacus"

        def addressable_memories(self):
            return []

    class Mesh:
        devices = np.array([Device()])

    check_host_memory(SETTINGS, Mesh())
    settings = dataclasses.replace(SETTINGS, optimizer=OptimizerSettings(offload=True))
    with pytest.raises(
        UserError,
        match=(
            "optimizer.offload=true needs devices that can use the host's memory, which abacus"
            " does not"
        ),
    ):
        check_host_memory(settings, Mesh())


@needs_libtpu
def test_state_on_the_host_takes_no_memory_of_a_tpu():
    wide = dataclasses.replace(
        TINY, intermediate_size=4096, num_hidden_layers=8
    )  # so that the state weighs more than a row
    settings = dataclasses.replace(SETTINGS, optimizer=OptimizerSettings(offload=True))
    on_device, on_host = (
        plan.plan(s, wide, "v5e:2x2", rows_per_device=1) for s in (SETTINGS, settings)
    )
    saved = on_device.peak_hbm_gib - on_host.peak_hbm_gib
    # All but what a slice of it takes while it passes through.
    assert saved > 0.8 * on_host.host_gib > 0


def test_lora_needs_less_memory_and_fewer_flops():
    small = dataclasses.replace(SETTINGS, lora=LoraSettings(rank=8))
    qlora = dataclasses.replace(SETTINGS, lora=LoraSettings(rank=8, quantize="nf4"))
    full, lora, fewer_bits = (
        plan.plan(s, plan.MODELS["8b"], "h100:1") for s in (SETTINGS, small, qlora)
    )
    assert not full.fits
    assert lora.fits
    assert lora.trained_parameters == 32 * 8 * (4096 + 4096 + 4096 + 1024)  # q and v of 32 layers
    assert "3,407,872 parameters are trained" in plan.describe(lora, small)
    assert lora.memory_gib["gradients"] < 0.02
    # Layers' 6.98 billion weights in 4.25 bits, tables' 1.59 billion in 16
    assert fewer_bits.memory_gib["parameters"] == pytest.approx(
        (6.98e9 * 4.25 + 1.59e9 * 16) / 8 / 2**30, rel=0.01
    )
    assert 0.65 < lora.model_flops_per_step / full.model_flops_per_step < 0.7
    assert lora.step_seconds["arithmetic"] < full.step_seconds["arithmetic"]
