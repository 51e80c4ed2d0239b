"""What makes a Llama a Llasa: new rows for the speech tokens, and a model card whose snippet
speaks.
"""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from llasa_jax.convert.export_hf import export_hf
from llasa_jax.convert.extend_vocab import added_rows
from llasa_jax.convert.import_hf import import_hf
from llasa_jax.convert.model_card import METRICS, SETTINGS, model_card
from llasa_jax.convert.model_folder import HF_FOLDER, read_description
from llasa_jax.convert.names import EMBED, HEAD
from llasa_jax.convert.safetensors_io import SINGLE, SafetensorsFolder
from llasa_jax.demo.tiny_llama import make_tiny_llama, make_tiny_tokenizer
from llasa_jax.errors import UserError
from llasa_jax.speech.prompts import Prompter
from llasa_jax.speech.settings import PromptSettings
from llasa_jax.speech.vocab import NUM_CODES, SpeechVocab
from llasa_jax.train.run_folder import SETTINGS_FILE

TEXT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """An untied text model, its import with --extend-vocab, and the export of that."""
    folder = tmp_path_factory.mktemp("extended")
    make_tiny_llama(
        folder / "text",
        make_tiny_tokenizer(extend=False),
        dtype="bfloat16",
        num_hidden_layers=1,
        tie_word_embeddings=False,
    )
    import_hf(folder / "text", folder / "model", extend_vocab=True, seed=7)
    export_hf(folder / "model", folder / "out", verify=True)
    return folder


@pytest.fixture(scope="module")
def tokenizer(extended):
    """Of the export. Loading it takes seconds."""
    return AutoTokenizer.from_pretrained(extended / "out")


def test_extension_keeps_old_rows_and_adds_the_speech_tokens(extended, tokenizer):
    old, new = load_file(extended / "text" / SINGLE), load_file(extended / "out" / SINGLE)
    assert old.keys() == new.keys()
    vocab = SpeechVocab.of(tokenizer)
    count = old[EMBED].shape[0]
    assert vocab.code_base == count + 8
    for name, before in old.items():
        assert torch.equal(new[name][: before.shape[0]], before), name
        assert new[name].shape[0] == (len(tokenizer) if name in (EMBED, HEAD) else before.shape[0])
    assert len(tokenizer) == count + 8 + NUM_CODES
    assert not torch.equal(new[EMBED][count:], new[HEAD][count:])
    config, _ = read_description(extended / "model")
    assert config.vocab_size == len(tokenizer)
    for folder in (extended / "model" / HF_FOLDER, extended / "out"):
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(tokenizer)
        generation = GenerationConfig.from_pretrained(folder)
        assert vocab.speech_end in generation.eos_token_id
        assert generation.pad_token_id == tokenizer.convert_tokens_to_ids(
            "<|finetune_right_pad_id|>"
        )
    text = AutoTokenizer.from_pretrained(extended / "text")
    assert tokenizer(TEXT)["input_ids"] == text(TEXT)["input_ids"]
    assert tokenizer.chat_template == text.chat_template


def test_extension_is_only_for_text_models(extended, tmp_path):
    with pytest.raises(UserError, match="--new-codes .* give it with --extend-vocab"):
        import_hf(extended / "text", tmp_path / "model", new_codes="levels")
    with pytest.raises(UserError, match="has the speech tokens already"):
        import_hf(extended / "out", tmp_path / "model", extend_vocab=True)
    moved = []
    try:
        # Without the first there is still a vocabulary, but no tokenizer.
        for name in ("tokenizer_config.json", "tokenizer.json"):
            moved.append((extended / "text" / name).rename(tmp_path / name))
            with pytest.raises(UserError, match="no tokenizer to extend"):
                import_hf(extended / "text", tmp_path / "model", extend_vocab=True)
        with pytest.warns(UserWarning, match="has no tokenizer"):
            import_hf(extended / "text", tmp_path / "bare")
    finally:
        for path in moved:
            path.rename(extended / "text" / path.name)


@pytest.mark.parametrize("singular", [False, True])
def test_new_rows_are_those_of_transformers(tmp_path, singular):
    """The very numbers that HF's own function draws from the same seed. A dead column makes the
    covariance singular: HF takes the mean.

    Tolerance: the old rows are about 0.02, the noise 6e-7, and float32 sums in another order differ
    by 1e-9.
    """
    torch.manual_seed(3)
    old = torch.nn.Embedding.from_pretrained(torch.randn(5000, 64) * 0.02 + 0.01)
    old.weight[:, 3] *= not singular
    new = torch.nn.Embedding(5300, 64)
    save_file({EMBED: old.weight}, tmp_path / SINGLE)
    torch.manual_seed(11)
    PreTrainedModel._init_added_embeddings_weights_with_mean(None, old, new, 5000, 300)
    expected = new.weight[5000:].detach().numpy()
    ours = added_rows(SafetensorsFolder(tmp_path), EMBED, 300, seed=11)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-8)
    assert (ours.std(0).max() > 1e-7) is not singular
    assert (
        np.array_equal(ours, added_rows(SafetensorsFolder(tmp_path), EMBED, 300, seed=12))
        is singular
    )


