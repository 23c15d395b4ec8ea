"""What operators refuse: every dtype of every tensor argument, sizes of nothing and of absurd numbers.

The operators are called as they are registered, by the names of their schemas: no Python stands between.
"""

import inspect
import math

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from torch.testing import make_tensor

import align_ext.alignment.tap  # noqa: F401  registers the operators of the step
from align_ext import ops
from align_ext.ops import _checks

# Shapes by the letters of their sizes: T tokens, n in_dim, m out_dim, r rank, N heads, G groups, q offset rank, M
# tasks, L layers, R rows of a gradient. Lists stand for Tensor[].
X = {"x": "T n", "base_out": "T m"}
OFFSET = {"A0": "q n", "B0": "m q"}
BACKWARD = {"x": "T n", "dy": "T m"}
LAYERS = {
    "A": ["N r n"] * 2, "B": ["N m r"] * 2, "R": ["NG n"] * 2, "A0": ["q n"] * 2, "B0": ["m q"] * 2,
    "weight": ["m n"] * 2,
}  # fmt: skip
OF_LAYERS = {"dy": ["T m"] * 2, "z": ["T N r"] * 2, "dz": ["T N r"] * 2, "w": ["T G N"] * 2, "dw": ["T G N"] * 2}
SHAPES = {
    "group_rows": {"group": "T"},
    "grouped_lora": X | {"A": "G r n", "B": "G m r", "order": "T+G+1"},
    "grouped_lora_backward": BACKWARD | {"z": "T r", "dz": "T r", "A": "G r n", "B": "G m r", "order": "T+G+1"},
    "sibling_lora": {"x": "T n", **LAYERS, "bias": ["m", "m"]},
    "sibling_lora_backward": {"x": "T n", **OF_LAYERS, **LAYERS},
    "dropout_sum": X | OFFSET | {"A": "r n", "B": "N m r"},
    "dropout_sum_backward": BACKWARD | OFFSET | {"z": "T r", "dz": "T r", "A": "r n", "B": "N m r"},
    "routed_lora": X | OFFSET | {"A": "N r n", "B": "N m r", "R": "NG n"},
    "routed_lora_backward": BACKWARD
    | OFFSET
    | {"z": "T N r", "dz": "T N r", "w": "T G N", "dw": "T G N", "A": "N r n", "B": "N m r", "R": "NG n"},
    "task_moments": {"z": ["T r", "T r"], "task": "T"},
    "gaussian_kl": {"z": "T r", "task": "T"},
    "gaussian_kl_tables": {"moments": "L M 2r+1"},
    "gaussian_kl_backward": {"d_loss": "", "z": ["T r"], "task": "T", "tables": "1 M 3r"},
    "mk_mmd": {"z": ["T r", "T r"], "task": "T"},
    "mk_mmd_backward": {"d_loss": "L", "gradient": "L R r", "slot": "T"},
}
OPTIONS = {
    "scaling": 0.5, "offset_scaling": -0.5, "p": 0.0, "site": 0, "top_k": 1, "tau": 1.0, "need_dx": True, "rank": 8,
    "eps": 1e-6, "ddof": 0, "mean_pairs": False, "scale": 1.0, "bandwidths": [], "num_kernels": 2, "num_tasks": 2,
    "u_statistic": False, "n_max": 4, "dtype": torch.float32, "groups": 2,
}  # fmt: skip
SMALL = {"T": 6, "n": 8, "m": 12, "r": 3, "N": 2, "G": 2, "q": 2, "M": 2, "L": 2, "R": 6}
FAKES = [name for name in SHAPES if not name.endswith(("_backward", "_tables"))]  # that check dtypes
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128, torch.bool]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2]
FLOATING = DTYPES[:4]
# What an argument may be in calls whose other tensors are float32; else what the call gives it.
MORE = {name: FLOATING for name in ("A", "B", "A0", "B0", "R", "d_loss")}
FREE = {"x", "z", "moments", "gradient", "tables"}  # floating, but then others would have to be so too


def operator(name):
    return getattr(torch.ops.align_ext, name).default


def tensors_of(name):
    """The names of an operator's tensors."""
    return {a.name for a in operator(name)._schema.arguments if "Tensor" in str(a.type)}


def shape_of(letters, sizes):
    compound = {"NG": sizes["N"] * sizes["G"], "2r+1": 2 * sizes["r"] + 1, "3r": 3 * sizes["r"], "1": 1}
    compound["T+G+1"] = sizes["T"] + sizes["G"] + 1
    return [(sizes | compound)[letter] for letter in letters.split()]


def tensor_of(name, shape, device):
    """Random values; one value that takes no memory where a shape has too many."""
    dtype = {"group": torch.int64, "task": torch.int64, "slot": torch.int32}.get(name, torch.float32)
    if math.prod(shape) > 10**6 or max(shape, default=0) > 10**6:
        return torch.zeros((), dtype=dtype, device=device).expand(shape)
    if name == "slot":
        return torch.full(shape, -1, dtype=dtype, device=device)
    if name in ("group", "task"):
        return torch.zeros(shape, dtype=dtype, device=device)
    if name in ("w", "moments"):
        return torch.full(shape, 0.5, device=device)
    return make_tensor(shape, dtype=dtype, device=device, low=-1, high=1)


