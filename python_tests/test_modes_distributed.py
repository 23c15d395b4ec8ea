"""Processes whose batches differ, in tasks, tokens and sizes: the gradient is that of one process on the union."""

import pytest
from processes import spawn


@pytest.mark.parametrize("processes", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_uneven_processes_give_the_gradient_of_the_union_batch(processes, unused_port):
    from ranks import train_unevenly  # a module of its own, which the processes can import by name

    spawn(train_unevenly, processes, unused_port, processes=processes)


@pytest.mark.slow
def test_two_processes_give_adalora_the_ranks_of_one_on_both_batches(unused_port):
    from ranks import allocate_on_rank

    spawn(allocate_on_rank, unused_port)


def test_checkpointing_accumulation_and_what_is_refused_with_two_processes(unused_port):
    from ranks import train_in_further_ways

    spawn(train_in_further_ways, unused_port)
