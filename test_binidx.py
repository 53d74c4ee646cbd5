"""corpus.py: binidx files as the reference tool writes them, damaged ones, missing ones."""

import concurrent.futures
import itertools
import json
import os
import pathlib
import shutil
import struct
import time

import numpy as np
import pytest

import convert
from binidx import Binidx, write_binidx
from convert import RECORD, jsonl_to_binidx
from corpus import hold_out, open_data
from test_data import in_tmp_path, make, write_jsonl  # noqa: F401  (a fixture, used by all)
from tokenizer import decode_bytes, encode

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


# ---- binidx ----------------------------------------------------------------------------------


def test_files_are_byte_for_byte_those_of_the_reference_tool():
    jsonl_to_binidx(FIXTURES / "sample.jsonl", "sample", dtype=np.int32)
    for end in (".bin", ".idx"):
        reference = FIXTURES / ("sample_text_document" + end)
        assert pathlib.Path("sample" + end).read_bytes() == reference.read_bytes()


def test_the_files_of_the_reference_tool_are_read():
    documents = Binidx(FIXTURES / "sample_text_document")
    lines = (FIXTURES / "sample.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    read = [decode_bytes(document).decode() for document in documents]
    assert read == [text for text in texts if text]
    assert all(document[-1] == 0 for document in documents)
    assert len(documents) == 5
    assert len(documents.tokens) == 83


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("name", ["x", "x.bin", "x.idx"])
def test_what_is_written_is_read_again(dtype, name):
    written = [[1, 2, 127], [], [0], np.array([5, 0])]
    assert write_binidx(name, iter(written), dtype) == (4, 6)
    documents = Binidx(name)
    assert [document.tolist() for document in documents] == [[1, 2, 127], [], [0], [5, 0]]
    assert documents.tokens.dtype == dtype
    assert documents.sizes.tolist() == [3, 0, 1, 2]
    assert documents.sizes.dtype == np.int32
    assert documents[0].dtype == np.int64
    assert documents[-1].tolist() == [5, 0]
    documents[0][:] = 9  # a copy: the file is not touched
    assert documents[0].tolist() == [1, 2, 127]
    assert sorted(os.listdir()) == ["x.bin", "x.idx"]


def test_a_new_bin_is_never_beside_an_old_idx(monkeypatch):
    """Of as many tokens, the two would pass for a pair."""
    write_binidx("x", [[1, 2, 3], [4, 0]])

    def replace(old, new, plain=os.replace):
        if new.endswith(".idx"):
            raise KeyboardInterrupt  # killed between the two
        plain(old, new)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write_binidx("x", [[5, 6], [7, 8, 0]])
    assert os.listdir() == ["x.bin"]


def test_nothing_is_left_when_writing_fails():
    def documents():
        yield [1, 2, 3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_binidx("x", documents())
    message = r"^x.bin: document 1 holds a token that uint16 cannot hold; write int32$"
    with pytest.raises(ValueError, match=message):
        write_binidx("x", [[1], [2, 70000]])
    message = r"^x.bin: document 0 holds a token that uint16 cannot hold"
    with pytest.raises(ValueError, match=message):
        write_binidx("x", [[-1]])
    message = (
        r"^missing/x.idx: cannot be written, as there is no folder missing/; "
        r"fix that, or write elsewhere$"
    )
    with pytest.raises(ValueError, match=message):
        write_binidx("missing/x", [[1]])
    assert os.listdir() == []


def header(magic=b"MMIDIDX\0\0", version=1, code=8, n=3, doc_count=4):
    return lambda idx: struct.pack("<9sQBQQ", magic, version, code, n, doc_count) + idx[34:]


def patched(offset, form, value):
    return lambda idx: (
        idx[:offset] + struct.pack(form, value) + idx[offset + struct.calcsize(form) :]
    )


def index(found):
    return (
        rf"x.idx: not a whole binidx index of version 1 with integers \({found}\); "
        r"copy or convert it again$"
    )


def missing(path):
    return (
        rf"x: no {path}, and no x.jsonl; give a .jsonl, or the prefix of a .bin and .idx "
        r"\(a text: --data_type utf-8; bare tokens: uint16\)$"
    )


@pytest.mark.parametrize(
    "end, damage, message",
    [
        (
            ".bin",
            lambda b: b[:8],
            r"x.bin: 8 bytes, but the index needs 12; copy or convert both again$",
        ),
        (
            ".bin",
            lambda b: b"",
            r"x.bin: 0 bytes, but the index needs 12; copy or convert both again$",
        ),
        (
            ".bin",
            lambda b: b + b"\0",
            r"x.bin: 13 bytes, but the index needs 12; copy or convert both again$",
        ),
        (".bin", None, missing("x.bin")),
        (".idx", None, missing("x.idx")),
        (".idx", lambda b: b[:-1], index("version 1, type 8, 101 of 102 bytes")),
        (".idx", lambda b: b[:20], index("version 1, type 8, 20 of 70 bytes")),
        (".idx", lambda b: b"", index("version 0, type 0, 0 of 34 bytes")),
        (".idx", lambda b: b + b"\0" * 8, index("version 1, type 8, 110 of 102 bytes")),
        (".idx", header(magic=b"PK\3\4     "), index("version 1, type 8, 102 of 102 bytes")),
        (".idx", header(version=2), index("version 2, type 8, 102 of 102 bytes")),
        (".idx", header(code=6), index("version 1, type 6, 102 of 102 bytes")),
        (".idx", header(code=99), index("version 1, type 99, 102 of 102 bytes")),
        (".idx", header(n=2**60), index(r"version 1, type 8, 102 of \d{20} bytes")),
        (
            ".idx",
            header(n=2**64 - 1, doc_count=2**64 - 1),
            index(r"version 1, type 8, 102 of \d{21} bytes"),
        ),
        (
            ".idx",
            lambda b: header(n=0, doc_count=1)(b)[:42],
            r"x.idx: holds no tokens; convert a .jsonl that has some$",
        ),
        (
            ".idx",
            patched(34, "<i", -3),
            r"x.idx: document 0 cannot have size -3 and pointer 0; convert it again$",
        ),
        (".idx", patched(46, "<q", 2), r"x.idx: document 0 cannot have size 3 and pointer 2"),
        (".idx", patched(54, "<q", -6), r"x.idx: document 1 cannot have size 1 and pointer -6"),
        (
            ".idx",
            patched(62, "<q", 10**15),
            r"x.idx: document 2 cannot have size 2 and pointer 1000000000000000",
        ),
        (
            ".idx",
            patched(42, "<i", 2**31 - 1),
            r"x.bin: 12 bytes, but the index needs 4294967302; copy",
        ),
    ],
)
def test_a_damaged_pair_is_refused_in_one_line_that_names_the_file(end, damage, message):
    make([1, 2, 3], [4], [5, 0])
    path = pathlib.Path("x" + end)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{message}") as error:
        open_data("x")
    assert "\n" not in str(error.value)
    assert "; " in str(error.value)


def test_a_pair_without_a_token_is_refused():
    message = r"^x.idx: holds no tokens; convert a .jsonl that has some$"
    with pytest.raises(ValueError, match=message):
        make([], [])


# ---- opening ---------------------------------------------------------------------------------


FILES = ["a.jsonl", "a.jsonl.bin", "a.jsonl.idx", "a.jsonl.source.json"]
AGAIN = "a.jsonl: tokenizing it again, as the tokens beside it may be of another content\n"


def read(path="a.jsonl"):
    return [decode_bytes(document).decode() for document in open_data(path)]


def set_times(paths, time):
    for path in paths:
        os.utime(path, ns=(time, time))


def test_a_jsonl_is_converted_beside_itself_once(capsys):
    write_jsonl("a.jsonl", "one")
    assert read() == ["one"]
    assert sorted(os.listdir()) == FILES
    stamps = {name: os.stat(name).st_mtime_ns for name in FILES}
    assert read() == ["one"]
    assert {name: os.stat(name).st_mtime_ns for name in FILES} == stamps
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("time", [1, 10**18, 4 * 10**18])
def test_another_content_is_converted_again_whatever_its_time(time, capsys):
    write_jsonl("a.jsonl", "one")
    set_times(["a.jsonl"], 10**18)
    read()
    set_times(FILES, 10**18)
    write_jsonl("b.jsonl", "two")  # of the same size
    set_times(["b.jsonl"], time)
    os.replace("b.jsonl", "a.jsonl")
    assert read() == ["two"]
    assert capsys.readouterr().out == AGAIN
    # So is what a link has pointed at.
    write_jsonl("c.jsonl", "six")
    set_times(["c.jsonl"], time)
    os.unlink("a.jsonl")
    os.symlink("c.jsonl", "a.jsonl")
    assert read() == ["six"]
    assert capsys.readouterr().out == AGAIN
    os.unlink("c.jsonl")
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl"):  # a link to nothing
        read()


def test_a_copied_folder_is_not_converted_again(capsys):
    os.mkdir("d")
    write_jsonl("d/a.jsonl", "one")
    read("d/a.jsonl")
    shutil.copytree("d", "e", copy_function=shutil.copyfile)  # with the time of now
    stamp = os.stat("e/a.jsonl.bin").st_mtime_ns
    os.chmod("e", 0o555)
    assert [note[:9] for note in open_data("e/a.jsonl").notes] == ["e/a.jsonl"]
    assert os.stat("e/a.jsonl.bin").st_mtime_ns == stamp
    assert capsys.readouterr().out == ""
    os.chmod("e", 0o755)


@pytest.mark.parametrize("name", [".bin", ".idx", RECORD])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"[]"),
        lambda path: path.write_bytes(b"{}"),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"reading": 1', b'"reading": 0')),
        lambda path: shutil.copy("old" + path.suffixes[-1], path),
    ],
)
def test_tokens_that_may_be_of_another_content_are_made_again(name, damage):
    """So are those without a record, of before there were any."""
    write_jsonl("a.jsonl", "two")
    read()
    for end in (".bin", ".idx"):  # of as many tokens
        os.replace("a.jsonl" + end, "old" + end)
    os.replace("a.jsonl" + RECORD, "old.json")
    write_jsonl("a.jsonl", "one")
    read()
    damage(pathlib.Path("a.jsonl" + name))
    assert read() == ["one"]
    assert read() == ["one"]


