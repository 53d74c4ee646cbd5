"""Texts for `make demo`, made from what is already installed: `python demo_data.py demo` writes
docs.jsonl      to pretrain a small base model: the help topics of Python
chat.jsonl      to fine-tune it: English and Chinese dialogues of the chatterbot-corpus package
chat_val.jsonl  a tenth of the dialogues; none of their questions occurs in chat.jsonl
"""

import json
import random
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

import chatterbot_corpus
import yaml

ALTERNATIVES = {"computers", "emotion"}  # in these two files, the lines after a question are different answers to it


def dialogues():
    """Conversations, each as (the letters and digits of its questions, its text); the first one for each opening question."""
    folder, found = Path(chatterbot_corpus.__file__).parent / "data", {}
    for path in sorted(folder.glob("english/*.yml")) + sorted(folder.glob("chinese/*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(turns, list):  # trivia.yml has one that is not
                turns = [re.sub(r"\n\s*\n", "\n", turn.strip()) for turn in turns]  # a blank line ends a turn
                pairs = list(zip(turns[::2], turns[1::2]))[:1 if path.stem in ALTERNATIVES else None]
                questions = [re.sub(r"[\W_]+", "", question.casefold()) for question, _ in pairs]
                text = "\n\n".join(f"User: {question}\n\nAssistant: {answer}" for question, answer in pairs)
                found.setdefault(questions[0], (questions, text))
    return list(found.values())


def main(folder):
    conversations = dialogues()
    random.Random(0).shuffle(conversations)
    n = len(conversations) // 10
    held_out = {question for questions, _ in conversations[:n] for question in questions}
    chat = [text for questions, text in conversations[n:] if held_out.isdisjoint(questions)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in {"docs": topics.values(), "chat": chat, "chat_val": [text for _, text in conversations[:n]]}.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
        print(f"{path}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
