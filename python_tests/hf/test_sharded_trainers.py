"""A Trainer's folders where its processes hold parts of the parameters: the whole adapter, to the bit, or none."""

import pytest
import torch
from hf import sharded_trainers as runs
from hf.folders import plain
from processes import spawn
from safetensors.torch import load_file

from align_ext import AlignTrainer, load_adapter


def assert_whole(folder, base="llama"):
    """One process loads the folder and has what was trained."""
    expected = load_file(folder / "expected")
    loaded = load_adapter(plain(base), folder)
    found = {name: p for name, p in loaded.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), (folder, name)


def assert_not_continued_by_one_process(checkpoint, by):
    """A Trainer whose parameters are not in parts would not load the optimizer's state."""
    ran, _ = runs.build(checkpoint.parent / "alone", (AlignTrainer, {"lora_dropout": 0.0}, {}))
    with pytest.raises(ValueError, match=f"'.*checkpoint-1' was written with {by}, and this training is with neither"):
        ran.train(resume_from_checkpoint=str(checkpoint))


def test_by_fsdp2_checkpoints_are_whole_and_a_run_goes_on_from_them_to_the_bit(tmp_path, unused_port):
    spawn(runs.by_fsdp, unused_port, str(tmp_path))
    for name in runs.FSDP:
        for folder in ("checkpoint-1", "checkpoint-2", "final"):
            assert_whole(tmp_path / name / folder)
        assert_not_continued_by_one_process(tmp_path / name / "checkpoint-1", "FSDP")


def test_by_deepspeed_checkpoints_are_whole_or_nothing_is_lost(tmp_path, unused_port):
    spawn(runs.by_deepspeed, unused_port, str(tmp_path))
    for name in runs.DEEPSPEED:
        for folder in ("checkpoint-1", "checkpoint-2", "final"):
            assert_whole(tmp_path / name / folder)
    assert_whole(tmp_path / "not gathered" / "final")
    for folder in ("checkpoint-1", "checkpoint-2"):
        assert_whole(tmp_path / "loaded in parts" / folder, "gpt2")


@pytest.mark.slow
def test_by_deepspeed_fewer_or_more_processes_go_on_as_those_that_began(tmp_path, unused_port):
    for count in (2, 1, 3):
        spawn(runs.by_fewer_or_more, unused_port, str(tmp_path), count, processes=count)
    for name in runs.REPARTITIONED:
        expected, *others = (load_file(tmp_path / f"{name}, {count}" / "expected") for count in (2, 1, 3))
        for found in others:
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=0)
        assert_not_continued_by_one_process(tmp_path / f"{name}, 2" / "checkpoint-1", "DeepSpeed")
    assert not [*tmp_path.rglob("*universal*")]
