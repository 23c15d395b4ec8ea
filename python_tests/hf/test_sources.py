"""In every kind of model each layer's alignment is over its own tokens, or the layer is refused with the cure."""

import ast
import copy
import re

import pytest
import torch
import transformers as hf
from hf.kinds import TASKS, VOCAB, adapted, bart, bert, by_hand, made, padded, t5, two_berts, whisper
from tiny import error, gradients

from align_ext import align_parts, align_step, set_task
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.alignment.accumulation import align_statistics

EXACT = 1e-11
TASKS_OF = torch.tensor([0, 1, 2, 0, 1, 1])
SOURCES, TARGETS = [7, 5, 7, 3, 6, 2], [4, 6, 5, 3, 2, 6]
CROSS = (".EncDecAttention.k", ".EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")
CROSS += ("crossattention.self.key", "crossattention.self.value", "enc_to_dec_proj")


def batch(longest_source=None, longest_target=None):
    ids, mask = padded(SOURCES, longest_source)
    labels, _ = padded(TARGETS, longest_target, -100, seed=1)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def audio(longest_target=None):
    labels, _ = padded(TARGETS, longest_target, -100, seed=1)
    return {
        "input_features": torch.randn(6, 4, 12, generator=torch.Generator().manual_seed(0)).double(),
        "labels": labels,
    }


def of_source(name):
    return ".decoder." not in f".{name}" or name.endswith(CROSS)


def tasks_by_hand(inputs, tasks=TASKS_OF):
    """The task of each token of a layer, by its name: the encoder's tokens have the source's mask."""
    source, labels = inputs.get("attention_mask"), inputs["labels"]
    source = torch.ones(len(labels), 6) if source is None else source
    target = inputs.get("decoder_attention_mask", labels != -100)

    def of(name):
        return torch.where((source if of_source(name) else target) > 0, tasks[:, None], -1).flatten()

    return of


MODELS = {
    "T5ForConditionalGeneration": t5,
    "BartForConditionalGeneration": bart,
    "MBartForConditionalGeneration": lambda: hf.MBartConfig(**bart().to_dict()),
    "WhisperForConditionalGeneration": whisper,
    "EncoderDecoderModel": two_berts,
}
LENGTHS = {"different": (7, 6), "alike": (7, 7), "targets longer": (7, 9)}


def make(kind):
    if kind == "EncoderDecoderModel":
        torch.manual_seed(0)
        model = hf.EncoderDecoderModel(two_berts()).double()
        return model
    return made(kind, MODELS[kind]())


def inputs_of(kind, lengths):
    source, target = LENGTHS[lengths]
    if kind == "WhisperForConditionalGeneration":
        return audio(6 if lengths == "alike" else target)
    return batch(source, target)


def own_loss(output):
    """In float64, where transformers' own is of float32 logits."""
    return output.logits.square().mean()


def check(model, inputs, tokens_of, tasks=TASKS_OF, plain=None):
    """Per layer and in every gradient what is written out by hand, by both ways into a step."""
    per_layer, expected = by_hand(plain or copy.deepcopy(model), inputs, tokens_of, own_loss)
    with align_step(model, tasks) as step:
        loss = own_loss(model(**inputs))
    step.total(loss).backward()
    assert align_parts(model).per_layer == pytest.approx(per_layer, rel=1e-9)
    assert error(gradients(model), expected) < EXACT
    model(**inputs, task_ids=tasks)
    assert align_parts(model).per_layer == pytest.approx(per_layer, rel=1e-9)
    return per_layer


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", MODELS)
def test_each_layer_of_an_encoder_decoder_counts_the_tokens_of_its_own_mask(kind, lengths):
    inputs = inputs_of(kind, lengths)
    model = adapted(make(kind), exclude_modules=("encoder.pooler.dense",))  # whose output nobody uses
    per_layer = check(model, inputs, tasks_by_hand(inputs))
    assert any(of_source(name) and ".decoder." in f".{name}" for name in per_layer)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_activation_checkpointing_changes_nothing(kind, reentrant):
    inputs, model = batch(7, 7), adapted(make(kind))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    check(model, inputs, tasks_by_hand(inputs), plain=adapted(make(kind)))


