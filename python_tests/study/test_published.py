import io

import pytest
import yaml
from rich.console import Console

from align_ext.model.cost import count_parameters, trained_parameters
from align_ext.study.design import parse
from align_ext.study.new import presets
from align_ext.study.published import meta_model, published, show


@pytest.fixture(scope="module")
def rows():
    return published()


def find(rows, table, method):
    return [row for row in rows if (row.table, row.method) == (table, method)]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("LLaMA-2-7B", 6_738_415_616), ("Qwen2.5-3B", 3_085_938_688), ("Qwen2.5-7B", 7_615_616_512)],
)
def test_the_models_have_the_sizes_that_their_makers_state(name, parameters):
    model = meta_model(name)
    assert count_parameters(model).total == parameters
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_count_by_hand(rows):
    """HydraLoRA on q and v of LLaMA-2-7B: A [16, 4096], 16 heads B [4096, 16], router [16, 4096], 64 layers."""
    millions, share = find(rows, "ablation", "HydraLoRA")
    assert millions.parameters == 64 * (16 * 4096 + 16 * 4096 * 16 + 16 * 4096) == 75_497_472
    assert share.counted == pytest.approx(100 * 75_497_472 / (75_497_472 + 6_738_415_616))
    # A block: the same sizes, one a layer. A second group of the router is 16 x 4096 more.
    assert find(rows, "ablation", "+ block")[0].parameters == 75_497_472 // 2
    assert find(rows, "ablation", "all: mtLoRA")[0].parameters == 75_497_472 // 2 + 32 * 16 * 4096


def test_flops_by_hand(rows):
    """A token takes 2 operations per weight of the linear layers, 64 of which have adapters."""
    (row,) = find(rows, "Table 6", "HydraLoRA")
    base = 2 * (6_738_415_616 - 32000 * 4096 - 65 * 4096)  # without the embedding and the norms
    hydra, lora = (2 * 64 * 4096 * (16 + routed + heads * 16) for routed, heads in ((16, 16), (0, 1)))
    assert row.counted == pytest.approx((base + hydra) / (base + lora), rel=1e-12)


def test_what_agrees_and_what_does_not(rows):
    """The rows that are stated not to agree; all others agree to the digits printed."""
    off = {(row.table, row.method, row.options["r"], row.options.get("num_heads")) for row in rows if not row.agrees}
    assert off == {
        ("Table 1", "heads and router", 4, 5),
        ("Table 1", "heads and router", 4, 3),
        ("Table 1", "heads", 4, 5),
        ("Table 2", "LoRA, larger rank", 30, None),
        ("Table 3", "heads and router", 4, 10),
        ("Table 3", "heads", 4, 10),
        ("Tables 5, 6", "Align-LoRA", 8, None),
        ("Table 6", "HydraLoRA", 16, 16),
    }
    for row in rows:
        digits = len(row.printed.partition(".")[2])
        assert row.agrees == (abs(row.counted - float(row.printed)) <= 0.5 * 10**-digits)


def test_three_heads_instead_of_five_or_ten(rows):
    for table, method, named, fewer in (
        ("Table 1", "heads and router", 0.715, 0.458),
        ("Table 1", "heads", 0.628, 0.406),
        ("Table 3", "heads and router", 0.739, 0.250),
        ("Table 3", "heads", 0.644, 0.221),
    ):
        counted = [round(row.counted, 3) for row in find(rows, table, method)]
        assert counted == [named, fewer]


def test_the_tables_show_every_row(rows):
    text = io.StringIO()
    show(Console(file=text, width=120))
    lines = text.getvalue().splitlines()
    assert sum("yes" in line.split() or "no" in line.split() for line in lines) == len(rows) == 23
    assert "15 of 23 agree to the digits printed" in text.getvalue()
    assert any(line.split()[:3] == ["ablation", "all:", "mtLoRA"] and "39.8 M" in line for line in lines)


def test_another_model_is_named():
    with pytest.raises(ValueError, match="name='GPT-2' is no model of the papers: give one of LLaMA-2-7B"):
        meta_model("GPT-2")


def test_the_preset_of_the_ablation_trains_what_the_paper_prints():
    study, model = parse(yaml.safe_load(presets()["mtlora-ablation"])), meta_model("LLaMA-2-7B")
    first = {cell.arm: study.options_of(cell) for cell in reversed(list(study.cells()))}
    trained = {arm: trained_parameters(options.adapter_config(25), model) / 1e6 for arm, options in first.items()}
    assert {arm: round(millions, 1) for arm, millions in trained.items()} == {
        "hydra": 75.5, "block": 37.7, "block_spectral": 37.7, "block_groups": 39.8, "uniform": 39.8, "mtlora": 39.8,
    }  # fmt: skip
