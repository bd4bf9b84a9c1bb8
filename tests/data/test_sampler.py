import pytest

from vit_efficient.data import EpochSampler


def test_an_epoch_is_a_permutation_of_seed_and_epoch():
    sampler = EpochSampler(50, seed=3)
    first = list(sampler)
    assert first == list(sampler)
    assert {epoch for epoch, _ in first} == {0}
    assert sorted(index for _, index in first) == list(range(50))
    sampler.set_epoch(1)
    second = list(sampler)
    assert [index for _, index in second] != [index for _, index in first]
    other = EpochSampler(50, seed=4)
    assert list(other) != first


def test_starting_in_the_midst_gives_the_rest():
    sampler = EpochSampler(50)
    whole = list(sampler)
    sampler.set_epoch(0, start=20)
    assert list(sampler) == whole[20:]
    assert len(sampler) == 30


@pytest.mark.parametrize('even', [True, False])
def test_processes_share_the_samples(even):
    shares = [list(EpochSampler(50, rank=rank, world_size=4, even=even)) for rank in range(4)]
    whole = list(EpochSampler(50))
    assert sorted(key for share in shares for key in share) == sorted(whole[:48] if even else whole)
    assert [shares[i % 4][i // 4] for i in range(48)] == whole[:48]
    assert [len(share) for share in shares] == [
        len(EpochSampler(50, rank=rank, world_size=4, even=even)) for rank in range(4)
    ]


def test_processes_take_the_batches_of_a_single_one_in_turn():
    """From any point on: 53 samples are 6 batches of 4 for each of two processes."""
    whole = list(EpochSampler(53, seed=1))
    for start in (0, 16):
        shares = [EpochSampler(53, seed=1, rank=rank, world_size=2, block=4) for rank in range(2)]
        for share in shares:
            share.set_epoch(0, start)
        keys = [list(share) for share in shares]
        assert [len(share) for share in shares] == [len(key) for key in keys] == [(48 - start) // 2] * 2
        batches = [keys[number % 2][number // 2 * 4 :][:4] for number in range((48 - start) // 4)]
        assert [key for batch in batches for key in batch] == whole[start:48]


def test_a_start_between_processes_is_an_error():
    with pytest.raises(ValueError, match='start=3 must be a multiple of world_size=2'):
        EpochSampler(50, world_size=2).set_epoch(0, start=3)
    with pytest.raises(ValueError, match='start=4 must be a multiple of world_size=2 × block=4'):
        EpochSampler(50, world_size=2, block=4).set_epoch(0, start=4)


def test_a_block_holds_a_sample_at_least():
    with pytest.raises(ValueError, match='block=0 must be at least 1'):
        EpochSampler(50, block=0)
