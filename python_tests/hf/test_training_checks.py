"""What a Trainer aligns is what it trains: everything else is refused before the first step."""

import re
import warnings
from functools import partial

import datasets
import peft
import pytest
import torch
from hf.sft_trainers import text_rows
from hf.sft_trainers import trainer as sft_trainer
from hf.trainers import adapted, features, trainer
from hf.words import llama
from torch.testing._internal.distributed.fake_pg import FakeStore

from align_ext import AlignTrainer, align_step, replace_linear_with_align_lora
from align_ext.adapters.adapted_block import adapted_layers

LORA = {"r": 2, "target_modules": ["q_proj"]}


def freeze_all(model):
    model.requires_grad_(False)


def freeze_one_A(model):
    next(iter(adapted_layers(model).values())).adapter.lora_A.requires_grad_(False)


def freeze_one_B(model):
    list(adapted_layers(model).values())[-1].adapter.lora_B.requires_grad_(False)


@pytest.mark.parametrize("freeze", [freeze_all, freeze_one_A, freeze_one_B])
def test_adapters_that_were_frozen_are_refused(tmp_path, freeze):
    model = adapted()
    freeze(model)
    with pytest.raises(ValueError, match=r"lora_[AB] is not trained.*it is frozen"):
        trainer(tmp_path, model, features()).train()


def test_an_optimizer_without_the_adapters_is_refused(tmp_path):
    model = adapted()
    some = [p for name, p in model.named_parameters() if name.endswith("lora_B")]
    given = {"optimizers": (torch.optim.SGD(some, lr=0.1), None)}
    with pytest.raises(ValueError, match=r"lora_A is not trained.*the optimizer does not have it"):
        trainer(tmp_path, model, features(), arguments=given).train()
    every = [p for p in model.parameters() if p.requires_grad]
    trainer(tmp_path, model, features(), arguments={"optimizers": (torch.optim.SGD(every, lr=0.1), None)}).train()


def test_plain_lora_may_train_a_part_of_each_adapter(tmp_path):
    model = adapted(align=None)
    for layer in adapted_layers(model).values():
        layer.adapter.lora_A.requires_grad_(False)
    trainer(tmp_path, model, features()).train()
    freeze_all(model)
    with pytest.raises(ValueError, match="is not trained"):
        trainer(tmp_path, model, features()).train()


def test_adapters_that_never_run_are_an_error_with_alignment_and_named_at_the_end_without(tmp_path, recwarn):
    trainer(tmp_path, adapted(align=None), features(), max_steps=2).train()
    assert not [w for w in recwarn if "no gradient in any step" in str(w.message)]
    with pytest.raises(RuntimeError, match="2 of 6 aligned layers did not run"):
        trainer(tmp_path, bypassing(adapted()), features()).train()
    with pytest.warns(
        UserWarning, match=r"2 adapted layers .*0.mlp.up_proj.*1.mlp.up_proj.* got no gradient in any step"
    ):
        trainer(tmp_path, bypassing(adapted(align=None)), features(), max_steps=2).train()


def bypassing(model):
    for layer in model.model.layers:
        layer.mlp.forward = partial(past_the_forward_of_up_proj, layer.mlp)
    return model


def past_the_forward_of_up_proj(mlp, x):
    up = mlp.up_proj
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * (x @ up.weight.T))


def test_a_model_without_adapters_is_refused_by_every_trainer_of_ours(tmp_path):
    with pytest.raises(ValueError, match="the model has no adapters"):
        trainer(tmp_path, llama(), features()).train()
    with pytest.raises(ValueError, match="the model has no adapters"):
        sft_trainer(tmp_path, text_rows(), model=llama()).train()


@pytest.mark.parametrize("model", [adapted, llama])
def test_an_adapter_that_the_trainer_would_make_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match=r"peft_config=LoraConfig makes an adapter that nothing aligns"):
        sft_trainer(tmp_path, text_rows(), model=model(), arguments={"peft_config": peft.LoraConfig(**LORA)})


