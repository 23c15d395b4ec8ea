"""align-lora bench: its baselines compute what they say, its ratios are right, and every suite runs."""

import json
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from align_ext import cli, reference
from align_ext.bench import layers, losses, models, plots, run, step
from align_ext.bench.baselines import ALPHA, LORA, SEVERAL, ConcatenatedHeads, LoopedHeads, Sizes
from align_ext.bench.setting import Case, Setting
from align_ext.bench.timing import Comparison, Goal, measure, visits

SMALL = Sizes(tokens=7, rank=3, heads=4, dropout_p=0.0)
TINY = Setting(sizes=SMALL, model="tiny", batch=5, seq_len=6)


def of_kind(kind, site, router, sizes=SMALL):
    torch.manual_seed(0)
    base = nn.Linear(11, 6, bias=False, dtype=torch.float64).requires_grad_(False)
    return kind(base, sizes, torch.float64, site=site, router=router)


@pytest.mark.parametrize("kind", [LoopedHeads, ConcatenatedHeads])
@pytest.mark.parametrize("site", ["input", "latent"])
@pytest.mark.parametrize("router", [True, False], ids=["router", "sum"])
def test_a_baseline_computes_the_reference_and_its_gradients(kind, site, router):
    layer, x = of_kind(kind, site, router), torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    options = {"weight": layer.base.weight, "site": site}
    if router:
        expected = reference.routed_lora(x, layer.lora_A, layer.lora_B, layer.lora_R, ALPHA / 3, **options)[0]
    else:
        expected = reference.dropout_sum(x, layer.lora_A, layer.lora_B, ALPHA / 3, **options)[0]
    y, dy = layer(x), torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy))


@pytest.mark.parametrize("site", ["input", "latent"])
@pytest.mark.parametrize("router", [True, False], ids=["router", "sum"])
def test_the_restructured_backward_is_right_under_dropout(site, router):
    layer = of_kind(ConcatenatedHeads, site, router, Sizes(7, 3, 4, 0.4))
    parameters = dict(layer.named_parameters())
    names = [name for name in parameters if name.startswith("lora_")]

    def call(x, *values):
        torch.manual_seed(1)
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    assert gradcheck(call, (x, *(parameters[name] for name in names)))


def test_the_losses_in_plain_pytorch_are_those_of_the_reference():
    z, tasks = torch.randn(24, 5, dtype=torch.float64, requires_grad=True), 3
    task = torch.arange(tasks).repeat_interleave(8)
    expected = reference.gaussian_kl(z, task, tasks), reference.mk_mmd(z, task, tasks)
    actual = losses.kl_in_closed_form(z, task, tasks), losses.mmd_by_pairs(z, tasks)
    by_products = losses.mmd_by_pairs(z, tasks, losses.by_products)
    for loss, exact in zip((*actual, by_products), (*expected, expected[1]), strict=True):
        torch.testing.assert_close(loss, exact)
        torch.testing.assert_close(torch.autograd.grad(loss, z, retain_graph=True),
                                   torch.autograd.grad(exact, z, retain_graph=True))  # fmt: skip


def test_ratios_are_to_the_baselines_of_each_time_and_goals_look_at_their_median():
    times = {"base": [1.0, 2.0, 4.0], "ours": [2.0, 2.0, 12.0], "other": [9.0, 9.0, 9.0]}
    goals = {"ours": Goal(2), "base": Goal(1.5, at_least=True), "other": Goal(9, in_ms=True)}
    comparison = Comparison(times, goals=goals, baselines={"ours": [(1, 1), (2,), (4, 4)], "other": [(3,), (9,), (1,)]})
    assert comparison.ratios("ours") == (2, 2, 3)  # of 2, 2, 1, 3, 3
    assert comparison.ratios("other") == (2, 3, 6)
    assert [comparison.reaches(name) for name in times] == [False, True, True]


def test_variants_take_turns_and_the_first_one_is_called_before_and_after_every_four():
    calls = []
    measure({name: lambda n=name: calls.append(n) for name in "ab"}, 3, "cpu", repeats=2)
    assert "".join(calls) == "ab" + "aa" + "bbaa" * 3
    calls.clear()
    measure({name: lambda n=name: calls.append(n) for name in "abcdefg"}, 2, "cpu")
    assert "".join(calls) == "abcdefg" + "a" + "bcdeafga" * 2


