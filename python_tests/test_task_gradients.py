"""Recording: gradients of the tasks' losses against autograd, and the model that is left as it was; conflict, bands."""

import contextlib
import math
import warnings

import pytest
import torch
from architectures import ARCHITECTURES, config_of
from recordings import UP, adapters, by_hand, of_architecture, untrained, with_tasks
from tiny import LENGTH, TASKS, VOCAB, adapted, batch, gpt2, llama

from align_ext import replace_linear_with_align_lora
from align_ext.adapters.capture import capture_latents
from align_ext.diagnostics.bands import gradient_bands, head_bands
from align_ext.diagnostics.conflict import gradient_cosines
from align_ext.diagnostics.heads import copy_heads
from align_ext.diagnostics.record import record_adapters

EYE = torch.eye(4)


def trained(model):
    return {(layer, name): p for layer, adapter in adapters(model).items() for name, p in adapter.named_parameters()}


def expected_gradients(model, batches, task):
    """Of the mean loss of a task's labels, by autograd through the model's logits, without dropout."""
    losses, count = [], 0
    model.eval()
    for inputs in batches:
        logits = model(
            **{k: v for k, v in inputs.items() if k != "labels" or "sequence" in str(model.align_state.config)}
        ).logits
        for row in range(len(logits)):
            for place in range(LENGTH - 1):
                label = int(inputs["labels"][row, place + 1])
                if inputs["task_ids"][row] == task and label != -100:
                    losses.append(-logits[row, place].log_softmax(0)[label])
                    count += 1
    found = torch.autograd.grad(sum(losses) / count, list(trained(model).values()), allow_unused=True)
    model.train()
    return dict(zip(trained(model), found, strict=True))


@pytest.mark.parametrize(
    "name", ["align_lora", "multi_adapter", "lora_moe, top 2", "m_lora, sum", "mtlora, by sequence", "mtlora, blocks"]
)
def test_gradients_are_those_of_each_tasks_mean_loss(name):
    model = llama().double()
    replace_linear_with_align_lora(model, config_of(name, r=4, lora_dropout=0.5))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    batches = [with_tasks(0), with_tasks(1)]
    found = record_adapters(model, batches, gradients=True).gradients
    for task in range(TASKS):
        for (layer, parameter), gradient in expected_gradients(model, batches, task).items():
            actual = found[layer][parameter][task]
            torch.testing.assert_close(actual, torch.zeros_like(actual) if gradient is None else gradient)


def test_a_model_that_computes_all_logits_has_the_same_gradients():
    model = adapted()
    assert "logits_to_keep" in model.align_state.arguments
    expected = record_adapters(model, [with_tasks()], gradients=True).gradients[UP]["lora_B"]
    model.align_state.arguments = ()
    torch.testing.assert_close(record_adapters(model, [with_tasks()], gradients=True).gradients[UP]["lora_B"], expected)


def test_gradients_of_ids_per_token_are_those_of_ids_per_sample():
    model, inputs = adapted(), with_tasks()
    per_token = {**inputs, "task_ids": inputs["task_ids"][:, None].expand(-1, LENGTH)}
    of_samples, of_tokens = (record_adapters(model, [i], gradients=True) for i in (inputs, per_token))
    torch.testing.assert_close(of_tokens.gradients[UP]["lora_A"], of_samples.gradients[UP]["lora_A"])
    torch.testing.assert_close(of_tokens.latents[UP], of_samples.latents[UP])


def test_how_rows_are_put_into_batches_changes_nothing():
    model, inputs = of_architecture("multi_adapter"), with_tasks()
    parts = [{k: v[start : start + 2] for k, v in inputs.items()} for start in (0, 2, 4)]
    whole, cut = (record_adapters(model, batches, gradients=True) for batches in ([inputs], parts))
    for parameter, gradient in whole.gradients[UP].items():
        torch.testing.assert_close(cut.gradients[UP][parameter], gradient)
    for example in range(6):
        rows, expected = (r.latents[UP][r.examples == example] for r in (cut, whole))
        torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("gradients", [False, True])
