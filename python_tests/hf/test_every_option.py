"""Every option of the adapters does something: with another value the parameters, losses or gradients are others.

So do those of the job that no result of a run shows. test_passed_options.py has what goes to TrainingArguments.
"""

import pytest
import torch
from hf import runs
from hf.mixtures import mixture
from hf.words import model_folder, write_rows
from tiny import batch, qwen2

from align_ext import AlignLoraConfig, replace_linear_with_align_lora
from align_ext.data.task_sampler import TaskSampler
from align_ext.model.rank_allocation import allocated_ranks, update_and_allocate
from align_ext.training import fit, recipe
from align_ext.training.options import known_options

MTLORA = {"architecture": "mtlora", "target_blocks": ()}
ADALORA = {"architecture": "adalora", "total_step": 9}
MMD, ROUTED, QUEUE = {"align": "mmd"}, {"architecture": "lora_moe"}, {"align_accumulation": "queue"}
BESIDE = {"routing": {"router": "mlp"}}  # what goes with the value alone
ELSEWHERE = {"layers_pattern"}  # test_by_layer.py, since the model here has one list of layers
# Of each option a value that is not the default, and the options that both sides have beside it.
TRIED = {
    "architecture": ("hydra", {}), "r": (4, {}), "lora_alpha": (16, {}), "lora_dropout": (0.5, {}),
    "target_modules": (["q_proj"], {}), "target_parameters": (["experts.down_proj"], {"target_modules": ["q_proj"]}),
    "exclude_modules": (["up_proj"], {}), "rank_pattern": ({"up_proj": 2}, {}), "alpha_pattern": ({"up_proj": 2}, {}),
    "layers_to_transform": ([1], {"target_modules": ["q_proj"]}),
    "modules_to_save": (["lm_head"], {}), "bias": ("all", {}), "lora_bias": (True, {}),
    "trainable_token_indices": ([3, 5], {}), "target_blocks": (["attention"], {"architecture": "mtlora"}),
    "use_rslora": (True, {}), "use_dora": (True, {}), "init_lora_weights": ("orthogonal", {}),
    "init_gamma": (8.0, {"architecture": "m_lora"}), "num_heads": (2, ROUTED),
    "reduce": ("mean", {"architecture": "m_lora"}), "router": (None, {"architecture": "hydra"}),
    "router_init": ("zeros", ROUTED), "routing": ("sequence", MTLORA),
    "routing_groups": (1, MTLORA), "top_k": (2, ROUTED), "router_temperature": (0.5, ROUTED),
    "dropout_site": ("input_per_head", {"architecture": "hydra"}), "align": ("l2", {}), "align_weight": (0.5, {}),
    "num_tasks": (5, {}), "align_eps": (0.1, {}), "align_ddof": (1, {}), "align_statistics": ("position", {}),
    "align_pairs": ("mean", {}), "align_layers": ("sum", {}), "align_accumulation": ("queue", {}),
    "align_queue": (1, QUEUE), "mmd_bandwidths": ([1.0, 2.0], MMD), "mmd_kernels": (2, MMD),
    "mmd_statistic": ("u", MMD), "mmd_n_max": (4, MMD), "response_only": (True, {}), "balance": ("cv2", ROUTED),
    "balance_weight": (0.5, {**ROUTED, "balance": "cv2"}), "spectral": ("uniform", {**MTLORA, "spectral_weight": 0.5}),
    "spectral_weight": (0.5, MTLORA), "spectral_steps": (1, {**MTLORA, "spectral_weight": 1.0}),
    "init_r": (4, ADALORA), "target_r": (1, ADALORA), "tinit": (2, ADALORA), "tfinal": (0, ADALORA),
    "deltaT": (2, ADALORA), "beta1": (0.5, ADALORA), "beta2": (0.5, ADALORA), "orth_reg_weight": (0.0, ADALORA),
    "total_step": (5, {"architecture": "adalora", "tinit": 0}),
    "share_inputs": (False, {}), "adapter_dtype": ("base", {}), "shared_rank": (4, {"architecture": "malora"}),
}  # fmt: skip


def norms(tensors):
    return [tensor.double().norm().item() for tensor in tensors.values()]