def test_an_adapter_of_pefts_beside_the_models_is_refused(tmp_path):
    model = adapted()
    before = [p for p in model.parameters() if p.requires_grad]
    beside = peft.inject_adapter_in_model(peft.LoraConfig(**LORA), model)
    for parameter in before:
        parameter.requires_grad_(True)
    with pytest.raises(ValueError, match=r"PEFT's own adapter .*q_proj.* would be trained beside"):
        trainer(tmp_path, beside, features()).train()


def test_an_adopted_peft_model_trains_and_one_that_was_frozen_afterwards_does_not(tmp_path):
    model = peft.get_peft_model(llama(torch.float32), peft.LoraConfig(**LORA))
    replace_linear_with_align_lora(model, num_tasks=3)
    trainer(tmp_path, model, features()).train()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="it is frozen"):
        trainer(tmp_path, model, features()).train()


def the_head(model):
    return model.get_output_embeddings()


def the_last_norm(model):
    return model.get_base_model().model.norm


@pytest.mark.parametrize(
    ("options", "later"), [({"modules_to_save": ["lm_head"]}, None), ({}, the_head), ({}, the_last_norm)]
)
def test_an_adopted_peft_model_trains_what_stands_beside_its_adapters(tmp_path, options, later):
    model = peft.get_peft_model(llama(torch.float32), peft.LoraConfig(**LORA, **options))
    replace_linear_with_align_lora(model, num_tasks=3)
    part = (later or the_head)(model).requires_grad_(True)
    before = part.weight.detach().clone()
    trainer(tmp_path, model, features(), learning_rate=0.1, lr_scheduler_type="constant", warmup_steps=0).train()
    assert not torch.equal(part.weight, before)


def test_the_weight_of_a_layer_that_peft_adapts_is_no_adapter_of_pefts(tmp_path):
    model = adapted()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["o_proj"]), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".adapter." in name or name.endswith("o_proj.base_layer.weight"))
    trainer(tmp_path, model, features()).train()


