"""adapter_report tells what PEFT's get_layer_status and get_model_status tell: the adapters as they are now."""

import pytest
from tiny import llama

from align_ext import adapter_report, disable_adapter, replace_linear_with_align_lora
from align_ext.adapters.adapted_block import adapted_layers


@pytest.mark.parametrize("options", [{}, {"architecture": "lora_moe", "target_blocks": ("mlp",)}])
def test_the_report_tells_the_state_of_the_adapters_as_it_is_now(options):
    model = llama().bfloat16()
    replace_linear_with_align_lora(model, **options)
    layers = adapted_layers(model)
    report = adapter_report(model)
    assert (report.active, report.enabled, report.merged, report.frozen) == ("default", True, [], [])
    assert report.placed == ["float32 on cpu"]
    assert str(report).splitlines()[1] == "default: float32 on cpu, trained"
    first, *others = layers
    layers[first].adapter.requires_grad_(False)
    layers[first].adapter.bfloat16()
    with disable_adapter(model):
        report = adapter_report(model)
    assert (report.enabled, report.frozen) == (False, [first])
    places = ["bfloat16 on cpu", *["float32 on cpu"] * bool(others)]
    assert report.placed == places
    expected = f"default: {', '.join(places)}, not trained in 1 of {len(layers)} layers, disabled"
    assert str(report).splitlines()[1] == expected
    assert adapter_report(model).enabled
    if not options:
        layers[others[0]].merge()
        assert adapter_report(model).merged == [others[0]]
        assert f"merged in 1 of {len(layers)} layers" in str(adapter_report(model))
