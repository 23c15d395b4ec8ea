"""Numbers of tasks: the most examples of each, and the weights of their shares in the batches."""

from collections import Counter

import pytest
from hf.runs import prepare, run
from hf.words import write_rows

from align_ext.data.task_sampler import TaskSampler
from align_ext.training import fit
from align_ext.training.options import TrainOptions


def options(**given):
    return TrainOptions.from_mapping(given)


@pytest.mark.parametrize(
    ("given", "stored", "numbers"),
    [
        (7, 7, (7, 7)),
        ("7", 7, (7, 7)),
        ("news=3", ("news=3",), (3, 500)),
        ("9, news=3", ("9", "news=3"), (3, 9)),
        ({"news": 3, "chat": 4}, ("news=3", "chat=4"), (3, 4)),
        (["a,b=2", "news=1"], ("a,b=2", "news=1"), (1, 500)),
        ("x=y=2", ("x=y=2",), (500, 500)),
    ],
)
def test_a_number_is_for_all_tasks_or_for_one(given, stored, numbers):
    made = options(train_examples=given)
    assert made.train_examples == stored
    assert tuple(made.train_counts.of(task) for task in ("news", "chat")) == numbers
    assert TrainOptions.from_mapping(made.to_dict()) == made


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_examples": 0}, "train_examples must be a positive integer, got 0"),
        ({"train_examples": "none"}, "train_examples must be a positive integer"),
        ({"train_examples": "news=0"}, "train_examples: '0' must be a positive integer"),
        ({"train_examples": "news="}, "train_examples must be pairs such as news=100,chat=2000"),
        ({"train_examples": "news=1,news=2"}, "train_examples: 'news' is there twice"),
        ({"train_examples": "1,2"}, "train_examples must be one number for all tasks"),
        ({"train_examples": 1.5}, "train_examples must be of type"),
        ({"mixing_weights": "news=-1"}, "mixing_weights: '-1' must be a positive number"),
        ({"mixing_weights": "news=nan"}, "must be a positive number"),
        ({"mixing_weights": "news=2", "mixing": "round_robin"}, "round_robin takes the tasks in turn"),
    ],
)
def test_a_wrong_number_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        options(**given)


def test_unknown_tasks_are_named_with_the_nearest(place):
    for name in ("train_examples", "mixing_weights"):
        with pytest.raises(ValueError, match=rf"{name}: unknown task 'nxt'; did you mean 'next'\?"):
            prepare(place, **{name: "nxt=2"})


def test_shares_follow_the_weights_times_the_mixing():
    tasks = [0] * 30 + [1] * 10 + [2] * 10
    shares = TaskSampler(tasks, 8, "equal", weights={0: 2}).shares
    assert shares == {0: 0.5, 1: 0.25, 2: 0.25}
    shares = TaskSampler(tasks, 8, "proportional", weights={1: 3, 2: 2}).shares
    assert shares == pytest.approx({0: 3 / 8, 1: 3 / 8, 2: 2 / 8})
    sampler = TaskSampler(tasks, 8, "equal", weights={0: 6, 1: 3, 2: 1}, batches=500, per_task=1)
    counts = Counter(tasks[i] for i in sampler)
    assert [counts[task] / 4000 for task in range(3)] == pytest.approx([0.6, 0.3, 0.1], abs=0.002)
    assert list(TaskSampler(tasks, 8)) == list(TaskSampler(tasks, 8, weights={}))
    for weights, mixing in (({0: 0}, "equal"), ({0: 1}, "round_robin")):
        with pytest.raises(ValueError, match="must be positive numbers, and round_robin has none"):
            TaskSampler(tasks, 8, mixing, weights=weights)


def test_a_run_takes_the_caps_and_weights_of_its_tasks(place):
    write_rows(place / "rows.jsonl", [{"task": t, "prompt": f"{t}{i}", "answer": t} for t in "ab" for i in range(20)])
    job = prepare(place, train_examples="a=3,b=9", mixing_weights={"b": 3}, per_task=1, align="none")
    assert Counter(x.task for x in job.data.train) == {"a": 3, "b": 9}
    assert fit.mixing(job)["weights"] == {0: 1.0, 1: 3.0}
    assert "weights" not in fit.mixing(prepare(place, output="plain"))
    arguments = fit.mixing(job)
    sampler = TaskSampler(arguments.pop("tasks"), **arguments)
    assert Counter(job.data.train[i].task for i in sampler) == {"a": 24, "b": 72}
    results, _ = run(place, train_examples="a=3", mixing_weights="b=3", output="ran", steps=1)
    assert results["data"]["tasks"]["a"]["train"]["left_out"]["beyond train_examples"] == 13