def test_new_codes_are_sums_over_their_digits(tmp_path):
    """As spread out as the old rows, in each column, and alike where digits are.

    Tolerance: the 32 vectors' own spread varies by an eighth of it.
    """
    torch.manual_seed(3)
    old = torch.randn(5000, 64) * torch.linspace(0.01, 0.1, 64) + 0.5
    save_file({EMBED: old}, tmp_path / SINGLE)
    folder = SafetensorsFolder(tmp_path)
    new = added_rows(folder, EMBED, NUM_CODES + 8, seed=11, codes="levels")
    np.testing.assert_array_equal(new[:8], added_rows(folder, EMBED, NUM_CODES + 8, seed=11)[:8])
    codes = new[8:]
    other_digit = codes[1::4] - codes[::4]
    assert np.abs(other_digit).max() > 0.01
    np.testing.assert_allclose(
        other_digit, np.broadcast_to(other_digit[0], other_digit.shape), atol=1e-6
    )
    ratio = codes.std(0) / old.std(0).numpy()
    assert 0.8 < ratio.mean() < 1.2
    assert ratio.std() < 0.25
    np.testing.assert_allclose(codes.mean(0), 0.5, atol=0.2)


def test_card_snippet_speaks(extended):
    card = (extended / "out" / "README.md").read_text()
    snippet, codec = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = snippet.replace(
        'from_pretrained("out"', f'from_pretrained("{extended / "out"}"'
    ).replace("max_length=2048", "max_length=80")
    assert code.count(str(extended / "out")) == 2
    names = {}
    exec(code, names)
    assert all(0 <= code < NUM_CODES for code in names["codes"])
    prompter = Prompter(names["tokenizer"])
    np.testing.assert_array_equal(names["prompt"]["input_ids"][0], prompter.opening(TEXT))
    compile(codec, "codec", "exec")
    assert "Xcodec2Model" in codec


def test_generate_stops_at_the_end_of_speech_by_itself(extended, tokenizer):
    """Without any argument, as a server does it: the exported generation config knows where speech
    ends.
    """
    model = AutoModelForCausalLM.from_pretrained(extended / "out")
    end = SpeechVocab.of(tokenizer).speech_end
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1)
        model.lm_head.weight[end] = model.model(torch.tensor([[5]])).last_hidden_state[0, -1]
    assert model.generate(torch.tensor([[5]]), do_sample=False, max_new_tokens=5)[0].tolist() == [
        5,
        end,
    ]


def test_card_tells_the_run_and_no_paths(tmp_path):
    settings = {
        "out": "/home/me/runs/voice",
        "model": {"path": "/home/me/models/llasa"},
        "data": {"path": "/home/me/data/kore", "max_length": 2048},
        "optimizer": {"learning_rate": 1e-5},
        "log": {"wandb": "secret"},
        "lora": {"init": "../adapters/mine"},
        "online": {"codec": "HKUSTAudio/xcodec2-hf"},
        "chat": {"user": "Say it calmly and/or slowly: {text}"},
    }
    assert SETTINGS == SETTINGS_FILE
    (tmp_path / SETTINGS).write_text(yaml.safe_dump(settings))
    lines = [
        {"step": 1, "loss": 6.0, "tokens_per_second": 10},
        {"step": 2, "loss": 5.5},
        {"step": 3, "loss": 0.1},
    ]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step"')
    origin = {"base_model": "HKUSTAudio/Llasa-1B", "license": "cc-by-nc-4.0"}
    card = model_card(tmp_path, origin, "me/voice", 2, speaks=True)
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-nc-4.0"
    assert front["base_model"] == "HKUSTAudio/Llasa-1B"
    assert front["pipeline_tag"] == "text-to-speech"
    for told in (
        "trained for 2 steps",
        "kore",
        "learning_rate: 1.0e-05",
        "loss 5.5",
        "# voice",
        'from_pretrained("me/voice")',
        "codec: HKUSTAudio/xcodec2-hf",
        "Say it calmly and/or slowly: {text}",
        "init: mine",
    ):
        assert told in card
    assert "/home" not in card
    assert "adapters/" not in card
    assert "secret" not in card
    plain = model_card(tmp_path, {"base_model": "folder"}, "x", None, speaks=False)
    assert "base_model" not in yaml.safe_load(plain.split("---")[1])
    assert "unchanged" in plain


@pytest.mark.parametrize("speaker", ["", "kore"])
def test_card_prompts_as_the_run_did(extended, tokenizer, monkeypatch, speaker):
    """With every field a prompt may have, in `system` too."""
    settings = {
        "system": "Mood {description}.",
        "user": 'Say "it"\nin {language}: {text}!',
        "date": "01 Jan 2025",
    }
    card = model_card(
        extended, {"base_model": "b", "prompt": settings}, str(extended / "out"), None, speaks=True
    )
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].split("end = ")[0]
    for name, value in {"speaker": speaker, "description": "calm", "language": "en"}.items():
        code = re.sub(rf'^{name} = ""', f'{name} = "{value}"', code, flags=re.MULTILINE)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: tokenizer)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda _, dtype: torch.nn.Identity()
    )
    names = {}
    exec(code, names)
    prompter = Prompter(
        tokenizer,
        PromptSettings(**(settings | {"user": settings["user"].replace("{language}", "en")})),
    )
    expected = prompter.opening(TEXT, speaker=speaker, description="calm")
    np.testing.assert_array_equal(names["prompt"]["input_ids"][0], expected)
