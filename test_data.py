"""data.py and tokenizer.py: tokens, batches as a function of (seed, i), the qa mask, messages.

Of corpus.py: .jsonl and other texts; its binidx files are in test_binidx.py.
"""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import corpus
import data
from binidx import Binidx, write_binidx
from check_data import check_mask
from cli import run_cli
from convert import jsonl_to_binidx
from data import BatchConfig, collate, qa_mask
from tokenizer import decode_bytes, encode, token_bytes


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # so that messages name short paths


def write_jsonl(path, *texts):
    pathlib.Path(path).write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
    )
    return path


def make(*documents, dtype=np.uint16):
    write_binidx("x", documents, dtype)
    return Binidx("x")


def batch(documents, i, *config, **more):
    return data.batch(documents, i, BatchConfig(*config, **more))


def counting(text, extra=()):
    """The text of the tokens that count under the qa mask."""
    tokens = [*encode(text), *extra]
    pairs = zip(tokens, qa_mask(tokens), strict=True)
    return decode_bytes(token for token, counts in pairs if counts).decode()


# ---- tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "Hello\r\n  World\t", "你好,有什么可以帮你?", "🙂 é \u2028 \x85 \x00 \ufeff", "-" * 200],
)
def test_tokens_decode_to_the_bytes_of_their_text(text):
    assert decode_bytes(encode(text)) == text.encode()


def test_every_byte_is_a_token_and_every_token_is_its_own_entry():
    table = token_bytes()
    assert [table[i + 1] for i in range(256)] == [bytes([i]) for i in range(256)]
    assert list(table) == list(range(1, 65530))
    assert len(set(table.values())) == 65529
    assert all(table.values())


def test_decoding_survives_cut_characters_and_unknown_ids():
    assert decode_bytes([1 + 0xE4, 1 + 0xBD]) == b"\xe4\xbd"
    assert decode_bytes(np.array([0, 65530, 65535, 99999, -10, 66])) == b"A"


# ---- jsonl -----------------------------------------------------------------------------------


def test_blank_lines_and_empty_texts_are_skipped_and_counted_and_marks_of_byte_order_dropped():
    lines = b'\xef\xbb\xbf{"text": "Hi"}\r\n\n   \n{"text": ""}\n'
    lines += b'{"id": 1, "text": "Hello World, this is long"}'
    pathlib.Path("a.jsonl").write_bytes(lines)
    long = len(encode("Hello World, this is long")) + 1
    made = jsonl_to_binidx("a.jsonl", "a")
    assert (made.documents, made.tokens, made.skipped) == (2, 2 + long, 3)
    assert made.notes() == ["2 documents (text); not used: id; 3 skipped, blank or empty"]
    assert [decode_bytes(document) for document in Binidx("a")] == [
        b"Hi",
        b"Hello World, this is long",
    ]


def test_a_document_is_too_long_when_training_would_cut_it(capsys):
    write_jsonl("a.jsonl", "Hello World, this is long")
    n = jsonl_to_binidx("a.jsonl", "a").tokens
    for ctx_len, too_long in ((n - 2, 1), (n - 1, 0)):  # ctx_len positions take ctx_len + 1 tokens
        data.main(["a.jsonl", f"b{ctx_len}", "--ctx_len", f"{ctx_len}"])
        assert f" {too_long}  too long, cut at --ctx_len {ctx_len}\n" in capsys.readouterr().out
        _, targets, _ = batch(Binidx("a"), 0, 1, ctx_len)
        assert (targets[0, -1] != 0) == too_long


