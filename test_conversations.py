"""conversations.py and convert.py: the forms in which people keep their data, and what is said."""

import json
import pathlib

import numpy as np
import pytest

import data
from binidx import Binidx
from convert import jsonl_to_binidx
from corpus import open_data
from data import qa_mask
from test_data import in_tmp_path, run  # noqa: F401  (a fixture, used by all)
from tokenizer import decode_bytes

U, A = "User: ", "\n\nAssistant: "


def write(path, *records):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    pathlib.Path(path).write_text(text, encoding="utf-8")


def texts(documents):
    return [decode_bytes(document[:-1]).decode() for document in documents]


def turns(*contents, role="role", content="content", names=("user", "assistant")):
    return [{role: names[i % 2], content: text} for i, text in enumerate(contents)]


FORMS = {
    "text": ({"text": "User: a\n\nAssistant: b"}, "User: a\n\nAssistant: b"),
    "instruction, output": (
        {"instruction": "Add.", "input": "1+1", "output": "2"},
        f"{U}Add.\n1+1{A}2",
    ),
    "instruction, response": (
        {"instruction": "Add.", "context": "1+1", "response": "2", "category": "sums"},
        f"{U}Add.\n1+1{A}2",
    ),
    "question, answer": ({"question": "a", "answer": "b"}, f"{U}a{A}b"),
    "query, response": ({"query": "你好", "response": "嗯"}, f"{U}你好{A}嗯"),
    "prompt, completion": ({"prompt": "a", "completion": " b"}, f"{U}a{A}b"),
    "messages": (
        {"messages": [{"role": "system", "content": "Be brief."}, *turns("a", "b", "c", "d")]},
        f"System: Be brief.\n\n{U}a{A}b\n\n{U}c{A}d",
    ),
    "conversations": (
        {"conversations": turns("a", "b", role="from", content="value", names=("human", "gpt"))},
        f"{U}a{A}b",
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "a.ndjson", "a", "a.data"])
def test_each_form_becomes_the_text_that_world_models_know(form, name):
    record, text = FORMS[form]
    for array in (False, True):
        if array:
            content = "\ufeff \n" + json.dumps([record, record], indent=2)
            pathlib.Path(name).write_text(content, encoding="utf-8")
        else:
            write(name, record, record)
        documents = open_data(name)
        assert texts(documents) == [text, text]
        noun = "documents" if form == "text" else "conversations"
        unused = "; not used: category" if "category" in record else ""
        assert documents.notes == [f"{name}: 2 {noun} ({form}){unused}"]
        # What --loss_mask qa learns: each answer, with the blank line that ends its turn.
        learnt = decode_bytes(documents[0][qa_mask(documents[0]) == 1]).decode()
        answers = [part.partition("User:")[0] for part in f"\n\n{text}".split("Assistant:")[1:]]
        assert learnt == "".join(answers)


@pytest.mark.parametrize(
    "record, text",
    [
        ({"instruction": "a", "output": "b"}, f"{U}a{A}b"),
        ({"instruction": "a", "input": "", "output": "b"}, f"{U}a{A}b"),
        ({"instruction": "a", "input": None, "output": "b"}, f"{U}a{A}b"),
        ({"instruction": "a\n", "input": "\n c ", "output": "b"}, f"{U}a\nc{A}b"),
        ({"question": "a", "answer": "b", "system": "s"}, f"System: s\n\n{U}a{A}b"),
        (
            {"query": "a", "response": "b", "history": [["1", "2"], ["3", "4"]]},
            f"{U}1{A}2\n\n{U}3{A}4\n\n{U}a{A}b",
        ),
        ({"query": "a", "response": "b", "history": [], "system": ""}, f"{U}a{A}b"),
        ({"messages": turns("a", "b"), "system": "s"}, f"System: s\n\n{U}a{A}b"),
        ({"messages": turns("a", "b", names=("USER", "Assistant"))}, f"{U}a{A}b"),
        ({"messages": turns("a", "b", role="from", content="value")}, f"{U}a{A}b"),
        ({"conversations": turns("a", "b")}, f"{U}a{A}b"),
        ({"messages": turns("a", "b", names=("用户", "助手"))}, f"{U}a{A}b"),
        ({"messages": turns("a", "b", names=("user", "model"))}, f"{U}a{A}b"),
        ({"question": "a", "context": "c", "answer": "b"}, f"{U}a\nc{A}b"),
        ({"messages": turns("", "b")}, "Assistant: b"),
        ({"messages": [{"role": "system", "content": ""}, *turns("a", "b")]}, f"{U}a{A}b"),
        (
            {"messages": turns([{"type": "text", "text": "a"}, {"text": "c"}], "b")},
            f"{U}a\nc{A}b",
        ),
        # Blank lines would end the turn.
        ({"question": "a\n\nb", "answer": "\n\nc\n \n\n    d\n\n"}, f"{U}a\nb{A}c\n    d"),
        ({"question": "a\r\n\r\nb\rc", "answer": "d\r\n"}, f"{U}a\nb\nc{A}d"),
        # Columns without a value, as tables have them, tell no form.
        ({"text": None, "question": "a", "answer": "b"}, f"{U}a{A}b"),
        # The first form that fits, as files with texts of their own have always been read.
        ({"text": "t", "instruction": "a", "output": "b"}, "t"),
        ({"text": "a\r\n\r\nb\n\nc\r"}, "a\n\nb\n\nc\n"),
        ({"text": " "}, " "),
    ],
)
def test_a_record_becomes_this_text(record, text):
    write("a.jsonl", record)
    jsonl_to_binidx("a.jsonl", "a")
    assert texts(Binidx("a")) == [text]


