"""Prompts against the layout that upstream trains (its finetune_offline.py), spelled out here independently."""

import numpy as np
import pytest

from llasa_jax.errors import UserError
from llasa_jax.prompts import Prompter, PromptSettings, Utterance, join_texts
from llasa_jax.tiny_llama import make_tiny_tokenizer

CODES = np.array([5, 65_535, 0, 7], np.uint16)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


def spelled_out(tokenizer, text, codes, speaker=""):
    head = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nConvert the text to speech:"
        "<|TEXT_UNDERSTANDING_START|>"
    )
    middle = f"<|TEXT_UNDERSTANDING_END|><|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{speaker}<|SPEECH_GENERATION_START|>"
    tail = "".join(f"<|s_{code}|>" for code in codes) + "<|SPEECH_GENERATION_END|><|eot_id|>"
    return sum((tokenizer(part, add_special_tokens=False)["input_ids"] for part in (head, text, middle, tail)), [])


@pytest.mark.parametrize("text", ["Hello there.", "  two spaces, and one behind ", "你好,世界", "a"])
@pytest.mark.parametrize("speaker", ["", "kore"])
def test_ids_are_upstreams(tokenizer, text, speaker):
    example = Prompter(tokenizer).example(Utterance(text=text, codes=CODES, speaker=speaker))
    expected = spelled_out(tokenizer, text, CODES, f"Speaker {speaker}" if speaker else "")
    assert example.tokens.tolist() == expected
    assert example.tokens.dtype == np.int32


def test_loss_is_on_speech_alone(tokenizer):
    example = Prompter(tokenizer).example(Utterance(text="Hello.", codes=CODES))
    learned = tokenizer.convert_ids_to_tokens(example.tokens[example.loss].tolist())
    assert learned == ["<|SPEECH_GENERATION_START|>", "<|s_5|>", "<|s_65535|>", "<|s_0|>", "<|s_7|>", "<|SPEECH_GENERATION_END|>"]
    assert tokenizer.convert_ids_to_tokens(int(example.tokens[-1])) == "<|eot_id|>"


def test_masks(tokenizer):
    utterance = Utterance(text="Hello.", codes=CODES)
    assert Prompter(tokenizer).example(utterance).visible.all()
    hidden = Prompter(tokenizer, PromptSettings(mask="upstream")).example(utterance)
    np.testing.assert_array_equal(hidden.visible, hidden.tokens != tokenizer.convert_tokens_to_ids("<|eot_id|>"))
    assert (~hidden.visible).sum() == 3


@pytest.mark.parametrize("speaker", ["", "kore"])
def test_inference_opens_exactly_as_training(tokenizer, speaker):
    prompter = Prompter(tokenizer)
    trained = prompter.example(Utterance(text="Hello there.", codes=CODES, speaker=speaker))
    opening = prompter.opening("Hello there.", speaker=speaker)
    assert opening.tolist() == trained.tokens[: len(opening)].tolist()
    assert len(opening) == np.flatnonzero(trained.loss)[0] + 1


def test_cloning_goes_on_from_the_prompts_codes(tokenizer):
    prompter = Prompter(tokenizer)
    opening = prompter.opening("And so on.", prompt_text="It was said.", prompt_codes=CODES)
    whole = prompter.example(Utterance(text="It was said. And so on.", codes=CODES))
    assert opening.tolist() == whole.tokens[: len(opening)].tolist()
    assert prompter.vocab.codes_of(opening).tolist() == CODES.tolist()
    assert opening[-1] == prompter.vocab.code_base + 7


def test_joining():
    assert join_texts("One.", "Two.") == "One. Two."
    assert join_texts("One. ", "Two.") == "One. Two."
    assert join_texts("", "Two.") == "Two."
    assert join_texts("你好。", "世界") == "你好。世界"


def test_the_date_does_not_move(tokenizer):
    text = tokenizer.decode(Prompter(tokenizer).opening("Hi"))
    assert "Today Date: 26 Jul 2024" in text
    assert "Today Date: 01 Jan 2030" in tokenizer.decode(Prompter(tokenizer, PromptSettings(date="01 Jan 2030")).opening("Hi"))


def test_templates(tokenizer):
    settings = PromptSettings(system="Voice: {description}", user="Say in {language}:{text}", assistant="{codes}")
    example = Prompter(tokenizer, settings).example(Utterance(text="Hi", codes=CODES, description="a low {growl}", language="en"))
    decoded = tokenizer.decode(example.tokens)
    assert "\n\nVoice: a low {growl}<|eot_id|>" in decoded
    assert "Say in en:<|TEXT_UNDERSTANDING_START|>Hi<|TEXT_UNDERSTANDING_END|>" in decoded


@pytest.mark.parametrize(
    ("settings", "utterance", "complaint"),
    [
        ({}, {"text": "  "}, "'x1' has no text"),
        ({}, {"codes": CODES[:0]}, "'x1' has no codes"),
        ({}, {"codes": np.array([128_264])}, "'x1': code 128264 is outside 0..65535"),
        ({}, {"text": "so <|eot_id|> there"}, r"'x1' contains the control token <\|eot_id\|>"),
        ({}, {"text": "so <|s_5|> there"}, r"'x1' contains the control token <\|s_5\|>"),
        ({"user": "{description}: {text}"}, {}, "'x1' has no description"),
    ],
)
def test_bad_utterances_are_named(tokenizer, settings, utterance, complaint):
    with pytest.raises(UserError, match=complaint):
        Prompter(tokenizer, PromptSettings(**settings)).example(Utterance(**{"id": "x1", "text": "Hi", "codes": CODES} | utterance))


def test_bad_settings_are_named(tokenizer):
    with pytest.raises(UserError, match=r"prompt.user mentions \{txet\}"):
        PromptSettings(user="{txet}")
    with pytest.raises(UserError, match=r"must each contain \{codes\}"):
        PromptSettings(assistant="nothing")
    with pytest.raises(UserError, match=r"must put <\|TEXT_UNDERSTANDING_START\|> into the conversation once"):
        Prompter(tokenizer, PromptSettings(user="nothing")).opening("Hi")
    plain = make_tiny_tokenizer(extend=False)
    with pytest.raises(UserError, match="has no speech tokens"):
        Prompter(plain)
    plain.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        Prompter(plain)
