"""Plain words, and lines that fit: phrases that readers stumbled over do not come back."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COUNTED = "rows|clips|codes|tokens|bytes|copies|GiB|samples|steps|hours|examples"
UNITS = "row|device|host|byte|token|line|record|clip|step|layer|second of audio"
# What not to write, and what to write instead.
PHRASES = {
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\b(is|are|was|were) told\b": "reports, prints, says",
    r"\btells? of\b": "reports",
    r"\bno pair\b": "does not match",
    r"\bsuch as those that\b": "name them",
    rf"\b({COUNTED}) an? ({UNITS})\b": "per",
    r"\bneed not be (here|there)\b": "that you do not have",
    r"\banew\b": "again",
    r"\blikeliest\b": "most probable",
    r"\bat the least\b": "at least",
    r"\bthe very (same|codes|batches|most|ones)\b": "the same, exactly",
    r"\bthereof\b|\btherein\b|\bupon\b|\bhence\b": "shorter words",
}
# Names of variables are nouns of the field.
PRONOUNS = {"its", "his", "mine", "told", "heard", "heard_too", "of_model", "whose"}
WIDE = 100


def tracked(*suffixes: str) -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout of git")
    names = [name for name in listed.stdout.splitlines() if name.endswith(suffixes)]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def lines(path: Path):
    yield from enumerate(path.read_text(encoding="utf-8").splitlines(), 1)


def test_plain_words():
    found = []
    for path in tracked(".py", ".md", ".yaml", "Makefile"):
        text = " ".join(path.read_text(encoding="utf-8").split())
        if path == Path(__file__):
            continue
        for pattern, better in PHRASES.items():
            found += [
                f"{path.relative_to(ROOT)}: '{match.group()}' in"
                f" '...{text[max(0, match.start() - 40) : match.end() + 20]}...': write {better}"
                for match in re.finditer(pattern, text, re.I)
            ]
    assert not found, "\n" + "\n".join(found)


def test_variables_are_nouns():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.id}"
        for path in tracked(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name)
        and isinstance(node.ctx, ast.Store)
        and node.id in PRONOUNS
        and "llasa_jax" in path.parts
    ]
    assert not found, "\n" + "\n".join(found)


def test_lines_fit():
    """Tables, code blocks and links of the docs cannot be broken, and are left out."""
    found = []
    for path in tracked(".py", ".md", ".yaml", ".yml", ".toml", "Makefile", "run"):
        code = False
        for number, line in lines(path):
            code ^= line.startswith("```")
            free = path.suffix == ".md" and (code or line.startswith("|") or "](" in line)
            if len(line) > WIDE and not free:
                found.append(f"{path.relative_to(ROOT)}:{number} has {len(line)} columns")
    assert not found, "\n" + "\n".join(found)
