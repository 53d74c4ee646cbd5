"""Make the texts for `make demo` from what is already installed: `python demo_data.py demo`.

One need not read this to understand Bone. It writes to the folder `demo`:

docs.jsonl      to pretrain a small base model: Python's help topics
chat.jsonl      to fine-tune it: English and Chinese questions and answers of chatterbot-corpus
chat_val.jsonl  a tenth of these, held out; no question is in both
"""

import json
import random
import re
import sys
from collections.abc import Collection
from pathlib import Path
from pydoc_data.topics import topics

import chatterbot_corpus
import yaml


def dialogues() -> list[str]:
    """Read the first question and answer of each conversation; each question only once."""
    folder = Path(chatterbot_corpus.__file__).parent / "data"
    found: dict[str, str] = {}
    for path in sorted(folder.glob("english/*.yml")) + sorted(folder.glob("chinese/*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            # trivia.yml has one conversation that is not a list.
            if isinstance(turns, list):
                question, answer = (_without_blank_lines(turn) for turn in turns[:2])
                # Questions that differ in letter case or punctuation are the same.
                key = re.sub(r"[\W_]+", "", question.casefold())
                found.setdefault(key, f"User: {question}\n\nAssistant: {answer}")
    return list(found.values())


def _without_blank_lines(turn: str) -> str:
    """Remove blank lines from a turn: in these dialogues, a blank line ends it."""
    return re.sub(r"\n\s*\n", "\n", turn.strip())


def write_jsonl(path: Path, texts: Collection[str]) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")


def main(folder: Path) -> None:
    chat = dialogues()
    random.Random(0).shuffle(chat)
    held_out = len(chat) // 10
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "docs.jsonl", topics.values())
    write_jsonl(folder / "chat.jsonl", chat[held_out:])
    write_jsonl(folder / "chat_val.jsonl", chat[:held_out])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
