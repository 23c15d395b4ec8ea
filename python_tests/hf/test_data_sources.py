"""Where rows are read from: files, folders and datasets; every file that cannot be read is one line, and none hangs."""

import gzip
import json
import os
import stat
import time

import datasets
import huggingface_hub
import pytest
from hf.words import rows, write_rows

from align_ext.data import sources
from align_ext.data.sources import Source, read_source
from align_ext.system import reading

GOOD = '{"task": "t", "prompt": "p", "completion": "c"}\n'
TWO = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]


def refusal(data):
    with pytest.raises(ValueError, match=r"\w") as caught:
        read_source(str(data))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert message.isprintable()
    return message


def prompts(source):
    return {split: [x.prompt for x in examples] for split, examples in source.splits.items()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"task": "t", "texts": "p"}\n', "line 1: no column prompt or instruction"),
        (GOOD.encode() * 2 + b"{broken\n", "line 3: cannot be read ("),
        (b"[1, 2]\n", "row 1: 1 is no JSON object"),
        (b"[]", "holds no rows"),
        (b"7\n", "line 1: 7 is no JSON object"),
        (b"\n\r\n", "holds no rows"),
        (b"", "holds no rows: write some into it, or take it out of the folder "),
        (b'{"a": NaN}', "line 1: cannot be read (NaN is no JSON number"),
        (b'{"a": 1e400}', "line 1: cannot be read (the number '1e400' is out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is out of range"),
        (b'{"a": 1, "a": 2}', "line 1: cannot be read (the key 'a' is there twice"),
        (b"[" * 90_000, "brackets"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "brackets"),
        (b'{"prompt": "\xff"}', "line 1: cannot be read ('utf-8' codec"),
        (GOOD.encode() + "{}".encode("utf-16"), "line 2: cannot be read ("),
        (
            b'{"prompt": "\\ud800", "answer": "b"}',
            "line 1: the column prompt holds '\\ud800', with half of a character",
        ),
        (GOOD.encode() + b'{"prompt": "p", "answer": "c"}\n', "line 2: no column task; found prompt, answer"),
        (
            b'{"prompt": "p", "answer": "c"}\n' + GOOD.encode(),
            "line 2: it has a column task, which rows before it lack",
        ),
        (
            b'{"prompt": "' + b"x" * (reading.MAX_ROW_BYTES + 1) + b'", "answer": "c"}',
            "line 1: it is larger than 16777216",
        ),
        (b"{" + b",".join(b'"%d": 1' % i for i in range(100_000)) + b', "5": 1}', "the key '5' is there twice"),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.JSON", "x.jsonl.gz"])
