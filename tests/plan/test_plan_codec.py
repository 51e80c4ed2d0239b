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
from llasa_jax.plan.codec import CodecPlan, describe, frame_flops, plan_codec


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
    command = ["plan", "--encode", "--codec", str(tmp_path), "--part", "decoder", "--clips", "2"]
    assert cli.main([*command, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["device_count"] == 8
    assert 0 < found["peak_hbm_gib"] < 0.2
    assert found["hours_roofline"] is None  # of a CPU no rate is known
    assert cli.main(["plan"]) == 2
    assert "--config FILE, or --encode" in capsys.readouterr().err
    assert cli.main([*command, "--train.rows=4"]) == 2
    assert "takes neither --config nor settings" in capsys.readouterr().err


def test_device_hours_and_their_price():
    plan = CodecPlan("encoder", "v5e:4x4", 16, 16, 10.0, True, 2.1, 16.0, 7e10, 1000.0, 3.0)
    assert describe(plan).endswith("about 96 device-hours at half the peak rate")
    assert describe(plan, 1.2).endswith("at half the peak rate, which cost 115 at 1.2 each")


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
