"""The mechanism of a study: its keys by architecture, JSON, the same bytes, the functions that it is made of."""

import json
import math

import pytest
import torch
from architectures import ARCHITECTURES, config_of
from recordings import UP, adapters, of_architecture, untrained, with_tasks
from tiny import TASKS, adapted, llama

from align_ext import replace_linear_with_align_lora
from align_ext.diagnostics.bands import gradient_bands, head_bands
from align_ext.diagnostics.conflict import gradient_cosines
from align_ext.diagnostics.cosines import pairs
from align_ext.diagnostics.heads import copy_heads, head_similarity
from align_ext.diagnostics.latents import task_divergence
from align_ext.diagnostics.record import record_adapters
from align_ext.diagnostics.routing import routing
from align_ext.study import mechanism as module
from align_ext.study.mechanism import mechanism

NAMES = ["addition", "spelling", "dates"]
OF_ALL = {"divergence", "latents", "conflict", "bands"}
KEYS = {
    "lora": OF_ALL,
    "align_lora": OF_ALL,
    "multi_adapter": OF_ALL | {"heads"},
    "m_lora": OF_ALL | {"heads"},
    "hydra": OF_ALL | {"heads", "routing"},
    "r_lora": OF_ALL | {"heads", "routing"},
    "lora_moe": OF_ALL | {"heads", "routing"},
    "mtlora": OF_ALL | {"heads", "routing"},
    "multilora": OF_ALL | {"heads"},
    "moelora": OF_ALL | {"heads"},
    "mtlora_cvpr": OF_ALL | {"heads"},
    "nlora": OF_ALL,
    "malora": OF_ALL | {"heads", "routing"},
    "mixlora": OF_ALL | {"heads", "routing"},
    "adalora": OF_ALL,
}


def batches():
    return [with_tasks(0), with_tasks(1)]


def numbers(value):
    if isinstance(value, dict):
        return [x for part in value.values() for x in numbers(part)]
    if isinstance(value, list):
        return [x for part in value for x in numbers(part)]
    return [] if isinstance(value, str) else [value]


@pytest.mark.parametrize("architecture", KEYS)
def test_each_architecture_has_the_keys_that_apply_and_bytes_of_its_own(architecture):
    texts = set()
    for _ in range(2):
        model = of_architecture(architecture)
        found = mechanism(model, batches(), NAMES)
        texts.add(json.dumps(found, allow_nan=False))
    assert set(found) == KEYS[architecture]
    assert len(texts) == 1
    assert json.loads(texts.pop()) == found
    assert all(type(x) in (int, float) and math.isfinite(x) for x in numbers(found))
    assert all(x == float(f"{x:.6g}") for x in numbers(found))
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("name", ["mtlora, blocks", "mtlora, by sequence", "lora, pissa", "hydra without router"])
def test_other_forms_of_an_architecture_have_a_mechanism_too(name):
    model = llama()
    replace_linear_with_align_lora(model, config_of(name))
    found = mechanism(model, batches(), NAMES)
    assert set(found) >= OF_ALL - {"bands"}
    if name == "mtlora, blocks":
        assert list(found["conflict"]["component"]) == list(found["routing"]["entropy"]) == ["self_attn", "mlp"]
        assert list(found["conflict"]["block"]) == ["attention", "mlp"]
    assert name in ARCHITECTURES


def test_heads_latents_and_divergence_are_those_of_the_functions():
    model = of_architecture("hydra")
    found, recording = mechanism(model, batches(), NAMES), record_adapters(model, batches())
    assert list(found["heads"]) == ["gate_proj", "up_proj", "down_proj"]
    expected = [float(pairs(head_similarity(model)[f"model.layers.{i}.mlp.up_proj"]).mean()) for i in range(2)]
    assert found["heads"]["up_proj"] == pytest.approx(expected, rel=1e-5)
    assert (found["divergence"]["tasks"], found["divergence"]["dimensions"]) == (NAMES, 4)
    torch.testing.assert_close(torch.tensor(found["divergence"]["kl"]), task_divergence(recording).float())
    latents = found["latents"]
    assert latents["layer"] == "model.layers.1.mlp.gate_proj"
    assert sorted(latents["labels"]) == [0] * 4 + [1] * 4 + [2] * 4
    assert len(latents["points"]) == 12
    assert latents["probe_chance"] == pytest.approx(1 / 3, rel=1e-5)
    assert 0 <= latents["probe_accuracy"] <= 1


