"""Texts for `make demo`, made from what is already installed. Nothing is downloaded.

    python demo_data.py demo

    docs.jsonl      to pretrain a small base model: docstrings of Python's standard library, and its `help()` topics
    chat.jsonl      to fine-tune it: English and Chinese dialogues of the chatterbot-corpus package
    chat_val.jsonl  a tenth of the dialogues; none of their questions occurs in chat.jsonl

One document a line, {"text": ...}, UTF-8. The same Python and the same package give the same files.
"""

import argparse
import ast
import json
import os
import random
import re
import sys
import sysconfig
from itertools import accumulate
from pathlib import Path

SKIP = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}
ALTERNATIVES = {"computers", "emotion"}  # in these two, the lines after a question are different answers to it


def stdlib_docs(min_chars=200, max_chars=2_000_000):
    """Docstrings and help topics of the standard library, read from its source: no module is imported."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = {}  # a dict, for a set that keeps its order
    for path in sorted(root.rglob("*.py")):
        if SKIP & set(path.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                documents[ast.get_docstring(node) or ""] = None  # cleaned as inspect.cleandoc does
            elif path.parent.name == "pydoc_data" and isinstance(node, ast.Constant):
                documents[str(node.value).strip()] = None  # topics = {"if": "The if statement ...", ...}
    documents = [text for text in documents if len(text) >= min_chars]
    random.Random(0).shuffle(documents)  # so that the cap takes a fair sample
    return [text for text, size in zip(documents, accumulate(map(len, documents))) if size <= max_chars]


def key(question):
    """What makes two questions the same: their letters and digits."""
    return re.sub(r"[\W_]+", "", question.casefold())


def dialogues():
    """Conversations, each a list of (question, answer); the first one for each opening question."""
    import chatterbot_corpus
    import yaml

    folder = Path(chatterbot_corpus.__file__).parent / "data"
    found = {}
    for path in sorted(folder.glob("english/*.yml")) + sorted(folder.glob("chinese/*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if not isinstance(turns, list) or not all(isinstance(turn, str) and turn.strip() for turn in turns):
                continue
            turns = [re.sub(r"\n\s*\n", "\n", turn.strip()) for turn in turns]  # a blank line ends a turn
            pairs = list(zip(turns[::2], turns[1::2]))[: 1 if path.stem in ALTERNATIVES else None]
            if pairs:
                found.setdefault(key(pairs[0][0]), pairs)
    return list(found.values())


def split(conversations, part=0.1):
    """-> train, validation. What shares a question with a held-out conversation is left out of train."""
    random.Random(0).shuffle(conversations)
    n = round(len(conversations) * part)
    held_out = {key(question) for pairs in conversations[:n] for question, _ in pairs}
    train = [pairs for pairs in conversations[n:] if held_out.isdisjoint(key(question) for question, _ in pairs)]
    return train, conversations[:n]


def chat_text(pairs):
    return "\n\n".join(f"User: {question}\n\nAssistant: {answer}" for question, answer in pairs)


def write_jsonl(path, texts):
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    os.replace(temporary, path)
    print(f"{path}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the texts for the demo.")
    parser.add_argument("folder", type=Path, help="where to write docs.jsonl, chat.jsonl, chat_val.jsonl")
    folder = parser.parse_args().folder
    try:
        train, validation = split(dialogues())
    except ImportError as error:
        print(f"demo_data.py: {error.name} is not installed; pip install -r requirements-dev.txt", file=sys.stderr)
        sys.exit(2)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "docs.jsonl", stdlib_docs())
    write_jsonl(folder / "chat.jsonl", [chat_text(pairs) for pairs in train])
    write_jsonl(folder / "chat_val.jsonl", [chat_text(pairs) for pairs in validation])