def test_ratios_are_to_the_first_variants_times_before_and_after(monkeypatch):
    seconds = iter([1, 1, 2, 9, 4, 12, 8])  # warm-up of both, then a b a b a
    now = 0.0

    def call():
        nonlocal now
        now += next(seconds) / 1e3

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    result = measure({"a": call, "b": call}, 2, "cpu")
    assert result.times_ms == {"a": pytest.approx([2, 4, 8]), "b": pytest.approx([9, 12])}
    assert result.baselines["b"] == [pytest.approx((2, 4)), pytest.approx((4, 8))]
    assert result.ratios("b") == pytest.approx((2.0625, 2.625, 3.375))  # of 9/2, 9/4, 12/4, 12/8
    assert result.ratios("a") == (1, 1, 1)
    assert result.per(2).times_ms["b"] == pytest.approx([4.5, 6])
    assert result.per(2).ratios("b") == pytest.approx(result.ratios("b"))


def test_a_short_call_is_repeated_until_its_row_takes_long_enough(monkeypatch):
    now, called = 0.0, []

    def call(name, seconds):
        nonlocal now
        now += seconds
        called.append(name)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    calls = {"short": lambda: call("short", 0.002), "long": lambda: call("long", 0.03)}
    times = measure(calls, 3, "cpu", row_ms=10).times_ms
    assert called == ["short", "long"] * 2 + ["short"] * 5 + (["long"] + ["short"] * 5) * 3
    assert times == {"short": pytest.approx([2] * 4), "long": pytest.approx([30] * 3)}


def test_a_visit_has_one_round_at_least_and_adds_to_those_before():
    taken = visits(dict.fromkeys("ab", lambda: None), 9, "cpu", seconds=lambda: 0.0)
    assert [len(next(taken).times_ms["b"]) for _ in range(3)] == [1, 2, 3]
    twice = visits(dict.fromkeys("ab", lambda: None), 9, "cpu", least=2, seconds=lambda: 0.0)
    assert [len(next(twice).times_ms["b"]) for _ in range(2)] == [2, 4]


def test_an_interrupted_round_leaves_ratios_that_can_be_computed():
    calls = 0

    def call():
        nonlocal calls
        calls += 1
        if calls == 10:  # three to warm up, four of the first visit, then a, b and c
            raise KeyboardInterrupt

    taken = visits(dict.fromkeys("abc", call), 1, "cpu")
    found = next(taken)
    with pytest.raises(KeyboardInterrupt):
        next(taken)
    assert all(low > 0 for low, _, _ in map(found.ratios, "abc"))
    assert len(found.times_ms["b"]) == len(found.times_ms["c"]) == 1


def test_visits_to_one_comparison_lie_between_those_to_others_and_whole_steps_are_one(monkeypatch):
    order = []

    def case(title, count):
        def visit(_):
            for done in range(count):
                order.append(title)
                yield Comparison({"base": [1.0] * (done + 1)})

        return Case("a table", title, visit)

    monkeypatch.setattr(run, "SUITES", {"some": lambda _: iter([case("a", 3), case("b", 1)])})
    results, left_out = run.run(["some"], Setting(visits=3))
    assert left_out == []
    assert order == ["a", "b", "a", "a"]
    assert {title: len(c.times_ms["base"]) for title, c in results.items()} == {"a table: a": 3, "a table: b": 1}
    order.clear()
    assert run.run(["some"], Setting(visits=3, seconds=0)) == ({}, ["a table: a", "a table: b"])  # no time at all
    assert order == []


def test_a_comparison_whose_round_would_take_too_long_is_left_out(monkeypatch, capsys):
    shape, dtype = (16, 24), torch.float32
    monkeypatch.setattr(layers, "frozen_seconds", lambda *_: 1e-3)
    assert [layers.takes_too_long(Setting(seconds=30), 4, tokens, shape, dtype) for tokens in (250, 251)] == [
        False,
        True,
    ]
    outcome = run.run(["restructured"], Setting(shapes=(shape,), dtypes=(dtype,), batches=(8, 2000), visits=1))
    assert [title.partition(": ")[2] for title in outcome.results] == ["T=8, 16 -> 24, float32"]
    assert [title.partition(": ")[2] for title in outcome.left_out] == ["T=2000, 16 -> 24, float32"]
    lines = " ".join(capsys.readouterr().out.split())
    assert "one round takes more than 15 s here (--full: 110 s): restructured" in lines