def each(value, function):
    """The function of a tensor, or of each of a list; other values as they are."""
    if isinstance(value, list):
        return [each(one, function) for one in value]
    return function(value) if isinstance(value, torch.Tensor) else value


def call_of(name, device, sizes=SMALL, **options):
    """The operator's arguments, by name."""
    known = OPTIONS | options
    for key, letters in SHAPES[name].items():
        several = letters if isinstance(letters, list) else [letters]
        made = [tensor_of(key, shape_of(one, sizes), device) for one in several]
        known |= {key: made if several is letters else made[0]}
    if "order" in SHAPES[name] and known["order"].numel() < 100:  # all rows belong to the first group
        offsets = torch.tensor([0] + [sizes["T"]] * sizes["G"])
        known["order"] = torch.cat([torch.arange(sizes["T"]), offsets]).to(device)
    arguments = {argument.name: known.get(argument.name) for argument in operator(name)._schema.arguments}
    if name.startswith("sibling_lora"):
        for key in ("scaling", "offset_scaling"):
            arguments[key] = len(arguments["A"]) * [arguments[key]]
    return arguments


def message_of(call):
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value)


def test_every_tensor_of_every_operator_is_tried(device):
    ours = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("align_ext::")]
    in_python = {"record_", "recorded_gradient", "expert_product"}
    assert {name.removeprefix("align_ext::") for name in ours} - in_python == set(SHAPES)
    more = {"offsets", "rng", "weight", "bias"}  # in cases of their own below
    for name, shapes in SHAPES.items():
        assert tensors_of(name) - more == set(shapes) - more, name


def check_dtypes(name, arguments, tried, device):
    """Every dtype of one argument: taken, or refused by name; on the meta device, by the fakes, in the same words."""
    given = torch.utils._pytree.tree_leaves(arguments[tried])[0].dtype
    for dtype in DTYPES:
        changed = arguments | {tried: each(arguments[tried], lambda tensor, dtype=dtype: tensor.to(dtype))}
        if dtype == given or dtype in MORE.get(tried, []):
            operator(name)(**changed)
        elif not (tried in FREE and dtype in FLOATING):
            message = message_of(lambda changed=changed: operator(name)(**changed))
            assert message.startswith(f"{tried} must be "), message
            assert message.endswith(f"got {str(dtype).removeprefix('torch.')}"), message
            if name in FAKES and device.type == "cpu" and tried not in ("group", "order", "offsets", "rng"):
                meta = {key: each(value, lambda tensor: tensor.to("meta")) for key, value in changed.items()}
                assert message_of(lambda meta=meta: operator(name)(**meta)) == message


@pytest.mark.parametrize(("name", "tried"), [(name, tried) for name in SHAPES for tried in SHAPES[name]])
def test_each_dtype_of_each_tensor_is_taken_or_refused_by_name(device, name, tried):
    check_dtypes(name, call_of(name, device), tried, device)


@pytest.mark.parametrize("name", ["grouped_lora", "dropout_sum", "routed_lora"])
@pytest.mark.parametrize("tried", ["weight", "bias", "rng", "offsets"])
def test_each_dtype_of_a_base_layer_is_taken_or_refused_by_name(device, name, tried):
    base = {"base_out": None, "weight": tensor_of("weight", [12, 8], device), "bias": tensor_of("bias", [12], device)}
    arguments = call_of(name, device, p=0.5, site=1) | base | {"rng": torch.tensor([3, 4], device=device)}
    if name == "grouped_lora":
        arguments |= {"order": None, "offsets": torch.tensor([0, 2, 6], device=device)}
    if tried in arguments:
        check_dtypes(name, arguments, tried, device)


ABSURD = [2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1]


def one_line(message, names):
    """An error of ours: in one line, about an argument or the memory that it would need."""
    assert "\n" not in message.strip(), message
    assert "csrc" not in message, message
    assert any(name in message for name in names), message


@pytest.mark.parametrize("name", SHAPES)
@given(data=st.data())
def test_fuzz_sizes_give_a_result_or_an_error_that_names_the_argument(device, name, data):
    letters = sorted(set(SMALL) & set(str(SHAPES[name].values())))
    sizes = SMALL | {letter: data.draw(st.sampled_from([0, 1, 2, 5]), letter) for letter in letters}
    absurd = data.draw(st.lists(st.sampled_from(letters), max_size=2, unique=True), "absurd")
    several = name.startswith("sibling")  # tensors of 8 GiB each fit the machine, but not those of all layers together
    huge = ABSURD[2:] if several else ABSURD
    sizes |= {letter: data.draw(st.sampled_from(huge), f"absurd {letter}") for letter in absurd}
    try:
        arguments = call_of(name, device, sizes)
    except (RuntimeError, TypeError):
        reject()  # torch has no such tensor
    try:
        results = operator(name)(**arguments)
    except RuntimeError as error:
        return one_line(str(error), [*arguments, "bytes"])
    for result in torch.utils._pytree.tree_leaves(results):
        assert result.numel() <= 10**6 or absurd
        if result.numel() <= 10**6 and name != "gaussian_kl_backward":  # whose buffer has room between the layers
            assert not result.isnan().any()


