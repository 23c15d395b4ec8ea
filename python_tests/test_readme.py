"""What the README shows works as it stands there."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from tiny import batch, llama

from align_ext import align_parts, align_step

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_quick_start_trains_with_alignment_and_saves_an_adapter(monkeypatch, tmp_path):
    import transformers

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: llama().eval())
    inputs, tasks = batch()
    names = {"loader": [inputs | {"task_ids": tasks}] * 2}
    exec(BLOCKS[0], names)
    assert align_parts(names["model"]).align > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

    # The second block continues the first with a loss of the user's own.
    names |= inputs | {"task_ids": tasks, "align_step": align_step, "align_parts": align_parts}
    names["my_loss"] = lambda logits: torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), inputs["labels"].flatten(), ignore_index=-100
    )
    exec(BLOCKS[1], names)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in names["model"].parameters())


def test_every_file_that_the_documents_link_to_exists():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_the_examples_run(example, capsys):
    runpy.run_path(str(example), run_name="__main__")
    assert "alignment" in capsys.readouterr().out
