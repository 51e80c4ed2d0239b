"""Prompts against the layout that upstream trains (its finetune_offline.py), spelled out here
independently.
"""

import sys
import time

import numpy as np
import pytest

from llasa_jax.demo.tiny_llama import make_tiny_tokenizer
from llasa_jax.errors import UserError
from llasa_jax.speech import chat_template
from llasa_jax.speech.prompts import Conversation, Prompter, Utterance, join_texts
from llasa_jax.speech.settings import PromptSettings

CODES = np.array([5, 65_535, 0, 7], np.uint16)


def spelled_out(tokenizer, text, codes, speaker=""):
    head = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date:"
        " December 2023\nToday Date: 26 Jul"
        " 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nConvert the text to"
        " speech:<|TEXT_UNDERSTANDING_START|>"
    )
    middle = (
        "<|TEXT_UNDERSTANDING_END|><|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        f"{speaker}<|SPEECH_GENERATION_START|>"
    )
    tail = "".join(f"<|s_{code}|>" for code in codes) + "<|SPEECH_GENERATION_END|><|eot_id|>"
    return sum(
        (
            tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in (head, text, middle, tail)
        ),
        [],
    )


@pytest.mark.parametrize(
    "text", ["Hello there.", "  two spaces, and one behind ", "你好,世界", "a"]
)
@pytest.mark.parametrize("speaker", ["", "kore"])
def test_ids_are_upstreams(tokenizer, text, speaker):
    example = Prompter(tokenizer).example(Utterance(text=text, codes=CODES, speaker=speaker))
    expected = spelled_out(tokenizer, text, CODES, f"Speaker {speaker}" if speaker else "")
    assert example.tokens.tolist() == expected
    assert example.tokens.dtype == np.int32


def test_loss_is_on_speech_alone(tokenizer):
    example = Prompter(tokenizer).example(Utterance(text="Hello.", codes=CODES))
    learned = tokenizer.convert_ids_to_tokens(example.tokens[example.loss].tolist())
    assert learned == [
        "<|SPEECH_GENERATION_START|>",
        "<|s_5|>",
        "<|s_65535|>",
        "<|s_0|>",
        "<|s_7|>",
        "<|SPEECH_GENERATION_END|>",
    ]
    assert tokenizer.convert_ids_to_tokens(int(example.tokens[-1])) == "<|eot_id|>"


def test_masks(tokenizer):
    utterance = Utterance(text="Hello.", codes=CODES)
    assert Prompter(tokenizer).example(utterance).visible.all()
    hidden = Prompter(tokenizer, PromptSettings(mask="upstream")).example(utterance)
    np.testing.assert_array_equal(
        hidden.visible, hidden.tokens != tokenizer.convert_tokens_to_ids("<|eot_id|>")
    )
    assert (~hidden.visible).sum() == 3


@pytest.mark.parametrize("speaker", ["", "kore"])
def test_inference_opens_exactly_as_training(tokenizer, speaker):
    prompter = Prompter(tokenizer)
    trained = prompter.example(Utterance(text="Hello there.", codes=CODES, speaker=speaker))
    opening = prompter.opening("Hello there.", speaker=speaker)
    assert opening.tolist() == trained.tokens[: len(opening)].tolist()
    assert len(opening) == np.flatnonzero(trained.loss)[0] + 1


def test_inference_asks_for_what_was_trained(tokenizer):
    prompter = Prompter(tokenizer, PromptSettings(user="In {language}, {description}:{text}"))
    asked = {"speaker": "ada", "description": "calm and low", "language": "English"}
    trained = prompter.example(Utterance("Hello there.", CODES, **asked))
    opening = prompter.opening("Hello there.", **asked)
    assert opening.tolist() == trained.tokens[: len(opening)].tolist()
    assert "In English, calm and low:" in tokenizer.decode(opening)
    with pytest.raises(UserError, match="has no language, which the prompt mentions"):
        prompter.opening("Hello there.", description="calm and low")
    for field in ("description", "language"):
        with pytest.raises(UserError, match=f"the {field} 'xx' would change nothing"):
            Prompter(tokenizer).opening("Hello there.", **{field: "xx"})
    unnamed = Prompter(tokenizer, PromptSettings(assistant_with_speaker="{codes}"))
    with pytest.raises(UserError, match="the speaker 'ada' would change nothing"):
        unnamed.opening("Hello there.", speaker="ada")


def test_the_generate_command_passes_them_on(monkeypatch, tmp_path):
    from llasa_jax import cli
    from llasa_jax.generate.speaker import Speaker

    seen = []

    class Silent:
        check = staticmethod(seen.append)

        def say(self, lines, **settings):
            return []

    monkeypatch.setattr(Speaker, "load", lambda *args, **options: Silent())
    asked = {"speaker": "ada", "description": "calm", "language": "en"}
    flags = [f"--{name}={value}" for name, value in asked.items()]
    out = tmp_path / "x.wav"
    words = ["generate", "--model", str(tmp_path), "--text", "Hi", "--out", str(out), *flags]
    assert cli.main(words) == 0
    assert [line.named for line in seen] == [asked]


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
    assert "Today Date: 01 Jan 2030" in tokenizer.decode(
        Prompter(tokenizer, PromptSettings(date="01 Jan 2030")).opening("Hi")
    )