@pytest.mark.parametrize(
    "line, message",
    [
        (
            b'{"text": "a"',
            "not JSON in UTF-8 (Expecting ',' delimiter: column 13 (char 12)); "
            'each line must look like {"text": "..."}',
        ),
        (
            b"just words",
            "not JSON in UTF-8 (Expecting value: column 1 (char 0)); each line must look like",
        ),
        (b"[" * 100000, "not JSON in UTF-8 (maximum recursion depth exceeded"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON in UTF-8 (Exceeds the limit"),
        (
            b'{"prompt": "a"}',
            "has the keys prompt; known are text; messages; conversations; instruction, output; "
            "instruction, response; question, answer; query, response; prompt, completion",
        ),
        (b'{"text": 5}', 'has no "text" that is a text: it is a number'),
        (b'{"text": null}', 'has no "text" that is a text: it is null'),
        (b'{"text": []}', 'has no "text" that is a text: it is a list'),
        (b'["text"]', 'is a list, not an object such as {"text": "..."}'),
        (b'"text"', 'is a text, not an object such as {"text": "..."}'),
        (b"{}", "has no keys; known are text; messages"),
        (
            b'{"text": "caf\xe9"}',
            "not JSON in UTF-8 ('utf-8' codec can't decode byte 0xe9 in position 13: "
            "invalid continuation byte); save it as UTF-8 (of GBK: iconv -f GBK",
        ),
        (
            b'{"text": "a"},',
            "not JSON in UTF-8 (Extra data: column 14 (char 13)); one record per line, with "
            "nothing after it, not even a comma",
        ),
        (
            b'{"text": "\\ud83d"}',
            "not JSON in UTF-8 ('utf-8' codec can't encode character '\\ud83d' in position 0: "
            "surrogates not allowed)",
        ),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_leaves_nothing_behind(line, message, capsys):
    pathlib.Path("data.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    assert run(["data.jsonl"], capsys).startswith(f"error: data.jsonl, line 3: {message}")
    assert os.listdir() == ["data.jsonl"]


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_a_jsonl_without_a_document_is_refused(content, capsys):
    pathlib.Path("data.jsonl").write_text(content)
    assert (
        run(["data.jsonl"], capsys)
        == 'error: data.jsonl: holds no document; each line must look like {"text": "..."}\n'
    )
    assert os.listdir() == ["data.jsonl"]


# ---- batches ---------------------------------------------------------------------------------


def numbered(n, length=4):
    """Documents of which each names itself in its first token."""
    return make(*([i + 1] + [7] * (length - 2) + [0] for i in range(n)))


def order(documents, steps, micro_bsz, seed=0):
    return [
        i
        for step in steps
        for i in (batch(documents, step, micro_bsz, 8, seed=seed)[0][:, 0] - 1).tolist()
    ]


@pytest.mark.parametrize("dataload, micro_bsz", [("pad", 3), ("only", 1), ("get", 3)])
def test_a_batch_is_a_function_of_seed_and_number(dataload, micro_bsz):
    documents = make(*np.random.default_rng(0).integers(1, 999, (50, 9)))

    def batches(steps, seed):
        return {
            step: [x.tolist() for x in batch(documents, step, micro_bsz, 8, dataload, seed=seed)]
            for step in steps
        }

    steps = [0, 1, 2, 30, 31]
    once = batches(steps, seed=0)
    assert batches(steps[::-1], seed=0) == once  # whatever was asked for before
    assert batches(steps, seed=1) != once
    assert len({str(rows) for rows in once.values()}) == len(steps)
    torch.manual_seed(5), np.random.seed(5)
    assert batches(steps, seed=0) == once


@pytest.mark.parametrize("n, micro_bsz", [(12, 1), (12, 4), (12, 5), (2, 7), (1, 3)])
def test_each_epoch_sees_every_document_exactly_once(n, micro_bsz):
    seen = order(numbered(n), range(5 * n), micro_bsz)
    epochs = [seen[start : start + n] for start in range(0, len(seen), n)]
    assert len(epochs) == 5 * micro_bsz
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n == 12:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # each in its own order


def test_the_order_of_documents_does_not_depend_on_the_batch_size():
    documents = numbered(12)
    one_by_one = order(documents, range(24), 1)
    assert order(documents, range(6), 4) == one_by_one
    assert order(documents, range(3), 8) == one_by_one
    assert order(documents, range(24), 1, seed=1) != one_by_one


def test_rows_are_cut_to_ctx_len_and_padded_to_the_longest_and_only_documents_count():
    idx, targets, mask = collate([np.array([1, 2, 0]), np.array([3, 4, 5, 6, 0])], ctx_len=8)
    assert idx.tolist() == [[1, 2, 0, 0], [3, 4, 5, 6]]
    assert targets.tolist() == [[2, 0, -100, -100], [4, 5, 6, 0]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert (idx.dtype, targets.dtype, mask.dtype) == (torch.int64, torch.int64, torch.float32)
    idx, targets, mask = collate([np.array([1, 2, 0]), np.array([3, 4, 5, 6, 0])], ctx_len=3)
    assert idx.tolist() == [[1, 2, 0], [3, 4, 5]]
    assert targets.tolist() == [[2, 0, -100], [4, 5, 6]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_the_picture_at_the_head_of_data_py_is_what_collate_makes():
    idx, targets, mask = collate([np.array([7, 8, 9, 0]), np.array([5, 6, 0])], ctx_len=8)
    assert idx.tolist() == [[7, 8, 9], [5, 6, 0]]
    assert targets.tolist() == [[8, 9, 0], [6, 0, -100]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_without_a_mask_rows_are_padded_to_ctx_len_and_the_padding_counts():
    idx, targets, mask = batch(make([1, 2, 0]), 0, 2, 6, loss_mask="none")
    assert idx.tolist() == [[1, 2, 0, 0, 0, 0]] * 2
    assert targets.tolist() == [[2, 0, 0, 0, 0, 0]] * 2
    assert mask.tolist() == [[1] * 6] * 2


@pytest.mark.parametrize("loss_mask", ["pad", "none"])
def test_only_gives_one_document_without_padding(loss_mask):
    idx, targets, mask = batch(make([1, 2, 0]), 0, 1, 6, "only", loss_mask)
    assert idx.tolist() == [[1, 2]]
    assert targets.tolist() == [[2, 0]]
    assert mask.tolist() == [[1, 1]]
    with pytest.raises(ValueError, match=r"--dataload only --micro_bsz 1$"):
        batch(make([1, 2, 0]), 0, 2, 6, "only", loss_mask)


@pytest.mark.parametrize("document", [[0], [5], []])
@pytest.mark.parametrize(
    "dataload, loss_mask",
    [("pad", "pad"), ("pad", "qa"), ("only", "pad"), ("only", "qa"), ("only", "none")],
)
def test_a_document_of_one_token_gives_a_position_that_does_not_count(
    document, dataload, loss_mask
):
    write_binidx("x", [document, [*document, 5]])
    data_set = Binidx("x")
    for made in (
        collate([np.array(document, np.int64)], 6, "qa"),
        batch(data_set, 0, 1, 6, dataload, loss_mask),
        batch(data_set, 1, 1, 6, dataload, loss_mask),
    ):
        idx, targets, mask = made
        assert idx.shape == targets.shape == mask.shape == (1, 1)
        assert mask.sum() == (loss_mask != "qa" and len(document) == 1 and targets.item() == 5)
    idx, _, mask = batch(make([0], [0]), 0, 2, 3, loss_mask="none")
    assert idx.shape == (2, 3) and mask.min() == 1


def test_get_takes_windows_from_anywhere_in_the_stream():
    documents = make(range(5), range(5, 12))
    starts = set()
    for step in range(100):
        idx, targets, mask = batch(documents, step, 2, 8, "get")
        assert idx.shape == (2, 8) and mask.min() == 1
        assert (targets == idx + 1).all() and (idx[:, 1:] == idx[:, :-1] + 1).all()
        starts |= set(idx[:, 0].tolist())
    assert starts == {0, 1, 2, 3}  # 12 tokens, windows of 9
    assert batch(documents, 0, 1, 11, "get")[1].tolist() == [list(range(1, 12))]
    with pytest.raises(
        ValueError, match=r"^x: 12 tokens, too few for --dataload get; use --ctx_len 11 or less$"
    ):
        batch(documents, 0, 1, 12, "get")


@pytest.mark.parametrize(
    "words, message",
    [
        ({"dataload": "onyl"}, "--dataload onyl is unknown; use pad, only or get"),
        ({"loss_mask": "pda"}, "--loss_mask pda is unknown; use pad, none, qa or se"),
    ],
)
def test_an_unknown_way_of_loading_or_masking_is_refused(words, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        BatchConfig(1, 4, **words)


# ---- the qa mask -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answers",
    [
        ("User: 1+1?\n\nAssistant: 2", " 2"),
        ("User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d\n\n", " b\n\n d\n\n"),  # several turns
        (
            "User: 你是谁?\n\nAssistant: 我是助手。\n\nUser: 好\n\nAssistant: 嗯",
            " 我是助手。\n\n 嗯",
        ),
        ("User: hi\n\nAssistant:你好", "你好"),  # nothing between the marker and the answer
        ("User: hi\n\nAssistant:\nHello", "\nHello"),
        ("User: hi\n\nAssistant:\n\nHello", "\n\nHello"),
        ("User: hi\n\nAssistant:“你”", "你”"),  # ':“' is one token: it belongs to the marker
        ("User: hi\n\nAssistant:) yes", " yes"),
        # In the middle of a line they are words.
        ("Assistant: a Assistant: b User: c", " a Assistant: b User: c"),
        ("Assistant:User: a", "User: a"),
        (
            "User: write a class\n\nAssistant: ```python\nclass User:\n    pass\n```\nDone.",
            " ```python\nclass User:\n    pass\n```\nDone.",
        ),
        (
            "User: What does a Virtual Assistant: role do?\n\nAssistant: It helps.",
            " It helps.",
        ),
        ("Assistant: see my.User: x\n\nUser: c", " see my.User: x\n\n"),
        # Where lines begin.
        ("User: a\r\n\r\nAssistant: b\r\nUser: c", " b\r\n"),
        ("User: a\rAssistant: b\rUser: c", " b\r"),
        ("User: a\nAssistant: b\nUser: c", " b\n"),
        ("  User: a\n   Assistant: b\n  User: c", " b"),
        ("User: a\n    Assistant: b", ""),  # four spaces begin code
        ("Assistant: x:\n    User: y\n\tUser: z", " x:\n    User: y\n\tUser: z"),
        ("**User:** a\n\n**Assistant:** b\n\n**User:** c", " b\n\n"),
        ("**User: a**\n\n**Assistant: b**", " b**"),
        ("User: a\n\nAssistant: **b** c", " **b** c"),
        ("User: a\n\nAssistant:\n**b** c", "\n**b** c"),
        ("User: a\n\n- Assistant: b", ""),
        ("Assistant: I", " I"),
        ("User: a\n\nAssistant:", ""),
        ("User: a question, cut in the", ""),
        ("no markers at all", ""),
        ("assistant: a, Assistant : b, Users: c", ""),
        ("", ""),
    ],
)
def test_what_follows_assistant_up_to_user_counts(text, answers):
    assert counting(text) == answers


def size_of_marker(line, marker):
    """The bytes that a marker takes at the beginning of a line; 0 where it is not there."""
    for spaces in (b"", b" ", b"  ", b"   "):
        for form in (b"**%b**", b"**%b", b"%b"):
            whole = spaces + form % marker
            if line.startswith(whole):
                return len(whole)
    return 0


def plain_answers(text):
    """For each byte of a text, whether it belongs to an answer: a walk from line to line."""
    in_answer = False
    answers = []
    for line in text.splitlines(keepends=True):  # of bytes: ended by CR, LF or both
        begins, ends = size_of_marker(line, b"Assistant:"), size_of_marker(line, b"User:")
        if begins or ends:
            in_answer = begins > 0
        answers += [False] * (begins + ends)
        answers += [in_answer] * (len(line) - begins - ends)
    return answers


def test_the_mask_is_that_of_a_plain_walk_over_the_lines():
    rng = np.random.default_rng(0)
    pieces = ["User:", "Assistant:", "你好", " ", "   ", "\n\n", "\n", "\r", ":", "“", "**"]
    pieces += ["Assist", "a", "ant", "User", ")", "\nUser:", "\n\nAssistant:"]
    answered = 0
    for _ in range(300):
        tokens = encode("".join(rng.choice(pieces, 16)))
        answer = plain_answers(decode_bytes(tokens))
        for token, counts in zip(tokens, qa_mask(tokens), strict=True):
            size = len(decode_bytes([token]))
            assert counts == all(answer[:size]), decode_bytes(tokens)
            answered += counts
            del answer[:size]
        assert not answer
    assert answered > 500


def test_the_end_of_a_document_counts_after_an_answer_and_ends_it():
    first = [*encode("User: a\n\nAssistant: b"), 0]
    plain = [*encode("plain text"), 0]
    question = [*encode("User: a"), 0]
    assert qa_mask(first)[-2:].tolist() == [1, 1]
    assert qa_mask(question).sum() == 0
    assert qa_mask(first + plain).tolist() == qa_mask(first).tolist() + [0] * len(plain)
    # The next "User:" takes nothing back.
    assert qa_mask(first + question).tolist() == qa_mask(first).tolist() + [0] * len(question)
    assert qa_mask([*encode("Assistant:"), 0])[-1] == 1
    assert qa_mask([*encode("Assist"), 0, *encode("ant: b")]).sum() == 0
    # A text begins after it.
    assert qa_mask([*first, *encode("Assistant: c"), 0])[-3:].tolist() == [0, 1, 1]
    assert qa_mask([*encode("an Assistant: c"), 0]).sum() == 0
    # Ids without an entry are as good as others.
    assert qa_mask([*encode("Assistant: b"), 65535, 70000, 66])[-4:].tolist() == [1, 1, 1, 1]


def test_twenty_thousand_turns_are_masked_each():
    tokens = np.tile(encode("User: a\n\nAssistant: b\n\n"), 20000)
    assert qa_mask(tokens).sum() == 2 * 20000  # " b" and "\n\n"


@pytest.mark.parametrize("dataload", ["pad", "only", "get"])
def test_batches_mask_the_target_not_the_input(dataload):
    tokens = [*encode("User: a\n\nAssistant: b"), 0]
    _, targets, mask = batch(make(tokens), 0, 1, len(tokens) - 1, dataload, "qa")
    assert targets[mask == 1].tolist() == [*encode(" b"), 0]


def test_a_document_cut_in_its_question_counts_for_nothing():
    tokens = np.array([*encode("User: a long question\n\nAssistant: b"), 0])
    answer = len(tokens) - 2
    for ctx_len in range(1, len(tokens) + 2):
        assert collate([tokens], ctx_len, "qa")[2].sum() == max(0, min(2, ctx_len + 1 - answer))


def test_a_marker_that_the_cut_goes_through_is_still_a_marker():
    tokens = np.array(encode("Assistant: b\n\nUser: c"))
    at_user = encode("Assistant: b\n\nUser: c").index(encode("User")[0])
    _, targets, mask = collate([tokens], at_user, "qa")
    assert targets[0, -1] == encode("User")[0]
    assert mask[0, -1] == 0
    assert mask.sum() == 2


def test_a_file_that_ends_within_a_record_may_be_cut_off(capsys):
    pathlib.Path("data.jsonl").write_text('{"text": "a"}\n{"text": "b')
    error = run(["data.jsonl"], capsys)
    assert "line 2: not JSON" in error
    assert error.endswith("the file ends here, and may be cut off\n")


def test_check_mask_refuses_data_without_an_answer_and_counts_documents_without_one():
    silent = [*encode("plain"), 0]
    answered = [*encode("User: a\n\nAssistant: b"), 0]
    message = (
        r"^x: no answer in 2 documents: no Assistant: at the beginning of a line in the first 64 "
        r"tokens; answers follow Assistant: and end at User:; .* a longer --ctx_len reaches "
        r"farther$"
    )

    def check(documents, loss_mask, ctx_len=64):
        return check_mask(documents, BatchConfig(4, ctx_len, loss_mask=loss_mask))

    with pytest.raises(ValueError, match=message):
        check(make(silent, silent), "qa")
    with pytest.raises(ValueError, match="no answer in 1 documents"):
        check(make(answered), "qa", 3)  # the answer lies beyond ctx_len
    assert check(make(silent, answered, silent), "qa") == (2, 3)
    assert check(make(silent), "pad") == (0, 0)
    assert check(make(silent), "none") == (0, 0)
    assert check(make(*[silent] * 999, answered, *[silent] * 50), "qa") == (999, 1000)
    with pytest.raises(ValueError, match="no answer in 1000 documents"):
        check(make(*[silent] * 1000, answered), "qa")


def test_check_mask_looks_at_the_windows_of_a_run_that_reads_windows():
    config = BatchConfig(4, 40, "get", loss_mask="qa")
    words = encode(" word") * 200
    late = make(*[[*words, *encode("\n\nAssistant: an answer\n\nUser: b"), 0]] * 20)
    silent, looked_at = check_mask(late, config)
    assert looked_at == 300
    windows = [row for i in range(75) for row in data.batch(late, i, config)[2]]
    assert silent == sum(not row.any() for row in windows)
    assert 200 < silent < 300
    # This document has an answer, at its beginning, but the windows lie elsewhere.
    early = make([*encode("Assistant: a\n\nUser: b"), *words * 450, 0])
    message = (
        "^x: no answer in 300 windows: no Assistant: at the beginning of a line; answers follow "
    )
    with pytest.raises(ValueError, match=message):
        check_mask(early, config)


@pytest.mark.parametrize(
    "before, after, answer",
    [
        ("a", "Assistant: b\n\nUser: c", ""),
        ("a ", "Assistant: b\n\nUser: c", ""),
        ("", "Assistant: b\n\nUser: c", " b\n\n"),  # the data begin
        ("a\n\n", "Assistant: b\n\nUser: c", " b\n\n"),
        ("a\r\n", "Assistant: b\n\nUser: c", " b\n\n"),
        ("a\n", "  **Assistant:** b\n\nUser: c", " b\n\n"),
        ("a\n\nAssistant: a", " b\n\nUser: c\n\nAssistant: d\nUser: e", " d\n"),
    ],
)
def test_a_window_knows_whether_a_line_begins_with_it(before, after, answer, monkeypatch):
    start, tokens = len(encode(before)), [*encode(before), *encode(after), *encode(" end") * 9]
    monkeypatch.setattr(data, "rows_of", lambda *_: [start])
    for size in range(1, len(encode(after))):
        config = BatchConfig(1, size, "get", loss_mask="qa")
        _, targets, mask = data.batch(make(tokens), 0, config)
        assert targets[0].tolist() == tokens[start + 1 : start + 1 + size]
        counts = decode_bytes(targets[mask == 1].tolist()).decode()
        # A marker that the window's end cuts is seen.
        assert answer.startswith(counts)
        assert counts == answer or size < len(encode(after)) - len(encode("User: c"))


def test_a_window_begins_a_text_after_token_0(monkeypatch):
    tokens = [*encode("plain"), 0, *encode("Assistant: b"), 0, 0]
    monkeypatch.setattr(data, "rows_of", lambda *_: [len(encode("plain")) + 1])
    _, targets, mask = data.batch(make(tokens), 0, BatchConfig(1, 4, "get", loss_mask="qa"))
    assert targets[mask == 1].tolist() == [*encode(" b"), 0]


# ---- command line ----------------------------------------------------------------------------


def run(argv, capsys):
    """Run the program, which must fail with exit code 2 and one line on stderr: that line."""
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: data.main(argv))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err


def test_the_command_line_writes_uint16_and_closes_with_a_summary(capsys):
    write_jsonl("a.jsonl", "Hi", "", "Hello World, this is long")
    data.main(["a.jsonl", "out", "--ctx_len", "5"])
    assert Binidx("out").tokens.dtype == np.uint16
    assert sorted(os.listdir()) == ["a.jsonl", "out.bin", "out.idx"]
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "a.jsonl: 2 documents (text); 1 skipped, blank or empty"
    numbers = {line.split("  ")[-1]: int(line.split()[0].replace(",", "")) for line in lines}
    tokens = len(encode("Hi") + encode("Hello World, this is long")) + 2
    assert numbers == {
        "documents": 2,
        "tokens": tokens,
        "longest": tokens - 2,
        "skipped": 1,
        "too long, cut at --ctx_len 5": 1,
        "bytes in out.bin": 2 * tokens,
        "bytes in out.idx": os.path.getsize("out.idx"),
    }


def test_the_prefix_is_the_name_of_the_jsonl_and_what_is_there_is_kept(capsys):
    write_jsonl("a.jsonl", "Hi")
    data.main(["a.jsonl"])
    assert sorted(os.listdir()) == ["a.bin", "a.idx", "a.jsonl"]
    assert "ctx_len" not in capsys.readouterr().out
    advice = "already there; delete it, or give another prefix"
    assert run(["a.jsonl"], capsys) == f"error: a.bin: {advice}\n"
    os.unlink("a.bin")
    assert run(["a.jsonl", "a.bin"], capsys) == f"error: a.idx: {advice}\n"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["none.jsonl"], "none.jsonl: No such file or directory"),
        (["."], ".: Is a directory"),
        (
            ["a.jsonl", "no/b"],
            "no/b.idx: cannot be written, as there is no folder no/; fix that, or write elsewhere",
        ),
        (
            ["a.jsonl", "a.jsonl/b"],
            "a.jsonl/b.idx: cannot be written, as there is no folder a.jsonl/; fix",
        ),
        (["a.jsonl", "b", "--ctx_len", "0"], "--ctx_len 0 must be at least 1"),
    ],
)
def test_a_wrong_command_ends_in_one_line_and_exit_code_2(argv, message, capsys):
    write_jsonl("a.jsonl", "Hi")
    assert run(argv, capsys).startswith(f"error: {message}")
    assert os.listdir() == ["a.jsonl"]


def test_the_program_itself_ends_without_a_traceback():
    pathlib.Path("a.jsonl").write_text('{"text": "good"}\n{"prompt": "bad"}\n')
    done = subprocess.run(
        [sys.executable, data.__file__, "a.jsonl"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: a.jsonl, line 2: has the keys prompt; known are text;")
    assert done.stderr.count("\n") == 1


def test_the_parser_and_its_errors_need_no_library():
    """So that --help and a mistyped flag answer at once."""
    libraries = "{'torch', 'numpy', 'psutil'}"
    code = f"import cli, sys; sys.exit(len({libraries} & sys.modules.keys()))"
    folder = os.path.dirname(data.__file__)
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


# ---- other data than documents ---------------------------------------------------------------


def test_a_text_is_cut_into_pieces_that_share_a_token_and_leave_none_out():
    for n, ctx_len in ((10, 3), (11, 3), (2, 5), (9, 1)):
        np.save("n.npy", np.arange(n))
        pieces = [piece.tolist() for piece in corpus.open_data("n.npy", ctx_len=ctx_len)]
        assert [token for piece in pieces for token in piece[1:]] == list(range(1, n))
        assert all(a[-1] == b[0] for a, b in itertools.pairwise(pieces))
        assert {len(piece) for piece in pieces[:-1]} <= {ctx_len + 1}
        assert len(pieces[-1]) >= 2


@pytest.mark.parametrize(
    "name, content, data_type",
    [
        ("a.txt", "é 词".encode(), "utf-8"),
        ("a.txt", "\ufeffé 词".encode(), "utf-8"),
        ("A.TXT", "\ufeffé 词".encode("utf-16le"), "utf-16le"),
        ("a.npy", b"", "numpy"),
        ("a.jsonl", b"", "binidx"),
        ("a", b"", "binidx"),
        ("gone.txt", None, "utf-8"),
    ],
)
def test_the_type_of_data_is_guessed_from_the_file(name, content, data_type):
    if content is not None:
        pathlib.Path(name).write_bytes(content)
    assert corpus.guess_data_type(name) == data_type
    if data_type.startswith("utf") and content:
        assert sorted(corpus.open_data(name).vocabulary) == [" ", "é", "词"]


def test_the_dummy_text_is_that_of_rwkv_lm():
    data_set = corpus.open_data("", data_type="dummy")
    beginning = data_set.vocabulary.decode_bytes(data_set.tokens[:28]).decode()
    assert beginning == ".0+0=0..1+1=2..2+4=6..3+9=12"
    assert list(data_set.vocabulary) == sorted("0123456789.+=")


def test_a_long_second_marker_that_the_cut_goes_through_is_seen_too():
    tokens = [*encode("A:yes\n\n请问这是什么呢why\n\nA:no"), 0]
    whole = qa_mask(tokens, "A:", "请问这是什么呢")
    for ctx_len in range(1, len(tokens)):
        _, _, mask = collate([np.array(tokens)], ctx_len, ("A:", "请问这是什么呢"))
        assert mask[0].tolist() == whole[1 : ctx_len + 1].tolist(), ctx_len


def test_without_shuffling_documents_come_in_the_order_of_the_file():
    documents = make(*([i, i + 1, 0] for i in range(1, 13)))
    for step in range(20):
        idx, _, _ = batch(documents, step, 1, 50, shuffle=False)
        assert idx[0].tolist() == documents[step % 12][:-1].tolist()


def test_se_counts_what_follows_mask1_up_to_mask0_and_qa_is_one_case_of_it():
    tokens = [*encode("<q>one<a>two, three<q>four<a>five"), 0]
    mask = qa_mask(tokens, "<a>", "<q>")
    assert decode_bytes(np.array(tokens)[mask == 1]) == b"two, threefive"
    assert mask[-1] == 1
    tokens = [*encode("User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d"), 0]
    assert qa_mask(tokens).tolist() == qa_mask(tokens, "Assistant:", "User:").tolist()
    _, _, named = collate([np.array(tokens)], 40, "qa")
    _, _, given = collate([np.array(tokens)], 40, ("Assistant:", "User:"))
    assert named.equal(given)
    assert 0 < named.sum() < len(tokens) - 1


@pytest.mark.parametrize(
    "text, begin, end, answers",
    [
        ("问题:你好 回答:不 \n回答:好\n\n问题:不", "回答:", "问题:", "好\n\n"),
        ("1 one 1 two\n0 three", "1", "0", " one 1 two\n"),
        # What begins with a sign or white space is found anywhere, as it is.
        ("<|user|>a<|bot|>b<|user|>c", "<|bot|>", "<|user|>", "b"),
        ("[INST] a [/INST] b [INST] c", "[/INST]", "[INST]", " b"),  # ' [' is a token
        (
            "User: a\n\nAssistant: b\nUser: c\n\nUser: d",
            "\n\nAssistant:",
            "\n\nUser:",
            " b\nUser: c",
        ),
        ("Q: a A: b Q: c", " A:", " Q:", " b"),
        ("**A:** b **Q:** c", "**A:**", "**Q:**", " b"),
    ],
)
def test_a_marker_that_begins_with_a_letter_needs_a_line_and_others_do_not(
    text, begin, end, answers
):
    tokens = encode(text)
    mask = qa_mask(tokens, begin, end)
    assert decode_bytes(np.array(tokens)[mask == 1]).decode() == answers
