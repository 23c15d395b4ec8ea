"""A folder of which something was changed is the very same adapter, or one line; never another one, nor a wait."""

import json
import os
import random
import shutil
import time

import pytest
import torch
from hf.folders import ARCHITECTURES, TASKED, as_version_0_1_0, files, plain, trained
from hostile import check_line
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from align_ext import load_adapter, save_adapter
from align_ext.io.adapter_folder import AdapterFolder, key_options

NUMBERS = [None, True, 0, 1, -1, 2, 7, 3.5, 1e30, 2**62, 10**400]
TEXTS = [
    "",
    "x",
    "lora",
    "hydra",
    "mlp",
    "../x",
    "/etc",
    "[/bold]",
    "(a*)*b",
    "((?:a?){5000}){5000}",
    "\ud800",
    "x" * 5000,
]
LISTS = [[], [1], ["a", "a"], ["..", "a", "b"], ["up_proj"], {}, {"a": 1}, {"a": float("nan")}, [[[[]]]]]
VALUES = [*NUMBERS, *TEXTS, *LISTS]
LENGTH_2, ENDLESS = (2).to_bytes(8, "little"), (2**62).to_bytes(8, "little")
BYTES = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 5000, b'{"r": 1, "r": 2}', b"\0" * 64]
BYTES += [b'{"r":1' + b"0" * 400 + b"}", ENDLESS + b"{}", LENGTH_2 + b"{}", LENGTH_2 + b"[]"]


def identity(folder):
    """Everything that makes an adapter what it is."""
    stored = AdapterFolder.read(folder)
    scaling = {name: adapter.scaling for name, adapter in stored.adapters.items()}
    names = stored.task_names if stored.config.row.by_task else ()
    return key_options(stored.config), scaling, names, stored.state(), stored.trained