@pytest.mark.parametrize("step", range(1, 8))
def test_a_conversion_that_is_killed_anywhere_passes_for_none(step, monkeypatch):
    write_jsonl("a.jsonl", "one")
    read()
    write_jsonl("a.jsonl", "two")
    steps = iter(range(1, 100))

    def or_killed(call):
        def stand_in(*args, **more):
            if next(steps) == step:
                raise KeyboardInterrupt
            return call(*args, **more)

        return stand_in

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(os, name, or_killed(getattr(os, name)))
        try:
            read()
            assert next(steps) <= step  # it has no such step
        except KeyboardInterrupt:
            assert next(steps) > step
    write_jsonl("b.jsonl", "one")
    for content, text in (("a.jsonl", "two"), ("b.jsonl", "one")):
        os.replace(content, "c.jsonl")
        os.replace("c.jsonl", "a.jsonl")
        assert read() == [text]


def test_of_several_that_open_a_file_at_once_one_converts_it(monkeypatch):
    write_jsonl("a.jsonl", *["one"] * 200)
    plain, conversions = convert.jsonl_to_binidx, []

    def slow(*arguments):
        conversions.append(arguments)
        time.sleep(0.2)
        return plain(*arguments)

    monkeypatch.setattr(convert, "jsonl_to_binidx", slow)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(read) for _ in range(4)]]
    assert found == [["one"] * 200] * 4
    assert len(conversions) == 1
    assert sorted(os.listdir()) == FILES