def test_the_time_of_a_run_is_shared_among_the_visits_that_are_left(monkeypatch):
    now, shares = 0.0, []

    def suite(setting):
        def visit(title, seconds):
            def visits(_):
                nonlocal now
                while True:
                    shares.append((title, setting.share()))
                    now += seconds
                    yield Comparison({"base": [1.0]})

            return visits

        yield Case("a table", "slow", visit("slow", 30))
        yield Case("a table", "fast", visit("fast", 2))

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(run, "SUITES", {"some": suite})
    run.run(["some"], Setting(visits=2, seconds=80))
    assert shares == [("slow", 20), ("fast", 50 / 3), ("slow", 24), ("fast", 18)]


def test_an_interrupted_run_shows_and_keeps_what_it_has(monkeypatch, capsys, tmp_path):
    def visit(_):
        yield Comparison({"base": [1.0], "ours": [3.0]}, baselines={"ours": [(1.0, 1.0)]})
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "SUITES", {"some": lambda _: iter([Case("a table", "a column", visit)])})
    with pytest.raises(KeyboardInterrupt):
        run.run(["some"], Setting(visits=3), tmp_path / "all.json")
    assert "a table" in (out := capsys.readouterr().out)
    assert "3.000 .. 3.000" in out
    assert json.loads((tmp_path / "all.json").read_text())["a table: a column"]["times_ms"]["ours"] == [3]


@pytest.mark.parametrize("variant", [v for v in models.variants("every") if "compiled" not in v])
def test_every_variant_trains_a_model(variant):
    if variant.startswith("PEFT"):
        pytest.importorskip("peft")
    step.make_step(step.work(TINY, variant, "bfloat16"))()
    model = models.adapt(models.frozen_model("tiny", torch.float32, "cpu"), variant, SMALL)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert bool(trained) == (variant != models.FROZEN)
    assert all("lora" in name for name in trained)


def test_a_process_says_why_it_ended():
    with (
        pytest.raises(RuntimeError, match="'nothing' ended: KeyError: 'nothing'"),
        step.Process(step.work(TINY, "nothing", "float32")),
    ):
        pass


