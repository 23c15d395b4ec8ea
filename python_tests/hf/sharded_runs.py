"""What test_sharded_runs runs in processes of their own."""

import os

import pytest


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

    def as_on_gpus(folder, fields):
        result = made(folder, fields | {"fsdp": "full_shard"})
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return result

    score = recipe.score

    def scored(job, *arguments):
        seen.append(bool(shard_ranks(job.model.parameters())))
        return score(job, *arguments)

    recipe.training_arguments, recipe.score = as_on_gpus, scored
    options = ["--device", "cpu", "--dtype", "float32", "--lora-dropout", "0", "--batch-size", "12", "--eval-examples",
               "4", "--log-steps", "1", "--lr", "1e-3", "--steps", "4"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["align-lora", "train", "--model", "model", "--data", "rows.jsonl", *options,
                                   "--output", "fsdp2"])  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0
    assert seen == [False, True]