def test_a_file_that_cannot_be_used_says_where_and_why(content, message, name, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    said = refusal(tmp_path / name)
    assert said.startswith(f"'{name}'")
    assert message in said


def test_marks_of_other_systems_are_no_part_of_the_rows(tmp_path):
    lines = [json.dumps(row) for row in TWO]
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    (tmp_path / "y.json").write_bytes(b"\xef\xbb\xbf\n" + json.dumps(TWO, indent=2).replace("\n", "\r\n").encode())
    for name in ("x.jsonl", "y.json"):
        assert prompts(read_source(str(tmp_path / name))) == {"": ["a", "c"]}
    assert read_source(str(tmp_path / "y.json")).splits[""][1].where == "'y.json', row 2"


@pytest.mark.parametrize("damage", ["cut", "flipped", "trailer", "plain", "empty"])
def test_a_damaged_gz_is_one_line(damage, tmp_path):
    whole = bytearray(gzip.compress("".join(f'{{"prompt": "{i}", "answer": "a"}}\n' for i in range(9999)).encode()))
    if damage == "flipped":
        whole[len(whole) // 2] ^= 0x55
    made = {"cut": whole[:-9], "flipped": whole, "trailer": whole + b"junk", "plain": GOOD.encode(), "empty": b""}
    (tmp_path / "x.jsonl.gz").write_bytes(made[damage])
    assert refusal(tmp_path / "x.jsonl.gz").startswith("'x.jsonl.gz'")


@pytest.mark.parametrize("line", [b"\n", GOOD.encode(), b" "])
def test_a_gz_that_unpacks_to_very_much_is_refused_before_memory_and_patience_end(line, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_UNPACKED", 1 << 20)
    with gzip.open(tmp_path / "x.jsonl.gz", "wb") as file:
        for _ in range(40):
            file.write(line * (100_000 // len(line)))
    assert "unpacks to more than 100 times its size" in refusal(tmp_path / "x.jsonl.gz")


def test_nothing_that_is_no_file_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "x.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "null.jsonl").symlink_to("/dev/zero")
    start = time.monotonic()
    for data in (
        "x.jsonl",
        "null.jsonl",
        "loop.jsonl",
        ".",
        "/dev/zero",
        "/dev/stdin",
        "a" * 5000,
        "a\0b",
        "",
        "~nobody/x",
    ):
        refusal(data)
    assert "it is no ordinary file" in refusal("x.jsonl")
    assert "Too many levels" in refusal("loop.jsonl")
    assert time.monotonic() - start < 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_says_so(tmp_path):
    (tmp_path / "x.jsonl").write_text(GOOD)
    (tmp_path / "x.jsonl").chmod(0)
    assert "Permission denied" in refusal(tmp_path / "x.jsonl")
    tmp_path.chmod(stat.S_IXUSR)
    assert "Permission denied" in refusal(tmp_path)
    tmp_path.chmod(stat.S_IRWXU)


def test_what_a_system_refuses_to_open_says_why(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.jsonl").write_text(GOOD)
    monkeypatch.setattr("builtins.open", refuse)
    assert "Permission denied" in refusal(tmp_path / "x.jsonl")
    monkeypatch.setattr(os, "listdir", refuse)
    assert "Permission denied" in refusal(tmp_path)
    monkeypatch.setattr(os, "stat", refuse)
    assert "Permission denied" in refusal(tmp_path / "x.jsonl")


def test_the_files_of_a_folder_are_read_or_refused_by_name_and_those_that_are_no_data_are_named(tmp_path):
    for name in ("README.md", "MANIFEST", "LICENSE.txt", ".gitignore", ".x.jsonl", "notes.md"):
        (tmp_path / name).write_text("no rows")
    write_rows(tmp_path / "x.jsonl", TWO)
    (tmp_path / "y.json").write_text(json.dumps(TWO))
    source = read_source(str(tmp_path))
    assert prompts(source) == {"": ["a", "c", "a", "c"]}
    assert source.skipped == [".gitignore", ".x.jsonl", "LICENSE.txt", "MANIFEST", "README.md", "notes.md"]
    for name in ("z.xlsx", "z.arrow", "z.parquet.gz", "z.jsonl.bz2", "z"):
        (tmp_path / name).write_text("a,b")
        assert f"holds '{name}', and rows are read from .jsonl files, a JSON" in refusal(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "more").mkdir()
    assert "holds 'more'" in refusal(tmp_path)
    (tmp_path / "more").rmdir()
    (tmp_path / "z.jsonl").symlink_to("nowhere")
    assert "No such file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "split", "task"),
    [
        ("gsm8k.train.jsonl", "train", "gsm8k"),
        ("gsm8k_test.jsonl.gz", "test", "gsm8k"),
        ("Dev-sums.JSON", "validation", "sums"),
        ("x.val.jsonl", "validation", "x"),
        ("sums.v2.training.json.gz", "train", "sums.v2"),
        ("x-train-00000-of-00012.jsonl", "train", "x"),
        ("train.jsonl", "train", "folder"),
        ("trainer.jsonl", "", "trainer"),
        ("contest.jsonl", "", "contest"),
    ],
)
def test_the_name_of_a_file_says_its_split_and_the_task_of_rows_that_name_none(name, split, task, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    content = "".join(json.dumps(row) + "\n" for row in TWO).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    ((found, examples),) = read_source(str(folder)).splits.items()
    assert (found, {x.task for x in examples}) == (split, {task})
    assert set(read_source(str(folder / name)).splits) == {""}, "a file by itself is what it is"
    (folder / "x.test.train.jsonl").write_text(GOOD)
    assert "says test and train: let it name one split" in refusal(folder)


def test_what_is_empty_in_a_typed_table_is_said_to_be(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = [{"prompt": "a", "completion": "b", "task": None}, {"prompt": "c", "completion": None, "task": None}]
    parquet.write_table(pyarrow.Table.from_pylist(table[:1] * 2), tmp_path / "x.parquet")
    assert {x.task for x in read_source(str(tmp_path / "x.parquet")).splits[""]} == {"x"}
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "x.parquet")
    assert "row 2: the column completion is empty" in refusal(tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("prompt,completion\na,b\nc,\n")
    assert "line 3: the column completion is empty" in refusal(tmp_path / "x.csv")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(TWO[0] | {"task": None}) + "\n" for _ in range(2)))
    assert {x.task for x in read_source(str(tmp_path / "x.jsonl")).splits[""]} == {"x"}


@pytest.mark.parametrize("pattern", ["*.jsonl", "x?.csv", "[ab].jsonl"])
def test_a_pattern_is_not_expanded(pattern, tmp_path):
    write_rows(tmp_path / "a.jsonl")
    assert "patterns are not expanded, so name the folder, or each file" in refusal(tmp_path / pattern)


def test_data_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.xlsx").write_text("a,b")
    for data in ("absent.jsonl", "some/absent.jsonl", "empty", "x.xlsx", "owner/name", "/no/such/folder", "x.xlsx/y"):
        assert data in refusal(data)


def test_a_dataset_goes_through_the_same_reader(tmp_path, monkeypatch):
    write_rows(tmp_path / "train.jsonl")
    write_rows(tmp_path / "validation.jsonl", list(rows())[:6])
    loaded = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_from_hub", lambda name, streaming: loaded)
    source = read_source("owner/name")
    assert {split: len(examples) for split, examples in source.splits.items()} == {"train": 48, "validation": 6}
    assert source.splits["train"][0].choices == ("the answer is yes", "the answer is no")
    assert source.splits["train"][1].where == "owner/name, train, row 1"


def test_the_splits_of_a_dataset_are_used_or_named():
    def loaded(**splits):
        source, parts = Source(), {split: datasets.Dataset.from_list(part) for split, part in splits.items()}
        sources._add_dataset(source, "owner/name:en", datasets.DatasetDict(parts), ())
        return source

    source = loaded(train=TWO, test=TWO[:1], validation=TWO, extra=TWO)
    assert {split: len(examples) for split, examples in source.splits.items()} == {"train": 2, "test": 1}
    assert source.skipped == ["split validation (2 rows)", "split extra (2 rows)"]
    assert source.splits["test"][0].task == "name-en"
    assert set(loaded(train=TWO).splits) == {""}
    with pytest.raises(ValueError, match=r"no split train \(it has 'corpus'"):
        loaded(corpus=TWO)
    with pytest.raises(ValueError, match=r"owner/name:en, train, row 1: the column hint would be lost, with 'h'"):
        loaded(train=[{**TWO[0], "hint": None}, {**TWO[1], "hint": "h"}])
    with pytest.raises(ValueError, match=r"row 0: the column answer holds 0\.5, a float, not text"):
        loaded(train=[{"prompt": "a", "answer": 0.5}])
