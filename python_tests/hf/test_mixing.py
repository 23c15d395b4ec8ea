"""TaskSampler and join_tasks: shares over time, enough of a task in each batch, one order for (seed, epoch)."""

from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from hf.trainers import adapted, features, logged, trainer
from torch.utils.data import BatchSampler, DataLoader

from align_ext import AlignTrainer, TaskCollator, TaskSampler, join_tasks
from align_ext.data.join_tasks import example_tasks

SIZES = (60, 30, 10)
TASKS = [task for task, size in enumerate(SIZES) for _ in range(size)]
MIXINGS = ["proportional", "temperature", "equal", "round_robin"]


def batches(sampler):
    order = list(sampler)
    return [order[i : i + sampler.batch_size] for i in range(0, len(order), sampler.batch_size)]


def counts(sampler):
    return [Counter(TASKS[i] for i in batch) for batch in batches(sampler)]


@pytest.mark.parametrize(
    ("mixing", "shares"),
    [
        ("proportional", (0.6, 0.3, 0.1)),
        ("temperature", tuple(size**0.5 / sum(s**0.5 for s in SIZES) for size in SIZES)),
        ("equal", (1 / 3, 1 / 3, 1 / 3)),
        ("round_robin", (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_each_task_gets_its_share_over_time(mixing, shares):
    for batch_size in (8, 10):
        sampler = TaskSampler(TASKS, batch_size, mixing, batches=60)
        so_far = Counter()
        for number, batch in enumerate(counts(sampler), start=1):
            so_far += batch
            for task, share in enumerate(shares):  # never further off than two batches' worth
                assert abs(so_far[task] - share * batch_size * number) <= 2 * batch_size, (mixing, number)


def test_a_share_too_small_for_a_pair_in_each_batch_waits_and_a_temperature_of_one_is_proportional():
    rare = [0] * 90 + [1] * 90 + [2] * 2
    chosen = [Counter(rare[i] for i in batch)[2] for batch in batches(TaskSampler(rare, 8, batches=100))]
    assert set(chosen) == {0, 2}
    assert sum(chosen) == pytest.approx(800 * 2 / 182, abs=2)
    same = TaskSampler(TASKS, 8, "temperature", temperature=1.0), TaskSampler(TASKS, 8, "proportional")
    assert list(same[0]) == list(same[1])


def test_the_shares_drawn_are_counted_of_the_order_itself():
    sampler = TaskSampler([0] * 9 + [1] * 3, 4, "equal", batches=6, weights={0: 19})
    assert sampler.shares == {0: 0.95, 1: 0.05}
    drawn = Counter(int(index >= 9) for index in sampler)
    assert sampler.drawn() == {0: drawn[0] / 24, 1: drawn[1] / 24} == {0: 0.5, 1: 0.5}
    assert TaskSampler([0, 0, 1, 1], 4, batches=0).drawn() == {0: 0.5, 1: 0.5}


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(("batch_size", "per_task"), [(4, 2), (7, 2), (8, 3), (12, 4), (2, 1)])
def test_a_batch_has_two_tasks_at_least_and_enough_of_each(mixing, batch_size, per_task):
    for batch in counts(TaskSampler(TASKS, batch_size, mixing, per_task=per_task)):
        assert sum(batch.values()) == batch_size
        assert 2 <= len(batch) <= batch_size // per_task
        assert min(batch.values()) >= per_task


@pytest.mark.parametrize("mixing", MIXINGS)
def test_within_a_task_every_example_comes_before_any_comes_again(mixing):
    seen, firsts = Counter(dict.fromkeys(range(len(TASKS)), 0)), {}
    for batch in batches(TaskSampler(TASKS, 8, mixing, batches=40)):
        seen.update(batch)
        for task in range(3):
            times = [seen[i] for i in seen if TASKS[i] == task]
            assert max(times) - min(times) <= 1
            for i in batch:
                firsts.setdefault((TASKS[i], seen[i]), i)
    assert firsts[2, 1] != firsts[2, 2] or firsts[2, 2] != firsts[2, 3]  # another order each time


def test_seed_and_epoch_determine_the_order_and_examples_of_no_task_are_left_out():
    def order(seed, epoch):
        sampler = TaskSampler([*TASKS, -1], 8, seed=seed)
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler) == 104
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert len(TASKS) not in order(0, 0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 3}, "batch_size=3 must hold two tasks with per_task=2"),
        ({"batch_size": 8, "per_task": 5}, "take a larger batch, or per_task=1"),
        ({"batch_size": 8, "per_task": 0}, "per_task must be at least 1"),
        ({"batch_size": 8, "mixing": "proportionl"}, "did you mean 'proportional'"),
        ({"batch_size": 8, "mixing": "temperature", "temperature": 0.5}, "temperature must be at least 1, got 0.5"),
        ({"batch_size": 8, "tasks": [-1, -1]}, "no example belongs to a task"),
    ],
)
def test_options_out_of_range_are_refused_with_the_cure(options, match):
    with pytest.raises(ValueError, match=match):
        TaskSampler(**({"tasks": TASKS} | options))