def test_the_steps_for_which_a_run_has_no_time_are_named(monkeypatch, capsys):
    monkeypatch.setattr(models, "variants", lambda _: [models.FROZEN, "lora", "r_lora", "hydra"])
    monkeypatch.setattr(step, "TOGETHER", 1)
    monkeypatch.setattr(step, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(run, "SUITES", {"step": lambda how: step.step(replace(how, share=lambda: 0.0))})
    run.run(["step"], replace(TINY, step_rounds=1, visits=1))
    lines = " ".join(capsys.readouterr().out.split())
    assert "more time): whole step, tiny model, 5 x 6 tokens, r=3, N=4: bfloat16: r_lora, hydra" in lines


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path):
    """Runs align-lora bench: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["align-lora", "bench", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


def test_every_suite_runs_and_writes_what_it_measured(bench, tmp_path):
    code, out, _ = bench("--quick", "--device", "cpu", "--json", "all.json")
    assert code == 0
    results = json.loads((tmp_path / "all.json").read_text())
    assert results.pop("written_by") == "align-lora bench"
    assert out.startswith(results.pop("machine"))
    for title, comparison in results.items():
        assert title in out
        assert comparison["goals"] == {}
        assert all(len(times) >= 3 for times in comparison["times_ms"].values())
    kinds = {title.split(",")[0].split(" M=")[0] for title in results}
    assert kinds >= {
        "restructured",
        "one adapter",
        "several heads",
        "gaussian_kl",
        "mk_mmd",
        "dropout of x",
        "whole step",
        "decoding",
    }
    heads = next(c["times_ms"] for title, c in results.items() if title.startswith("several heads"))
    assert {*SEVERAL, "r_lora", "r_lora, offset", "lora_moe", "mtlora", "hydra, input_per_head"} <= heads.keys()
    whole = next(c for title, c in results.items() if title.startswith("whole step"))
    assert whole["peak_mib"].keys() == whole["times_ms"].keys() == {models.FROZEN, "r_lora"}
    assert len(set(whole["peak_mib"].values())) > 1  # each its own, not that of the process which started it
    lines = plots.points({title: Comparison(**c) for title, c in results.items()})
    assert lines.keys() == {"tokens", "rank", "heads", "tasks"}
    assert [value for value, *_ in lines["heads"]["r_lora"]] == [1, 2, 4, 8, 16]


def test_a_sweep_becomes_a_plot_with_a_panel_for_each_axis(tmp_path):
    matplotlib = pytest.importorskip("matplotlib.figure") and sys.modules["matplotlib"]
    times = {"frozen": [1.0, 1.0, 2.0], "ours": [2.0, 3.0, 2.0]}
    frozen = {"ours": [(ms,) for ms in times["frozen"]]}
    results = {
        f"{axis} {x}": Comparison(times, baselines=frozen, point=(axis, x))
        for axis in ("rank", "tasks")
        for x in (1, 2)
    }
    assert plots.points(results)["rank"] == {"ours": [(1, 1.5, 2, 2.5), (2, 1.5, 2, 2.5)]}
    assert plots.points(results)["tasks"].keys() == times.keys()
    with pytest.raises(ValueError, match="the ending must be one of"):
        plots.check(tmp_path / "sweep.doc")
    for name in ("sweep.svg", "sweep.png", "sweep.pdf"):
        plots.write(tmp_path / name, results, "a machine")
        plots.check(tmp_path / name)  # the next one may take its place
    assert (tmp_path / "sweep.svg").read_text().lstrip().startswith("<?xml")
    matplotlib.figure.Figure().savefig(tmp_path / "mine.png")
    plots.write(tmp_path / "sweep.jpg", results, "a machine")
    for name in ("mine.png", "sweep.jpg"):  # the latter holds nothing that tells it
        with pytest.raises(ValueError, match="is no such result, and would be lost"):
            plots.check(tmp_path / name)


def test_without_matplotlib_a_plot_is_refused_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plots.check(tmp_path / "sweep.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "layers,haeds"], "did you mean 'heads'?"),
        (["--only", ","], "names no suite"),
        (["--quick", "--full"], "not both"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--check", "--only", "layers"], "--check is about the suite restructured, which --only layers leaves out"),
        (["elsewhere"], "'elsewhere' is the folder of --save"),
        (["--quick", "--save"], "--quick measures nothing worth keeping"),
        (["--save", "absent"], "cannot be written: No such file"),
        (["--json", "absent/all.json"], "json='absent/all.json' cannot be written: No such file"),
        (["--only", "decode", "--model", "/absent"], "no model folder '/absent'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_measured(bench, arguments, message, tmp_path):
    code, _, err = bench(*arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_times_replace_earlier_times_and_no_other_file(bench, tmp_path):
    (tmp_path / "notes.json").write_text('{"machine": "mine"}')
    code, _, err = bench("--quick", "--json", "notes.json")
    assert (code, (tmp_path / "notes.json").read_text()) == (2, '{"machine": "mine"}')
    assert "is no such result, and would be lost: name another" in err
    assert err.count("\n") == 1
    for _ in range(2):
        assert bench("--quick", "--device", "cpu", "--only", "dispatch", "--json", "all.json")[0] == 0


def test_the_help_explains_every_suite_and_what_a_ratio_is(bench):
    code, out, _ = bench("--help")
    assert code == 0
    assert "1.10 means that" in " ".join(out.split())
    for suite in run.SUITES:
        assert f"  {suite}: " in out


@pytest.mark.slow
def test_a_quantised_base_is_measured_when_it_is_asked_for(bench, tmp_path):
    assert {*run.SUITES} - {*run.chosen(None)} == {"quantised"}
    code, out, _ = bench("--quick", "--device", "cpu", "--only", "quantised", "--json", "all.json")
    assert code == 0
    results = json.loads((tmp_path / "all.json").read_text())
    (measured,) = (value for value in results.values() if isinstance(value, dict))
    assert measured["peak_mib"].keys() == measured["times_ms"].keys() > {models.FROZEN}
    assert "in nf4" in out


@pytest.mark.parametrize("name", [*LORA, *SEVERAL])
def test_a_baseline_drops_nothing_out_in_evaluation(name):
    if name.startswith("PEFT"):
        pytest.importorskip("peft")
    x = torch.randn(5, 11)
    layer = (LORA | SEVERAL)[name](nn.Linear(11, 6, bias=False), Sizes(dropout_p=0.5), torch.float32)
    assert torch.equal(layer.eval()(x), layer(x))


def test_one_head_is_plain_lora():
    x, base = torch.randn(5, 11), nn.Linear(11, 6, bias=False)
    for name in ("plain PyTorch LoRA", "LoRA, restructured"):
        layer = LORA[name](base, SMALL, torch.float32)
        expected = base(x) + ALPHA / SMALL.rank * x @ layer.lora_A.T @ layer.lora_B[0].T
        torch.testing.assert_close(layer(x), expected)