def test_what_was_learned_of_one_batch_holds_for_those_of_other_lengths():
    model = adapted(make("T5ForConditionalGeneration"))
    for lengths in ((7, 7), (7, 6), (9, 9), (8, 12)):
        inputs = batch(*lengths)
        model.zero_grad()
        check(model, inputs, tasks_by_hand(inputs))


@pytest.mark.parametrize("lengths", [(7, 1), (1, 1), (1, 7)])
def test_sequences_of_one_token_are_told_apart_too(lengths):
    model, inputs = adapted(make("BartForConditionalGeneration")), batch(7, 7)
    cut = {name: x[:, : lengths[name == "labels"]] for name, x in inputs.items()}
    tasks = torch.tensor([0, 1, 0, 0, 1, 1])
    model(**cut, task_ids=tasks)
    per_layer, _ = by_hand(copy.deepcopy(model), cut, tasks_by_hand(cut, tasks))
    assert align_parts(model).per_layer == pytest.approx(per_layer, rel=1e-9)


def test_a_batch_of_one_sample_has_nothing_to_align():
    model = adapted(make("BartForConditionalGeneration"))
    model(**{name: x[:1] for name, x in batch(7, 6).items()}, task_ids=torch.tensor([2])).loss.backward()
    assert align_parts(model).align == 0
    inputs = batch(7, 7)  # and what was learned of it is right
    model.zero_grad()
    check(model, inputs, tasks_by_hand(inputs))


def test_the_decoders_own_mask_comes_before_its_labels():
    inputs = batch(7, 7)
    inputs["decoder_attention_mask"] = (torch.arange(7) < torch.tensor(TARGETS)[:, None] + 1).long()
    plain = check(adapted(make("T5ForConditionalGeneration")), batch(7, 7), tasks_by_hand(batch(7, 7)))
    masked = check(adapted(make("T5ForConditionalGeneration")), inputs, tasks_by_hand(inputs))
    name = "decoder.block.1.layer.2.DenseReluDense.wo"
    assert abs(plain[name] / masked[name] - 1) > 1e-3


def test_labels_that_the_model_does_not_see_tell_the_decoders_padding():
    inputs = batch(7, 7)
    model = adapted(make("T5ForConditionalGeneration"))
    per_layer, _ = by_hand(copy.deepcopy(model), inputs, tasks_by_hand(inputs), own_loss)
    labels = inputs.pop("labels")
    inputs["decoder_input_ids"] = model._shift_right(labels)
    with align_step(model, TASKS_OF, labels=labels) as step:
        loss = own_loss(model(**inputs))
    step.total(loss)
    assert align_parts(model).per_layer == pytest.approx(per_layer, rel=1e-9)
    with pytest.raises(RuntimeError, match="give the model decoder_attention_mask, or labels"):
        adapted(make("T5ForConditionalGeneration"))(**inputs, task_ids=TASKS_OF)


def test_micro_batches_of_an_encoder_decoder_are_aligned_as_one_batch():
    parts = [
        {**{k: v[half] for k, v in batch(7, 7).items()}, "task_ids": TASKS_OF[half]} for half in (slice(3), slice(3, 6))
    ]
    model, whole = (adapted(make("T5ForConditionalGeneration"), align_accumulation=kind) for kind in ("exact", "micro"))
    union = align_statistics(model, parts)
    for part, of in union.replay():
        with align_step(model, part.pop("task_ids")) as step:
            loss = own_loss(model(**part)) * len(part["labels"]) / 6
        step.total(loss, scale=1 / len(union), of=of).backward()
    with align_step(whole, TASKS_OF) as step:
        loss = own_loss(whole(**batch(7, 7)))
    step.total(loss).backward()
    assert error(gradients(model), gradients(whole)) < EXACT


def test_a_router_is_balanced_over_the_tokens_of_each_layers_own_mask():
    options = {"architecture": "hydra", "num_heads": 2, "balance": "cv2", "balance_weight": 1.0, "align": None}
    model, inputs = adapted(make("BartForConditionalGeneration"), **options), batch(7, 7)
    weights = {}
    for name, layer in adapted_layers(model).items():
        layer.register_forward_pre_hook(lambda layer, args, name=name: weights.update({name: routing(layer, args[0])}))
    model(**inputs, task_ids=TASKS_OF)
    of, losses = tasks_by_hand(inputs), []
    for name, w in weights.items():
        shares = w.reshape(-1, 2)[of(name) >= 0].mean(0)
        losses.append(shares.var() / (shares.mean() ** 2 + 1e-10))
    assert align_parts(model).balance == pytest.approx((sum(losses) / len(losses)).item(), rel=1e-6)


