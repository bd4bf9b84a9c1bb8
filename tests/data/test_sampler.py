import pytest
from timm.data.distributed_sampler import RepeatAugSampler

from vit_efficient.data import EpochSampler, stable_seed
from vit_efficient.data.sampler import sample_seed


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


# --- repeats and groups ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('world_size', [1, 2, 4])
@pytest.mark.parametrize('repeats', [2, 3])
def test_repeats_are_those_of_timm(repeats, world_size):
    for rank in range(world_size):
        sampler = EpochSampler(48, shuffle=False, rank=rank, world_size=world_size, repeats=repeats)
        theirs = RepeatAugSampler(range(48), world_size, rank, shuffle=False, num_repeats=repeats)
        assert [index for _, index, _ in sampler] == list(theirs)
        assert len(sampler) == len(list(sampler)) == 48 // world_size


def test_repeats_are_numbered_in_the_order_without_them():
    plain = [index for _, index in EpochSampler(50, seed=3)]
    sampler = EpochSampler(50, seed=3, repeats=3)
    assert list(sampler) == [(0, index, repeat) for index in plain for repeat in range(3)][:50]
    whole = list(sampler)
    sampler.set_epoch(0, start=20)
    assert list(sampler) == whole[20:]


def test_augmentation_of_the_first_is_as_without_repeats():
    first, second, other = (
        tuple(sample_seed(*key).generate_state(4)) for key in ((3, 1, 7), (3, 1, 7, 1), (3, 1, 7, 2))
    )
    assert first == tuple(stable_seed('sample', 3, 1, 7).generate_state(4))
    assert len({first, second, other}) == 3


@pytest.mark.parametrize('mixed', [1, 2, 9])
def test_few_groups_are_mixed_at_a_time(mixed):
    groups = [7, 5, 0, 9, 3]
    of_group = [number for number, size in enumerate(groups) for _ in range(size)]
    sampler = EpochSampler(24, seed=1, groups=groups, mixed=mixed)
    order = [index for _, index in sampler]
    assert sorted(order) == list(range(24))
    assert order == [index for _, index in sampler]
    sampler.set_epoch(1)
    assert order != [index for _, index in sampler]
    sampler.set_epoch(0, start=10)
    assert [index for _, index in sampler] == order[10:]
    # As many as are open at once: a group is open from its first sample to its last.
    seen = [of_group[index] for index in order]
    open_at = [sum(seen.index(g) <= place <= 23 - seen[::-1].index(g) for g in set(seen)) for place in range(24)]
    assert max(open_at) == min(mixed, 4)
    if mixed == 9:
        assert seen != sorted(seen)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'repeats': 0}, 'repeats must be a positive integer, got repeats=0'),
        ({'mixed': 0}, 'mixed must be a positive integer, got mixed=0'),
        ({'block': 0}, 'block must be a positive integer, got block=0'),
        ({'groups': [3, 4]}, 'groups hold 7 samples, there are 8'),
    ],
)
def test_what_cannot_be_ordered_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(8, **options)
