"""Healing without gradients: the linear layers that end attention and MLP, solved for by least squares.

Block after block, the tokens of some images go through a student and its teacher. What the student's attention lacks of
the teacher's tokens is linear in the weights of its output projection, what its MLP lacks in those of its last layer:
each is a ridge regression, whose solution needs no learning rate and a few hundred images. A block sees what the blocks
before it, already solved for, have made of the images, so that it also makes up for what these could not.

The idea of fitting a network to another one, layer by layer, by least squares is known from pruning and quantisation
(He, Zhang, Sun, "Channel pruning", ICCV 2017, arXiv 1707.06168; Frantar, Alistarh, "Optimal brain compression", NeurIPS
2022, arXiv 2208.11580). A layer that would not be better on images that no regression has seen stays as it is. The
ridge is larger than what would be best for each layer by itself: layers that are too well fitted to what their own
attention lacks no longer give what later ones have learned to read.

Dimensions: N tokens, C channels, F inputs of a linear layer.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vit_efficient.grid import PatchGrid
from vit_efficient.models.blocks import OnGrid
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.modes import evaluating

RIDGE = 1.0
HELD_OUT = 8  # one in so many photographs tells whether a layer is better; as many images are needed
TOKENS = 400  # of an image that count, about; others are much like them
LAYERS = ('attn.proj', 'mlp.fc2')  # of a block


class Solved(NamedTuple):
    """What a layer has gained.

    Attributes:
        layer: Its name in the model.
        before, after: The mean squared error of tokens over their mean square, on images that were held out; the layer
            stays as it was where it would not be less.
    """

    layer: str
    before: float
    after: float


def check_images(count: int, photographs: int) -> None:
    """Raises the errors of `solve` that there are too few images, or photographs that they are drawn from."""
    if count < HELD_OUT:
        raise UserError(f'heal.solve needs {HELD_OUT} images at least, got {count}')
    if photographs < 2:
        raise UserError(
            'heal.solve needs two photographs at least, one to tell whether a layer is better, got '
            f'{photographs}; give more, or set heal.solve=0'
        )


def check_solvable(student: nn.Module, teacher: nn.Module) -> None:
    """Raises the errors of `solve` that its models have, whatever the images."""
    for block in (*student.blocks, *teacher.blocks):
        modules = dict(block.named_modules())
        if not hasattr(block, 'before_linear') or not all(isinstance(modules.get(name), nn.Linear) for name in LAYERS):
            raise UserError(
                f'heal.solve serves blocks that add what {" and ".join(LAYERS)} give, which a {type(block).__name__} '
                'does not; set heal.solve=0'
            )
    if any(block.attn.of_block for block in teacher.blocks):
        raise UserError("heal.solve: the teacher has attentions at place='block'; set heal.solve=0")


@torch.no_grad()
def solve(
    student: nn.Module,
    teacher: nn.Module,
    images: Iterable[Tensor],
    ridge: float = RIDGE,
    after_block: Callable[[], None] | None = None,
    photographs: Sequence[int] | None = None,
) -> list[Solved]:
    """Solves for the layers of all blocks of a student, in place.

    Args:
        student, teacher: Models of ours of one architecture (`healing.on_grid`).
        images: (channels, height, width) each, preprocessed, of sizes that both take. They are read one by one, and not
            kept: of each stay its tokens in student and teacher, N · C numbers each.
        ridge: In units of the mean square of an input of a layer.
        after_block: Called after each block.
        photographs: The number of the photograph that each image is drawn from, looked at once the images are read; by
            default each is from another. All of every eighth photograph are held out; of fewer than eight, those of
            the last one.

    Raises:
        UserError: If there are fewer than eight images, fewer than two photographs, or blocks of a kind that is not
            served.
    """
    check_solvable(student, teacher)
    report = []
    with evaluating(student), evaluating(teacher):
        positions: dict[torch.Size, _Positions] = {}
        streams = [_Stream(student, teacher, image, positions) for image in images]
        photographs = range(len(streams)) if photographs is None else photographs
        check_images(len(streams), len(set(photographs)))
        held = _held_out(photographs)
        # Those before an image that are held out, too, or are not.
        before_it = [held[:number].count(own) for number, own in enumerate(held)]
        for i, (ours, theirs) in enumerate(zip(student.blocks, teacher.blocks, strict=True)):
            for place, name in enumerate(LAYERS):
                linear, scale = ours.get_submodule(name), ours.scales()[place]
                fitted, held_out = _System(linear, scale), _System(linear, scale)
                for number, stream in enumerate(streams):
                    stream.teach(theirs, i, place)
                    with _passing(ours, name):
                        found, inputs = stream.before_linear(ours, i, place)
                    system = held_out if held[number] else fitted
                    few = _counted(before_it[number], found.shape[1])
                    system.add(inputs[:, few], (stream.taught - found)[:, few], stream.taught[:, few])
                solution, before = fitted.solution(ridge), held_out.error()
                after = held_out.error(solution)
                if not math.isfinite(before):
                    raise UserError(f'heal.solve: tokens are not finite, of these images, at blocks.{i}.{name}')
                if after < before:
                    fitted.apply(solution)
                report.append(Solved(f'blocks.{i}.{name}', before, min(before, after)))
            for stream in streams:
                stream.advance(ours, i)
            if after_block:
                after_block()
    return report


def _held_out(photographs: Sequence[int]) -> list[bool]:
    """Of each image whether its photograph is held out."""
    ranks = {photograph: rank for rank, photograph in enumerate(sorted(set(photographs)))}
    every = min(HELD_OUT, len(ranks))
    return [ranks[photograph] % every == every - 1 for photograph in photographs]


def _counted(number: int, tokens: int) -> slice:
    """Those of the tokens of an image that count, of the one of that number among those that are fitted, or held out.
    From image to image it is others that do: the distance between them may be that of the keys of an attention."""
    step = max(1, tokens // TOKENS)
    return slice(number % step, None, step)


class _Positions(NamedTuple):
    """Of the tokens of images of one size, in student and teacher."""

    grid: PatchGrid
    ours: Any
    theirs: Any


class _Stream:
    """The tokens (1, N, C) of an image on their way through student (`x`) and teacher (`taught`).

    Args:
        image: (channels, height, width); it is not kept.
        positions: By size of images; what is not there yet is added.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, image: Tensor, positions: dict[torch.Size, _Positions]):
        images = image[None].to(next(student.parameters()))
        self.x, grid, ours = student.embed(images)
        self.taught, _, theirs = teacher.embed(images)
        self.positions = positions.setdefault(image.shape, _Positions(grid, ours, theirs))
        self.mixed = student.rope_mixed

    def teach(self, block: OnGrid, i: int, place: int) -> None:
        """The teacher goes on to the end of the attention of block i (place 0), or then of its MLP (1)."""
        add = block.sublayers(self.positions.grid, self._of_block(self.positions.theirs, i), None, False)[place]
        self.taught = self.taught + add(self.taught)

    def before_linear(self, block: OnGrid, i: int, place: int) -> tuple[Tensor, Tensor]:
        """`before_linear` of block i of the student. Its tokens go on to those without what the layer adds, unless the
        block works on fewer of them, and needs them as they are for both layers."""
        positions = self.positions
        found, inputs = block.before_linear(self.x, positions.grid, self._of_block(positions.ours, i), place)
        if not block.attn.of_block:
            self.x = found
        return found, inputs

    def advance(self, block: OnGrid, i: int) -> None:
        """The student goes on to the end of block i."""
        grid = self.positions.grid
        if block.attn.of_block:
            self.x = block(self.x, grid, self._of_block(self.positions.ours, i))
        else:
            self.x = self.x + block.mlp_adds(self.x, grid)

    def _of_block(self, rope: Any, i: int) -> Any:
        return rope[i] if self.mixed else rope