def test_a_batch_of_one_example_takes_the_tasks_in_their_shares():
    tasks = [0] * 6 + [1] * 6
    assert sorted(tasks[i] for i in TaskSampler(tasks, 1, "equal", per_task=1)) == tasks


def test_one_task_alone_fills_any_batch():
    assert sorted(TaskSampler([0] * 6, 3, per_task=3)) == list(range(6))


def test_two_processes_get_whole_batches():
    sampler = TaskSampler(TASKS, 8)
    whole = batches(sampler)
    shards = [list(BatchSamplerShard(BatchSampler(sampler, 8, False), 2, rank)) for rank in range(2)]
    assert shards[0] == whole[0::2]
    assert shards[1][: len(whole) // 2] == whole[1::2]


def seen_tokens(ran):
    """What each step of a run is trained on, by wrapping the loss."""
    seen, compute = [], ran.compute_loss

    def spy(model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].sum(1).tolist())
        return compute(model, inputs, *args, **kwargs)

    ran.compute_loss = spy
    return seen


def test_trainer_takes_the_samplers_batches_another_order_each_epoch_and_goes_on_in_it(tmp_path):
    rows = datasets.Dataset.from_list(features())
    sums = [sum(row["input_ids"]) for row in rows]
    options = {"arguments": {"mixing": "equal"}, "max_steps": 9, "save_strategy": "steps", "save_steps": 6}
    ran = trainer(tmp_path, adapted(), rows, data_seed=5, **options)
    seen = seen_tokens(ran)
    ran.train()
    expected, sampler = [], TaskSampler(rows["task_ids"], 6, "equal", seed=5)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected += [[sums[i] for i in batch] for batch in batches(sampler)]
    assert seen == expected[:9]
    again = trainer(tmp_path, adapted(), rows, data_seed=5, **options)
    rest = seen_tokens(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert rest == expected[6:9]


def test_of_two_processes_that_go_on_each_skips_in_the_order_of_its_epoch(tmp_path):
    rows = features()
    ran = trainer(tmp_path, adapted(), rows, arguments={"mixing": "equal"}, num_train_epochs=2, max_steps=-1)
    loader, sampler = ran.get_train_dataloader(), ran._epochs.sampler
    ran.state.epoch = 1.5
    ran.callback_handler.on_epoch_begin(ran.args, ran.state, ran.control)
    fresh = TaskSampler(example_tasks(rows), 6, "equal", seed=ran.args.seed)
    fresh.set_epoch(1)
    expected = batches(fresh)
    for rank in range(2):
        shard = prepare_data_loader(DataLoader(rows, 6, sampler=sampler, collate_fn=ran.data_collator),
                                    num_processes=2, process_index=rank)  # fmt: skip
        rest = skip_first_batches(shard, 1)
        rest.set_epoch(1)  # as Trainer does
        (batch,) = rest
        assert batch["labels"].tolist() == ran.data_collator([rows[i] for i in expected[2 + rank]])["labels"].tolist()
    assert len(loader) == 4


def test_mixing_needs_ids_a_known_size_and_rows_of_one_task(tmp_path):
    rows = features()
    assert example_tasks([{"task_ids": [-1, 2, 2]}, {"task_ids": 1}]) == [2, 1]
    with pytest.raises(ValueError, match="packed from several tasks"):
        example_tasks([{"task_ids": [0, 1]}])
    bare = [{k: v for k, v in row.items() if k != "task_ids"} for row in rows]
    with pytest.raises(ValueError, match="needs a training dataset with a column task_ids"):
        trainer(tmp_path, adapted(), bare, arguments={"mixing": "equal"}).get_train_dataloader()
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match="join_tasks mixes iterable ones"):
        trainer(tmp_path, adapted(), stream, arguments={"mixing": "equal"})


