"""The design of a study: what study.yaml may say, its cells and their options, and errors that name the cure."""

import re
from pathlib import Path

import pytest
import yaml

from align_ext.study.design import Cell, parse
from align_ext.study.new import new_study, presets

DESIGN = """
train: {steps: 4, batch_size: 4}
arms:
  lora: {architecture: lora}
  align: {architecture: align_lora, lr: 1e-3}
  shuffled: {architecture: align_lora, control: shuffled_ids}
  zero: {architecture: align_lora, control: weight_zero}
  l2: {architecture: align_lora, control: l2}
"""


def study(text="", **changed):
    return parse(yaml.safe_load(DESIGN + text) | changed)


def test_cells_come_seed_by_seed_and_an_axis_of_the_weight_is_for_arms_that_align():
    cells = list(study(seeds=[5, 3], vary={"align_weight": [0.1, 0.2]}).cells())
    labels = [
        "lora-s5",
        "align-align_weight=0.1-s5",
        "align-align_weight=0.2-s5",
        *(f"{name}-align_weight={weight}-s5" for name in ("shuffled",) for weight in (0.1, 0.2)),
        "zero-s5",
        *(f"l2-align_weight={weight}-s5" for weight in (0.1, 0.2)),
    ]
    assert [cell.label for cell in cells] == labels + [label.replace("s5", "s3") for label in labels]


def test_an_alignment_that_all_arms_share_is_varied_too():
    made = study(train={"align": "mmd"}, arms={"lora": {"architecture": "lora"}}, seeds=[0],
                 vary={"align_weight": [0.1, 0.2]})  # fmt: skip
    assert [cell.label for cell in made.cells()] == ["lora-align_weight=0.1-s0", "lora-align_weight=0.2-s0"]
    assert made.align_of(made.arms[0]) == "mmd"


def test_options_of_a_cell_are_those_of_all_then_of_the_arm_then_of_the_axis():
    made = study(vary={"lr": [1e-4]}, equal={"scaling": 3.0})
    options = made.options_of(Cell("align", 7, {"lr": 1e-4}))
    assert (options.lr, options.steps, options.seed, options.order_seed, options.log_steps) == (1e-4, 4, 7, 7, 1)
    assert study().options_of(Cell("align", 7)).lr == 1e-3
    for changed in ({}, {"r": 12}, {"r": 9, "use_rslora": True}):
        assert made.options_of(Cell("lora", 0), **changed).adapter_config(2).scaling == pytest.approx(3.0)
    assert study().options_of(Cell("zero", 0)).adapter["align_weight"] == 0
    assert study().options_of(Cell("l2", 0)).adapter["align"] == "l2"


def test_a_number_on_the_axis_of_tasks_takes_the_first_so_many_with_equal_steps_for_each():
    made = study(train={"tasks": ["c", "a", "b"]}, vary={"tasks": [2, 3]}, steps_per_task=10)
    options = [made.options_of(cell) for cell in list(made.cells())[:2]]
    assert [(option.tasks, option.steps) for option in options] == [(("c", "a"), 20), (("c", "a", "b"), 30)]


