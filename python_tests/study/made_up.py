"""Writes the folder of a study that nobody ran: every file of a finished study, with effects that are known.

The logit of a row's right choice is its own ease (the same for all arms and seeds) plus the arm's skill plus noise; the
logits of the other choices are noise. So the arms differ by what `effects` says, and by nothing else.
"""

import csv
import gzip
import io
import json
import math
from pathlib import Path
from zlib import crc32

import numpy as np

TASKS = {"qnli": 2, "piqa": 2, "winogrande": 2, "arc_easy": 4, "gsm8k": 0}  # how many choices; 0: free text
UNSEEN = {"navigate": 2, "snarks": 2, "date_parts": 3, "object_order": 3, "causal_words": 2}
ARMS = {
    "lora": {"architecture": "lora"},
    "align_kl": {"architecture": "align_lora", "align": "kl", "align_weight": 0.1},
    "align_mmd": {"architecture": "align_lora", "align": "mmd", "align_weight": 0.1},
    "shuffled_ids": {"architecture": "align_lora", "align": "kl", "align_weight": 0.1, "control": "shuffled_ids"},
    "weight_zero": {"architecture": "align_lora", "align": "kl", "align_weight": 0.0, "control": "weight_zero"},
    "m_lora": {"architecture": "m_lora", "rank": 3, "scaling": 10.67, "parameters": 1_227_000, "budget_off": -0.193},
    "hydra": {"architecture": "hydra", "rank": 2, "scaling": 4.0, "merges": False, "budget_off": -0.004},
}
BEST_RATE = {"m_lora": 1e-4}  # of the others the best is 2e-4