def test_the_change_of_heads_is_there_where_their_start_is_given():
    model = of_architecture("r_lora")
    start = copy_heads(model)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B += 1e-3 * torch.tensor([1.0, 1.0, -1.0])[:, None, None]
    found = mechanism(model, batches(), NAMES, start)
    assert found["heads_change"]["down_proj"] == pytest.approx([-1 / 3, -1 / 3], rel=1e-3)
    assert max(map(abs, found["heads"]["down_proj"])) < 0.2
    assert found["bands"]["bands"] == ["1"]  # all heads have learned one direction
    assert found["bands"]["alignment"] == pytest.approx([1.0], rel=1e-3)
    assert "heads_change" not in mechanism(model, batches(), NAMES)


def test_conflict_is_the_share_of_negative_cosines_with_the_mean_beside_it():
    model = adapted()
    found = mechanism(model, batches(), NAMES)["conflict"]
    recording = record_adapters(model, batches(), gradients=True)
    for level, kinds in (("component", ["gate_proj", "up_proj", "down_proj"]), ("block", ["mlp"])):
        matrices = gradient_cosines(recording, level)
        assert list(found[level]) == list(found["cosine"][level]) == kinds
        for kind in kinds:
            cosines = torch.cat([pairs(m) for name, m in matrices.items() if name.endswith(kind)])
            assert len(cosines) == 2 * TASKS
            assert found[level][kind] == pytest.approx(float((cosines < 0).double().mean()), rel=1e-5)
            assert found["cosine"][level][kind] == pytest.approx(float(cosines.mean()), rel=1e-4)


def test_bands_are_of_gradients_for_one_adapter_and_of_heads_for_several():
    for model in (adapted(), of_architecture("lora_moe")):
        found = mechanism(model, batches(), NAMES)["bands"]
        several = model.align_state.config.architecture == "lora_moe"
        recording = record_adapters(model, batches(), gradients=True)
        expected = head_bands(model) if several else gradient_bands(model, recording)
        assert found["of"] == ("heads" if several else "gradients")
        assert tuple(found["bands"]) == expected.names == ("1", "2", "3", "4")
        for key in ("alignment", "energy", "chance"):
            assert found[key] == pytest.approx(getattr(expected, key).tolist(), rel=1e-4)


def test_routing_is_by_type_with_the_mean_load_over_the_layers():
    model = of_architecture("lora_moe")
    found = mechanism(model, batches(), NAMES)["routing"]
    layers = routing(record_adapters(model, batches(), gradients=True))
    ups = [layers[UP], layers[UP.replace("0", "1")]]
    assert found["entropy"]["up_proj"] == pytest.approx([layer.entropy for layer in ups], rel=1e-5)
    for key in ("load", "importance"):
        expected = sum(getattr(layer, key) for layer in ups) / 2
        assert found[key]["up_proj"] == pytest.approx(expected.tolist(), rel=1e-5)
        assert sum(found[key]["up_proj"]) == pytest.approx(1, rel=1e-5)


def test_an_untrained_model_has_no_similarity_of_its_zero_heads_and_no_bands():
    found = mechanism(untrained("hydra"), batches(), NAMES, copy_heads(untrained("hydra")))
    assert set(found) == KEYS["hydra"] - {"heads", "bands"}


def test_one_task_has_no_pairs():
    one = [{**with_tasks(), "task_ids": torch.zeros(6, dtype=torch.int64)}]
    assert set(mechanism(adapted(), one, ["only"])) == set()
    assert set(mechanism(of_architecture("hydra"), one, ["only"])) == {"heads", "bands", "routing"}


@pytest.mark.parametrize("names", [NAMES[:2], [*NAMES, "more"]])
def test_tasks_and_names_must_fit(names):
    with pytest.raises(ValueError, match=rf"the task ids \[0, 1, 2\], but task_names has {len(names)} names"):
        mechanism(adapted(), batches(), names)


def test_latents_need_two_rows_of_each_task():
    few = {name: value[:4] for name, value in with_tasks().items()}
    assert set(mechanism(adapted(), [few], NAMES)) == OF_ALL - {"latents"}


def test_numbers_are_rounded_to_six_significant_digits():
    given = {
        "a": torch.tensor([[1 / 3, 12345.678]], dtype=torch.float64),
        "b": [2e-9 / 3, 7, "x"],
        "c": torch.tensor([3]),
    }
    assert module._rounded(given) == {"a": [[0.333333, 12345.7]], "b": [6.66667e-10, 7, "x"], "c": [3]}
