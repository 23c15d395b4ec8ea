"""`align-lora train` with parameters in parts, by ZeRO-3 and FSDP2, on two processes: the results of one process."""

import json
import os

import pytest
from hf.test_several_processes import assert_equal_runs, said, train
from hf.words import model_folder, write_rows
from processes import spawn

pytestmark = pytest.mark.slow  # test_sharded_trainers has most of it
STEPS = ("--steps", 4)
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    model_folder(folder / "model")
    write_rows(folder / "rows.jsonl")
    (folder / "zero3.json").write_text(json.dumps(ZERO3))
    said(train(folder, 1, "alone", *STEPS))
    return folder


def test_by_zero3_a_run_is_that_of_one_process(place, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    text = said(train(place, 2, "zero3", *STEPS, "--deepspeed", "zero3.json"))
    assert "loaded again: does not apply: the parameters are in parts" in text
    assert_equal_runs(place / "alone", place / "zero3")


def by_fsdp2(rank, port, place):
    """The command in one of two processes; accelerate shards on GPUs alone, if it is not told that these are some."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.chdir(place)
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    from align_ext import cli
    from align_ext.base_model.sharded import shard_ranks
    from align_ext.training import recipe

    made, seen = recipe.training_arguments, []

    def as_on_gpus(*arguments):
        result = made(*arguments)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return result

    score = recipe.score

    def scored(job, *arguments):
        seen.append(bool(shard_ranks(job.model.parameters())))
        return score(job, *arguments)

    recipe.training_arguments, recipe.score = as_on_gpus, scored
    options = ["--device", "cpu", "--dtype", "float32", "--lora-dropout", "0", "--batch-size", "12", "--eval-examples",
               "4", "--log-steps", "1", "--lr", "1e-3", "--steps", "4", "--trainer", "fsdp=full_shard"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["align-lora", "train", "--model", "model", "--data", "rows.jsonl", *options,
                                   "--output", "fsdp2"])  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0
    assert seen == [False, True]


def test_by_fsdp2_a_run_is_that_of_one_process(place, unused_port):
    spawn(by_fsdp2, unused_port, str(place))
    assert_equal_runs(place / "alone", place / "fsdp2")