def test_padding_and_tokens_of_no_task_do_not_count(gradients):
    model, inputs = of_architecture("hydra"), with_tasks()
    ids = torch.tensor([0, -1, -1, -1, -1, -1])
    alone = record_adapters(model, [{**inputs, "task_ids": ids}], gradients=gradients)
    first = record_adapters(model, [{k: v[:1] for k, v in inputs.items()}], gradients=gradients)
    assert len(alone.tasks) == int(inputs["attention_mask"][0].sum())
    torch.testing.assert_close(alone.latents[UP], first.latents[UP])
    torch.testing.assert_close(alone.weights[UP], first.weights[UP])
    with pytest.raises(ValueError, match="no token of the batches counts"):
        record_adapters(model, [{**inputs, "task_ids": torch.full((6,), -1)}], gradients=gradients)


def test_without_ids_and_mask_all_tokens_are_of_one_task():
    found = record_adapters(adapted(), [{"input_ids": batch()[0]["input_ids"]}])
    assert found.tasks.tolist() == [0] * 60
    assert found.examples.tolist() == [i for i in range(6) for _ in range(LENGTH)]


def test_an_example_latent_is_what_capture_latents_gives():
    model, inputs = adapted(), with_tasks()
    with torch.no_grad(), capture_latents(model.eval()) as captured:
        model(**inputs)
    counts = inputs["attention_mask"].flatten() == 1
    torch.testing.assert_close(record_adapters(model, [inputs]).latents[UP], captured[UP].z[counts])


OPTIONS = {
    "plain": {"lora_dropout": 0.5},
    "queue": {"lora_dropout": 0.5, "align_accumulation": "queue"},
    "exact": {"lora_dropout": 0.5, "align_accumulation": "exact"},
    "checkpointed": {"lora_dropout": 0.5},
    "mtlora": {"lora_dropout": 0.5, "architecture": "mtlora", "num_heads": 3, "align": "kl"},
    "multi_adapter": {"lora_dropout": 0.5, "architecture": "multi_adapter"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_model_is_left_as_it_was(name):
    model = adapted(**OPTIONS[name])
    if name == "checkpointed":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.model.layers[0].eval()  # a mixture of modes
    layer, adapter = next(iter(adapters(model).items()))
    adapter.lora_A.grad = torch.ones_like(adapter.lora_A)
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    modes, seed = {n: m.training for n, m in model.named_modules()}, torch.get_rng_state()
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = record_adapters(model, [with_tasks()], gradients=True)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    grads = {n for n, p in model.named_parameters() if p.grad is not None}
    assert grads == {f"{layer}.adapter.lora_A"}
    assert (adapter.lora_A.grad == 1).all()
    assert all(adapter.capture is None for adapter in adapters(model).values())
    assert not any(g.requires_grad for of_layer in found.gradients.values() for g in of_layer.values())
    again = record_adapters(model, [with_tasks()], gradients=True)
    assert torch.equal(again.gradients[layer]["lora_A"], found.gradients[layer]["lora_A"])


def test_the_model_is_left_as_it_was_after_an_error():
    model = adapted()
    with contextlib.suppress(ValueError, RuntimeError, IndexError):
        record_adapters(model, [{**with_tasks(), "input_ids": torch.full((6, LENGTH), VOCAB)}])
        pytest.fail("an unknown token was accepted")
    assert all(module.training for module in model.modules())
    assert all(adapter.capture is None for adapter in adapters(model).values())


def test_a_step_after_a_recording_is_what_it_would_have_been():
    losses = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = adapted(lora_dropout=0.3)
        if recorded:
            record_adapters(model, [with_tasks()], gradients=True)
        torch.manual_seed(1)
        losses.append(float(model(**with_tasks()).loss.detach()))
    assert losses[0] == losses[1]


def frozen():
    model = adapted()
    model.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: record_adapters(llama(), [with_tasks()]), "no adapters"),
        (lambda: record_adapters(frozen(), [with_tasks()], gradients=True), "no adapter of the model is trained"),
        (lambda: record_adapters(adapted(), [], gradients=True), "no token of the batches counts"),
        (lambda: record_adapters(adapted(), [{"input_ids": torch.ones(2, 3, dtype=int)}], gradients=True), "no labels"),
        (lambda: gradient_cosines(by_hand()), "the recording has no gradients"),
        (lambda: gradient_cosines(by_hand(gradients={"a": {"lora_A": [[1.0]]}}), "model"), "level must be"),
        (lambda: gradient_bands(adapted(), by_hand()), "the recording has no gradients"),
        (lambda: head_bands(adapted()), "no layer has several heads"),
    ],
)
def test_what_is_not_there_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_conflict_is_computed_by_hand_of_modules_and_of_blocks():
    gradients = {
        "l.0.mlp.up": {"lora_A": [[[3.0, 0.0]], [[-3.0, 0.0]]], "lora_B": [[[4.0]], [[4.0]]]},
        "l.0.mlp.down": {"lora_A": [[[5.0]], [[5.0]]]},
        "l.0.attn.q": {"lora_A": [[[1.0]], [[0.0]]]},
    }
    recording = by_hand((0, 1), gradients=gradients)
    components, blocks = (gradient_cosines(recording, level) for level in ("component", "block"))
    assert list(components) == list(gradients)
    assert float(components["l.0.mlp.up"][0, 1]) == pytest.approx((16 - 9) / 25)
    assert float(components["l.0.mlp.down"][0, 1]) == pytest.approx(1)
    assert components["l.0.attn.q"][0, 1].isnan()
    assert list(blocks) == ["l.0.mlp", "l.0.attn"]
    assert float(blocks["l.0.mlp"][0, 1]) == pytest.approx((16 - 9 + 25) / 50)


