"""How often an update waits for the device, and where the counters of an optimiser are."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.data.trees import write_tree
from tests.train.recipes import tiny_recipe
from vit_efficient.train import optim as learning
from vit_efficient.train import train
from vit_efficient.train.config import EmaConfig, OptimConfig
from vit_efficient.train.optim import create_optimizer
from vit_efficient.train.sharding import load_optimizer_state, optimizer_state
from vit_efficient.train.trainer import Trainer
from vit_efficient.utils.compat import OperatorMode


class Reads(OperatorMode):
    """Counts what would bring numbers of a GPU to the host. Counters of optimisers are on the host."""

    def __init__(self, on_host):
        super().__init__()
        self.on_host, self.found = {tensor.data_ptr() for tensor in on_host}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        waits = name.startswith(('aten._local_scalar_dense', 'aten.nonzero', 'aten._unique'))
        if waits and args[0].data_ptr() not in self.on_host:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_an_update_waits_once_for_the_device(tmp_path, monkeypatch):
    """With all that takes part in one; `tolist` of a tensor on the host is no operator, and counted apart."""
    reads, tolist, update = [], torch.Tensor.tolist, Trainer.update

    def updating(trainer, chunk):
        lists = []
        steps = [values['step'] for values in trainer.state.optimizer.state.values()]
        with monkeypatch.context() as patch, Reads(steps) as mode:
            patch.setattr(torch.Tensor, 'tolist', lambda tensor: lists.append('tolist') or tolist(tensor))
            loss = update(trainer, chunk)
        reads.append((mode.found, lists))
        return loss

    monkeypatch.setattr(Trainer, 'update', updating)
    config = tiny_recipe(write_tree(tmp_path), tmp_path / 'run', grad_accum=2, clip_grad=0.5, ema=EmaConfig(0.9, True))
    train(config)
    assert reads[1:] == [([], ['tolist'])] * 5  # the first one makes the counters


def trained(optim, device='cpu', steps=2):
    model = nn.Linear(3, 2, device=device)
    optimizer = create_optimizer(model, optim)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return model, optimizer


def test_counters_stay_on_the_host_where_a_run_goes_on():
    state = optimizer_state(trained(OptimConfig())[1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        for args, where in (({'foreach': True}, 'cpu'), ({}, 'cuda')):  # those of a fused step are beside the weights
            model = nn.Linear(3, 2, device='cuda')
            optimizer = create_optimizer(model, OptimConfig(args=args))
            assert bool(optimizer.param_groups[0].get('fused')) == (not args)
            load_optimizer_state(optimizer, state)
            for values in optimizer.state.values():
                assert values['step'].device.type == where
                assert values['exp_avg'].device.type == 'cuda'


@pytest.mark.parametrize('first, second', [(True, False), (False, True)])
def test_a_run_goes_on_with_another_implementation(monkeypatch, first, second):
    """As from a GPU to a CPU; and what it computes is the same, but for rounding."""

    def go_on(*fused):
        saved = None
        for number, one in enumerate(fused):
            monkeypatch.setattr(learning, 'takes_fused', lambda model, one=one: one)
            torch.manual_seed(0)
            model, optimizer = trained(OptimConfig(), steps=0)
            if saved:
                model.load_state_dict(saved[0])
                load_optimizer_state(optimizer, saved[1])
            assert all(bool(group.get('fused')) == one for group in optimizer.param_groups)
            for step in range(3):
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, 1.0 + step - number)
                optimizer.step()
            saved = copy.deepcopy((model.state_dict(), optimizer_state(optimizer)))
        return saved

    one, other = go_on(first, second), go_on(False, False)
    for name, weight in one[0].items():
        torch.testing.assert_close(weight, other[0][name])
    assert [float(values['step']) for values in one[1]['state'].values()] == [6.0, 6.0]


def test_what_the_recipe_says_of_the_implementation_stands(monkeypatch):
    monkeypatch.setattr(learning, 'takes_fused', lambda model: True)
    assert trained(OptimConfig())[1].param_groups[0]['fused']
    assert not trained(OptimConfig(args={'foreach': True}))[1].param_groups[0]['fused']
    assert not trained(OptimConfig(opt='sgd'))[1].param_groups[0].get('fused')


@pytest.mark.cuda
def test_adamw_is_fused_on_a_gpu_and_goes_on_from_the_host():
    _, host = trained(OptimConfig())
    model, optimizer = trained(OptimConfig(), 'cuda', steps=0)
    load_optimizer_state(optimizer, optimizer_state(host))
    assert optimizer.param_groups[0]['fused']
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(values['step'].is_cuda and values['step'].item() == 3 for values in optimizer.state.values())