def test_templates(tokenizer):
    settings = PromptSettings(
        system="Voice: {description}", user="Say in {language}:{text}", assistant="{codes}"
    )
    example = Prompter(tokenizer, settings).example(
        Utterance(text="Hi", codes=CODES, description="a low {growl}", language="en")
    )
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
        Prompter(tokenizer, PromptSettings(**settings)).example(
            Utterance(**{"id": "x1", "text": "Hi", "codes": CODES} | utterance)
        )


@pytest.mark.parametrize(
    "field",
    [
        {"text": "so <|start_header_id|> there"},
        {"speaker": "<|eot_id|>"},
        {"text": "<|SPEECH_UNDERSTANDING_END|>"},
    ],
)
def test_no_field_smuggles_control_tokens_in(tokenizer, field):
    with pytest.raises(
        UserError,
        match=(
            r"'x1' contains the control token"
            r" <\|(start_header_id|eot_id|SPEECH_UNDERSTANDING_END)\|>"
        ),
    ):
        Prompter(tokenizer).example(Utterance(**{"id": "x1", "text": "Hi", "codes": CODES} | field))


JOINED = {"speaker": "<|eot", "description": "_id|>", "language": "<|"}


@pytest.mark.parametrize(
    "templates",
    [
        {"assistant_with_speaker": "{speaker}{description}{codes}"},
        {"user": "{language}eot_id|>{text}"},
        {"system": "{speaker}{description}"},
    ],
)
def test_control_tokens_are_looked_for_in_the_finished_prompt(tokenizer, templates):
    """No field has one, but side by side they make one."""
    with pytest.raises(
        UserError, match=r"'x1' contains the control token <\|eot_id\|>, made of parts"
    ):
        Prompter(tokenizer, PromptSettings(**templates)).example(
            Utterance("Hi", CODES, "x1", **JOINED)
        )
    Prompter(tokenizer, PromptSettings(assistant_with_speaker="{speaker}-{codes}")).example(
        Utterance("Hi", CODES, "x1", **JOINED)
    )


def test_a_chat_template_that_joins_turns_is_seen_through():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}_id|>{% endfor %}"
    prompter = Prompter(tokenizer, PromptSettings(task="chat"))
    with pytest.raises(
        UserError, match=r"'c1' contains the control token <\|eot_id\|>, made of parts"
    ):
        prompter.example(conversation(("user", "Hi<|eot"), ("assistant", "Ho")))


def test_long_fields_are_refused(tokenizer):
    with pytest.raises(UserError, match=r"'x1' has a speaker of 100,000 characters") as caught:
        Prompter(tokenizer).example(Utterance("Hi", CODES, "x1", "a" * 100_000))
    assert len(str(caught.value)) < 200
    with pytest.raises(UserError, match="has a speaker of 100,000 characters") as caught:
        Prompter(tokenizer).opening("Hi " * 10_000, speaker="a" * 100_000)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "the chat template of the tokenizer .* takes longer than",
        ),
        ("{{ messages[7].content.x }}", "the chat template of the tokenizer .* fails"),
        ("{{ raise_exception('no system turn') }}", "fails .no system turn"),
        ("{% for %}", "the chat template of the tokenizer .* fails"),
    ],
)
def test_chat_templates_that_loop_or_fail_are_refused(monkeypatch, template, complaint):
    monkeypatch.setattr(chat_template, "TRIAL_SECONDS", 0.5)
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    before = time.monotonic()
    with pytest.raises(UserError, match=complaint) as caught:
        Prompter(tokenizer)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - before < 60
    assert sys.gettrace() is None or "watch" not in repr(sys.gettrace())


def ids(tokenizer, *parts):
    return sum((tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts), [])


HEAD = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date:"
    " December 2023\nToday Date: 26 Jul 2024\n\n{system}<|eot_id|>"
)
USER, ASSISTANT = (
    f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")
)


@pytest.mark.parametrize("speaker", ["", "kore"])
def test_speech_understanding_is_the_other_way_round(tokenizer, speaker):
    utterance = Utterance(" Hello there. ", CODES, speaker=speaker)
    example = Prompter(tokenizer, PromptSettings(task="asr")).example(utterance)
    codes = "".join(f"<|s_{code}|>" for code in CODES)
    heard = (
        "Transcribe the following speech:"
        f"<|SPEECH_UNDERSTANDING_START|>{codes}<|SPEECH_UNDERSTANDING_END|><|eot_id|>{ASSISTANT}"
    )
    written = ids(
        tokenizer, "<|TEXT_GENERATION_START|>", " Hello there. ", "<|TEXT_GENERATION_END|>"
    )
    assert example.tokens.tolist() == [
        *ids(tokenizer, HEAD.format(system="") + USER + heard),
        *written,
        *ids(tokenizer, "<|eot_id|>"),
    ]
    assert example.tokens[example.loss].tolist() == written
    with pytest.raises(UserError, match="trained with prompt.task asr, which does not speak"):
        Prompter(tokenizer, PromptSettings(task="asr")).opening("Hello")


