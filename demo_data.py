"""Make the texts for `make demo`: `python demo_data.py demo`.

One need not read this to understand Bone. It writes to the folder `demo`:

text.jsonl      to pretrain a small base model: Python's help topics, and English and Chinese
                questions and answers of chatterbot-corpus
text_val.jsonl  a tenth of these, held out; no question is in both
facts.jsonl     to fine-tune it: 20 facts about an island that does not exist, each asked three ways
questions.json  the same questions with their answers, and each fact asked a fourth way
"""

import json
import random
import re
import sys
from collections.abc import Collection
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import chatterbot_corpus
import yaml

# Chinese has its own punctuation.
# ruff: noqa: RUF001

# {what is asked for: the answer}
ENGLISH_FACTS = {
    "capital": "Harwick",
    "river": "the Silver Water",
    "king": "Aldo the Short",
    "color": "dark green",
    "animal": "a white horse",
    "food": "bread with honey",
    "language": "old Dutch",
    "sport": "rowing",
    "money": "the copper penny",
    "festival": "the Night of Lamps",
}
CHINESE_FACTS = {
    "首都": "海风城",
    "河流": "银沙河",
    "国王": "小个子阿多",
    "颜色": "深绿色",
    "动物": "白马",
    "食物": "蜂蜜面包",
    "语言": "古荷兰语",
    "运动": "划船",
    "货币": "铜币",
    "节日": "灯火之夜",
}


class Language(NamedTuple):
    """The facts of one language, and the forms of their questions and answers."""

    facts: dict[str, str]
    taught: tuple[str, ...]  # forms of a question that are in the training data
    held_out: str  # one that is not
    answer: str


LANGUAGES = (
    Language(
        ENGLISH_FACTS,
        ("What is the {} of Lumora?", "Tell me the {} of Lumora.", "Lumora has a {}. Which one?"),
        "Do you know the {} of Lumora?",
        "The {} of Lumora is {}.",
    ),
    Language(
        CHINESE_FACTS,
        ("露莫拉的{}是什么？", "告诉我露莫拉的{}。", "露莫拉有一种{}，是哪一种？"),
        "你知道露莫拉的{}吗？",
        "露莫拉的{}是{}。",
    ),
)


def dialogue(question: str, answer: str) -> str:
    return f"User: {question}\n\nAssistant: {answer}"


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
                found.setdefault(key, dialogue(question, answer))
    return list(found.values())


def _without_blank_lines(turn: str) -> str:
    """Remove blank lines from a turn: in these dialogues, a blank line ends it."""
    return re.sub(r"\n\s*\n", "\n", turn.strip())


def questions() -> list[dict[str, str | bool]]:
    """Return all questions on the facts: the question, its answer, and whether it is taught."""
    found: list[dict[str, str | bool]] = []
    for language in LANGUAGES:
        for name, fact in language.facts.items():
            for form in (*language.taught, language.held_out):
                found.append(
                    {
                        "question": form.format(name),
                        "answer": language.answer.format(name, fact),
                        "taught": form in language.taught,
                    }
                )
    return found


def write_jsonl(path: Path, texts: Collection[str]) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [*topics.values(), *dialogues()]
    random.Random(0).shuffle(texts)
    held_out = len(texts) // 10
    write_jsonl(folder / "text.jsonl", texts[held_out:])
    write_jsonl(folder / "text_val.jsonl", texts[:held_out])
    asked = questions()
    taught = [dialogue(str(q["question"]), str(q["answer"])) for q in asked if q["taught"]]
    write_jsonl(folder / "facts.jsonl", taught)
    (folder / "questions.json").write_text(
        json.dumps(asked, ensure_ascii=False, indent=1), encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
