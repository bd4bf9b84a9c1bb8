import pytest
import torch

from vit_efficient.train.checkpoint import load_checkpoint, save_checkpoint


class Unwritable:
    def __reduce__(self):
        raise OSError('the disk is full')


def test_a_failure_in_the_midst_of_writing_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / 'checkpoint.pt'
    save_checkpoint(path, {'identity': {}, 'model': torch.ones(3)})
    with pytest.raises(
        ValueError, match=r'checkpoint\.pt: cannot be written: the disk is full; the checkpoint before is'
    ):
        save_checkpoint(path, {'identity': {}, 'model': torch.zeros(100_000), 'last': Unwritable()})
    assert torch.equal(load_checkpoint(path)['model'], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('content', [b'', b'text', None])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    path = tmp_path / 'checkpoint.pt'
    save_checkpoint(path, {'identity': {}, 'model': torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ValueError, match=r'checkpoint\.pt: not a readable checkpoint'):
        load_checkpoint(path)


def test_other_files_of_torch_are_no_checkpoints(tmp_path):
    torch.save({'weight': torch.ones(2)}, tmp_path / 'model.pt')
    with pytest.raises(ValueError, match='not a checkpoint of a training run'):
        load_checkpoint(tmp_path / 'model.pt')
