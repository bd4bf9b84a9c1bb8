"""Whole models timed against each other in one run: inference, the passes of training, and a step of it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vit_efficient.benchmark.timing import CPU, Call, check_plans, check_request, compiled_by_now, measure_block
from vit_efficient.benchmark.ways import Inputs, check_way, depends_on_data, replayed, sdpa_context, way_of
from vit_efficient.flops import count_flops
from vit_efficient.models import compile_blocks, create_from_spec, input_size
from vit_efficient.utils.checks import check_choice
from vit_efficient.utils.errors import UserError

WORKS = ('inference', 'forward+backward', 'training step')


@dataclass(frozen=True)
class ModelCandidate:
    """A model that is timed."""

    name: str  # as timm knows it, after any `ways`
    args: dict[str, Any] = field(default_factory=dict)  # as of `models.create_from_spec`
    label: str = ''  # what a table calls it

    def __str__(self) -> str:
        return self.label or self.name + ''.join(f' {key}={value}' for key, value in self.args.items())

    def build(self, img_size: int, **factory: Any) -> nn.Module:
        """The model for square images of that size, with the errors of `models.create_from_spec`."""
        try:
            return create_from_spec(way_of(self.name, ModelSetting())[0], self.args, img_size, **factory)
        except UserError as error:
            raise UserError(f'{self}: {error}') from error


@dataclass(frozen=True)
class ModelSetting:
    """What models that are compared have in common."""

    batch_size: int = 1
    dtype: torch.dtype = torch.float32  # of weights and images or, with `amp`, of matrix products
    amp: bool = False  # autocast to `dtype`, the weights in float32
    device: torch.device = CPU
    compiled: bool = False  # time models compiled block by block; compiling is not timed
    optimizer: str = 'adamw'  # of the training step: a name that timm knows
    sdpa: str | None = None  # the only backend of SDPA that may run, of `ways.BACKENDS`
    graph: bool = False  # on CUDA: time inference as the replay of a graph


def benchmark_models(
    candidates: Sequence[ModelCandidate],
    img_sizes: Sequence[int],
    works: Sequence[str] = ('inference',),
    setting: ModelSetting | None = None,
    rounds: int = 5,
    max_seconds: float = math.inf,
    memory: bool = True,
) -> Iterator[list[dict[str, Any]]]:
    """Times models against the first of them, in the same run.

    Args:
        candidates: What is compared.
        img_sizes: Heights of square images.
        works: Of `WORKS`: inference; forward and backward pass; or both and a step of the optimiser, with a loss.
        setting: Of the models and their input.
        rounds, max_seconds, memory: Of each block, as in `timing.compare`.

    Returns:
        The blocks of rows, one for each size and work, as they are measured; in a block a row for each model: img_size,
        work, model, parameters_m, gmacs (of the forward pass, all images), sdpa and fresh_inputs (as `benchmark_layer`
        has them), what `compare` returns, images_per_second, and peak_share: the multiply-accumulates per second of the
        whole work, as a share of those of a large matrix product.

    Raises:
        UserError: If a number is out of range, or a model can be had at none of the sizes. This is known before
            anything is timed.
    """
    setting = setting or ModelSetting()
    numbers = [('batch_size', setting.batch_size), ('rounds', rounds), *(('img_size', size) for size in img_sizes)]
    check_request(numbers, max_seconds, [map(str, candidates), img_sizes, works])
    for work in works:
        check_choice('work', work, WORKS)
    plans = [[_plan(candidate, size, setting) for size in img_sizes] for candidate in candidates]
    check_plans(plans)

    def blocks() -> Iterator[list[dict[str, Any]]]:
        for size, of_size in zip(img_sizes, zip(*plans, strict=True), strict=True):
            for work in works:
                makes = [partial(model_call, candidate, size, setting, work) for candidate in candidates]
                rows = measure_block(of_size, work, makes, setting, (rounds, max_seconds, memory))
                for row in rows:
                    time = row['milliseconds']
                    row['images_per_second'] = 1e3 * setting.batch_size / time if time else None
                yield rows

    return blocks()


def _plan(candidate: ModelCandidate, img_size: int, setting: ModelSetting) -> dict[str, Any]:
    """What is known of a row before anything runs."""
    _, setting = way_of(candidate.name, setting)
    plan = dict(img_size=img_size, model=str(candidate), parameters_m=None, gmacs=None, error=None)
    plan |= dict(sdpa=setting.sdpa, fresh_inputs=None)
    try:
        check_way(setting)
        model = candidate.build(img_size, device='meta')
        macs = count_flops(model, input_size(model, img_size), setting.batch_size).total
    except UserError as error:
        return plan | dict(error=str(error))
    plan['fresh_inputs'] = depends_on_data(model) or None
    return plan | dict(parameters_m=sum(p.numel() for p in model.parameters()) / 1e6, gmacs=macs / 1e9)


def model_call(candidate: ModelCandidate, img_size: int, setting: ModelSetting, work: str) -> Call:
    _, setting = way_of(candidate.name, setting)
    factory = dict(device=setting.device, dtype=torch.float32 if setting.amp else setting.dtype)
    model = candidate.build(img_size, **factory).train(work != 'inference')
    x = torch.randn(setting.batch_size, *input_size(model, img_size), **factory)
    of_call, context, graph = Inputs(x, depends_on_data(model)), sdpa_context(setting), ''
    run = compile_blocks(model, dynamic=False) if setting.compiled else model
    # Weights that autocast keeps for the time of its context are not there any more when a graph reads them.
    how = dict(enabled=setting.amp, cache_enabled=not setting.graph)
    autocast = partial(torch.autocast, setting.device.type, setting.dtype, **how)
    if work == 'inference':

        def call() -> None:
            with torch.inference_mode(), autocast():
                run(of_call())

        compiled_by_now(Call(call, context=context), setting.compiled, setting.device)
        if setting.graph:
            with context(), autocast():
                run, graph = replayed(run, x)
        return Call(call, of_call.prepare, context, graph)

    labels = torch.zeros(setting.batch_size, dtype=torch.int64, device=setting.device)
    optimizer = None
    if work == 'training step':
        from timm.optim import create_optimizer_v2

        optimizer = create_optimizer_v2(model, setting.optimizer, lr=1e-6)
        # Its state is there before a step, as it is in all steps of a run but the first.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        model.zero_grad()

    def step() -> None:
        with autocast():
            loss = F.cross_entropy(run(of_call()).float(), labels)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    step = Call(step, of_call.prepare, context, 'not the backward pass' * setting.graph)
    compiled_by_now(step, setting.compiled, setting.device)
    return step