NUMBERS = st.one_of(st.sampled_from([-1, 0, 1, 2, 2**16, 2**16 + 1, 2**59, 10**19, -(2**63)]), st.integers())
RANKS = st.sampled_from([-1, 0, 2, 3, 64, 2**30 + 1, 2**59, 10**19])


@pytest.mark.needs("size")
@given(st.data())
def test_fuzz_numbers_give_a_result_or_an_error_that_names_the_argument(device, data):
    z, task = torch.ones(6, 3, device=device), torch.tensor([0, 1, 0, 1, 1, 2], device=device)
    function = data.draw(st.sampled_from([ops.gaussian_kl, ops.task_moments, ops.mk_mmd]), "function")
    allowed = {"num_tasks", "rank", "n_max", "num_kernels", "ddof"} & set(inspect.signature(function).parameters)
    chosen = data.draw(st.lists(st.sampled_from(sorted(allowed)), min_size=1, unique=True), "options")
    numbers = {name: data.draw(RANKS if name == "rank" else NUMBERS, name) for name in chosen}
    try:
        result = function(z, task, **{"num_tasks": 3, **numbers})
    except (ValueError, RuntimeError) as error:
        return one_line(str(error), [*numbers, "bytes"])
    assert result.isfinite().all()
    assert 1 <= numbers.get("num_tasks", 1) <= 2**16


@given(st.data())
def test_fuzz_the_operators_of_the_step_name_what_they_miss(device, data):
    integers = st.integers(-(2**63), 2**63 - 1)
    key, layer = (torch.tensor(data.draw(integers, what)) for what in ("key", "layer"))
    z = torch.zeros(data.draw(st.sampled_from([(0, 3), (3, 0), (2, 2)]), "shape"), device=device)
    output = data.draw(integers, "output")
    door = torch.zeros((), dtype=torch.int64)
    ours = torch.ops.align_ext
    assert "its alignment step is gone" in message_of(lambda: ours.recorded_gradient(z, z, key, layer, output))
    assert "its alignment step is gone" in message_of(lambda: ours.record_(door, z, key, layer, output))


@pytest.mark.parametrize("wrong", [0, -1, 2**16 + 1, 2**59, 10**19, 2.0, "2", None, [2]])
@pytest.mark.parametrize("function", [ops.gaussian_kl, ops.task_moments, ops.mk_mmd])
def test_the_number_of_tasks_is_bounded_in_python_and_below(device, function, wrong):
    z, task = torch.ones(4, 2, device=device), torch.tensor([0, 1, 0, 1], device=device)
    with pytest.raises(ValueError, match=r"num_tasks must be an integer in 1 \.\. 65536, got "):
        function(z, task, wrong)
    if isinstance(wrong, int) and wrong < 2**63:
        arguments = call_of(function.__name__, device, num_tasks=wrong)
        assert message_of(lambda: operator(function.__name__)(**arguments)) == (
            f"num_tasks must be in 1 .. {_checks.MAX_COUNT}, got {wrong}"
        )


@pytest.mark.needs("size")
@pytest.mark.parametrize("function", [ops.gaussian_kl, ops.task_moments, ops.mk_mmd])
def test_as_many_tasks_as_there_may_be_work(device, function):
    z, task = torch.ones(4, 2, device=device), torch.tensor([0, 1, 0, 2**16 - 1], device=device)
    assert function(z, task, _checks.MAX_COUNT).isfinite().all()


def test_rows_of_no_group_are_refused(device):
    for empty in ({}, {"order": None, "offsets": torch.zeros(1).long()}):
        arguments = call_of("grouped_lora", device, SMALL | {"G": 0})
        arguments |= {name: tensor if tensor is None else tensor.to(device) for name, tensor in empty.items()}
        assert message_of(lambda a=arguments: operator("grouped_lora")(**a)) == "A holds no group, but x has 6 rows"


def test_the_gradient_of_no_tasks_is_zero(device):
    arguments = call_of("gaussian_kl_backward", device, SMALL | {"M": 0})
    arguments["task"] = torch.tensor([0, -1, 5, 1, 0, 2], device=device)
    assert not operator("gaussian_kl_backward")(**arguments)[0, : 6 * 3].any()


@pytest.mark.needs("values")
def test_rows_of_a_gradient_that_is_not_there_are_refused(device):
    slot = torch.tensor([0, -1, 6], dtype=torch.int32, device=device)
    arguments = call_of("mk_mmd_backward", device) | {"slot": slot}
    message = message_of(lambda: operator("mk_mmd_backward")(**arguments))
    assert message == "slot must be below the rows of gradient, 6, got 6"
