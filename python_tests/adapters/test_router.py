"""routing="sequence": one set of weights for each sequence, from its prompt alone."""

import pytest
import torch
from architectures import config_of
from literal import routing_weights
from tiny import VOCAB, adapted, batch, llama, prompts

from align_ext.adapters.router import SequenceRouter

OPTIONS = {
    "architecture": "mtlora", "router": "mlp", "routing": "sequence", "num_heads": 3, "lora_dropout": 0.0,
    "balance": None, "spectral": None, "target_blocks": ("attention", "mlp"),
}  # fmt: skip


def routed(blocks=True, **options):
    return adapted(llama(), **OPTIONS | ({} if blocks else {"target_blocks": ()}) | options)


@pytest.fixture
def logits_of(monkeypatch):
    """Each layer's routing logits of a forward in training."""
    logits, seen = SequenceRouter.logits, []

    def watched(*arguments):
        seen.append(logits(*arguments))
        return seen[-1]

    def run(model, inputs):
        seen.clear()
        model(**inputs)
        return list(seen)

    monkeypatch.setattr(SequenceRouter, "logits", watched)
    return run


@pytest.mark.parametrize("blocks", [True, False])
def test_a_token_changes_nothing_before_it(blocks):
    model, (inputs, _) = routed(blocks), batch()
    changed = {key: tensor.clone() for key, tensor in inputs.items()}
    changed["input_ids"][:, 6] = (changed["input_ids"][:, 6] + 7) % VOCAB
    before, after = model(**inputs).logits, model(**changed).logits
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax(2).min() > 1e-6


def test_tokens_from_the_first_label_on_and_padding_do_not_route(logits_of):
    model, (inputs, _) = routed(), batch()
    inputs["labels"][:, 5] = -100  # as a second question in one conversation
    changed = {key: tensor.clone() for key, tensor in inputs.items()}
    first = (~prompts(inputs)) & (torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) > 0.3)
    changed["input_ids"][first] = 1
    # Of the first block, whose input a change of later tokens does not reach through attention.
    assert torch.equal(logits_of(model, inputs)[0], logits_of(model, changed)[0])
    changed["input_ids"][:, 0] = changed["input_ids"][:, 0] % (VOCAB - 1) + 1
    assert not torch.equal(logits_of(model, inputs)[0], logits_of(model, changed)[0])


def test_the_weights_are_those_of_the_mean_of_the_prompt():
    config = config_of("mtlora, by sequence", routing_groups=1, num_heads=2, router_temperature=0.5)
    router = SequenceRouter(3, 2)
    with torch.no_grad():
        router.lora_H.zero_()
        router.lora_H[0] = torch.tensor([1.0, 0.0, 0.0])
        router.lora_H[1] = torch.tensor([0.0, -1.0, 0.0])  # relu makes it 0
        router.lora_R.zero_()
        router.lora_R[0, :2] = torch.tensor([2.0, 5.0])
    x = torch.tensor([[[1.0, 4.0, 0.0], [3.0, 4.0, 0.0], [100.0, 0.0, 0.0]]])
    prompt = torch.tensor([[True, True, False]])
    weights = routing_weights(router, config, x, prompt)
    # The mean's first number is 2, so the logits are (4, 0), divided by tau (8, 0).
    expected = torch.tensor([8.0, 0.0]).softmax(0)
    assert torch.allclose(weights, expected.expand(3, 1, 2))

    class Current:
        decoding = False

    current = Current()
    current.prompt = prompt
    assert torch.equal(router.logits(x, current), torch.tensor([[4.0, 0.0]]))


@pytest.mark.parametrize("blocks", [True, False])
def test_generation_is_one_forward_over_prompt_and_answer(blocks):
    """The weights stay those of the prompt while the answer is decoded, for left-padded prompts too."""
    model = routed(blocks).eval()
    prompt, mask = batch()[0]["input_ids"][:3, :5], torch.ones(3, 5, dtype=torch.int64)
    mask[1, :2] = 0
    out = model.generate(
        prompt, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
        use_cache=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    answer = torch.arange(out.sequences.shape[1]) >= 5
    full = torch.cat([mask, torch.ones(3, 4, dtype=torch.int64)], 1)
    labels = torch.where(answer, out.sequences, -100)
    positions = (full.cumsum(1) - 1).clamp_min(0)
    whole = model(input_ids=out.sequences, attention_mask=full, position_ids=positions, labels=labels).logits
    decoded = torch.stack(out.logits, 1)
    eps = torch.finfo(torch.float32).eps  # generate() hands its logits out in float32
    assert (decoded - whole[:, 4:-1]).abs().max() < eps * whole.abs().max()
    pooled = model(input_ids=out.sequences, attention_mask=full, position_ids=positions).logits  # over the answer too
    assert (decoded - pooled[:, 4:-1]).abs().max() > 1e-6 * whole.abs().max()


def test_a_batch_decodes_only_after_its_own_prompt():
    from transformers import DynamicCache

    model = routed().eval()
    ids, cache = batch()[0]["input_ids"], DynamicCache()
    model(input_ids=ids[:3], use_cache=True, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="decodes 2 sequences whose prompt it did not see in eval mode"):
        model(input_ids=ids[:2, :1], past_key_values=cache, use_cache=True)


def test_what_it_cannot_pool_over_is_an_error():
    model, (inputs, _) = routed(), batch()
    with pytest.raises(ValueError, match='routing="sequence" pools over the tokens before the first label'):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(RuntimeError, match="trains outside a step"):
        model.model(input_ids=inputs["input_ids"])
    router = SequenceRouter(4, 2)
    with pytest.raises(RuntimeError, match=r"needs x \[batch, tokens, features\], but a layer got \[5, 4\]"):
        router.logits(torch.zeros(5, 4), None)


def test_a_sequence_without_a_prompt_has_equal_weights(logits_of):
    model, (inputs, _) = routed(), batch()
    inputs["labels"] = inputs["input_ids"].clone()
    logits = logits_of(model, inputs)
    assert all((of_layer == 0).all() for of_layer in logits)