def test_tasks_of_the_same_rows_agree_and_those_of_a_multi_adapter_share_nothing():
    inputs = with_tasks()
    same = {k: torch.cat([v[:2], v[:2]]) for k, v in inputs.items()} | {"task_ids": torch.tensor([0, 0, 1, 1])}
    for architecture, cosine in (("align_lora", 1.0), ("multi_adapter", 0.0)):
        found = gradient_cosines(record_adapters(of_architecture(architecture), [same], gradients=True))
        assert all(float(matrix[0, 1]) == pytest.approx(cosine) for matrix in found.values())


def test_a_gpt2_has_conflicts_of_its_modules():
    found = record_adapters(adapted(gpt2(), target_modules="all-linear"), [with_tasks()], gradients=True)
    blocks = gradient_cosines(found, "block")
    assert list(blocks) == [f"transformer.h.{i}.{block}" for i in range(2) for block in ("attn", "mlp")]


def with_heads(B, A, architecture="hydra"):
    """A model whose first up_proj has heads B [N, m, r] and A; other layers have none, which do not count."""
    model = of_architecture(architecture, num_heads=len(B), r=B.shape[-1])
    with torch.no_grad():
        for name, adapter in adapters(model).items():
            adapter.lora_B.zero_()
            if name == UP:
                adapter.lora_B[:, : B.shape[1]] = B.to(adapter.lora_B)
                adapter.lora_A.zero_()
                adapter.lora_A[..., : A.shape[-1]] = A.to(adapter.lora_A)
    return model


def test_bands_of_heads_are_computed_by_hand():
    """Both write their largest singular value into output 0, and the other into 1 and 2."""
    B = torch.stack([torch.stack([3 * EYE[0], EYE[1]], 1), torch.stack([EYE[2], -2 * EYE[0]], 1)])
    found = head_bands(with_heads(B, torch.eye(2)))
    assert found.names == ("1", "2")
    assert found.alignment.tolist() == pytest.approx([1, 0])
    assert found.energy.tolist() == pytest.approx([(9 / 10 + 4 / 5) / 2, (1 / 10 + 1 / 5) / 2])
    assert found.chance.tolist() == pytest.approx([1 / 80, 1 / 80])


def test_bands_are_of_the_update_and_not_of_its_heads_alone():
    """The second expert's A turns its small direction into its large one."""
    B = torch.stack([torch.stack([3 * EYE[0], EYE[1]], 1)] * 2)
    A = torch.stack([torch.eye(2), torch.diag(torch.tensor([0.1, 10.0]))])
    assert head_bands(with_heads(B, A, "lora_moe")).alignment.tolist() == pytest.approx([0, 0])
    assert head_bands(with_heads(B, torch.eye(2))).alignment.tolist() == pytest.approx([1, 1])


def test_directions_of_equal_singular_values_may_turn_within_their_band():
    eye = torch.eye(8)
    values = torch.tensor([9.0, 9, 5, 5, 2, 2, 1, 1])
    turn = torch.block_diag(
        *[torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]]) for t in range(4)]
    )
    found = head_bands(with_heads(torch.stack([eye * values, (eye @ turn) * values]), eye))
    assert found.names == ("1-2", "3-4", "5-6", "7-8")
    assert found.alignment.tolist() == pytest.approx([1] * 4)
    assert found.energy.tolist() == pytest.approx([(v * v / (81 + 25 + 4 + 1)).item() for v in values[::2]])


