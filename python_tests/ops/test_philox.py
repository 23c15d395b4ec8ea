"""The reference generator against the published vectors, and the native masks against the reference."""

import pytest
import torch

from align_ext import ops
from align_ext.reference.philox import dropout_mask, philox

# Random123 known-answer vectors for philox4x32-10: counter (4 words), key (2 words) -> 4 words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(value):
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_reference_gives_the_published_words(counter, key, expected):
    block = torch.tensor(signed(counter[0] | counter[1] << 32))
    offset, seed = counter[2] | counter[3] << 32, key[0] | key[1] << 32
    assert tuple(philox(seed, block, offset).tolist()) == expected


@pytest.mark.parametrize("in_dim", [1, 3, 8, 64, 67])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_op_drops_what_the_reference_drops(device, in_dim, p):
    rng = torch.tensor([-(2**62) + 12345, 2**61 + 77])
    x = torch.ones(29, in_dim, device=device)
    eye = torch.eye(in_dim, device=device)
    _, z = ops.grouped_lora(x, eye, eye, dropout_p=p, rng=rng.to(device), base_out=torch.zeros_like(x))
    z, mask = z.cpu(), dropout_mask(rng, p, x.shape, torch.float32)
    assert torch.equal(z != 0, mask != 0)
    torch.testing.assert_close(z, mask, rtol=1e-6, atol=0)


def test_the_share_of_dropped_elements_is_p():
    mask = dropout_mask(torch.tensor([1, 2]), 0.1, (1000, 1000), torch.float32)
    assert abs((mask == 0).float().mean().item() - 0.1) < 1e-3
    assert abs(mask.mean().item() - 1) < 1e-3


def test_another_seed_or_offset_gives_another_mask():
    masks = [dropout_mask(torch.tensor(rng), 0.5, (64, 64), torch.float32) for rng in ([1, 2], [1, 3], [2, 2])]
    for i in range(3):
        for j in range(i):
            assert 0.4 < (masks[i] == masks[j]).float().mean() < 0.6
