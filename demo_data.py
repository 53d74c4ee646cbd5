"""Texts for `make demo`, made from what is already installed: `python demo_data.py demo` writes
docs.jsonl      to pretrain a small base model: the help topics of Python
chat.jsonl      to fine-tune it: English and Chinese questions and answers of the chatterbot-corpus package
chat_val.jsonl  a tenth of them; no question is in both
"""

import json
import random
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

import chatterbot_corpus
import yaml


def dialogues():
    """The first question and answer of each conversation; of those with one question, the first."""
    folder, found = Path(chatterbot_corpus.__file__).parent / "data", {}
    for path in sorted(folder.glob("english/*.yml")) + sorted(folder.glob("chinese/*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(turns, list):  # trivia.yml has one that is not
                question, answer = (
                    re.sub(r"\n\s*\n", "\n", turn.strip()) for turn in turns[:2]
                )  # a blank line ends a turn
                found.setdefault(
                    re.sub(r"[\W_]+", "", question.casefold()),
                    f"User: {question}\n\nAssistant: {answer}",
                )
    return list(found.values())


def main(folder):
    chat = dialogues()
    random.Random(0).shuffle(chat)
    n = len(chat) // 10
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in {"docs": topics.values(), "chat": chat[n:], "chat_val": chat[:n]}.items():
        path = folder / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
            encoding="utf-8",
        )
        print(f"{path}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
