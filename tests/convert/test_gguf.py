"""GGUF against its own reader, against transformers' reading of it, and in llama.cpp itself."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from llasa_jax.convert.gguf_file import write_gguf
from llasa_jax.demo.tiny_llama import make_tiny_llama
from llasa_jax.errors import UserError

pytestmark = pytest.mark.slow
gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def release(tmp_path_factory, tokenizer):
    """A checkpoint with grouped heads, scaled frequencies and an odd size that 32 divides."""
    folder = tmp_path_factory.mktemp("gguf") / "release"
    sizes = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    # With a head of its own and large weights, what is drawn next depends on all before it.
    sizes |= {"tie_word_embeddings": False, "initializer_range": 0.3}
    make_tiny_llama(folder, tokenizer, **sizes, rope_parameters=SCALING)
    return folder


def read(path):
    """The tensors of a file by their names, dequantised, and its keys."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def test_every_tensor_is_that_of_the_checkpoint(release, tokenizer):
    write_gguf(release, release / "f32.gguf", "f32")
    tensors, keys = read(release / "f32.gguf")
    expected = load_file(release / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, values in expected.items():
        found = tensors.pop(names.get_name(name, (".weight",)))
        if "q_proj" in name or "k_proj" in name:  # neighbours are turned, not halves
            found = found.reshape(-1, 8, 2, 96).swapaxes(1, 2).reshape(values.shape)
        np.testing.assert_array_equal(found, values, name)
    # Frequencies as transformers scales them.
    model = AutoModelForCausalLM.from_pretrained(release)
    plain = 500_000.0 ** (-np.arange(0, 16, 2) / 16)
    scaled = model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(plain / tensors.pop("rope_freqs.weight"), scaled, rtol=1e-6)
    assert not tensors
    assert keys["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    end = tokenizer.convert_tokens_to_ids("<|SPEECH_GENERATION_END|>")
    assert keys["tokenizer.ggml.eot_token_id"] == end
    assert keys["tokenizer.chat_template"] == tokenizer.chat_template
    # transformers' own reader, which was written by others
    again = AutoModelForCausalLM.from_pretrained(release, gguf_file="f32.gguf")
    for name, values in again.state_dict().items():
        np.testing.assert_array_equal(values.numpy(), expected.get(name, values.numpy()), name)
    config, other = model.config, again.config
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size"):
        assert getattr(config, key) == pytest.approx(getattr(other, key))


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "error"), [("bf16", 2**-8), ("f16", 2**-11), ("q8_0", 2**-7)])
def test_smaller_types_are_near(release, kind, error, tmp_path):
    if kind == "bf16":  # the program's default
        program = ROOT / "convert/hf_to_gguf.py"
        subprocess.run([sys.executable, program, release, tmp_path / "x.gguf"], check=True)
    else:
        write_gguf(release, tmp_path / "x.gguf", kind)
    tensors, _ = read(tmp_path / "x.gguf")
    expected = load_file(release / "model.safetensors")
    for name, found in (("embed_tokens", "token_embd"), ("layers.1.mlp.up_proj", "blk.1.ffn_up")):
        values, found = expected[f"model.{name}.weight"], tensors[f"{found}.weight"]
        most = np.abs(values) if kind != "q8_0" else np.abs(values).max()
        assert np.all(np.abs(found - values) <= error * most + 1e-7)
        assert np.any(found != values)
    np.testing.assert_array_equal(tensors["output_norm.weight"], expected["model.norm.weight"])


def test_what_llama_cpp_would_misread_is_refused(release, tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        write_gguf(tmp_path, tmp_path / "x.gguf", "f32")
    other = tmp_path / "other"
    other.mkdir()
    for path in release.glob("*[!f]"):
        (other / path.name).symlink_to(path)
    content = json.loads((release / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="not Llama 3's way to cut a text"):
        write_gguf(other, tmp_path / "x.gguf", "f32")
    assert not Path(tmp_path / "x.gguf").exists()


def test_llama_cpp_draws_the_same_tokens(release, prompter, tokenizer):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    write_gguf(release, release / "f32.gguf", "f32")
    prompt = prompter.opening("the quick brown fox").tolist()
    model = AutoModelForCausalLM.from_pretrained(release, dtype=torch.float32)
    drawn = model.generate(
        torch.tensor([prompt]), min_new_tokens=100, max_new_tokens=100, do_sample=False
    )
    assert len({*drawn[0, len(prompt) :].tolist()}) > 20
    llama = llama_cpp.Llama(str(release / "f32.gguf"), n_ctx=512, n_threads=1, verbose=False)
    ours = llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
    assert [next(ours) for _ in range(100)] == drawn[0, len(prompt) :].tolist()
    text = "the quick <|s_17|> fox's 1234 words"
    ids = llama.tokenize(text.encode(), add_bos=False, special=True)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