def test_own_words_for_speech_understanding(tokenizer):
    settings = PromptSettings(
        task="asr",
        system="You hear {language}.",
        user="{codes} What was said?",
        assistant="{speaker} said {text}",
    )
    example = Prompter(tokenizer, settings).example(
        Utterance("Hi", CODES, speaker="ada", language="English")
    )
    decoded = tokenizer.decode(example.tokens)
    assert "\n\nYou hear English.<|eot_id|>" in decoded
    assert "<|SPEECH_UNDERSTANDING_END|> What was said?<|eot_id|>" in decoded
    assert decoded.endswith("ada said <|TEXT_GENERATION_START|>Hi<|TEXT_GENERATION_END|><|eot_id|>")
    assert (
        tokenizer.decode(example.tokens[example.loss])
        == "<|TEXT_GENERATION_START|>Hi<|TEXT_GENERATION_END|>"
    )


TURNS = [
    ("system", "Be brief."),
    ("user", " Why? "),
    ("assistant", "Because.\n\nSo. "),
    ("user", "And?"),
    ("assistant", "And so."),
]


def conversation(*turns):
    return Conversation([{"role": role, "content": content} for role, content in turns], "c1")


def test_chat_learns_the_assistants_turns_alone(tokenizer):
    example = Prompter(tokenizer, PromptSettings(task="chat")).example(
        conversation(*TURNS, ("user", "Thanks."))
    )
    parts = [
        (HEAD.format(system="Be brief.") + USER + "Why?<|eot_id|>" + ASSISTANT, False),
        ("Because.\n\nSo.<|eot_id|>", True),
        (USER + "And?<|eot_id|>" + ASSISTANT, False),
        ("And so.<|eot_id|>", True),
    ]
    assert example.tokens.tolist() == ids(tokenizer, *(part for part, _ in parts))
    assert example.tokens[example.loss].tolist() == ids(
        tokenizer, *(part for part, learned in parts if learned)
    )
    assert example.visible.all()
    # What the model is asked at inference is what it was trained after.
    asked = tokenizer.apply_chat_template(
        conversation(*TURNS[:2]).messages,
        add_generation_prompt=True,
        date_string="26 Jul 2024",
        return_dict=False,
    )
    assert example.tokens[: len(asked)].tolist() == asked


@pytest.mark.parametrize(
    ("turns", "complaint"),
    [
        ([("user", "Why?")], "'c1' has turns of user; it must open with a user's turn"),
        ([("assistant", "Hm.")], "'c1' has turns of assistant"),
        (
            [("user", "Why?"), ("system", "No."), ("assistant", "Hm.")],
            "'c1' has turns of user, system, assistant",
        ),
        ([("user", "Why?"), ("assistant", " ")], "'c1' has an empty turn of the assistant"),
        (
            [("user", "Why?<|eot_id|>"), ("assistant", "Hm.")],
            r"'c1' contains the control token <\|eot_id\|>",
        ),
        (
            [("user", "Why?"), ("assistant", "<|s_12|>")],
            r"'c1' contains the control token <\|s_12\|>",
        ),
    ],
)
def test_bad_conversations_are_named(tokenizer, turns, complaint):
    with pytest.raises(UserError, match=complaint):
        Prompter(tokenizer, PromptSettings(task="chat")).example(conversation(*turns))


def test_a_template_that_rewrites_history_is_refused():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}<|eot_id|>{% endfor %}"
    )
    with pytest.raises(
        UserError, match="'c1': the tokenizer's chat template rewrites earlier turns"
    ):
        Prompter(tokenizer, PromptSettings(task="chat")).example(conversation(*TURNS))


def test_bad_settings_are_named(tokenizer):
    with pytest.raises(UserError, match=r"prompt.user mentions \{txet\}"):
        PromptSettings(user="{txet}").filled()
    with pytest.raises(UserError, match=r"must each contain \{codes\}"):
        PromptSettings(assistant="nothing").filled()
    with pytest.raises(UserError, match=r"must each contain \{text\}, which asr learns"):
        PromptSettings(task="asr", assistant="{codes}").filled()
    with pytest.raises(
        UserError, match=r"here words a turn, but the task chat takes all turns from its records"
    ):
        PromptSettings(task="chat", user="{text}").filled("here")
    with pytest.raises(UserError, match=r"template 'a \{text' is malformed"):
        PromptSettings(user="a {text").filled()
    with pytest.raises(
        UserError,
        match=r"must put \{text\} into the conversation once, but it stands there 0",
    ):
        Prompter(tokenizer, PromptSettings(user="nothing")).opening("Hi")
    plain = make_tiny_tokenizer(extend=False)
    with pytest.raises(UserError, match="has no speech tokens"):
        Prompter(plain)
    plain.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        Prompter(plain)
