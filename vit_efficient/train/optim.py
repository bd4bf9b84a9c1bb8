"""Optimiser, schedule and loss of a recipe, from timm."""

import math
from dataclasses import replace
from typing import Any

import timm.optim
import timm.scheduler
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vit_efficient.dct.window import FrequencyWindow
from vit_efficient.train.config import LossConfig, OptimConfig, SchedConfig
from vit_efficient.train.masks import MaskLoss
from vit_efficient.utils.errors import UserError, first_line

TRIED_RATES = 100  # of a schedule, over its length
# How PyTorch's optimisers compute, not what: where a run goes on it may be otherwise.
IMPLEMENTATIONS = ('fused', 'foreach', 'capturable')
TRIED_WIDTH = 128  # of a layer: some optimisers treat large matrices in their own way


def create_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimiser, with its parameter groups: no decay for biases and norms, learning rates by layer.

    The sizes of learned truncations have the full rate at any layer. On GPUs AdamW is fused, unless `config.args` say
    how it computes.
    """
    args = dict(config.args)
    if config.opt == 'adamw' and takes_fused(model) and not args.keys() & set(IMPLEMENTATIONS):
        args['fused'] = True
    try:
        optimizer = timm.optim.create_optimizer_v2(
            model, config.opt, config.lr, config.weight_decay, layer_decay=config.layer_decay, **args
        )
    except Exception as error:  # optimisers check their arguments in all ways, or not at all
        raise _refused('optim.opt', config.opt, config.args, error) from error
    if config.layer_decay:
        if args.get('filter_bias_and_bn', True):
            _keep_biases(model, optimizer)
        _keep_rate_of_windows(model, optimizer)
    return optimizer


def takes_fused(model: nn.Module) -> bool:
    """Whether the weights are where a fused step is the faster one."""
    return all(parameter.is_cuda and parameter.is_floating_point() for parameter in model.parameters())


def _keep_biases(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """By layers timm goes by the axes of a parameter alone, and decays biases that have two, such as those of trees."""
    numbers = {id(parameter) for name, parameter in model.named_parameters() if name.endswith('.bias')}
    for group in list(optimizer.param_groups):
        biases = [parameter for parameter in group['params'] if id(parameter) in numbers]
        if group['weight_decay'] and biases:
            group['params'] = [parameter for parameter in group['params'] if id(parameter) not in numbers]
            optimizer.add_param_group({**group, 'params': biases, 'weight_decay': 0.0})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group['params']]


def _keep_rate_of_windows(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Learned sizes are no features of a low layer; at the rate of one, that of the patch embedding hardly moves."""
    sizes = [module.share for module in model.modules() if isinstance(module, FrequencyWindow)]
    numbers, like = set(map(id, sizes)), None
    for group in list(optimizer.param_groups):
        others = [parameter for parameter in group['params'] if id(parameter) not in numbers]
        if len(others) < len(group['params']):
            like, group['params'] = group, others
            if not others:
                optimizer.param_groups.remove(group)
    if like is not None:
        optimizer.add_param_group({**like, 'params': sizes, 'lr_scale': 1.0, 'weight_decay': 0.0})


def create_scheduler(optimizer: torch.optim.Optimizer, config: SchedConfig, updates_per_epoch: int) -> Scheduler | None:
    """timm's schedule of the learning rate, stepped by updates and as long as the training; None for `sched` none, and
    for no epochs.

    The rates of layers (`layer_decay`) are the schedule's affair in timm; without one, they are set here, once.
    """
    if not config.epochs:
        return None
    try:
        options = {name: getattr(config, name) for name in ('warmup_epochs', 'warmup_lr', 'min_lr')}
        options |= {'num_epochs': config.epochs, 'step_on_epochs': False, 'updates_per_epoch': updates_per_epoch}
        scheduler, epochs = timm.scheduler.create_scheduler_v2(optimizer, config.sched, **options, **config.args)
    except Exception as error:
        raise _refused('sched.sched', config.sched, config.args, error) from error
    if scheduler is None and config.sched != 'none':  # what older timm gives for an unknown name
        raise UserError(f'sched.sched={config.sched}: timm knows no such schedule')
    if scheduler is None:
        for group in optimizer.param_groups:
            group['lr'] *= group.get('lr_scale', 1.0)
    if epochs != config.epochs:
        raise UserError(f'sched.args make a schedule of {epochs} epochs; set sched.epochs to that, without them')
    return scheduler


def try_learning(optim: OptimConfig, sched: SchedConfig, updates_per_epoch: int, device='cpu', shard=None) -> None:
    """Takes a step of a tiny model, and the learning rates of some updates: most arguments are read only there.

    `shard` splits the weights of a model, in place, as it does those of the run: not all optimisers take that.

    Raises:
        UserError: Naming the section's arguments, if the step or a rate cannot be taken, or a rate is no rate.
    """
    model = nn.Linear(TRIED_WIDTH, TRIED_WIDTH, device=device)
    if shard:
        shard(model)
    optimizer = create_optimizer(model, replace(optim, layer_decay=None))
    scheduler = create_scheduler(optimizer, sched, updates_per_epoch)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except Exception as error:
        where = ', with parallel=fsdp' if shard else ''
        raise _refused('optim.opt', optim.opt, optim.args, error, where) from error
    updates = sched.epochs * updates_per_epoch
    try:
        for update in sorted({1, *(updates * part // TRIED_RATES for part in range(TRIED_RATES + 1))}):
            if scheduler:
                scheduler.step_update(update)
            for rate in (group['lr'] for group in optimizer.param_groups):
                if not 0 <= rate < math.inf:
                    raise UserError(f'the learning rate of update {update} would be {rate}')
    except Exception as error:
        raise _refused('sched.sched', sched.sched, sched.args, error) from error


def _refused(key: str, name: str, args: dict[str, Any], error: Exception, where: str = '') -> UserError:
    given = f' with {key.partition(".")[0]}.args={args}' if args else ''
    return UserError(f'{key}={name}{given}{where}: {first_line(error)}')


def create_loss(config: LossConfig, num_classes: int, of_pixels: bool = False) -> tuple[Mixup | None, nn.Module]:
    """The mixing of a batch, if any, and the loss of (logits, targets)."""
    mixup = None
    if of_pixels:
        weights = config.class_weights
        if weights is not None and len(weights) != num_classes:
            raise UserError(f'loss.class_weights has {len(weights)} numbers for {num_classes} classes')
        return None, MaskLoss(config.masks, weights, config.smoothing)
    if config.mixup or config.cutmix:
        # Mixing makes the targets soft, and smooths them on the way.
        mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=num_classes)
    if config.bce:
        return mixup, BinaryCrossEntropy(smoothing=config.smoothing)
    return mixup, SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(config.smoothing)
