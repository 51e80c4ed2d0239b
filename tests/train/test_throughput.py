"""FLOPs against PyTorch's own counter; rates on a clock that the test turns."""

import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import config_of, hf_llama
from torch.utils.flop_counter import FlopCounterMode

from llasa_jax.model.flops import model_flops_per_token
from llasa_jax.model.lora import adapter_config
from llasa_jax.model.settings import LoraSettings
from llasa_jax.runtime.hardware import GPUS, TPUS, device_of_kind
from llasa_jax.train import progress
from llasa_jax.train.progress import Throughput


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_pytorch_counts(tied):
    hf = hf_llama(tied=tied, attn_implementation="eager")
    rows, length = 2, 48
    with FlopCounterMode(display=False) as counter:
        logits = hf(torch.zeros(rows, length, dtype=torch.long)).logits
        logits.sum().backward()
    counted = counter.get_total_flops() / (rows * length)
    # PyTorch computes every score of the square, causal or not, and angles by a small product that
    # is no model's.
    assert model_flops_per_token(config_of(hf), context=length) == pytest.approx(counted, rel=1e-3)


def device(kind):
    return types.SimpleNamespace(device_kind=kind)


def test_peaks():
    assert device_of_kind("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert device_of_kind("NVIDIA H100 PCIe").flops == 756e12
    assert device_of_kind("NVIDIA L40S") is GPUS["l40s"]
    assert device_of_kind("TPU v5 lite").flops == 197e12
    assert device_of_kind("TPU v5p") is device_of_kind("TPU v5") is TPUS["v5p"]
    assert device_of_kind("cpu") is None


class Result:
    def __init__(self, ready):
        self.is_ready = lambda: ready


def test_rates(monkeypatch):
    clock = {"now": 100.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock["now"])
    config = config_of(hf_llama())
    measured = Throughput(config, [device("TPU v5 lite")] * 2)
    assert measured.step_ended(1000, 500, 20.0) == {}
    assert measured.remaining(3) == "?"
    for ready in (True, False):
        with measured.waiting(Result(ready)):
            clock["now"] += 1  # only the first wait keeps the devices waiting
        clock["now"] += 3
        rates = measured.step_ended(1000, 500, 20.0)
    with measured.pause():
        clock["now"] += 1000
    assert rates == {
        "tokens_per_second": 2000 / 8,
        "speech_hours_per_hour": 1000 / 50 / 8,
        "data_wait": 1 / 8,
        "mfu": pytest.approx(2000 / 8 * model_flops_per_token(config, 20.0) / (2 * 197e12)),
    }
    clock["now"] += 4
    assert measured.step_ended(1000, 500, 20.0)["tokens_per_second"] == 3000 / 12
    assert measured.remaining(1000) == "1:06:40"


def test_old_steps_are_forgotten(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock["now"])
    measured = Throughput(config_of(hf_llama()), [device("cpu")])
    for step in range(200):
        clock["now"] += 10 if step < 100 else 1
        rates = measured.step_ended(100, 0, 1.0)
    assert rates == {"tokens_per_second": 100, "speech_hours_per_hour": 0, "data_wait": 0}


@pytest.mark.parametrize(
    ("targets", "whole"), [(["q", "v"], []), (["o", "down", "embed"], ["head"])]
)
def test_flops_of_adapters_are_those_that_pytorch_counts_for_peft(targets, whole):
    hf = hf_llama(tied=False, attn_implementation="eager")
    modules = {
        "q": "q_proj",
        "v": "v_proj",
        "o": "o_proj",
        "down": "down_proj",
        "embed": "embed_tokens",
        "head": "lm_head",
    }
    wanted = LoraConfig(
        r=4,
        target_modules=[modules[name] for name in targets],
        modules_to_save=[modules[name] for name in whole] or None,
    )
    theirs = get_peft_model(hf, wanted)
    # As in a scan over layers, the first one's inputs have a gradient too.
    theirs.enable_input_require_grads()
    rows, length = 2, 48
    with FlopCounterMode(display=False) as counter:
        theirs(torch.zeros(rows, length, dtype=torch.long)).logits.sum().backward()
    adapters = adapter_config(
        LoraSettings(rank=4, targets=targets, train_also=whole), config_of(hf), {}
    )
    counted = counter.get_total_flops() / (rows * length)
    assert model_flops_per_token(config_of(hf), length, adapters) == pytest.approx(
        counted, rel=2e-3
    )