def test_a_file_that_changes_while_it_is_read_is_refused(monkeypatch):
    write_jsonl("a.jsonl", "one")
    plain, numbers = os.replace, itertools.count()

    def replace(old, new):
        plain(old, new)
        write_jsonl("a.jsonl", f"{next(numbers)}")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ValueError, match=r"^a\.jsonl: changes while it is read; wait until"):
        read()


def test_a_pair_beside_a_file_of_its_name_is_somebodys_own():
    pathlib.Path("a").write_text('{"text": "file"}')
    assert read("a") == ["file"]
    assert sorted(os.listdir()) == ["a", "a.tokens.bin", "a.tokens.idx", "a.tokens.source.json"]
    pathlib.Path("a").write_text('{"text": "file again"}')
    assert read("a") == ["file again"]
    write_binidx("a", [encode("pair")])
    assert read("a") == ["pair"]


def test_a_read_only_folder_says_how_to_convert_elsewhere(monkeypatch):
    write_jsonl("a.jsonl", "one")
    monkeypatch.setattr(os, "access", lambda *_: False)
    message = r"by python data.py a.jsonl PREFIX, and use --data_file PREFIX$"
    with pytest.raises(ValueError, match=message):
        read()
    assert os.listdir() == ["a.jsonl"]


def test_a_name_without_ending_stands_for_the_pair_or_else_for_the_jsonl():
    write_jsonl("a.jsonl", "one")
    assert decode_bytes(open_data("a")[0]) == b"one"
    write_binidx("a", [encode("pair")])
    assert decode_bytes(open_data("a")[0]) == b"pair"
    os.unlink("a.idx")  # half a pair is none
    assert decode_bytes(open_data("a")[0]) == b"one"