class _System:
    """The normal equations of what is added to a linear layer, tokens weighed by the inverse of their mean square.

    Args:
        linear: The layer.
        scale: (C,), by which what it gives is scaled, or None.
    """

    def __init__(self, linear: nn.Linear, scale: Tensor | None):
        self.linear, self.scale = linear, scale
        size, wide = linear.in_features + (linear.bias is not None), dict(dtype=torch.float64)
        self.inner = linear.weight.new_zeros(size, size, **wide)
        self.outer = linear.weight.new_zeros(size, linear.out_features, **wide)
        self.squares, self.tokens = 0.0, 0

    def add(self, inputs: Tensor, wanted: Tensor, target: Tensor) -> None:
        """The tokens of an image.

        Args:
            inputs: (1, N, F).
            wanted: (1, N, C), what the block should add, scaled.
            target: (1, N, C), the tokens that come of it.
        """
        weight = target.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()[0]
        added = self.linear(inputs)
        if self.scale is not None:  # a channel that is scaled by 0 asks for nothing
            wanted = torch.where(self.scale == 0, added, wanted / self.scale)
        lacking = wanted - added
        lacking, inputs = weight * lacking[0], inputs[0]
        if self.linear.bias is not None:
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
        inputs = weight * inputs
        self.inner += inputs.T @ inputs
        self.outer += inputs.T @ lacking
        self.squares += float(self._squared(lacking).sum())
        self.tokens += len(inputs)

    def _squared(self, lacking: Tensor) -> Tensor:
        return (lacking if self.scale is None else lacking * self.scale).square().double()

    def solution(self, ridge: float) -> Tensor:
        """What is added to weight and bias, (F or F + 1, C)."""
        squares = self.inner.diagonal()
        return torch.linalg.solve(self.inner + torch.diag((ridge * squares.mean()).expand_as(squares)), self.outer)

    def error(self, solution: Tensor | None = None) -> float:
        """The mean squared error of the tokens, over their mean square, with what a solution adds."""
        squares = self.squares
        if solution is not None:
            gained = 2 * (solution * self.outer) - solution * (self.inner @ solution)
            squares -= float((gained if self.scale is None else gained * self.scale.double() ** 2).sum())
        return squares / (self.tokens * self.outer.shape[1])

    def apply(self, solution: Tensor) -> None:
        """Adds a solution to the layer."""
        linear = self.linear
        of_weight = solution[: linear.in_features].T
        weight = linear.parametrizations.weight.original if parametrize.is_parametrized(linear) else linear.weight
        weight += of_weight.to(weight.dtype)
        if linear.bias is not None:
            linear.bias += solution[-1].to(linear.bias.dtype)


@contextmanager
def _passing(block: nn.Module, name: str) -> Iterator[None]:
    """A context in which a layer gives its input back."""
    layer = block.get_submodule(name)
    block.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        block.set_submodule(name, layer)