NO_LIST = "not a list of turns"
KNOWN = "known are system, user (or human) and assistant (or gpt)"


@pytest.mark.parametrize(
    "record, message",
    [
        (
            {"question": "a", "reply": "b"},
            "has the keys question, reply; known are text; messages;",
        ),
        ({"answer": "b"}, "has the keys answer; known are"),
        ([{"role": "user", "content": "a"}], 'is a list, not an object such as {"text": "..."}'),
        ({"question": "a", "answer": None}, 'has no "answer" that is a text: it is null'),
        ({"question": 1, "answer": "b"}, 'has no "question" that is a text: it is a number'),
        ({"question": "a", "answer": True}, 'has no "answer" that is a text: it is true or false'),
        ({"question": "a", "answer": []}, 'has no "answer" that is a text: it is a list'),
        ({"question": "a", "answer": {}}, 'has no "answer" that is a text: it is an object'),
        ({"query": "a", "response": "b", "input": 1}, 'has no "input" that is a text: it is a num'),
        ({"query": "a", "response": "b", "history": "c"}, '"history" is a text, not a list of que'),
        (
            {"query": "a", "response": "b", "history": [["c"]]},
            '"history" must hold lists of two te',
        ),
        (
            {"query": "a", "response": "b", "history": [["c", 1]]},
            '"history" must hold lists of two',
        ),
        ({"messages": "a"}, f'"messages" is a text, {NO_LIST}'),
        ({"messages": None}, f'"messages" is null, {NO_LIST}'),
        ({"conversations": {"a": 1}}, f'"conversations" is an object, {NO_LIST}'),
        ({"messages": ["a"]}, "has a turn that is a text, not an object with role and content"),
        ({"messages": [{"role": "user"}]}, "has a turn with the keys role; it needs role and cont"),
        (
            {"messages": [{}]},
            "has a turn with no keys; it needs role and content, or from and value",
        ),
        ({"messages": turns("a", "b", names=("tool", "user"))}, f'has a turn of "tool"; {KNOWN}'),
        ({"messages": turns("a", None)}, 'has no "content" that is a text: it is null'),
        (
            {"messages": turns([{"type": "image_url", "image_url": {"url": "x"}}], "b")},
            'has no "content" that is a text: it is a list',
        ),
        (
            {"messages": [*turns("a", "b"), {"role": "system", "content": "s"}]},
            "has a system turn after others; it can only be the first",
        ),
        ({"text": "t"}, "is of the form text, but what comes before it is of the form query, resp"),
    ],
)
def test_a_record_that_cannot_be_right_is_named(record, message, capsys):
    first = {"query": "a", "response": "b"}
    if "messages" in message or "messages" in record:
        first = {"messages": turns("a", "b")}
    elif isinstance(record, dict) and record.keys() >= {"question", "answer"}:
        first = {"question": "a", "answer": "b"}
    elif isinstance(record, dict) and "conversations" in record:
        first = {"conversations": turns("a", "b")}
    write("a.jsonl", first, record)
    assert run(["a.jsonl"], capsys).startswith(f"error: a.jsonl, line 2: {message}")
    pathlib.Path("a.json").write_text(json.dumps([first, first, record]))
    assert run(["a.json"], capsys).startswith(f"error: a.json, record 3: {message}")