def test_an_optimizer_without_what_is_trained_beside_the_adapters_is_refused(tmp_path):
    model = adapted()
    some = [p for p in model.parameters() if p.requires_grad]
    model.model.norm.requires_grad_(True)
    given = {"optimizers": (torch.optim.SGD(some, lr=0.1), None)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not trained.*the optimizer does not have it.*freeze"):
        trainer(tmp_path, model, features(), arguments=given).train()


@pytest.mark.parametrize("align", ["kl", None])
def test_a_merged_layer_is_refused_by_its_name(tmp_path, align):
    model = adapted(align=align)
    name, layer = list(adapted_layers(model).items())[-1]
    layer.merge()
    with pytest.raises(ValueError, match=rf"{name} is merged.*unmerge\(\)"):
        trainer(tmp_path, model, features()).train()
    layer.unmerge()
    trainer(tmp_path, model, features()).train()


def test_a_model_that_stays_in_eval_mode_is_refused(tmp_path):
    model = adapted().eval()
    model.train = lambda mode=True: model
    with pytest.raises(ValueError, match=r"in eval mode in training.*model\.train\(\)"):
        trainer(tmp_path, model, features()).train()


@pytest.mark.parametrize(
    ("make", "message"), [(lambda: adapted(), None), (lambda: llama(), "inside model_init"), (freeze_one_A, "frozen")]
)
def test_what_model_init_makes_is_checked(tmp_path, make, message):
    def frozen():
        model = adapted()
        freeze_one_A(model)
        return model

    ran = trainer(tmp_path, adapted(), features())
    own = AlignTrainer(
        model_init=frozen if make is freeze_one_A else make, args=ran.args, train_dataset=features(),
        data_collator=ran.data_collator, in_order=True,
    )  # fmt: skip
    if message is None:
        own.train()
    else:
        with pytest.raises(ValueError, match=message):
            own.train()


@pytest.mark.parametrize("metric", ["loss/none", "eval_loss/none", "los", "accuracy", "even_loss/even"])
def test_a_metric_that_no_evaluation_gives_is_refused_before_training(tmp_path, metric):
    options = {"metric_for_best_model": metric, "eval_strategy": "steps", "eval_steps": 1, "eval_rows": features()}
    with pytest.raises(ValueError, match=r"is no metric of the evaluation, which gives .*eval_loss/even"):
        trainer(tmp_path, adapted(), features(), **options).train()


@pytest.mark.parametrize("metric", ["loss/even", "eval_loss/odd", "loss", "eval_samples_per_second"])
def test_a_metric_that_the_evaluation_gives_is_taken_and_a_loss_is_least(tmp_path, metric):
    options = {"metric_for_best_model": metric, "eval_strategy": "steps", "eval_steps": 1, "eval_rows": features()}
    ran = trainer(tmp_path, adapted(), features(), **options)
    assert ran.args.greater_is_better is ("loss" not in metric)
    ran.train()
    assert ran.state.best_metric is not None


def test_of_datasets_by_name_the_metric_names_one(tmp_path):
    parts = {"x": features(), "y": features()}
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_rows": parts}
    trainer(tmp_path, adapted(), features(), metric_for_best_model="eval_x_loss/even", **options).train()
    with pytest.raises(ValueError, match="is no metric"):
        trainer(tmp_path, adapted(), features(), metric_for_best_model="loss/even", **options).train()


def test_a_task_without_examples_has_no_metric(tmp_path):
    rows = datasets.Dataset.from_list([row for row in features() if row["task_ids"] != 1])
    options = {"metric_for_best_model": "loss/odd", "eval_strategy": "steps", "eval_steps": 1, "eval_rows": rows}
    with pytest.raises(ValueError, match="is no metric"):
        trainer(tmp_path, adapted(), features(), **options).train()


def test_processes_that_did_not_join_are_refused(tmp_path, monkeypatch):
    ran = trainer(tmp_path, adapted(), features())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(RuntimeError, match=r"2 processes were started.*init_process_group"),
        align_step(adapted().train(), torch.tensor([0])),
    ):
        pass
    with pytest.raises(RuntimeError, match="use_cpu=True"):
        AlignTrainer(model=ran.model, args=ran.args, train_dataset=features(), data_collator=ran.data_collator)


def test_processes_that_another_joined_and_trainer_did_not_are_refused(tmp_path, monkeypatch):
    """A library may make a process group; Trainer without use_cpu trains each process by itself all the same."""
    ran = trainer(tmp_path, adapted(), features())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(RuntimeError, match=r"2 processes were started, but each would train by itself: .*use_cpu"):
            AlignTrainer(model=ran.model, args=ran.args, train_dataset=features(), data_collator=ran.data_collator)
    finally:
        torch.distributed.destroy_process_group()


def warned(tmp_path, steps, options=None, **arguments):
    """What is said of an alignment that dominates, in so many steps."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer(tmp_path, adapted(**options or {}), features(), max_steps=steps, arguments=arguments).train()
    return [str(one.message) for one in found if "dominates" in str(one.message)]


def test_an_alignment_far_above_the_loss_is_named_once_with_the_cure(tmp_path):
    strong = {"align_weight": 500.0}
    (said,) = warned(tmp_path, 7, strong)
    figures = (
        r"500 \(align_weight\) x (\S+) = (\S+), and the loss of the model itself is (\S+), in the mean of the logs"
    )
    cure = r' up to step 3: give align_pairs="mean", or a smaller align_weight$'
    align, weighted, lm = map(
        float, re.match("the alignment dominates what is trained: " + figures + cure, said).groups()
    )
    assert 500 * align == pytest.approx(weighted, rel=0.01)
    assert weighted > 3 * lm
    assert warned(tmp_path, 3, strong | {"align_pairs": "mean"})[0].endswith("step 3: give a smaller align_weight")
    assert "up to step 6: give" in warned(tmp_path, 8, strong, align_warmup=0.75)[0]
    assert warned(tmp_path, 2, strong) == warned(tmp_path, 4) == []
