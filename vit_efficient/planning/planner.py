"""What each attention costs in each layer of a model alone, and the plans that follow."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vit_efficient.fidelity import Fidelity, fidelity, mean_fidelity
from vit_efficient.models.blocks import LayerSpec, attention_per_layer, is_named
from vit_efficient.models.plans import Plan
from vit_efficient.planning.knapsack import choose
from vit_efficient.planning.probe import Probe, Spec
from vit_efficient.utils.checks import as_integer, as_share, check_choice, is_real
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.measurements import Measurements, digest
from vit_efficient.utils.options import write_spec
from vit_efficient.utils.packages import import_optional

logger = logging.getLogger(__name__)

#: What each layer may become where nothing else is asked for.
OPTIONS: tuple[Spec, ...] = (
    ('combiner', {'window_size': 12, 'cell_size': 4}),
    ('combiner', {'window_size': 8, 'cell_size': 4, 'reach': 1}),
    ('merge', {'keep_ratio': 1 / 4}),
    ('merge', {'keep_ratio': 1 / 4, 'place': 'x'}),
    ('merge', {'keep_ratio': 1 / 4, 'place': 'block'}),
    ('subsample', {'keep_ratio': 1 / 4}),
)
UNITS = ('gmacs', 'ms', 'keys')
#: By name. The first is the default: what all patches of an image have in common, which hardly changes, is not in it.
LOSSES: dict[str, Callable[[Fidelity], float]] = {
    'centred': lambda kept: max(1 - kept.centred, 0.0),
    'patch': lambda kept: max(1 - kept.patch, 0.0),
    'error': lambda kept: kept.error,
    'prefix': lambda kept: max(1 - kept.prefix, 0.0),
}
EXACT = 'as it is'

Loss = str | Callable[[Tensor, Tensor], float]
Assignment = tuple[int, ...]  # the number of an option for each layer; 0 is what the layer has


class Planner:
    """What each option costs in each layer of a model, measured when it is first asked for; and the plans that follow.

    Args:
        model, images, options, unit, loss, measured, progress: As of `vit_efficient.plan`.

    Attributes:
        probe: The model as it is measured.
        labels: The options, the first being what a layer has.
        layers: The numbers of the blocks that can be converted.

    Raises:
        UserError: As `vit_efficient.plan`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Sequence[Tensor],
        options: Sequence[LayerSpec] | None = None,
        unit: str = 'gmacs',
        loss: Loss = 'centred',
        measured: str | os.PathLike | None = None,
        progress: bool = True,
    ):
        check_choice('unit', unit, UNITS)
        if not callable(loss):
            check_choice('loss', loss, LOSSES)
        self.images, self.unit, self.loss, self._progress = _checked(images), unit, loss, progress
        if measured is not None and self.loss_name.endswith(('<lambda>', 'functools.partial')):
            raise UserError(
                f'measured={os.fspath(measured)} knows a loss by its name, and {self.loss_name} may be any: define it '
                'by def, or leave measured out'
            )
        self.probe = Probe(model, self.images[0].shape)
        if loss == 'prefix' and not self.probe.model.num_prefix_tokens:
            raise UserError("loss='prefix' is of prefix tokens, and the model has none; use loss='centred'")
        self.layers, self.labels = self.probe.layers, [EXACT]
        self._measured = Measurements(measured, 'plan', self._about())
        self._add_options(options)
        self._exact: Assignment = (0,) * len(self.layers)
        self._references: dict[int, Tensor] = {}
        self._means: dict[Assignment, tuple[float, Fidelity]] = {}

    @property
    def loss_name(self) -> str:
        if isinstance(self.loss, str):
            return self.loss
        named = self.loss if hasattr(self.loss, '__qualname__') else type(self.loss)
        return f'{named.__module__}.{named.__qualname__}'

    def _about(self) -> dict[str, str]:
        """What measurements are of. Those of named losses are all kept, so that they are of one kind."""
        arguments = json.dumps(self.probe.arguments, sort_keys=True, default=lambda value: type(value).__name__)
        pixels = digest((str(i), image) for i, image in enumerate(self.images))
        return {
            'model': self.probe.architecture,
            'arguments': hashlib.sha256(arguments.encode()).hexdigest()[:16],
            'weights': digest(self.probe.model.state_dict().items()),
            'images': f'{len(self.images)} of {"×".join(map(str, self.images[0].shape))}, {pixels}',
            'loss': 'fidelity' if isinstance(self.loss, str) else self.loss_name,
        }

    def _add_options(self, options: Sequence[LayerSpec] | None) -> None:
        """Has the probe add those that it can have; one that is asked for must be."""
        wanted = OPTIONS if options is None else options
        if not isinstance(wanted, (list, tuple)) or is_named(wanted):
            wanted = [wanted]
        for name, given in attention_per_layer(wanted, None, len(wanted)):
            label = write_spec(name, given)
            if label in self.labels:
                raise UserError(f'options has {label} twice')
            if all(spec == (name, given) for spec in self.probe.specs[0]):
                continue  # it is what the layers have
            try:
                self.probe.add(name, given)
            except UserError as error:
                if options is not None:
                    raise UserError(f'options: {label}: {error}') from error
                logger.info('left out %s: %s', label, error)
            else:
                self.labels.append(label)

    def plan(self, budget: float, refine: int = 8) -> Plan:
        """The best plan within a budget; arguments and errors are those of `vit_efficient.plan`."""
        budget, refine = as_share('budget', budget), as_integer('refine', refine, 0)
        costs, rest = self.costs()
        total, least = rest + costs[:, 0].sum(), rest + costs.min(axis=1).sum()
        room = budget * total * (1 + 1e-9) - rest  # sums of milliseconds are rounded
        if choose(costs, np.zeros_like(costs), room) is None:
            raise UserError(
                f'{budget=:g} cannot be had: with the cheapest option in each layer the model costs '
                f'{math.ceil(1e4 * least / total) / 1e4:g} of what it does, in {self.unit} (the other parts of the '
                'model included); allow that, or give cheaper options'
            )
        losses, every = self.sensitivities(), np.arange(len(self.layers))
        best = choose(costs, losses, room)
        if any(best) or not isinstance(self.loss, str):  # a loss of the user's own may be below that of the exact model
            # What is least by another loss may be less by this one too, when layers are changed together.
            by_others = [each for each in map(self.sensitivities, LOSSES.values()) if np.isfinite(each).all()]
            others = [choose(costs, each, room) for each in by_others]
            uniform = ((option,) * len(self.layers) for option in range(len(self.labels)))
            candidates = [best, *others, *(each for each in uniform if costs[every, each].sum() <= room)]
            best = self._best_measured(dict.fromkeys(candidates), costs, losses, room, refine)
        loss, kept = self.measure(best)
        macs = np.array(self.probe.macs, dtype=float).T
        saved = macs[:, 0].sum() - macs[every, best].sum()
        return Plan(
            layers=[self.probe.specs[option][layer] for layer, option in enumerate(best)],
            model=self.probe.architecture,
            img_size=tuple(self.images[0].shape[1:]),
            unit=self.unit,
            budget=budget,
            share=float((rest + costs[every, best].sum()) / total),
            gmacs=(self.probe.total_macs / 1e9, float(self.probe.total_macs - saved) / 1e9),
            loss=self.loss_name,
            predicted=float(self.measure(self._exact)[0] + losses[every, best].sum()),
            measured=loss,
            fidelity={name: value for name, value in kept._asdict().items() if not math.isnan(value)},
        )

    def _best_measured(
        self, candidates: dict[Assignment, None], costs: np.ndarray, losses: np.ndarray, room: float, refine: int
    ) -> Assignment:
        """The candidate of least measured loss, moved in one or two layers at a time while that lowers the loss."""
        with self._bar('verify', (len(candidates) + refine) * len(self.images)) as bar:
            best = min(candidates, key=lambda each: self.measure(each, bar)[0])
            while refine:
                others = (each for each in _neighbours(best, costs, losses, room) if each not in candidates)
                for other in islice(others, refine):
                    candidates[other], refine = None, refine - 1
                    if self.measure(other, bar)[0] < self.measure(best)[0]:
                        best = other
                        break
                else:
                    break
        return best

    def numbers(self, plan: Plan) -> Assignment:
        """The number of the option of each layer in a plan of this planner."""
        of_layers = list(zip(*self.probe.specs, strict=True))
        return tuple(specs.index(spec) for specs, spec in zip(of_layers, plan.layers, strict=True))

    def costs(self) -> tuple[np.ndarray, float]:
        """What each option costs in each layer, (layers, options), and the rest of the model; of 'gmacs' in MACs."""
        if self.unit == 'keys':
            return np.array(self.probe.keys, dtype=float).T, 0.0
        if self.unit == 'gmacs':
            macs = np.array(self.probe.macs, dtype=float).T
            return macs, float(self.probe.total_macs - macs[:, 0].sum())
        device = self.probe.device
        where = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{torch.get_num_threads()} threads'
        keys = 'milliseconds', f'{device.type}, {where}'
        with self._bar('time', len(self.layers)) as bar:
            for layer, block in enumerate(self.layers):
                known = self._measured.get(*keys, str(block)) or {}
                if not isinstance(known, dict) or not all(map(is_real, known.values())):
                    raise self._measured.damaged(*keys, str(block))
                if not known.keys() >= set(self.labels):
                    times = self.probe.milliseconds(self.images[0], layer)
                    self._measured.add({(*keys, str(block)): dict(zip(self.labels, times, strict=True))})
                bar.update()
        if self._measured.get(*keys, 'model') is None:
            self._measured.add({(*keys, 'model'): self.probe.total_milliseconds(self.images[0])})
        if not is_real(whole := self._measured.get(*keys, 'model')):
            raise self._measured.damaged(*keys, 'model')
        of_layers = [self._measured.get(*keys, str(block)) for block in self.layers]
        times = np.array([[of_layer[label] for label in self.labels] for of_layer in of_layers])
        return times, max(0.0, whole - times[:, 0].sum())

    def sensitivities(self, loss: Callable[[Fidelity], float] | None = None) -> np.ndarray:
        """By how much a loss, by default its own, grows with each option in each layer alone, (layers, options)."""
        shape = len(self.layers), len(self.labels)
        alone = {(layer, option): self._alone(layer, option) for layer, option in np.ndindex(shape) if option}
        todo = [
            [place for place, assignment in alone.items() if self._known(assignment, image) is None]
            for image in range(len(self.images))
        ]
        with self._bar('measure', sum(map(len, todo))) as bar:
            for image, places in enumerate(todo):
                if not places and self._known(self._exact, image):
                    continue
                # One image at a time: what the blocks of the exact model are given is large.
                self._references[image], inputs = self.probe.exact(self.images[image])
                if self._known(self._exact, image) is None:
                    self._record(self._references[image], self._exact, image)
                for layer, option in places:
                    given = inputs[: self.layers[layer] + 1]
                    tokens = self.probe.tokens(self.images[image], alone[layer, option], given)
                    self._record(tokens, alone[layer, option], image)
                    bar.update()
        losses = np.zeros(shape)
        for place, assignment in alone.items():
            (value, kept), (of_exact, all_kept) = self.measure(assignment), self.measure(self._exact)
            losses[place] = value - of_exact if loss is None else loss(kept) - loss(all_kept)
        return losses

    def measure(self, assignment: Assignment, bar: Any = None) -> tuple[float, Fidelity]:
        """The loss of the model with an assignment, and what is kept of its features; means over the images."""
        if assignment not in self._means:
            for image, pixels in enumerate(self.images):
                if self._known(assignment, image) is None:
                    if image not in self._references:
                        self._references[image] = self.probe.tokens(pixels, self._exact)
                    self._record(self.probe.tokens(pixels, assignment), assignment, image)
                if bar is not None:
                    bar.update()
            found = [self._known(assignment, image) for image in range(len(self.images))]
            kept = mean_fidelity([Fidelity(*(math.nan if v is None else v for v in values[:4])) for values in found])
            loss = LOSSES[self.loss](kept) if isinstance(self.loss, str) else float(np.mean([v[4] for v in found]))
            self._means[assignment] = loss, kept
        return self._means[assignment]

    def _alone(self, layer: int, option: int) -> Assignment:
        return (*self._exact[:layer], option, *self._exact[layer + 1 :])

    def _keys(self, assignment: Assignment, image: int) -> tuple[str, ...]:
        """Where what is measured is kept, of an assignment on an image."""
        changed = [layer for layer, option in enumerate(assignment) if option]
        if len(changed) == 1:
            return 'layers', str(self.layers[changed[0]]), self.labels[assignment[changed[0]]], str(image)
        return 'plans', '; '.join(self.labels[option] for option in assignment), str(image)

    def _known(self, assignment: Assignment, image: int) -> list[float | None] | None:
        keys = self._keys(assignment, image)
        found = self._measured.get(*keys)
        count = len(Fidelity._fields) + (not isinstance(self.loss, str))
        if found is not None and not (
            isinstance(found, list) and len(found) == count and all(v is None or is_real(v) for v in found)
        ):
            raise self._measured.damaged(*keys)
        return found

    def _record(self, tokens: Tensor, assignment: Assignment, image: int) -> None:
        """Records what an image keeps of its features: a `Fidelity`, and the loss that is the user's own."""
        reference = self._references[image]
        kept = fidelity(reference, tokens, self.probe.model.num_prefix_tokens)
        own = [] if isinstance(self.loss, str) else [self._own_loss(reference, tokens)]
        keys = self._keys(assignment, image)
        if not all(map(math.isfinite, own or [LOSSES[self.loss](kept)])):
            raise UserError(f'the loss {self.loss_name} of image {image} is not finite with {" ".join(keys[:-1])}')
        self._measured.add({keys: [None if math.isnan(value) else value for value in (*kept, *own)]})

    def _own_loss(self, reference: Tensor, tokens: Tensor) -> float:
        value = self.loss(reference, tokens)
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            got = f'Tensor of shape {tuple(value.shape)}' if isinstance(value, Tensor) else repr(value)
            raise UserError(f'loss: {self.loss_name} must return one number, got {got}') from error

    def _bar(self, what: str, total: int) -> Any:
        tqdm = import_optional('tqdm', 'progress is shown by', 'train').tqdm
        return tqdm(desc=what, total=total, leave=False, disable=None if self._progress else True)


