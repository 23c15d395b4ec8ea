"""AdaLoRA by hand and by its equations: the layer, the orthogonality, the budget, the importance, the allocation."""

import itertools

import pytest
import torch
from adapters.test_methods import ONES, fill, layer
from torch import nn

from align_ext import AlignLoraConfig, merge_and_unload, replace_linear_with_align_lora
from align_ext.losses.orthogonality import orthogonality
from align_ext.model.rank_allocation import RankSchedule, allocated_ranks, update_and_allocate

PARTS = ("lora_B", "lora_E", "lora_A")


def two_layers(dtype=torch.float64, **options):
    """Two layers of different sizes with random P, Λ and Q."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6)).to(dtype)
    names = {"architecture": "adalora", "target_modules": ["0", "1"], "r": 4, "lora_dropout": 0.0}
    replace_linear_with_align_lora(model, **{"target_r": 2, "orth_reg_weight": 0.0} | names | options)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.copy_(torch.randn(parameter.shape))
    return model


def trained(model):
    return [getattr(model[i].adapter, part) for i in range(2) for part in PARTS]


def set_gradients(model, seed):
    """Random ones, those of the second layer larger."""
    generator = torch.Generator().manual_seed(seed)
    for i, parameter in enumerate(trained(model)):
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.mul(1 + i // 3).to(parameter.dtype)


def test_a_layer_by_hand():
    model = layer([[1.0, 0.0], [0.0, 1.0]], architecture="adalora", r=2, lora_alpha=2)
    fill(model[0].adapter, lora_A=[[1.0, 2.0], [3.0, 0.0]], lora_E=[[2.0], [-1.0]], lora_B=[[1.0, 0.0], [5.0, 1.0]])
    # x = (1, 1): Q x = (3, 3), Λ Q x = (6, -3), P Λ Q x = (6, 30 - 3)
    assert model(ONES).tolist() == [[1 + 6, 1 + 27]]
    assert merge_and_unload(model)(ONES).tolist() == [[7, 28]]


def test_it_starts_from_singular_values_of_zero_and_vectors_of_small_numbers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200))
    adapter = replace_linear_with_align_lora(model, architecture="adalora", target_modules=["0"], r=40)[0].adapter
    assert not adapter.lora_E.any()
    for vectors in (adapter.lora_A, adapter.lora_B):
        assert abs(vectors.std() / 0.02 - 1) < 0.02
        assert abs(vectors.mean()) < 1e-3


def test_the_orthogonality_by_hand():
    P = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    Q = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    value = orthogonality(P, Q)  # PᵀP - I = [1, 1; 1, 0] and QQᵀ - I = [3, 0; 0, 0]: squares of 3 and 9
    value.backward()
    assert value.item() == 6
    assert P.grad.tolist() == [[2, 2], [4, 2]]  # 2 P (PᵀP - I)
    assert Q.grad.tolist() == [[12, 0], [0, 0]]
    assert orthogonality(torch.eye(3, dtype=torch.bfloat16), torch.eye(3, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_budget_by_hand():
    config = AlignLoraConfig(architecture="adalora", r=10, target_r=2, tinit=2, tfinal=4, deltaT=2)
    schedule = RankSchedule.of(config, 10, layers=3)  # 30 triplets fall to 6 from step 2 to step 6
    assert [schedule.budget(t) for t in range(1, 11)] == [30, 30, 16, 9, 6, 6, 6, 6, 6, 6]  # 24 (3/4)³ = 10.1, 3, 0.4
    assert [t for t in range(1, 11) if schedule.allocates(t)] == [4]
    default = RankSchedule.of(AlignLoraConfig(architecture="adalora", r=12), 300, layers=1)
    assert (default.begin, default.end, default.first, default.last) == (50, 150, 12, 8)
    with pytest.raises(ValueError, match="tinit=2 and tfinal=4 leave none of 6 optimizer steps"):
        RankSchedule.of(config, 6, layers=3)


@pytest.mark.parametrize(("tinit", "tfinal", "deltaT", "total"), [(0, 0, 1, 20), (3, 5, 2, 30), (10, 20, 7, 101)])
def test_the_budget_is_pefts(tinit, tfinal, deltaT, total):
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    numbers = {"target_r": 3, "init_r": 8, "tinit": tinit, "tfinal": tfinal, "deltaT": deltaT, "total_step": total}
    schedule = RankSchedule.of(AlignLoraConfig(architecture="adalora", **numbers), total, layers=11)
    theirs = RankAllocator(nn.Module(), AdaLoraConfig(**numbers), "default")
    theirs.init_bgt, theirs.target_bgt = 8 * 11, 3 * 11
    for step in range(1, total + 1):
        budget, masks = theirs.budget_schedule(step)
        assert schedule.budget(step) == budget, step
        if step < schedule.end:  # there PEFT masks whatever deltaT says, and from there on keeps the mask
            assert schedule.allocates(step) == masks, step


def test_an_allocation_by_hand():
    options = {"r": 2, "target_r": 1, "tinit": 0, "tfinal": 1, "total_step": 3, "beta1": 0.5, "beta2": 0.25}
    model = layer([[1.0]], architecture="adalora", lora_alpha=2, orth_reg_weight=0.0, **options)
    adapter = model[0].adapter
    fill(adapter, lora_A=[[1.0], [1.0]], lora_E=[[2.0], [1.0]], lora_B=[[1.0, 3.0]])
    for parameter, gradient in ((adapter.lora_A, [[0.0], [1.0]]), (adapter.lora_E, [[1.0], [-2.0]])):
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
    adapter.lora_B.grad = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    update_and_allocate(model, 1)
    importance = model.align_state.ranks
    # I of λ = (2, 2), of P = (2, 0), of Q = (0, 1). Ī = I / 2, Ū = 3/4 |I - I / 2|, s = 3/16 I²
    assert importance.scores("0").tolist() == [3 / 16 * (4 + 4), 3 / 16 * (4 + 1)]
    assert adapter.lora_E.flatten().tolist() == [2, 0]  # the budget is floor(1 + 1/8) = 1
    fill(adapter, lora_E=[[0.0], [1.0]])  # what was pruned is trained on
    adapter.lora_E.grad.copy_(torch.tensor([[0.0], [20.0]]))
    update_and_allocate(model, 2)  # the last allocation, in which Ī Ū of the second λ is (1 + 20) / 2 (3/16 + 57/8)
    assert adapter.lora_E.flatten().tolist() == [0, 1]
    assert importance.kept["0"].tolist() == [False, True]
    fill(adapter, lora_E=[[3.0], [4.0]])
    update_and_allocate(model, 3)
    assert adapter.lora_E.flatten().tolist() == [0, 4]
    assert allocated_ranks(model) == {"0": 1}


class Plain:
    """The equations, weight by weight and triplet by triplet."""

    def __init__(self, config, total):
        self.config, self.total, self.mean, self.spread, self.kept = config, total, {}, {}, None

    def step(self, t, weights, gradients):
        """Returns which triplets of which layer lose their singular value in step t."""
        c, end = self.config, self.total - self.config.tfinal
        names = [(k, i) for k in range(2) for i in range(c.r)]
        if t <= end:
            for key, w in weights.items():
                now = abs(w * gradients[key])
                self.mean[key] = c.beta1 * self.mean.get(key, 0) + (1 - c.beta1) * now
                self.spread[key] = c.beta2 * self.spread.get(key, 0) + (1 - c.beta2) * abs(now - self.mean[key])
        if t > c.tinit and (t == end or (t < end and t % c.deltaT == 0)):
            b0, bT = 2 * c.r, 2 * c.target_r
            b = int(bT + (b0 - bT) * (1 - (t - c.tinit) / (end - c.tinit)) ** 3)
            ordered = sorted(names, key=lambda name: -self.score(*name))
            if t == end:
                self.kept = ordered[:b]
            return ordered[b:]
        return [name for name in names if name not in self.kept] if t > end else []

    def score(self, k, i):
        def mean(part):
            own = [self.mean[key] * self.spread[key] for key in self.mean if key[:3] == (k, part, i)]
            return sum(own) / len(own)

        return mean("lora_E") + mean("lora_B") + mean("lora_A")


def numbers_of(tensors):
    """Every number of P, Λ and Q by (layer, part, triplet, place)."""
    found = {}
    for (k, part), tensor in zip(itertools.product(range(2), PARTS), tensors, strict=True):
        for i, values in enumerate((tensor.T if part == "lora_B" else tensor).tolist()):
            found |= {(k, part, i, j): value for j, value in enumerate(values)}
    return found


def test_a_training_is_that_of_the_equations():
    model = two_layers(tinit=2, tfinal=3, deltaT=2, total_step=14, beta1=0.6, beta2=0.3)
    optimizer = torch.optim.SGD(trained(model), lr=0.05)
    plain, ranks = Plain(model.align_state.config, 14), []
    for t in range(1, 15):
        set_gradients(model, t)
        optimizer.step()
        before = [parameter.detach().clone() for parameter in trained(model)]
        pruned = plain.step(t, numbers_of(before), numbers_of([p.grad for p in trained(model)]))
        for k, i in pruned:
            before[3 * k + 1][i] = 0
        update_and_allocate(model, t)
        assert all(torch.equal(a, b) for a, b in zip(trained(model), before, strict=True)), t
        ranks.append(sum(allocated_ranks(model).values()))
    assert ranks == [8, 8, 8, 5, 8, 4, 8, 4, 8, 4, 4, 4, 4, 4]
    assert set(allocated_ranks(model).values()) != {2}, "the layers have ranks of their own"


def test_a_training_is_pefts():
    """PEFT's allocator on the same weights and gradients: the same averages, and the same triplets at every step."""
    from peft import AdaLoraConfig, get_peft_model

    numbers = {"target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 3, "total_step": 20}
    model = two_layers(**numbers)
    base = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6)).double()
    theirs = get_peft_model(base, AdaLoraConfig(init_r=4, target_modules=["0", "1"], **numbers)).double()
    layers = [theirs.base_model.model[i] for i in range(2)]
    pairs = [(getattr(layers[i], part)["default"], getattr(model[i].adapter, part)) for i in range(2) for part in PARTS]
    for t in range(1, 21):
        set_gradients(model, t)
        with torch.no_grad():
            for their, our in pairs:
                our.sub_(0.05 * our.grad)
                their.copy_(our)
                their.grad = our.grad.clone()
        update_and_allocate(model, t)
        if t == 16:  # where PEFT takes the ranks by the averages of the step before
            theirs.base_model.rankallocator.update_ipt(theirs.base_model.model)
        theirs.base_model.update_and_allocate(t)
        for their, our in pairs:
            assert torch.equal(their, our), t
        if t < 16:
            allocator = theirs.base_model.rankallocator
            for name, average in model.align_state.ranks.sensitivity.items():
                key = f"{name}.default"
                torch.testing.assert_close(average, allocator.exp_avg_ipt[key], rtol=1e-12, atol=0)
                uncertainty = model.align_state.ranks.uncertainty[name]
                torch.testing.assert_close(uncertainty, allocator.exp_avg_unc[key], rtol=1e-12, atol=1e-14)
    assert sum(allocated_ranks(model).values()) == 4