def parts(iterable=False, sizes=(5, 9, 4)):
    names = ("a", "b", "c")
    whole = {
        name: datasets.Dataset.from_dict({"input_ids": [[3 + k, i] for i in range(size)]})
        for k, (name, size) in enumerate(zip(names, sizes, strict=True))
    }
    return {k: part.to_iterable_dataset() for k, part in whole.items()} if iterable else whole


def test_joined_datasets_number_their_tasks_in_order():
    joined, names = join_tasks(parts())
    assert names == ("a", "b", "c")
    assert joined["task_ids"] == [0] * 5 + [1] * 9 + [2] * 4
    assert all(row["input_ids"][0] == 3 + row["task_ids"] for row in joined)


def test_joined_streams_take_turns_in_groups_until_all_have_ended():
    rows = list(join_tasks(parts(iterable=True))[0])
    assert all(row["input_ids"][0] == 3 + row["task_ids"] for row in rows)
    groups = [[row["task_ids"] for row in rows[i : i + 2]] for i in range(0, len(rows), 2)]
    assert [group[0] for group in groups] == [i % 3 for i in range(len(groups))]
    assert all(group[0] == group[1] for group in groups)
    seen = {task: {row["input_ids"][1] for row in rows if row["task_ids"] == task} for task in range(3)}
    assert [len(seen[task]) for task in range(3)] == [4, 8, 4]  # whole groups only
    for batch in [rows[i : i + 4] for i in range(0, len(rows) - 3, 4)]:
        assert sorted(Counter(row["task_ids"] for row in batch).values()) == [2, 2]


@pytest.mark.parametrize("stop", [1, 2, 5, 8, 15])
def test_joined_streams_go_on_from_their_state(stop):
    rows = list(join_tasks(parts(iterable=True))[0])
    stream = join_tasks(parts(iterable=True))[0]
    reading = iter(stream)
    assert [next(reading) for _ in range(stop)] == rows[:stop]
    state = stream.state_dict()
    again = join_tasks(parts(iterable=True))[0]
    again.load_state_dict(state)
    assert list(again) == rows[stop:]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "a dataset for each task"),
        ({"train": parts()["a"], "test": parts()["b"]}, r"of splits take one, \['train'\]"),
        ({"a": parts()["a"], "b": parts(iterable=True)["b"]}, "make them all of one kind"),
    ],
)
def test_what_cannot_be_joined_is_refused(given, match):
    with pytest.raises(ValueError, match=match):
        join_tasks(given)
    with pytest.raises(ValueError, match="per_task must be at least 1"):
        join_tasks(parts(), per_task=0)


@pytest.mark.parametrize("iterable", [False, True])
def test_trainer_takes_a_dictionary_of_datasets_by_task(tmp_path, iterable):
    rows = features()
    given = {
        name: datasets.Dataset.from_list([{k: v for k, v in r.items() if k != "task_ids"} for r in rows[:6]])
        for name in ("first", "second", "third")
    }
    streams = {name: part.to_iterable_dataset() for name, part in given.items()} if iterable else given
    plain = trainer(tmp_path, adapted(), rows)
    ran = AlignTrainer(
        model=plain.model,
        args=plain.args,
        train_dataset=streams,
        eval_dataset=given,
        data_collator=TaskCollator(plain.data_collator.inner),
        mixing=None if iterable else "equal",
    )
    ran.train()
    assert logged(ran)[0]["align_loss"] > 0
    assert [name for name in logged(ran)[0] if name.startswith("loss/")] == ["loss/first", "loss/second", "loss/third"]
    metrics = ran.evaluate()
    for name in given:
        assert metrics[f"eval_{name}_loss/{name}"] == pytest.approx(metrics[f"eval_{name}_loss"], rel=1e-5)
    batch = next(iter(ran.get_train_dataloader()))
    assert torch.bincount(batch["task_ids"]).tolist() == [2, 2, 2]


@pytest.mark.parametrize("tasks", [[0.5, 1], [0, True], ["0", "1"], [0, None], [0, -2], torch.tensor([0.0, 1.0])])
def test_tasks_that_are_no_integers_are_refused(tasks):
    with pytest.raises(ValueError, match="task_ids must be integers"):
        TaskSampler(tasks, 4)
    with pytest.raises(ValueError, match="task_ids must be integers"):
        example_tasks([{"task_ids": [task, task]} for task in tasks])


def test_integers_of_numpy_and_torch_are_tasks():
    assert TaskSampler(torch.tensor([0, 1, -1]), 4).pools == TaskSampler(np.array([0, 1, -1]), 4).pools