def steps(model, **options):
    """Name and shape of each trained parameter, its gradients, the loss, and AdaLoRA's ranks in three steps of SGD."""
    torch.manual_seed(0)
    replace_linear_with_align_lora(model, AlignLoraConfig(**{"num_tasks": 3} | options))
    model.train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = [(name, parameter.shape, parameter.dtype) for name, parameter in trained.items()]
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for seed in range(3):
        torch.manual_seed(seed)
        inputs, tasks = batch(seed)
        loss = model(**inputs, task_ids=tasks).loss
        optimizer.zero_grad()
        loss.backward()
        found += [loss.item(), *((name, p.grad.double().norm().item()) for name, p in trained.items())]
        optimizer.step()
        if model.align_state.config.architecture == "adalora":
            update_and_allocate(model, seed + 1, total_step=4)
            ranks = model.align_state.ranks
            found += [list(allocated_ranks(model).values()), *map(norms, (ranks.sensitivity, ranks.uncertainty))]
    return found


def test_every_option_of_the_adapters_is_tried_here():
    assert {name for name, option in known_options().items() if option.of_adapter} == TRIED.keys() | ELSEWHERE


def of(name):
    """A model in which the option can do something."""
    if name == "target_parameters":
        return mixture("Qwen3Moe")
    return qwen2().bfloat16() if name == "adapter_dtype" else qwen2()


@pytest.mark.parametrize("options", [{}, MMD, QUEUE, ROUTED, MTLORA])
def test_the_same_options_do_the_same(options):
    assert steps(qwen2(), **options) == steps(qwen2(), **options)


@pytest.mark.parametrize("name", TRIED)
def test_an_option_of_the_adapters_does_something(name):
    value, others = TRIED[name]
    assert steps(of(name), **others) != steps(of(name), **others, **{name: value}, **BESIDE.get(name, {}))


def of_job(place, **options):
    """A job with the options, its TrainingArguments among it."""
    return runs.prepare(place, **{"steps": 4, "lora_dropout": 0.0} | options)


def test_options_of_the_model_and_of_the_steps_arrive_in_the_job(place):
    plain, other = of_job(place), of_job(place, attn_implementation="eager", gradient_checkpointing=True)
    attention = [job.model.config._attn_implementation for job in (plain, other)]
    recomputing = [getattr(job.arguments, fit._CHECKPOINTING) for job in (plain, other)]
    assert (attention, recomputing) == (["sdpa", "eager"], [False, True])


def test_the_alignment_rises_over_its_warmup(place):
    losses = runs.run(place, log_steps=1, steps=4, align_warmup=0.5)[0]["losses"]
    weights = [entry["align_weight"] for entry in losses]
    assert weights[0] < weights[1] < weights[2] == weights[3] == pytest.approx(0.1)


@pytest.mark.parametrize(("given", "share"), [({}, 2 / 3), ({"mixing_temperature": 1}, 4 / 5)])
def test_the_temperature_of_the_mixing_decides_the_shares(place, given, share):
    job = of_job(place, train_examples="next=16,threes=4", architecture="lora", mixing="temperature", **given)
    assert TaskSampler(**fit.mixing(job)).shares[job.data.names.index("next")] == pytest.approx(share)


def test_the_rows_of_a_forward_of_the_scores_are_as_many_as_were_given(place):
    job, seen = of_job(place, eval_batch_size=3), []
    job.model.register_forward_pre_hook(lambda _, args, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    recipe.score(job)
    assert max(seen) == 3


def test_columns_are_renamed_and_left_out_by_the_commands(run, tmp_path):
    rows = [{"q": f"{i}+1", "completion": str(i + 1), "note": f"a note of many words {i}"} for i in range(8)]
    write_rows(tmp_path / "x.test.jsonl", rows)
    data = ("--data", tmp_path / "x.test.jsonl", "--model", model_folder(tmp_path / "model"), "--device", "cpu")
    named = ("--columns", "prompt=q")
    code, _, error = run("eval", *data, "--no-generate", *named)
    assert (code, "note" in error) == (2, True)
    code, _, error = run("eval", *data, "--no-generate", "--ignore-columns", "note")
    assert (code, "no column prompt" in error) == (2, True)
    assert run("eval", *data, "--no-generate", *named, "--ignore-columns", "note")[0] == 0
    write_rows(tmp_path / "x.train.jsonl", [row | {"q": f"2 * {row['q']}"} for row in rows])
    train = ("data", *data, "--data", tmp_path / "x.train.jsonl", "--align", "none", *named)
    assert run(*train)[0] == 2
    assert run(*train, "--ignore-columns", "note")[0] == 0
