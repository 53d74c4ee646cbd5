"""Texts for `make demo`, made from what is already installed: `python demo_data.py demo` writes

docs.jsonl      to pretrain a small base model: docstrings and help topics of Python's standard library
chat.jsonl      to fine-tune it: English and Chinese dialogues of the chatterbot-corpus package
chat_val.jsonl  a tenth of the dialogues; none of their questions occurs in chat.jsonl
"""

import ast
import json
import random
import re
import sys
import sysconfig
from pathlib import Path

from files import atomic_path, run_cli

SKIP = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}
ALTERNATIVES = {"computers", "emotion"}  # in these two files, the lines after a question are different answers to it


def stdlib_docs(min_chars=200):
    """Docstrings and help topics of the standard library, read from its source: no module is imported."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = {}  # a dict, for a set that keeps its order
    for path in sorted(p for p in root.rglob("*.py") if not SKIP & set(p.relative_to(root).parts)):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                documents[ast.get_docstring(node) or ""] = None
            elif path.parent.name == "pydoc_data" and isinstance(node, ast.Constant):
                documents[str(node.value).strip()] = None  # topics = {"if": "The if statement ...", ...}
    return [text for text in documents if len(text) >= min_chars]


def key(question):
    """What makes two questions the same: their letters and digits."""
    return re.sub(r"[\W_]+", "", question.casefold())


def dialogues():
    """Conversations, each a list of (question, answer); the first one for each opening question."""
    try:
        import chatterbot_corpus
        import yaml
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; pip install -r requirements-dev.txt") from error
    folder, found = Path(chatterbot_corpus.__file__).parent / "data", {}
    for path in sorted(folder.glob("english/*.yml")) + sorted(folder.glob("chinese/*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(turns, list) and all(isinstance(turn, str) and turn.strip() for turn in turns):
                turns = [re.sub(r"\n\s*\n", "\n", turn.strip()) for turn in turns]  # a blank line ends a turn
                if pairs := list(zip(turns[::2], turns[1::2]))[:1 if path.stem in ALTERNATIVES else None]:
                    found.setdefault(key(pairs[0][0]), pairs)
    return list(found.values())


def main():
    if len(sys.argv) != 2:
        raise ValueError("give the folder to write to: python demo_data.py demo")
    folder, conversations = Path(sys.argv[1]), dialogues()
    random.Random(0).shuffle(conversations)
    n = len(conversations) // 10
    held_out = {key(question) for pairs in conversations[:n] for question, _ in pairs}
    train = [pairs for pairs in conversations[n:] if held_out.isdisjoint(key(question) for question, _ in pairs)]
    texts = {"docs": stdlib_docs(), **{name: ["\n\n".join(f"User: {q}\n\nAssistant: {a}" for q, a in pairs) for pairs in part]
                                       for name, part in (("chat", train), ("chat_val", conversations[:n]))}}
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in texts.items():
        with atomic_path(folder / f"{name}.jsonl") as path, open(path, "w", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
        print(f"{folder / name}.jsonl: {len(documents):,} documents, {sum(map(len, documents)):,} characters")


if __name__ == "__main__":
    run_cli(main)