def routing(layer, x):
    return torch.softmax(x @ layer.adapter.lora_router.lora_R.T, -1)


def test_an_adapter_for_each_task_serves_both_sides():
    model, inputs = adapted(make("T5ForConditionalGeneration"), architecture="multi_adapter", align=None), batch(7, 5)
    whole = model(**inputs, task_ids=TASKS_OF).logits
    model.eval()
    for task in range(TASKS):
        mine = task == TASKS_OF
        set_task(model, task)
        alone = model(**{name: value[mine] for name, value in inputs.items()}).logits
        assert (whole[mine] - alone).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("options", "error_type", "message"),
    [
        ({"response_only": True}, ValueError, "an encoder's tokens have no labels"),
        ({"architecture": "hydra", "router": "mlp", "routing": "sequence"}, ValueError, 'use routing="token"'),
        ({"align": "mmd"}, RuntimeError, r"\(exclude_modules\), or use align=.kl"),
    ],
)
def test_options_without_a_meaning_for_an_encoder_decoder_are_refused(options, error_type, message):
    with pytest.raises(error_type, match=message):
        adapted(make("T5ForConditionalGeneration"), **options)(**batch(7, 7), task_ids=TASKS_OF)


def test_mmd_aligns_one_side_of_an_encoder_decoder():
    model = adapted(make("T5ForConditionalGeneration"), align="mmd", exclude_modules=r"decoder\..*")
    model(**batch(7, 7), task_ids=TASKS_OF).loss.backward()
    assert align_parts(model).align > 0


def test_an_encoder_decoder_has_one_id_a_sample():
    model = adapted(make("T5ForConditionalGeneration"))
    with pytest.raises(ValueError, match="give one id per sample"):
        model(**batch(7, 7), task_ids=TASKS_OF[:, None].expand(6, 7))


@pytest.mark.slow
def test_a_compiled_encoder_decoder_trains_once_its_layers_are_known():
    torch._dynamo.reset()
    inputs, model = batch(7, 7), adapted(make("T5ForConditionalGeneration"))
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match="run one step of the plain model first"):
        compiled(**inputs, task_ids=TASKS_OF)
    torch._dynamo.reset()
    expected = check(model, inputs, tasks_by_hand(inputs))
    compiled(**inputs, task_ids=TASKS_OF).loss.backward()
    assert align_parts(model).per_layer == pytest.approx(expected, rel=1e-9)


# ------------------------------------------------------------------------------------------------ other kinds of models


def whole_rows(inputs, tasks=TASKS_OF):
    """The task of each token of a layer that sees the tokens, or one vector a sample (a pooler)."""

    def of(name):
        return tasks if "pooler" in name else torch.where(inputs["attention_mask"] > 0, tasks[:, None], -1).flatten()

    return of


def test_a_pooler_sees_one_vector_a_sample():
    ids, mask = padded(SOURCES)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(6) % 2}
    model = adapted(made("BertForSequenceClassification", bert()), exclude_modules=("classifier",))
    assert any("pooler" in name for name in check(model, inputs, whole_rows(inputs)))


def test_the_choices_of_a_multiple_choice_have_their_samples_task():
    ids, mask = padded([7, 5, 7, 3, 6, 2, 4, 4, 5, 6, 7, 3])
    inputs = {"input_ids": ids.view(6, 2, 7), "attention_mask": mask.view(6, 2, 7), "labels": torch.arange(6) % 2}
    model = adapted(made("BertForMultipleChoice", bert()), exclude_modules=("classifier",))
    rows = whole_rows({"attention_mask": mask}, TASKS_OF.repeat_interleave(2))
    check(model, inputs, rows)


def test_an_image_has_no_padding():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = hf.ViTConfig(**sizes, image_size=8, patch_size=4, hidden_dropout_prob=0.0, num_labels=2)
    inputs = {"pixel_values": torch.randn(6, 3, 8, 8).double(), "labels": torch.arange(6) % 2}
    model = adapted(made("ViTForImageClassification", config), exclude_modules=("classifier",))
    check(model, inputs, lambda name: TASKS_OF.repeat_interleave(5))


