"""The model card of a trained adapter, and its upload to the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from align_ext.io.model_card import CardFacts, update_card
from align_ext.system.messages import reason_of, shown
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
    """Writes the card of a run's adapter: what save_adapter says, losses before and after, the run's options.

    Args:
        folder: the adapter's folder.
        results: the content of the run's results.json.
    """
    given, defaults, adapters = results["options"], TrainOptions().to_dict(), results["adapters"]
    changed = {n: x for n, x in given.items() if n in defaults and x != defaults[n] and n not in _OF_THIS_PLACE}
    facts = CardFacts(
        results["model"]["name"], "AutoModelForCausalLM", adapters["architecture"], adapters["rank"],
        adapters["trained_parameters"], list(results["before"]["tasks"]), changed, _training(results),
        "`align-lora train --config FILE`",
    )  # fmt: skip
    update_card(folder, facts)


def _training(results: Mapping[str, Any]) -> str:
    tasks, rows = results["data"]["tasks"], []
    for name, before in results["before"]["tasks"].items():
        after, trained = results["after"]["tasks"][name], tasks.get(name, {}).get("train", {}).get("used", 0)
        scores = [before["score"], after["score"]]
        score = "-" if None in scores else f"{scores[0]:.3f} → {scores[1]:.3f}"
        rows.append(
            f"| {name} | {trained} | {before['examples']} | {before['loss']:.3f} → {after['loss']:.3f} | {score} |"
        )
    return f"""trained by `align-lora train` of align_ext {results["versions"]["align_ext"]}:
{shown_steps(results)}, on the base model{stored_bits(results["options"])}.

| task | trained on | scored on | loss per answer token, before → after | score, before → after |
|---|---|---|---|---|
{chr(10).join(rows)}"""