def test_equal_importance_keeps_the_first_layers_triplets_and_exactly_the_budget():
    model = two_layers(tinit=0, tfinal=1, total_step=3)
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    update_and_allocate(model, 1)
    assert allocated_ranks(model) == {"0": 4, "1": 0}  # floor(4 + 4 / 8) of 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_averages_of_narrow_adapters_are_float32(dtype):
    model = two_layers(dtype, adapter_dtype="base", tinit=0, tfinal=1, total_step=9)
    set_gradients(model, 0)
    update_and_allocate(model, 1)
    importance = model.align_state.ranks
    assert {x.dtype for of in (importance.sensitivity, importance.uncertainty) for x in of.values()} == {torch.float32}


def test_a_second_training_allocates_anew():
    model = two_layers(tinit=0, tfinal=1, total_step=3)
    for t in (1, 2, 3):
        set_gradients(model, t)
        update_and_allocate(model, t)
    first = {name: mask.clone() for name, mask in model.align_state.ranks.kept.items()}
    for t in (1, 2, 3):
        for parameter in trained(model):
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
        set_gradients(model, 100 + t)
        update_and_allocate(model, t)
    second = model.align_state.ranks.kept
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_what_cannot_be_allocated_is_refused():
    model = two_layers(tinit=0, tfinal=3, total_step=5)
    with pytest.raises(RuntimeError, match=r"no gradients: call update_and_allocate before optimizer.zero_grad"):
        update_and_allocate(model, 1)
    with pytest.raises(RuntimeError, match="step=3: from step 2 on the ranks are final"):
        update_and_allocate(model, 3)
    for step in (0, True, 1.0):
        with pytest.raises(ValueError, match="count the optimizer steps that have been made, from 1 on"):
            update_and_allocate(model, step)
    with pytest.raises(ValueError, match="total_step=None: the schedule of the ranks"):
        update_and_allocate(two_layers(), 1)
    plain = replace_linear_with_align_lora(nn.Sequential(nn.Linear(4, 4)), architecture="lora", target_modules=["0"])
    with pytest.raises(ValueError, match="architecture='lora': only the ranks of adalora are allocated"):
        update_and_allocate(plain, 1)


def test_the_total_may_be_the_callers():
    model = two_layers(tinit=0, tfinal=1)
    set_gradients(model, 0)
    update_and_allocate(model, 1, total_step=3)
    assert sum(allocated_ranks(model).values()) == 4
