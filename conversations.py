"""Texts of the records in which people keep their data: alpaca, messages, questions and answers.

One need not read this to understand Bone. A record is a JSON object. Its keys tell its form:

    text                        the text itself, as it is
    messages, conversations     a list of turns: role and content, or from and value
    instruction, output         one question and its answer, under these names
    instruction, response
    question, answer
    query, response
    prompt, completion

Beside a question, input or context (more of it) and history (earlier questions and answers, in
pairs) may be there, and beside a question or a list, system. All but `text` become a text as RWKV
World models know it:

    System: ...\\n\\nUser: ...\\n\\nAssistant: ...\\n\\nUser: ...\\n\\nAssistant: ...

A blank line ends a turn there. So blank lines within a turn are left out, as the page of RWKV World
advises (huggingface.co/BlinkDL/rwkv-7-world: "better replace \\n\\n in xxx to \\n").
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

Turn = tuple[str, str]  # who speaks, and what
Form = tuple[str, ...]  # the keys that tell it

TEXT: Form = ("text",)
LISTS: tuple[Form, ...] = (("messages",), ("conversations",))
PAIRS: tuple[Form, ...] = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "completion"),
)
# A record that fits several is of the first of them.
FORMS = (TEXT, *LISTS, *PAIRS)
ROLES = {
    "system": "System",
    "user": "User",
    "human": "User",
    "用户": "User",
    "assistant": "Assistant",
    "gpt": "Assistant",
    "bot": "Assistant",
    "model": "Assistant",
    "助手": "Assistant",
}

# Keys of what belongs to a question, and follows it on a new line.
MORE = ("input", "context")

# So many of the keys that are not used are remembered.
MOST_UNUSED = 20
BLANK_LINES = re.compile(r"\n\s*\n")
LIKE_A_TURN = re.compile(r"^ {0,3}(\*\*)?(User|Assistant):", re.MULTILINE)


@dataclasses.dataclass
class Texts:
    """Makes texts of records, all of one form, and counts what people should know of them."""

    form: Form = ()  # of the first record
    empty: int = 0  # records without a text, or without an answer
    line_ends: int = 0  # records in which \r\n or \r became \n
    blank_lines: int = 0  # conversations that lost blank lines
    like_turns: int = 0  # conversations in which a line within a turn looks like another turn
    unused: set[str] = dataclasses.field(default_factory=set)  # keys, at most MOST_UNUSED

    def text_of(self, record: Any) -> str:
        """Return the text of a record; "" where there is nothing to learn.

        Raises ValueError for a record of no form, or of another one than those before it, or with
        something else where a text should be.
        """
        form = form_of(record)
        self.form = self.form or form
        if form != self.form:
            raise ValueError(
                f"is of the form {name_of(form)}, but what comes before it is of the form "
                f"{name_of(self.form)}; give each form a file of its own"
            )
        text = self._own_text(record) if form == TEXT else self._conversation(record)
        if not text:
            self.empty += 1
        return text

    def _own_text(self, record: dict[str, Any]) -> str:
        self._note_unused(record, TEXT)
        text = text_in(record, "text")
        self.line_ends += "\r" in text
        return with_newlines(text)

    def _conversation(self, record: dict[str, Any]) -> str:
        turns = [("System", text_in(record, "system", optional=True))]
        if self.form in PAIRS:
            self._note_unused(record, (*self.form, "system", *MORE, "history"))
            turns += turns_of_pair(record, *self.form)
        else:
            self._note_unused(record, (*self.form, "system"))
            turns += self._turns_of_list(record[self.form[0]])
        self.line_ends += any("\r" in text for _, text in turns)
        turns = [(who, with_newlines(text).strip()) for who, text in turns]
        turns = [(who, text) for who, text in turns if text]
        if not any(who == "Assistant" for who, _ in turns):
            return ""
        short = [(who, BLANK_LINES.sub("\n", text)) for who, text in turns]
        self.blank_lines += short != turns
        self.like_turns += any(LIKE_A_TURN.search(text) for _, text in short)
        return "\n\n".join(f"{who}: {text}" for who, text in short)

    def _turns_of_list(self, items: Any) -> list[Turn]:
        if not isinstance(items, list):
            raise ValueError(f'"{self.form[0]}" is {kind_of(items)}, not a list of turns')
        turns: list[Turn] = []
        for item in items:
            turn, used = turn_of(item)
            self._note_unused(item, used)
            if turn[0] == "System" and turns and turns[-1][0] != "System":
                raise ValueError("has a system turn after others; it can only be the first")
            turns.append(turn)
        return turns

    def _note_unused(self, record: dict[str, Any], used: Iterable[str]) -> None:
        for key in record.keys() - set(used):
            if len(self.unused) < MOST_UNUSED and record[key] not in (None, "", [], {}):
                self.unused.add(key[:40])


def form_of(record: Any) -> Form:
    """Return the keys that tell the form of a record. ValueError: it is of none."""
    if not isinstance(record, dict):
        raise ValueError(f'is {kind_of(record)}, not an object such as {{"text": "..."}}')
    # Tables written as JSON have all columns in each record, and null where there is nothing.
    filled = [key for key, value in record.items() if value is not None]
    for keys in (filled, list(record)):
        for form in FORMS:
            if set(form) <= set(keys):
                return form
    raise ValueError(f"has {keys_of(record)}; known are {'; '.join(map(name_of, FORMS))}")


def name_of(form: Form) -> str:
    """Return a form as text."""
    return ", ".join(form)


def turns_of_pair(record: dict[str, Any], question: str, answer: str) -> list[Turn]:
    """Return the turns of a record of one question and its answer."""
    history = record.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f'"history" is {kind_of(history)}, not a list of questions and answers')
    turns = []
    for pair in history:
        texts = pair if isinstance(pair, list) else []
        if [type(text) for text in texts] != [str, str]:
            raise ValueError('"history" must hold lists of two texts, a question and its answer')
        turns += [("User", texts[0]), ("Assistant", texts[1])]
    asked = text_in(record, question)
    for key in MORE:
        more = text_in(record, key, optional=True)
        if more.strip():
            asked = f"{asked.strip()}\n{more.strip()}"
    return [*turns, ("User", asked), ("Assistant", text_in(record, answer))]


def turn_of(item: Any) -> tuple[Turn, Form]:
    """Return a turn of a list, and the keys of its role and its text."""
    if not isinstance(item, dict):
        raise ValueError(f"has a turn that is {kind_of(item)}, not an object with role and content")
    for keys in (("role", "content"), ("from", "value")):
        if set(keys) <= item.keys():
            break
    else:
        raise ValueError(
            f"has a turn with {keys_of(item)}; it needs role and content, or from and value"
        )
    role = text_in(item, keys[0])
    if role.lower() not in ROLES:
        raise ValueError(
            f'has a turn of "{role[:40]}"; known are system, user (or human) and assistant (or gpt)'
        )
    return (ROLES[role.lower()], text_in(item, keys[1])), keys


def text_in(record: dict[str, Any], key: str, optional: bool = False) -> str:
    """Return the text under a key. ValueError: something else is there.

    It may be in pieces, [{"type": "text", "text": "..."}, ...]. optional: "" for null, or no key.
    """
    value = record.get(key)
    if optional and value is None:
        return ""
    if isinstance(value, list) and value:
        value = [part.get("text") if isinstance(part, dict) else None for part in value]
        if all(isinstance(part, str) for part in value):
            return "\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f'has no "{key}" that is a text: it is {kind_of(value)}')
    return value


def with_newlines(text: str) -> str:
    """Return a text whose lines end in \\n alone."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def keys_of(record: dict[str, Any]) -> str:
    """Name the keys of a record, so that people recognise it."""
    if not record:
        return "no keys"
    return "the keys " + ", ".join(key[:40] for key in list(record)[:MOST_UNUSED])


def kind_of(value: Any) -> str:
    """Say what a value is, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else "a number"