def test_random_heads_are_aligned_by_chance():
    B = torch.randn(4, 80, 8, generator=torch.Generator().manual_seed(0))
    found = head_bands(with_heads(B, torch.randn(8, 48, generator=torch.Generator().manual_seed(1))))
    torch.testing.assert_close(found.alignment, found.chance, rtol=0.5, atol=0)
    assert found.energy.sum() == pytest.approx(1)


def test_bands_are_of_what_heads_have_learned_where_a_start_is_given():
    start = 5 * torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    model = with_heads(start, torch.eye(2))
    before = copy_heads(model)
    assert head_bands(model, before).names == ()
    learned = torch.stack([torch.stack([2 * EYE[0], EYE[1]], 1), torch.stack([2 * EYE[0], EYE[2]], 1)])
    with torch.no_grad():
        adapters(model)[UP].lora_B[:, :4] += learned
    assert head_bands(model, before).alignment.tolist() == pytest.approx([1, 0], abs=1e-6)


def test_a_band_without_a_value_is_left_out():
    B = torch.stack([torch.stack([3 * EYE[0], 0 * EYE[1]], 1)] * 2)
    assert head_bands(with_heads(B, torch.eye(2))).names == ("1",)


def of_one_adapter(B, A):
    model = adapted(r=B.shape[-1])
    with torch.no_grad():
        for name, adapter in adapters(model).items():
            adapter.lora_B.zero_()
            if name == UP:
                adapter.lora_B[: len(B)], adapter.lora_A[:] = B.to(adapter.lora_B), 0
                adapter.lora_A[:, : A.shape[1]] = A.to(adapter.lora_A)
    return model


def test_bands_of_gradients_are_computed_by_hand():
    """B A = diag(3, 1): band 1 is row 0 of dB and column 0 of dA, band 2 row 1 and column 1."""
    model = of_one_adapter(torch.stack([3 * EYE[0], EYE[1]], 1), torch.eye(2))
    dB, dA = torch.zeros(2, 80, 2), torch.zeros(2, 2, 48)
    dB[0, 0], dA[0, :, 0] = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0])
    dB[1, 0], dA[1, :, 0] = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0])
    dB[:, 1], dA[:, :, 1] = torch.tensor([[4.0, 3.0], [-4.0, -3.0]]), torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    dB[0, 2], dA[1, :, 2] = 100.0, 100.0  # outside of the update
    found = gradient_bands(model, by_hand((0, 1), gradients={UP: {"lora_A": dA.tolist(), "lora_B": dB.tolist()}}))
    assert found.names == ("1", "2")
    assert found.alignment.tolist() == pytest.approx([1 / (math.sqrt(5) * 3), -1])
    assert found.energy.tolist() == pytest.approx([0.9, 0.1])
    assert found.chance.tolist() == [0, 0]


@pytest.mark.parametrize("architecture", ["lora", "hydra"])
def test_there_are_no_bands_before_training_or_of_one_task(architecture):
    model = untrained(architecture)
    recording = record_adapters(model, [with_tasks()], gradients=True)
    of_model = head_bands(model) if architecture == "hydra" else gradient_bands(model, recording)
    assert of_model.names == ()
    one = {**with_tasks(), "task_ids": torch.zeros(6, dtype=torch.int64)}
    assert gradient_bands(adapted(), record_adapters(adapted(), [one], gradients=True)).names == ()


def test_the_update_of_a_pissa_start_is_what_has_changed_since():
    model = llama().double()
    replace_linear_with_align_lora(model, config_of("lora, pissa", r=2))
    assert gradient_bands(model, record_adapters(model, [with_tasks()], gradients=True)).names == ()
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B[0] += 1.0
    assert gradient_bands(model, record_adapters(model, [with_tasks()], gradients=True)).names == ("1",)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_recorded(name):
    model = llama()
    replace_linear_with_align_lora(model, config_of(name))
    found = record_adapters(model, [with_tasks()], gradients=True)
    assert list(found.gradients) == list(found.latents) == list(adapters(model))
    first = {"multilora": "_scaling", "adalora": "_E"}.get(name, "_B")  # what is trained before the others
    assert all(bool(gradient.any()) for of in found.gradients.values() for n, gradient in of.items() if first in n)
