"""Ask models what they were taught: `python demo_ask.py demo/questions.json BASE TUNED ...`.

One need not read this to understand Bone. It prints some answers of each model, and how many are
right to the letter: to questions as they were taught, and to the same asked in other words.
"""

import json
import sys
from pathlib import Path

import checkpoint
from cli import run_cli
from generate import WORLD, Settings, stream
from rwkv6 import RWKV

SETTINGS = Settings(length=40, temperature=0)
SHOWN = 11  # one question of so many is printed with its answer


def answer(model: RWKV, question: str) -> str:
    """Return what the model answers, always with the likeliest token."""
    tokens = WORLD.encode(f"User: {question}\n\nAssistant:")
    pieces = stream(model, model.empty_state(), tokens, settings=SETTINGS, stop="\n\n")
    return "".join(piece.text for piece in pieces).strip()


def count(questions: list[dict], answers: list[str], *, taught: bool) -> str:
    """Say how many of the questions of one kind have the right answer."""
    pairs = zip(questions, answers, strict=True)
    right = [q["answer"] == a for q, a in pairs if q["taught"] == taught]
    return f"{sum(right)} of {len(right)}"


def main(questions_path: Path, model_paths: list[str]) -> None:
    """Print the answers and the table."""
    questions = json.loads(questions_path.read_text(encoding="utf-8"))
    table = [f"{'right answers':<24}{'as taught':>12}{'in other words':>18}"]
    for path in model_paths:
        model = checkpoint.load_model(path)
        answers = [answer(model, q["question"]) for q in questions]
        taught, others = (count(questions, answers, taught=kind) for kind in (True, False))
        table.append(f"{path:<24}{taught:>12}{others:>18}")
        print(f"{path} says:")
        for q, a in list(zip(questions, answers, strict=True))[::SHOWN]:
            print(f"    {q['question']}  {' '.join(a.split())}")
        print()
    print(*table, sep="\n")


if __name__ == "__main__":
    run_cli(lambda: main(Path(sys.argv[1]), sys.argv[2:]))