class TimeMajor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(8, 8).double()

    def forward(self, x):
        return {"logits": self.up(x.transpose(0, 1))}


def test_a_model_that_is_not_batch_first_is_refused():
    model = adapted(TimeMajor(), target_modules=["up"])
    with pytest.raises(RuntimeError, match="not batch first"):
        model(x=torch.randn(6, 12, 8).double(), task_ids=TASKS_OF)
    each = adapted(TimeMajor(), target_modules=["up"], architecture="multi_adapter", align=None)
    with pytest.raises(RuntimeError, match="not batch first"):
        each(x=torch.randn(6, 12, 8).double(), task_ids=TASKS_OF)


class Routed(torch.nn.Module):
    """Experts of which one sees as many tokens as there are samples, at first."""

    def __init__(self):
        super().__init__()
        self.few, self.all = torch.nn.Linear(8, 8).double(), torch.nn.Linear(8, 8).double()
        self.seen = 6

    def forward(self, x, attention_mask):
        return {"logits": self.all(x).sum() + self.few(x.flatten(0, 1)[: self.seen]).sum()}


def test_an_expert_that_sees_some_of_the_tokens_is_refused_with_the_cure():
    model = adapted(Routed(), target_modules=["few", "all"])
    x, mask = torch.randn(6, 7, 8).double(), padded(SOURCES)[1]
    model(x=x, attention_mask=mask, task_ids=TASKS_OF)
    model.seen = 12
    with pytest.raises(RuntimeError, match=r"'few' saw one vector a sample before, and now 12.*exclude_modules"):
        model(x=x, attention_mask=mask, task_ids=TASKS_OF)
    other = adapted(Routed(), target_modules=["few", "all"])
    other.seen = 84 // 2 + 1
    with pytest.raises(RuntimeError, match=r"\(few\).*exclude_modules"):
        other(x=x.repeat(1, 2, 1), attention_mask=mask.repeat(1, 2), task_ids=TASKS_OF)


def llava():
    text = hf.LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                          num_attention_heads=2, use_cache=False)  # fmt: skip
    vision = hf.CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                 image_size=8, patch_size=4)  # fmt: skip
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-1)
    return made("LlavaForConditionalGeneration", config)


def test_the_layers_that_see_an_images_tokens_are_refused_and_the_cure_works():
    with pytest.raises(ValueError, match="see other tokens than the text's") as refused:
        adapted(llava())
    cure = re.search(r"exclude_modules=('.*'), or", str(refused.value))
    model = adapted(llava(), exclude_modules=ast.literal_eval(cure[1]))
    ids, mask = padded(SOURCES)
    ids = torch.cat([torch.full((6, 4), 3), ids.masked_fill(ids == 3, 4)], 1)
    mask = torch.cat([torch.ones(6, 4, dtype=torch.int64), mask], 1)
    images = torch.randn(6, 3, 8, 8).double()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids, "pixel_values": images}
    check(model, inputs, whole_rows(inputs))
    adapted(llava(), align=None)


def test_tokens_of_another_model_are_refused():
    config = bert(is_decoder=True, add_cross_attention=True)
    model, (ids, mask) = adapted(made("BertLMHeadModel", config)), padded(SOURCES)
    with pytest.raises(RuntimeError, match="adapt and call the whole encoder-decoder"):
        model(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=torch.randn(6, 7, 16).double(), task_ids=TASKS_OF
        )


def test_labels_of_whole_samples_are_no_answers_of_tokens():
    inputs = dict(zip(("input_ids", "attention_mask"), padded(SOURCES), strict=True)) | {"labels": torch.arange(6) % 2}
    model = adapted(made("BertForSequenceClassification", bert()), response_only=True, exclude_modules=("classifier",))
    with pytest.raises(ValueError, match=r"needs a label for each token, but labels are torch.int64 \[6\]"):
        model(**inputs, task_ids=TASKS_OF)
    options = {"architecture": "hydra", "router": "mlp", "routing": "sequence", "num_heads": 2, "align": "kl"}
    layers = {"target_modules": ["query", "value"]}
    model = adapted(made("BertForSequenceClassification", bert()), **options, **layers)
    model(**inputs, task_ids=TASKS_OF).loss.backward()
    assert align_parts(model).align > 0