def test_what_is_skipped_left_out_or_changed_is_said_with_its_number(capsys):
    write(
        "a.jsonl",
        {"id": 1, "source": "x", "messages": turns("a\r\n\r\nb", "c")},
        {"id": 2, "source": "", "messages": []},
        {"id": 3, "messages": turns("a")},
        {"id": 4, "messages": turns("a", " ")},
        {"id": 5, "messages": [{**turn, "weight": 0} for turn in turns("a", "b\n\nUser: c")]},
        {"id": 6, "tools": [], "messages": turns("a", "b")},
    )
    with open("a.jsonl", "a") as f:
        f.write("\n")
    notes = [
        "a.jsonl: 3 conversations (messages); not used: id, source, weight; "
        "4 skipped, blank, empty or without an answer",
        "a.jsonl: \\r\\n became \\n in 1 of them",
        "a.jsonl: blank lines within a turn are left out, in 2 of them: one would end the turn, as "
        "RWKV World models know it",
        "a.jsonl: in 1 of them a line within a turn begins with User: or Assistant:, which "
        "--loss_mask qa takes for another turn",
    ]
    assert open_data("a.jsonl").notes == notes  # when it is converted
    assert open_data("a.jsonl").notes == notes  # and whenever it is opened
    data.main(["a.jsonl", "b"])
    assert capsys.readouterr().out.splitlines()[:4] == notes


def test_any_number_of_unknown_keys_is_said_in_one_short_line(capsys):
    write("a.jsonl", *({"text": "a", "k" * 30 + f"{i}": 1} for i in range(100)))
    (note,) = jsonl_to_binidx("a.jsonl", "a").notes()
    assert note.count(", ") == 19
    write("a.jsonl", {"k" * 300 + f"{i}": 1 for i in range(1000)})
    assert len(run(["a.jsonl", "b"], capsys)) < 1000


@pytest.mark.parametrize("content", ["[]", " [ ] ", '[{"text": ""}]'])
def test_an_array_without_a_document_is_refused(content, capsys):
    pathlib.Path("a.json").write_text(content)
    assert run(["a.json"], capsys).startswith("error: a.json: holds no document; ")


def test_conversations_without_any_answer_are_refused(capsys):
    write("a.jsonl", {"messages": []}, {"messages": turns("a")})
    assert run(["a.jsonl"], capsys) == (
        "error: a.jsonl: holds no conversation with an answer, but 2 without; look at messages\n"
    )


@pytest.mark.parametrize(
    "content, why",
    [
        (b'[{"text": "a"}\n{"text": "b"}]', "Expecting ',' delimiter: line 2 column 1 (char 15)"),
        (b'["text"]\n["text"]', "Extra data: line 2 column 1 (char 9)"),
        (b"[" * 100_000, "maximum recursion depth exceeded"),
        (b'["\xff"]', "'utf-8' codec can't decode byte 0xff in position 2"),
    ],
)
def test_what_begins_like_an_array_must_be_one(content, why, capsys):
    pathlib.Path("a.jsonl").write_bytes(content)
    message = f"error: a.jsonl: begins with [, but is not one JSON array in UTF-8 ({why}"
    assert run(["a.jsonl"], capsys).startswith(message)


@pytest.mark.parametrize(
    "name, content, seems",
    [
        (
            "a.csv",
            b"question,answer\n1,2\n",
            'a table; make a .jsonl of it: pip install pandas; python -c "import pandas',
        ),
        ("a.parquet", b"PAR1\0\0", "a table; make a .jsonl of it"),
        ("a", b"PAR1\0\0", "a table; make a .jsonl of it"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\0", "compressed; unpack it"),
        ("a.zip", b"PK\3\4", "compressed; unpack it"),
        (
            "a.md",
            b"# Title\n",
            'plain text; write it as a .jsonl, {"text": "..."} on each line; or',
        ),
        ("a.bak", "{".encode("utf-16"), "text in UTF-16; save it as UTF-8"),
        ("a", b"\0\1\0\2", "no text; a row of tokens needs --data_type uint16"),
        ("a", b"", "plain text"),
    ],
)
def test_a_file_of_another_kind_is_said_to_be_there_and_what_it_seems_to_be(
    name, content, seems, capsys
):
    pathlib.Path(name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        open_data(name)
    assert str(error.value).startswith(f"{name}: is there, but seems to be {seems}")
    assert run([name, "b"], capsys) == f"error: {error.value}\n"


def test_a_folder_is_said_to_be_one(tmp_path):
    pathlib.Path("d").mkdir()
    with pytest.raises(
        ValueError, match=r"^d: a folder; give a file in it, as in --data_file d/data\.jsonl$"
    ):
        open_data("d")
    write("d.jsonl", {"text": "a"})
    assert len(open_data("d")) == 1


def test_a_long_array_is_converted_in_the_time_of_its_lines():
    records = [{"question": f"{i}", "answer": "b"} for i in range(2000)]
    pathlib.Path("a.json").write_text(json.dumps(records))
    write("b.jsonl", *records)
    jsonl_to_binidx("a.json", "a")
    jsonl_to_binidx("b.jsonl", "b")
    assert np.array_equal(Binidx("a").tokens, Binidx("b").tokens)
    assert len(Binidx("a")) == 2000
