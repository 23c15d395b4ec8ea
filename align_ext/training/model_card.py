"""The model card of a trained adapter, and its upload to the hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import ModelCard, ModelCardData, constants

from align_ext.io.adapter_folder import CARD
from align_ext.io.peft_format import PEFT_CONFIG
from align_ext.system.messages import reason_of, shown
from align_ext.system.writing import atomic_file
from align_ext.training.in_words import shown_steps, stored_bits
from align_ext.training.options import TrainOptions

_OF_THIS_PLACE = {"output", "overwrite", "resume", "device", "push_to_hub", "hub_model_id", "hub_private_repo"}


def check_hub(options: TrainOptions) -> None:
    """Checks before a run that its adapter can be uploaded at its end.

    Raises:
        ValueError: the hub is switched off or does not answer, or nobody is logged in.
    """
    if not options.push_to_hub:
        return
    if constants.HF_HUB_OFFLINE:
        raise ValueError("--push-to-hub needs the hub, but HF_HUB_OFFLINE is set: unset it, or leave the option out")
    try:
        huggingface_hub.whoami()
    except Exception as error:  # without a connection the library raises anything
        raise ValueError(f"--push-to-hub: {reason_of(error)} (hf auth login, or HF_TOKEN)") from error


def push(folder: Path, target: Path, options: TrainOptions) -> str:
    """Uploads an adapter's folder; returns its address.

    Args:
        folder: the adapter's folder.
        target: the run's output folder, after which the repository is called if hub_model_id does not name it.
        options: the run's options.

    Raises:
        OSError: the upload failed; the folder is as it was.
    """
    name = options.hub_model_id or target.name
    try:
        repo = huggingface_hub.create_repo(name, private=options.hub_private_repo, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="Adapter of align-lora")
    except Exception as error:  # without a connection the library raises anything
        again = f"hf upload {name} {target / 'adapter'}" + " --private" * bool(options.hub_private_repo)
        raise OSError(
            f"the adapter was not uploaded to {shown(name)}: {reason_of(error)}; the run is whole: {again}"
        ) from error
    return str(repo)


def write_card(folder: Path, results: Mapping[str, Any]) -> None:
    """Writes the model card into an adapter's folder: base, tasks, losses before and after, options.

    Args:
        folder: the adapter's folder.
        results: the content of the run's results.json.
    """
    base = results["model"]["name"]
    about = ModelCardData(
        library_name="peft" if (folder / PEFT_CONFIG).is_file() else "align_ext",
        tags=["lora", "multi-task", "align-lora", results["adapters"]["architecture"]],
        **({} if Path(base).exists() else {"base_model": base}),
    )
    with atomic_file(folder / CARD) as new:
        ModelCard(f"---\n{about.to_yaml()}\n---\n\n{_text(base, results)}").save(new)


def _text(base: str, results: Mapping[str, Any]) -> str:
    given, defaults = results["options"], TrainOptions().to_dict()
    changed = {n: x for n, x in given.items() if n in defaults and x != defaults[n] and n not in _OF_THIS_PLACE}
    adapters, tasks = results["adapters"], results["data"]["tasks"]
    rows = []
    for name, before in results["before"]["tasks"].items():
        after, trained = results["after"]["tasks"][name], tasks.get(name, {}).get("train", {}).get("used", 0)
        scores = [before["score"], after["score"]]
        score = "-" if None in scores else f"{scores[0]:.3f} → {scores[1]:.3f}"
        rows.append(
            f"| {name} | {trained} | {before['examples']} | {before['loss']:.3f} → {after['loss']:.3f} | {score} |"
        )
    options = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in changed.items())
    peft = (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, FOLDER)\n```'
    )
    own = (
        "```python\nfrom align_ext import load_adapter\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{base}")\nload_adapter(model, FOLDER)\n```'
    )
    of_peft = "stock PEFT" in results.get("checks", {}) and results["checks"]["stock PEFT"]["passed"]
    article = "An" if adapters["architecture"].startswith("a") else "A"
    return f"""# Adapter of {base} for {len(rows)} {"task" if len(rows) == 1 else "tasks"}

{article} {adapters["architecture"]} adapter of rank {adapters["rank"]} ({adapters["trained_parameters"]:,} parameters,
{adapters["percent"]:.3g}% of the model), trained by `align-lora train` of align_ext {results["versions"]["align_ext"]}:
{shown_steps(results)}, on the base model{stored_bits(given)}.

| task | trained on | scored on | loss per answer token, before → after | score, before → after |
|---|---|---|---|---|
{chr(10).join(rows)}

## Use

{peft if of_peft else own}

## Options

What is not named has its default; `align-lora train --config FILE` takes this file.

```yaml
{options}
```
"""