def same(one, other):
    tensors = zip(one[3:], other[3:], strict=True)
    return one[:3] == other[:3] and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
        for a, b in tensors
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of every architecture, and one with a norm that is trained beside it."""
    torch.set_num_threads(1)
    made = {}
    for kind in ARCHITECTURES:
        path = tmp_path_factory.mktemp("adapters") / "adapter"
        save_adapter(trained(kind), path, ["a", "b", "c"] if kind in TASKED else ())
        made[kind] = (path, identity(path))
    for kind in ("lora", "r_lora"):
        model, path = trained(kind), tmp_path_factory.mktemp("adapters") / "adapter"
        model.model.norm.requires_grad_(True)
        save_adapter(model, path)
        made[f"{kind} and a norm"] = (path, identity(path))
    return made


def places(content, at=()):
    """Every place in a JSON value."""
    yield at
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*at, key))


def change_json(file, pick):
    content = json.loads(file.read_text())
    at = pick.choice(list(places(content))[1:])
    inside = content
    for key in at[:-1]:
        inside = inside[key]
    action = pick.choice(["set", "set", "set", "delete", "rename", "nudge"])
    if action == "set":
        inside[at[-1]] = pick.choice(VALUES)
    elif action == "nudge" and isinstance(inside[at[-1]], (int, float)):
        inside[at[-1]] = pick.choice([inside[at[-1]] + 1, inside[at[-1]] * 2, -inside[at[-1]], not inside[at[-1]]])
    elif action == "rename" and isinstance(inside, dict):
        inside[pick.choice(["r", "x", "digest", "use_dora", "task_names", "layer_scaling"])] = inside.pop(at[-1])
    else:
        del inside[at[-1]]
    file.write_text(json.dumps(content))


def change_tensors(file, pick):
    tensors = load_file(file)
    key, other = pick.choice(list(tensors)), pick.choice(list(tensors))
    action = pick.choice(["swap", "drop", "scale", "nan", "cast", "cut", "rename", "empty", "scalar"])
    if action == "swap":
        tensors[key], tensors[other] = tensors[other].clone(), tensors[key].clone()
    elif action == "drop":
        del tensors[key]
    elif action == "rename":
        tensors[pick.choice([f"{key}x", "../x.lora_A", ".lora_A", "\x1b.lora_B", "y" * 5000, other])] = tensors.pop(key)
    else:
        tensors[key] = {
            "scale": tensors[key] * 2, "nan": tensors[key] * float("nan"), "cut": tensors[key].reshape(-1)[:1].clone(),
            "cast": tensors[key].to(pick.choice([torch.int64, torch.float8_e4m3fn, torch.complex64, torch.float64])),
            "empty": tensors[key].reshape(-1)[:0].clone(), "scalar": torch.tensor(1.0),
        }[action]  # fmt: skip
    save_file(tensors, file)


def change_bytes(file, pick):
    content = bytearray(file.read_bytes())
    action = pick.choice(["bit", "bit", "bit", "cut", "add", "other"])
    if action == "bit":
        content[pick.randrange(len(content))] ^= 1 << pick.randrange(8)
    elif action == "cut":
        del content[pick.randrange(len(content)) :]
    elif action == "add":
        content += pick.choice([b"x", bytes(content), b"\0" * 100])
    else:
        content = pick.choice(BYTES)
    file.write_bytes(content)


def change_kind(file, pick):
    content = file.read_bytes()
    file.unlink()
    action = pick.choice(["gone", "folder", "FIFO", "device", "dangling", "loop", "link"])
    if action == "folder":
        file.mkdir()
    elif action == "FIFO":
        os.mkfifo(file)
    elif action == "device":
        file.symlink_to("/dev/zero")
    elif action == "dangling":
        file.symlink_to("absent")
    elif action == "loop":
        file.symlink_to(file)
    elif action == "link":
        (file.parents[1] / "elsewhere").write_bytes(content)
        file.symlink_to(file.parents[1] / "elsewhere")


def change(folder, pick):
    file = folder / pick.choice(files(folder))
    of_content = {".json": change_json, ".safetensors": change_tensors}.get(file.suffix, change_bytes)
    pick.choice([of_content, of_content, change_bytes, change_kind])(file, pick)


@given(st.integers(0, 2**63), st.data())
def test_fuzz_a_changed_folder_is_the_same_adapter_or_one_line(folders, seed, data):
    kind = data.draw(st.sampled_from(list(folders)))
    path, original = folders[kind]
    work = path.parent / "work" / "adapter"
    shutil.rmtree(work.parent, ignore_errors=True)
    shutil.copytree(path, work)
    start = time.process_time()
    pick = random.Random(seed)
    change(work, pick)
    between = files(path.parent.parent)
    try:
        found = identity(work)
    except ValueError as error:
        check_line(error)
    else:
        assert same(found, original), kind
    assert time.process_time() - start < 2
    assert files(path.parent.parent) == between


@pytest.mark.parametrize("kind", ["lora", "hydra", "multi_adapter", "m_lora", "lora and a norm"])
def test_each_edit_of_what_decides_is_refused_with_its_name(kind, folders, tmp_path):
    edits = {"lora_alpha": 6, "use_rslora": True, "r": 4, "layer_scaling": {"x": 1.0}}
    edits |= {"hydra": {"router_temperature": 2.0, "top_k": 2, "num_heads": 4}, "m_lora": {"reduce": "mean"}}.get(
        kind, {}
    )
    edits |= {"task_names": ["b", "a", "c"], "num_tasks": 2} if kind == "multi_adapter" else {}
    for option, value in edits.items():
        work = tmp_path / option
        shutil.copytree(folders[kind][0], work)
        file = work / "align_lora_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
        with pytest.raises(ValueError, match=r"align_lora_config|model's is|task_names") as error:
            load_adapter(plain(), work)
        check_line(error.value)


@pytest.mark.parametrize(
    "edit",
    [{"lora_dropout": 0.3}, {"align_weight": 0.5}, {"align": "mmd", "align_weight": 1.0}, {"response_only": True}],
)
def test_options_of_the_training_may_be_edited(edit, folders, tmp_path):
    shutil.copytree(folders["align_lora"][0], tmp_path / "a")
    file = tmp_path / "a/align_lora_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    assert same(identity(tmp_path / "a"), folders["align_lora"][1])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_folders_of_version_0_1_0_load(kind, folders, tmp_path):
    shutil.copytree(folders[kind][0], tmp_path / "a")
    as_version_0_1_0(tmp_path / "a")
    assert same(identity(tmp_path / "a"), folders[kind][1])
    assert AdapterFolder.read(tmp_path / "a").base is None


@pytest.mark.parametrize(
    "names", [5, [1], "abc", list("abcd"), ["a", "b", "../c"], ["a", "b", "/c"], ["a", "b", "b"], {"a": 1}, [["a"]]]
)
def test_names_of_tasks_that_are_none_are_refused_by_every_reader(names, folders, tmp_path, run):
    shutil.copytree(folders["multi_adapter"][0], tmp_path / "a")
    as_version_0_1_0(tmp_path / "a")
    file = tmp_path / "a/align_lora_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_names": names}))
    for command in (["inspect"], ["export", "--output", "o"], ["merge", "--output", "o", "--task", "0"]):
        code, _, err = run(command[0], tmp_path / "a", *command[1:])
        assert code == 2, err
        assert "task_names" in err
    assert list((tmp_path / "work").iterdir()) == []