def make_study(
    folder,
    *,
    effects=None,
    seeds=(0, 1, 2),
    rows=120,
    rates=(1e-4, 2e-4),
    weights=(),
    unseen=True,
    mechanism=True,
    cost=True,
    missing=("hydra", 2),
    arms=ARMS,
    tasks=TASKS,
    constant=(),
    not_finite=(),
    noise=0.3,
    seed_noise=0.02,
    skill=1.0,
    arm_options=None,
):
    """Writes a study and returns its folder.

    Args:
        folder: where.
        effects: what is added to the logit of the right choice, by arm.
        seeds: of each arm.
        rows: of each task in the test split.
        rates: the learning rates, of which each arm takes its best; () for no such axis.
        weights: the align_weights of a sweep; () for none.
        unseen: whether there are tasks that were not trained on.
        mechanism: whether the cells hold measurements of the mechanism.
        cost: whether the cells hold their cost.
        missing: (arm, seed) of the cells that are not there, or None.
        arms: what the plan says of each arm.
        tasks: how many choices each task has.
        constant: arms that give the same answer to each row of qnli.
        not_finite: arms whose training diverged with seed 0.
        noise: standard deviation of the noise of an arm, a seed and a row, in nats.
        seed_noise: standard deviation of the noise of an arm and a seed.
        skill: the logit of the right choice without effects.
        arm_options: options of an arm, by arm.
    """
    folder = Path(folder)
    effects = effects or {}
    axes = ({"lr": list(rates)} if rates else {}) | ({"align_weight": list(weights)} if weights else {})
    plan = {
        "study": "made_up", "question": "Does alignment help?", "tasks": list(tasks),
        "unseen": list(UNSEEN) if unseen else [], "seeds": list(seeds), "baseline": "lora", "margin": 0.02,
        "vary": axes, "choose": ["lr"] if rates else [], "dtype": "float32", "device": "cpu",
        "versions": {"align_ext": "0.1.0", "torch": "2.13.0"}, "base_parameters": 134_515_008,
        "data": {"digest": "ab" * 32, "tasks": {task: _data(task, rows) for task in tasks}, "notes": []},
        "arms": {name: _arm(values, (arm_options or {}).get(name, {})) for name, values in arms.items()},
        "cells": [{"key": "base", "arm": "base", "seed": None, "vary": {}}],
    }  # fmt: skip
    points = [{}]
    for axis, values in axes.items():
        points = [{**point, axis: value} for point in points for value in values]
    for arm in arms:
        for point in points:
            if arm == "lora" and weights and point["align_weight"] != weights[0]:
                continue
            own = {axis: value for axis, value in point.items() if not (arm == "lora" and axis == "align_weight")}
            for seed in seeds:
                key = "-".join([arm, str(seed), *(f"{axis}{value:g}" for axis, value in own.items())])
                plan["cells"].append({"key": key, "arm": arm, "seed": seed, "vary": own})
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    everything = [(name, count, rows, "test") for name, count in tasks.items()]
    everything += [(name, count, max(rows // 4, 20), "dev") for name, count in tasks.items()]
    everything += [(name, count, 40, "unseen") for name, count in (UNSEEN if unseen else {}).items()]
    for cell in plan["cells"]:
        arm, seed = cell["arm"], cell["seed"]
        if missing and (arm, seed) == tuple(missing):
            continue
        rate = cell["vary"].get("lr", 2e-4)
        level = skill + effects.get(arm, 0.0) - 0.3 * abs(math.log2(rate / BEST_RATE.get(arm, 2e-4)))
        if "align_weight" in cell["vary"]:
            level += effects.get("per_weight", 0.0) * cell["vary"]["align_weight"]
        level = skill / 2 if arm == "base" else level + seed_noise * _random(arm, seed).standard_normal()
        content = _content(cell, plan, level, mechanism, arm in not_finite and seed == 0)
        lines = [
            row
            for name, count, number, split in everything
            for row in _rows(
                name, count, number, split, level, (cell["key"], noise), arm in constant and name == "qnli"
            )
        ]
        _write(folder / "cells" / cell["key"], content, lines, _cost(arm, seed) if cost and arm != "base" else None)
    return folder


def _random(*key):
    return np.random.default_rng(crc32(repr(key).encode()))


def _data(task, rows):
    left_out = {"too long": 12} if task == "gsm8k" else {}
    return {
        "train": {"rows": 1000, "used": 640, "left_out": left_out, "repeated": 0},
        "test": {"rows": rows, "used": rows, "left_out": {}, "repeated": 0},
    }


def _arm(values, options):
    usual = {
        "control": None, "align": None, "align_weight": None, "rank": 8, "scaling": 4.0, "parameters": 1_520_640,
        "percent": 1.13, "budget_off": None, "flops_per_token": {"base": 269_000_000, "adapters": 9_000_000},
        "merges": True, "options": {},
    }  # fmt: skip
    return usual | values | {"options": options}


def _rows(task, choices, number, split, level, noise, constant):
    """Returns the rows of one task; ids and eases depend on the task and the split alone."""
    of_rows, of_cell = _random(task, split), _random(task, split, noise)
    ease, labels = of_rows.standard_normal(number), of_rows.integers(max(choices, 1), size=number)
    rows = []
    for i in range(number):
        row = {"id": f"{task}/{split}{i:08x}", "task": task, "split": split, "label": int(labels[i]), "also": []}
        gold = level + 0.8 * ease[i] + noise[1] * of_cell.standard_normal()
        if choices:
            logits = 0.3 * of_cell.standard_normal(choices)
            logits[0] += 20 * constant
            logits[labels[i]] += gold
            nll = np.log(np.exp(logits).sum()) - logits + 1.5
            rows.append(row | {"nll": [round(float(x), 5) for x in nll], "tokens": [1] * choices, "greedy": None})
        else:
            nll = 24 * math.exp(-gold / 3)
            score = float(of_cell.random() < 1 / (1 + math.exp(-gold))) if split == "test" else None
            rows.append(row | {"label": -1, "nll": [round(nll, 5)], "tokens": [24], "greedy": score})
    return rows


def _content(cell, plan, level, mechanism, not_finite):
    arm, random = cell["arm"], _random(cell["key"], "mechanism")
    about = plan["arms"].get(arm)
    aligned = bool(about and about["align"] and not about["control"])
    kl = (0.9 if aligned else 1.6 if about and about["control"] == "shuffled_ids" else 2.0) + 0.05 * random.random()
    content = {
        **cell, "steps": 400, "train_tokens": 812_000, "align_weight": about and about["align_weight"],
        "pairs_per_batch": 4.2 if about and about["align"] else None,
        "losses": {"first": 2.1, "last": 0.8 - level / 10},
        "alignment": {"kl": kl, "mmd": kl / 10} if about else None,
        "forgetting": {"loss": 3.0 + (0.05 * random.random() if about else 0.0), "tokens": 65_536},
        "mechanism": _mechanism(arm, plan["tasks"], random, aligned) if mechanism and about else None,
        "finite": not not_finite,
    }  # fmt: skip
    return content


def _mechanism(arm, tasks, random, aligned):
    modules = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    size = len(tasks)
    kl = random.uniform(0.5, 3.0, (size, size)) * (0.5 if aligned else 1.0)
    kl = (kl + kl.T) * (1 - np.eye(size))
    spread = 1.0 if aligned else 3.0
    labels = [index for index in range(size) for _ in range(12)]
    points = [
        [float(spread * math.cos(k) + random.normal()), float(spread * math.sin(2 * k) + random.normal())]
        for k in labels
    ]
    found = {
        "divergence": {"tasks": list(tasks), "kl": kl.round(4).tolist(), "dimensions": 8},
        "latents": {
            "layer": "model.layers.15.mlp.down_proj", "tasks": list(tasks), "labels": labels, "points": points,
            "probe_accuracy": 0.71 if aligned else 0.93, "probe_chance": 1 / size,
            "silhouette": 0.12 if aligned else 0.31,
        },
        "conflict": {
            "component": {name: float(random.uniform(0.1, 0.5)) for name in modules},
            "block": {name: float(random.uniform(0.1, 0.5)) for name in ("attention", "mlp")},
        },
        "bands": {
            "of": "gradients", "bands": ["1-2", "3-4", "5-8"],
            "alignment": [float(x) for x in random.uniform(0.2, 0.9, 3)],
        },
    }  # fmt: skip
    if arm in ("m_lora", "hydra"):
        found["heads"] = {name: random.uniform(0.7, 0.95, 12).tolist() for name in modules}
        found["heads_change"] = {name: random.uniform(-0.1, 0.5, 12).tolist() for name in modules}
    if arm == "hydra":
        found["routing"] = {
            "entropy": {name: random.uniform(0.6, 1.0, 12).tolist() for name in modules},
            "importance": {name: random.dirichlet([8, 8, 8]).tolist() for name in modules},
        }
    return found


def _cost(arm, seed):
    slow = {"lora": 1.0, "m_lora": 1.25, "hydra": 1.6}.get(arm, 1.1) * (1 + 0.01 * (seed or 0))
    return {
        "host": "bench-1", "step_seconds": [0.95 * slow, slow, 1.1 * slow], "tokens_per_second": 2030 / slow,
        "peak_memory_mib": 900 + 60 * slow, "seconds": {"train": 400 * slow, "score": 90.0},
        "decode_ms": {"adapter": 20 * slow, "merged": None if arm == "hydra" else 18.0},
    }  # fmt: skip


def _write(folder, content, rows, cost):
    folder.mkdir(parents=True)
    if deeper := content.pop("mechanism"):
        (folder / "mechanism.json").write_text(json.dumps(deeper) + "\n")
    (folder / "cell.json").write_text(json.dumps(content) + "\n")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0, compresslevel=1) as file:
        file.write(text.encode())
    (folder / "rows.jsonl.gz").write_bytes(packed.getvalue())
    if cost:
        (folder / "cost.json").write_text(json.dumps(cost) + "\n")
    with open(folder / "losses.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["step", "lm_loss", "align_loss", "aligned_pairs"], [1, 2.1, 0.0, 4], [400, 0.7, 0.0, 4]])
