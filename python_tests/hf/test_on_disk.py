"""Examples and rows on disk: equal to what was put there, in the same order, with little of them in memory."""

import hashlib
import json
import os
import tracemalloc

import datasets
import pytest
from hf.runs import options, prepare
from hf.words import model_folder, tokenizer, write_rows
from hypothesis import given
from hypothesis import strategies as st

from align_ext.data import on_disk, packing, sources
from align_ext.data.encode import features
from align_ext.data.on_disk import Examples, ExampleStore, rows_on_disk
from align_ext.data.rows import Example, example_of
from align_ext.data.tasks import read_tasks, select
from align_ext.training import recipe
from align_ext.training.rows import choose, read_pools, train_rows

ODD = [
    Example("t", "2+2=", "4", golds=("4", "four"), where="'x', line 1"),
    Example("ü\u2028", (("tools", "[]"), ("user", 'a "b"\n\0'), ("assistant", "c", "{}")), "\ud800 \U0001f600"),
    Example("t", (), "a text", ends=False),
    Example("t", "which?", "b", ("a", "b"), 1, also=(0,)),
    Example("t", (("user", "call"),), "[{}]", calls='[{"name": "f", "arguments": {}}]'),
]


def test_an_example_comes_back_whole():
    stored = Examples(ExampleStore()).add(ODD)
    assert list(map(repr, stored)) == list(map(repr, ODD))
    assert [(x.golds, x.where) for x in stored] == [(x.golds, x.where) for x in ODD]
    assert (stored[-1], list(stored[1:3]), len(stored)) == (ODD[-1], ODD[1:3], 5)
    assert stored == ODD
    assert stored != ODD[:4]
    assert stored != [*ODD[:4], ODD[0]]
    with pytest.raises(IndexError):
        stored[5]


def test_an_example_is_judged_as_before_it_was_stored():
    scored = Example("t", "p", "a", scorer=lambda text: 0.25)
    stored = Examples(ExampleStore()).add([*ODD, scored])
    for text in ("4", "four", "The answer is 4.", "b", "a", '{"name": "f", "arguments": {}}', "a text", ""):
        assert [x.score(text) for x in stored] == [x.score(text) for x in (*ODD, scored)]
    assert [stored[0].score("four"), stored[4].score('{"name": "f", "arguments": {}}'), stored[5].score("x")] == [
        1, 1, 0.25,
    ]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from("ab"), st.text("xyz", max_size=2)), max_size=30), st.integers(0, 3))
def test_order_repeats_and_tasks_are_those_of_a_list(pairs, seed):
    made = [Example(task, f"p{text}", text, where=str(i)) for i, (task, text) in enumerate(pairs)]
    stored = Examples(ExampleStore()).add(made)

    def key(x):
        return hashlib.sha256(f"{seed}\0{x.prompt}\0{x.answer}".encode()).digest()

    assert [x.where for x in stored.ordered(seed)] == [x.where for x in sorted(made, key=key)], "equal ones in turn"
    assert stored.repeated() == len(made) - len(set(made))
    assert {t: [x.where for x in part] for t, part in stored.by_task().items()} == {
        task: [x.where for x in made if x.task == task] for task in dict.fromkeys(x.task for x in made)
    }


def test_more_than_fits_is_selected_and_encoded_alike(tmp_path, monkeypatch):
    file = str(write_rows(tmp_path / "x.jsonl"))

    def rows():
        data = select(read_tasks(file), 9, 3)
        return data, rows_on_disk(features(tokenizer(), data.train, data.ids()))

    (small, encoded), _ = rows(), monkeypatch.setattr(on_disk, "_IN_MEMORY", 100)
    monkeypatch.setattr(on_disk, "_BATCH", 3)
    large, again = rows()
    assert small == large
    assert list(encoded) == list(again) == list(features(tokenizer(), small.train, small.ids()))


def test_memory_does_not_grow_with_the_texts(tmp_path, monkeypatch):
    """13 MB of texts, all of which are trained on, are read, chosen, encoded and packed."""
    monkeypatch.setattr(on_disk, "_IN_MEMORY", 1 << 20)
    monkeypatch.setattr(on_disk, "_BATCH", 16)
    monkeypatch.setattr(packing, "_PORTION", 1 << 12)
    with open(tmp_path / "x.jsonl", "w") as out:
        for number in range(160):
            out.write(json.dumps({"task": "ab"[number % 2], "prompt": f"{number}", "answer": 80_000 * "x"}) + "\n")

    class Short:
        """A tokenizer whose tokens are few, so that its own work is no part of what is measured."""

        is_fast, eos_token_id, chat_template = True, 1, None

        def __call__(self, text, **_):
            return {"input_ids": [len(text) % 90] * (2 + len(text) // 100)}

    job = options(tmp_path, data=str(tmp_path / "x.jsonl"), seq_len=1000, train_examples=200, packing=True)
    tracemalloc.start()
    pools = read_pools(job)
    data = choose(job, pools, Short())
    plain, packed = train_rows(job, Short(), data, packing=False), train_rows(job, Short(), data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(data.train), len(plain)) == (2 * (80 - job.eval_examples), len(data.train))
    assert sum(map(len, packed["input_ids"])) == sum(map(len, plain["input_ids"]))
    assert peak < 8e6


def test_the_files_go_when_the_rows_do():
    rows = rows_on_disk([{"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, 2], "task_ids": 0}])
    (file,) = (part["filename"] for part in rows.cache_files)
    assert list(rows) == [{"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, 2], "task_ids": 0}]
    assert os.path.exists(file)
    del rows
    assert not os.path.exists(file)


def test_the_digest_is_that_of_the_whole_repr(tmp_path):
    assert (
        "".join(recipe._shown_list(["1", recipe._shown_list(["2", "3"]), recipe._shown_list([])])) == "[1, [2, 3], []]"
    )
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    job = prepare(tmp_path, align=None)
    content = [(x.task, x.prompt, x.answer, x.choices) for x in (*job.data.train, *job.data.test)]
    assert job.digest == hashlib.sha256(repr(content).encode()).hexdigest()


def test_of_a_source_the_first_rows_alone_can_be_read(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    write_rows(tmp_path / "d/x.train.jsonl", [{"prompt": f"p{i}", "answer": "a"} for i in range(9)])
    write_rows(tmp_path / "d/x.test.jsonl", [{"prompt": f"t{i}", "answer": "a"} for i in range(3)])
    pools = read_tasks({"path": str(tmp_path / "d"), "rows": 4})
    assert {split: len(part) for split, part in pools.tasks["x"].items()} == {"train": 4, "test": 3}
    assert pools.notes == (f"{str(tmp_path / 'd')!r}: only the first 4 rows of train are read",)
    with pytest.raises(ValueError, match="rows=0 must be a positive integer"):
        read_tasks({"path": str(tmp_path / "d"), "rows": 0})
    asked = []

    def endless():
        for number in range(10**9):
            yield {"prompt": f"p{number}", "answer": "a"}

    def from_hub(name, streaming):
        asked.append(streaming)
        return {"train": datasets.IterableDataset.from_generator(endless)}

    monkeypatch.setattr(sources, "_from_hub", from_hub)
    pools = read_tasks({"path": "owner/endless", "rows": 50})
    assert [asked, len(pools.tasks["endless"][""])] == [[True], 50]
    assert "only the first 50 rows are read" in pools.notes[0]


def test_the_row_reader_names_what_a_text_is_judged_by():
    assert example_of({"task": "t", "prompt": "p", "answers": ["a", "b"]}, "here")[0].golds == ("a", "b")