def _checked(images: Sequence[Tensor]) -> list[Tensor]:
    try:
        images = list(images)
    except TypeError as error:
        raise UserError(f'images must be a list of tensors (C, H, W), got {type(images).__name__}') from error
    if not images:
        raise UserError('images must hold at least one image (C, H, W)')
    for image in images:
        if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
            got = f'{image.dtype}, {tuple(image.shape)}' if isinstance(image, Tensor) else type(image).__name__
            raise UserError(
                f'images must be tensors (C, H, W) of floating-point numbers, preprocessed for the model, got {got} '
                'among them'
            )
        if image.shape != images[0].shape:
            shapes = f'{tuple(image.shape)} beside {tuple(images[0].shape)}'
            raise UserError(f'images must be of one size, which costs are for, got {shapes}')
    return images


def _neighbours(best: Assignment, costs: np.ndarray, losses: np.ndarray, room: float) -> Iterator[Assignment]:
    """Assignments within the room that differ in one or two layers, those of least summed loss first."""
    every = np.arange(len(best))
    room = room - costs[every, best].sum()
    layer, option = np.nonzero(np.arange(costs.shape[1]) != np.array(best)[:, None])
    cost = costs[layer, option] - costs[every, best][layer]
    loss = losses[layer, option] - losses[every, best][layer]
    a, b = np.triu_indices(len(layer))  # a change and itself: that change alone
    fit = (a == b) | (layer[a] != layer[b])
    fit &= cost[a] + (a != b) * cost[b] <= room
    a, b = a[fit], b[fit]
    for k in np.argsort(loss[a] + (a != b) * loss[b], kind='stable'):
        moved = list(best)
        for change in (a[k], b[k]):
            moved[layer[change]] = int(option[change])
        yield tuple(moved)
