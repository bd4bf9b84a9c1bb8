import pytest
import torch

from vit_efficient.train.checkpoint import load_checkpoint, save_checkpoint

PARTS = {'identity': {}, 'progress': {'updates': 1}, 'optimizer': {}}


class Unwritable:
    def __reduce__(self):
        raise OSError('the disk is full')


def test_a_failure_in_the_midst_of_writing_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / 'checkpoint.pt'
    save_checkpoint(path, {**PARTS, 'model': {'weight': torch.ones(3)}})
    with pytest.raises(
        ValueError, match=r'checkpoint\.pt: cannot be written: the disk is full; the checkpoint before is'
    ):
        save_checkpoint(path, {**PARTS, 'model': {'weight': torch.zeros(100_000)}, 'last': Unwritable()})
    assert torch.equal(load_checkpoint(path)['model']['weight'], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('content', [b'', b'text', None])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    path = tmp_path / 'checkpoint.pt'
    save_checkpoint(path, {**PARTS, 'model': {'weight': torch.ones(1000)}})
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ValueError, match=r'checkpoint\.pt: not a readable checkpoint'):
        load_checkpoint(path)


@pytest.mark.parametrize('damage', ['a bit', '4 KiB'])
def test_damaged_weights_are_found(tmp_path, damage):
    path = tmp_path / 'checkpoint.pt'
    save_checkpoint(path, {**PARTS, 'model': {'weight': torch.ones(10_000)}})
    content = bytearray(path.read_bytes())
    place = content.index(torch.ones(100).numpy().tobytes()) + 400
    if damage == 'a bit':
        content[place] ^= 1
    else:
        content[place : place + 4096] = bytes(4096)
    path.write_bytes(content)
    message = r'checkpoint\.pt: not a readable checkpoint \(archive/data/0 is not what was written\)'
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize('part', ['progress', 'model', 'optimizer', 'identity'])
def test_a_part_that_is_missing_is_named(tmp_path, part):
    state = {**PARTS, 'model': {}, part: []}
    torch.save(state, tmp_path / 'checkpoint.pt')
    with pytest.raises(ValueError, match=rf'checkpoint\.pt: not a whole checkpoint \(it has no {part}\)'):
        load_checkpoint(tmp_path / 'checkpoint.pt')


def test_other_files_of_torch_are_no_checkpoints(tmp_path):
    torch.save({'weight': torch.ones(2)}, tmp_path / 'model.pt')
    with pytest.raises(ValueError, match='not a checkpoint of a training run'):
        load_checkpoint(tmp_path / 'model.pt')
