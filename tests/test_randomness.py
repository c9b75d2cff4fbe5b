"""Random streams: a function of their key, and nobody else's changed."""

import pytest
import torch

from lightning_iwae.randomness import forked, reseed, seed_for

CPU = torch.device("cpu")


def test_seed_is_a_function_of_the_whole_key():
    keys = [(0, "a", 1, 2), (0, "a", 2, 1), (0, "b", 1, 2), (1, "a", 1, 2), (0, "a", 12), (0, "a")]
    assert [seed_for(*key) for key in keys] == [seed_for(*key) for key in keys]
    assert len({seed_for(*key) for key in keys}) == len(keys)
    assert all(0 <= seed_for(*key) < 2**32 for key in keys)


def test_forked_starts_from_the_seed_and_leaves_the_stream_as_it_was():
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with forked(7, CPU):
        assert torch.equal(torch.randn(3), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_forked_puts_the_stream_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), forked(7, CPU):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_reseeding_starts_torchs_own_streams():
    torch.manual_seed(7)
    expected = torch.randn(3), torch.rand(5)
    for device in (CPU, torch.device("meta")):
        reseed(7, device)
        assert torch.equal(torch.randn(3), expected[0]) and torch.equal(torch.rand(5), expected[1])
