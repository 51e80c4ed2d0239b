"""What plan says of the codec in JAX."""

import importlib.util
import json

import pytest
import torch
from small_codec import small_config, small_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Xcodec2Config

from llasa_jax import cli
from llasa_jax.errors import UserError
from llasa_jax.plan.codec import describe, frame_flops, plan_codec


def test_arithmetic_of_the_published_codec():
    """Wav2Vec2-BERT has 24 million weights a layer, applied 50 times a second."""
    assert 50 * frame_flops(Xcodec2Config(), "encoder", 500) == pytest.approx(74e9, rel=0.04)
    assert 50 * frame_flops(Xcodec2Config(), "decoder", 500) == pytest.approx(20e9, rel=0.06)


def test_arithmetic_of_a_decoder_is_what_pytorch_counts():
    model, frames = small_model(), 80
    model.set_attn_implementation("eager")  # what the counter can count
    codes = torch.randint(0, 65536, (1, 1, frames))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.decode(codes)
    ours = frames * frame_flops(model.config, "decoder", frames)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_plan_of_this_machine_in_words_and_for_programs(tmp_path, capsys):
    small_config().save_pretrained(tmp_path)
    command = ["plan-codec", "--codec", str(tmp_path), "--part", "decoder", "--clips", "2"]
    assert cli.main([*command, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["device_count"] == 8
    assert 0 < found["peak_hbm_gib"] < 0.2
    assert found["hours_roofline"] is None  # of a CPU no rate is known


def test_what_cannot_be_planned():
    with pytest.raises(UserError, match="not planned for h100:8"):
        plan_codec(small_config(), "h100:8")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (pip install 'llasa-jax[plan]')",
)
def test_a_plan_of_a_tpu():
    found = plan_codec(small_config(), "v5e:2x2", "decoder", speech_hours=100)
    assert found.fits
    assert found.device_count == 4
    assert found.hours_roofline == pytest.approx(100 * found.flops_per_second * 6 / (4 * 197e12))
    assert "100 hours of speech: at least" in describe(found)