def test_steps_for_each_task_count_the_tasks_that_are_named_in_a_text():
    made = study(train={"tasks": "next, threes"}, steps_per_task=10, study=None, question=None)
    assert made.options_of(next(made.cells())).steps == 20
    assert (made.name, made.question) == ("study", "")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arms": {}}, "arms is empty: name at least one"),
        ({"armz": {}}, "unknown option of the design 'armz'; did you mean 'arms'"),
        (
            {"arms": {"a": {"architecture": "hydr"}}},
            "arms.a.architecture: unknown architecture 'hydr'; did you mean 'hydra'",
        ),
        ({"arms": {"a": {"learning_rate": 1}}}, "arm 'a': unknown option 'learning_rate'; did you mean 'lr'"),
        ({"arms": {"a": {"rank": 1}}}, "arm 'a': unknown option 'rank'; did you mean 'r'? (known: control, "),
        ({"train": {"alpha": 1}}, "train: unknown option 'alpha'; did you mean 'lora_alpha'?"),
        ({"arms": []}, "arms must be a mapping of names to values, as {lora: {architecture: lora}}, got []"),
        ({"arms": {"a": 8}}, "arm 'a' must be a mapping of names to values, as {architecture: lora}, got 8"),
        ({"train": {"lr": -1}}, "train.lr must be a positive number, at most 1000, got -1"),
        ({"arms": {"a": {"lr": -1}}}, "arms.a.lr must be a positive number, at most 1000, got -1"),
        ({"train": {"architecture": "hydr"}, "arms": {"a": {}}}, "train.architecture: unknown architecture 'hydr'"),
        ({"arms": {"a": {"seed": 1}}}, "arm 'a': seed is the study's own, the same for all cells"),
        ({"arms": {"base": {}}}, "the arm's name 'base' must be"),
        ({"arms": {"a/b": {}}}, "the arm's name 'a/b' must be"),
        ({"arms": {"a": {"control": "shuffled"}}}, "arm 'a': unknown control 'shuffled'; did you mean 'shuffled_ids'"),
        ({"arms": {"a": {"architecture": "lora", "control": "l2", "align": None}}, "seeds": [0]}, None),
        ({"arms": {"a": {"architecture": "lora", "control": "shuffled_ids"}}}, "the arm aligns nothing to control for"),
        ({"seeds": [2, 1, 1]}, "seeds must be different integers in 0 .. 2**32-1, got 1 twice in [2, 1, 1]"),
        ({"seeds": [0, -1]}, "seeds must be different integers in 0 .. 2**32-1, got -1 in [0, -1]"),
        ({"seeds": 3}, "seeds must be a list of values, as [0, 1, 2], got 3"),
        ({"choose": 3}, "choose must be a list of names, got 3"),
        ({"train": {"tasks": 3}, "steps_per_task": 5}, "train.tasks must be a list of names, got 3"),
        ({"score": {"generate": 3}}, "score.generate must be a list of names, got 3"),
        ({"choose": ["lr"]}, "unknown axis to choose 'lr'"),
        ({"vary": {"lr": [1e-3]}, "choose": ["lr"]}, "needs rows to choose on: set score.dev"),
        ({"vary": {"lr": []}}, "vary.lr must be a list of values"),
        ({"vary": {"lr": [1e-3, 1e-4, 1e-3]}}, "vary holds the same value twice: the cells"),
        ({"train": {"tasks": "a,b"}, "vary": {"tasks": [3]}}, "vary.tasks: 3 must be a number of the 2 tasks"),
        ({"train": {"tasks": "a,b"}, "vary": {"tasks": [0]}}, "vary.tasks: 0 must be a number of the 2 tasks"),
        ({"train": {}, "steps_per_task": 2}, "steps_per_task needs the names of the tasks: set train.tasks"),
        ({"vary": {"lr": [-1.0]}}, "vary.lr must be a positive number, at most 1000, got -1"),
        ({"score": {"test": 0}}, "score.test must be a positive integer, got 0"),
        ({"score": {"unseen": {"examples": 0}}}, "score.unseen.examples must be a positive integer, got 0"),
        ({"equal": {"scaling": -1}}, "equal.scaling must be a number >= 0, got -1"),
        ({"equal": {"parameters": {"r": 0}}}, "equal.parameters.r must be"),
        ({"score": {"unseen": {"taskz": ["a"]}}}, "unknown option of score.unseen 'taskz'; did you mean 'tasks'"),
        ({"compare": {"with": "lore"}}, "compare.with: unknown baseline arm 'lore'; did you mean 'lora'"),
        ({"compare": {"margin": "2%"}}, "compare.margin must be a positive number, got '2%'"),
        ({"compare": {"margin": 0}}, "compare.margin must be a positive number, got 0"),
        ({"score": {"probe": 0}}, "arm 'l2': control=l2 pulls as strongly as the alignment does on the probe"),
        ({"equal": {"parameters": "hydra"}}, "equal.parameters must be a number of parameters or options"),
        ({"train": {"output": "x"}}, "train: output is the study's own"),
        ({"arms": {"a": {"batch-size": 8}}}, "arm 'a': batch-size makes the batches, which all arms share"),
        ({"vary": {"lr": ["1e-3", 1e-3]}}, "vary holds the same value twice: the cells lora-lr=1e-3-s0 and"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_the_nearest_word(changed, message):
    if message is None:
        study(**changed)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        study(**changed)


def test_the_preset_methods_has_every_method_that_the_guide_names():
    text = (Path(__file__).parents[2] / "docs/guide/architectures.md").read_text()
    table = text.split("## By the names in the papers")[1].split("\n## ")[0]
    named = {word for row in re.findall(r"^\| [^|]+ \| ([^|]+) \|", table, re.M) for word in re.findall("`(.+?)`", row)}
    flags = {"--use-dora": {"use_dora": True}, "--init-lora-weights pissa": {"init_lora_weights": "pissa"}}
    arms = [arm.options for arm in parse(yaml.safe_load(presets()["methods"])).arms]
    assert len(named) > 12
    for name in named:
        wanted = flags.get(name, {"architecture": name}).items()
        assert any(wanted <= options.items() for options in arms), name


def test_every_preset_is_a_valid_design_that_asks_a_question(tmp_path):
    assert set(presets()) >= {
        "quick", "five-tasks", "eight-tasks", "unseen", "lambda", "rank", "attention-only", "align-on-heads",
        "mtlora-ablation", "collapse", "methods",
    }  # fmt: skip
    for name, text in presets().items():
        made = parse(yaml.safe_load(text))
        assert made.question.endswith("?")
        assert len(list(made.cells())) >= 9
        assert new_study(tmp_path / name, name).read_text() == text
    with pytest.raises(ValueError, match="exists: edit it, or name another folder"):
        new_study(tmp_path / "quick", "quick")
    with pytest.raises(ValueError, match="unknown preset 'quik'; did you mean 'quick'"):
        new_study(tmp_path / "other", "quik")