@pytest.mark.parametrize(
    "path, message",
    [
        (
            "d/x",
            "d/x: no d/x.bin and d/x.idx, and no d/x.jsonl; "
            "give a .jsonl, or the prefix of a .bin and .idx",
        ),
        ("d/x.jsonl", "d/x.jsonl: no d/x.jsonl.bin and d/x.jsonl.idx, and no d/x.jsonl; give"),
        ("x.bin", "x.bin: no x.bin and x.idx, and no x.jsonl; give"),
    ],
)
def test_a_missing_path_says_what_was_looked_for(path, message):
    with pytest.raises(FileNotFoundError) as error:
        open_data(path)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "token, dtype",
    [(70000, np.int32), (65536, np.int32), (-1, np.int32), (-7, np.int64), (-1, np.int16)],
)
def test_a_token_outside_the_vocabulary_is_refused_with_its_document(token, dtype):
    make([1, 2], [3], [], [token, 5], [6], dtype=dtype)
    message = f"^x: document 3 holds token {token}, but the model's vocabulary is 65536$"
    with pytest.raises(ValueError, match=message):
        open_data("x", vocab_size=65536)
    assert len(open_data("x")) == 5


def test_the_last_token_of_the_vocabulary_is_accepted_and_the_next_is_not():
    make([1, 99, 0])
    assert len(open_data("x", vocab_size=100)) == 1
    message = "^x: document 0 holds token 99, but the model's vocabulary is 99$"
    with pytest.raises(ValueError, match=message):
        open_data("x", vocab_size=99)


# ---- a held-out part -------------------------------------------------------------------------


def test_a_part_is_held_out_by_the_seed_alone():
    documents = make(*([i, i + 1, 0] for i in range(1, 41)))
    training, held_out = hold_out(documents, 0.1, seed=7)
    assert (len(training), len(held_out)) == (36, 4)
    both = sorted([*training.numbers, *held_out.numbers])
    assert both == list(range(40))
    for part in (training, held_out):
        assert [part[i].tolist() for i in range(len(part))] == [
            documents[number].tolist() for number in part.numbers
        ]
        assert part.token_count() == 3 * len(part)
    again = hold_out(open_data("x"), 0.1, seed=7)[1]
    assert again.numbers.tolist() == held_out.numbers.tolist()
    assert hold_out(documents, 0.1, seed=8)[1].numbers.tolist() != held_out.numbers.tolist()
    prints = {data.fingerprint() for data in (documents, training, held_out, again)}
    assert len(prints) == 3
    assert documents.fingerprint() == open_data("x").fingerprint()  # that of old states
    assert training.notes == ["x: 4 of 40 documents are held out (--val_split 0.1)"]


@pytest.mark.parametrize(
    "share, n, count", [(0.01, 5, 1), (0.99, 5, 4), (0.5, 2, 1), (0.05, 60, 3)]
)
def test_each_side_has_a_document(share, n, count):
    training, held_out = hold_out(make(*[[1, 0]] * n), share, seed=0)
    assert (len(training), len(held_out)) == (n - count, count)


def test_one_document_cannot_be_split():
    with pytest.raises(ValueError, match=r"^x: holds 1 documents, but --val_split needs two$"):
        hold_out(make([1, 0]), 0.5, seed=0)


def test_what_is_beside_the_tokens_that_are_read_is_said():
    write_jsonl("a.jsonl", "one")
    jsonl_to_binidx("a.jsonl", "a")
    assert open_data("a").notes == [
        "note: a.bin is used, and a.jsonl beside it is not read; --data_file a.jsonl takes that, "
        "as it is now"
    ]
    assert open_data("a.jsonl").notes == ["a.jsonl: 1 document (text)"]
    os.unlink("a.jsonl")
    assert open_data("a").notes == []
    assert open_data("a.jsonl").notes == [
        "note: a.jsonl is not there; the tokens that were kept beside it are used"
    ]
