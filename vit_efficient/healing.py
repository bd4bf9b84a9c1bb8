"""Giving a converted model back what its features have lost: a student learns the features of its teacher, which is the
model as it was, from images without labels.

Two kinds of learning. *Align*: each attention that was converted is given what the teacher's is given, and learns to
give back what that gives. *Recover*: the whole student learns the teacher's tokens at the end, and after blocks that
are chosen. Sources: attention outputs, then final features, Li et al., "ViT-AdaLA", 2026; a cosine for class and patch
tokens with a smooth-L1 beside it, "IronViT", 2026. What is ours: each token is compared by its own scale, so that a few
tokens of large norm (Darcet et al., "Vision transformers need registers", ICLR 2024, arXiv 2309.16588) do not rule; and
a centred cosine, since patches of an image have much in common.

Dimensions: B images, N tokens (prefix tokens, then patches), C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_efficient.conversion import swap_attentions
from vit_efficient.grid import PatchGrid
from vit_efficient.low_rank import ORIGINAL, LowRank
from vit_efficient.models import blocks
from vit_efficient.models.backbone import BACKBONE, WithBackbone
from vit_efficient.models.forward import GridForward
from vit_efficient.models.served import served_model
from vit_efficient.utils.checks import is_integer
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.measurements import digest
from vit_efficient.utils.options import write_options

SOLVED = 'solved'  # what least squares give, before anything learns; in a run's folder the model that it is
ALIGN, RECOVER, REFINE = KINDS = ('align', 'recover', 'refine')


class Given(NamedTuple):
    """What a part of a model was called with: an attention, 'blocks.3.attn', or a whole block, 'blocks.3'."""

    part: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def on_grid(model: nn.Module) -> nn.Module:
    """The vision transformer itself, out of its wrapper, as one of ours: what it computes stays.

    Raises:
        UserError: If it is none that can be served, or its tokens do not lie on one grid.
    """
    model = served_model(model)
    if not hasattr(model, 'patch_embed') or hasattr(model, 'neck'):
        raise UserError(f'features are compared of tokens on one grid of patches, which a {type(model).__name__} lacks')
    if not isinstance(model, GridForward):
        swap_attentions(model, 'full', layers=[])
    return model


def tokens_after(model: nn.Module, images: Tensor, layers: Sequence[int] = ()) -> list[Tensor]:
    """The tokens (B, N, C) after the last block and the final norm, then those after each of some blocks."""
    if not layers:
        return [model.forward_features(images)]
    final, features = model.forward_intermediates(images, list(layers), return_prefix_tokens=True, output_fmt='NLC')
    pairs = [each if isinstance(each, tuple) else (each, each[:, :0]) for each in features]
    return [final, *(torch.cat([prefix, patches], 1) for patches, prefix in pairs)]


class Student(WithBackbone):
    """A model that learns features; what is saved of it is its backbone.

    Args:
        backbone: As for `convert`, converted; it is used, not copied.
        layers: Blocks, after which tokens are compared as well; negative ones are counted from the end. None: all.

    Attributes:
        kind: What is learned: align, recover or refine.
        parts: What aligns, by name.
    """

    def __init__(self, backbone: nn.Module, layers: Sequence[int] | None = ()):
        super().__init__()
        self.backbone = on_grid(backbone)
        depth = len(self.backbone.blocks)
        layers = range(depth) if layers is None else layers
        for i in layers:
            if not is_integer(i, -depth) or i >= depth:
                raise UserError(f'heal.blocks: the model has blocks 0 … {depth - 1}, got {i}')
        self.layers = sorted({i % depth for i in layers})
        self.kind, self.parts = RECOVER, []
        self._fixed = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        return self.backbone.pretrained_cfg

    @property
    def num_classes(self) -> int:
        """Of the classifier, which stays as it is."""
        return self.backbone.num_classes

    @property
    def prefix(self) -> int:
        return self.backbone.num_prefix_tokens

    def begin(self, kind: str, teacher: 'Teacher') -> None:
        """What learns from now on: of `align` the attentions that the teacher has otherwise, else all.

        Raises:
            UserError: If there is nothing that differs.
        """
        self.parts = converted_parts(self.backbone, teacher.model)
        self.kind = kind
        if kind == ALIGN and not self.parts:
            raise UserError('align: the attentions of the student are those of its teacher; nothing was converted')
        if kind == ALIGN:
            attentions = blocks.named_attentions(self.backbone)
            wanted = {part if part in attentions else f'{part}.attn' for part in self.parts}
            aligned = {id(p) for name in wanted for p in self.backbone.get_submodule(name).parameters()}
        known = {name for name, _ in teacher.model.named_parameters()}
        low_rank = any(isinstance(module, LowRank) for module in self.modules())
        for name, parameter in self.named_parameters():
            # With low-rank updates these learn, and what an attention has that the teacher's has not.
            inner = name.removeprefix(BACKBONE).replace(ORIGINAL, 'weight')
            learns = inner not in known if low_rank else name not in self._fixed
            parameter.requires_grad_(learns and (kind != ALIGN or id(parameter) in aligned))

    def forward(self, images: Tensor, given: Sequence[Given] = (), layers: Sequence[int] | None = None) -> list[Tensor]:
        """`tokens_after` the blocks `layers`, by default the student's own; or what its parts make of what they are
        `given`, without the images."""
        if given:
            return [self._run(*each) for each in given]
        return tokens_after(self.backbone, images, self.layers if layers is None else layers)

    def _run(self, part: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        number, _, attention = part.removeprefix('blocks.').partition('.')
        block = self.backbone.blocks[int(number)]
        if attention:
            return block.run_attention(attention, *args, **kwargs)
        return block(*args, **kwargs) - args[0]

    def no_weight_decay(self) -> set[str]:
        """As timm's: names of parameters that are not to decay."""
        updates = {name for name, _ in self.named_parameters() if '.parametrizations.' in name}
        return super().no_weight_decay() | updates


def converted_parts(student: nn.Module, teacher: nn.Module) -> list[str]:
    """The attentions of a student that its teacher has otherwise, by name; or their blocks, where those work on what an
    attention has kept."""
    found = []
    for i, block in blocks.grid_blocks(student).items():
        ours, theirs = (blocks.first_attention(each) for each in (block, teacher.blocks[i]))
        if (ours.mechanism, ours.options) != (theirs.mechanism, theirs.options):
            found += parts_of(student, i)
    return found


def converted_layers(student: nn.Module, teacher: nn.Module) -> dict[str, list[int]]:
    """The attentions that a student has in the place of its teacher's, with their options, and the blocks of each."""
    found: dict[str, list[int]] = {}
    for i, (ours, theirs) in enumerate(zip(student.attention_spec(), teacher.attention_spec(), strict=True)):
        if ours != theirs:
            found.setdefault(f'{ours[0]}: {write_options(ours[1])}', []).append(i)
    return found


def parts_of(model: nn.Module, i: int) -> list[str]:
    """The attentions of block i, by name; or the block, where it works on what its attention has kept."""
    block = model.blocks[i]
    if blocks.first_attention(block).of_block:
        return [f'blocks.{i}']
    return [f'blocks.{i}.{name}' for name in blocks.attentions_of(block)]


def watch_parts(model: nn.Module, names: Sequence[str], found: dict[str, tuple[Given, Tensor]]) -> list[Any]:
    """Has each forward pass of a model note what its parts are called with, and what they give; of a block what it adds
    to its tokens. Returns the handles by which that ends."""

    def watch(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            found[name] = Given(name, args, kwargs), output if name.count('.') > 1 else output - args[0]

        return model.get_submodule(name).register_forward_hook(note, with_kwargs=True)

    return [watch(name) for name in names]


class Teacher:
    """A model whose features are learned. It is evaluated, without gradients, and never changed.

    Args:
        model: As for `convert`; it is used, not copied.
        size: Height and width in pixels that images are resized to for it, or None. Its tokens of patches are then
            resized to the student's grid.

    Attributes:
        digest: A hash of its weights, and of its attentions where they are not exact.
    """

    def __init__(self, model: nn.Module, size: Sequence[int] | None = None):
        self.model = on_grid(model).eval().requires_grad_(False)
        self.size = None if size is None else tuple(size)
        self.digest = self.current_digest()

    def current_digest(self) -> str:
        converted = [each for each in self.model.attention_spec() if each[0] != 'full']
        return digest([*([(str(converted), torch.empty(0))] if converted else []), *self.model.state_dict().items()])

    @torch.no_grad()
    def tokens(self, images: Tensor, layers: Sequence[int] = ()) -> list[Tensor]:
        """As `tokens_after`, on the grid that the images have without `size`."""
        height, width = images.shape[2:]
        if self.size is None or self.size == (height, width):
            return tokens_after(self.model, images, layers)
        resized = F.interpolate(images, self.size, mode='bicubic', antialias=True)
        small, large = self.model.grid_of(*self.size), self.model.grid_of(height, width)
        return [_on_grid(tokens, small, large) for tokens in tokens_after(self.model, resized, layers)]

    @torch.no_grad()
    def parts(self, images: Tensor, names: Sequence[str]) -> tuple[list[Given], list[Tensor]]:
        """What its parts are called with, and what they give; of a block what it adds to its tokens."""
        found: dict[str, tuple[Given, Tensor]] = {}
        handles = watch_parts(self.model, names, found)
        try:
            self.model.forward_features(images)
        finally:
            for handle in handles:
                handle.remove()
        return [found[name][0] for name in names], [found[name][1] for name in names]


def _on_grid(tokens: Tensor, small: PatchGrid, large: PatchGrid) -> Tensor:
    prefix, patches = tokens.tensor_split([small.prefix], 1)
    maps = patches.transpose(1, 2).unflatten(2, (small.height, small.width))
    maps = F.interpolate(maps.float(), (large.height, large.width), mode='bilinear', antialias=True)
    return torch.cat([prefix, maps.to(prefix).flatten(2).transpose(1, 2)], 1)


@dataclass(frozen=True)
class FeatureLoss:
    """What features that differ cost: a sum of weighted means over tokens.

    Args:
        prefix: Weight of 1 - cosine of prefix tokens (class, registers).
        patch: Of 1 - cosine of patch tokens.
        centred: Of the same, after the mean patch token of the image, as the teacher has it, is taken from both.
        smooth: Of the smooth-L1 of patch tokens in units of the root mean square of each, as the teacher has it.
        blocks: Of the same four, mean over the blocks, of tokens after blocks.
    """

    prefix: float = 1.0
    patch: float = 1.0
    centred: float = 1.0
    smooth: float = 1.0
    blocks: float = 1.0

    def __call__(self, taught: Sequence[Tensor], found: Sequence[Tensor], prefix: int) -> Tensor:
        """The loss of tokens (B, N, C), those at the end first, of which `prefix` are prefix tokens."""
        final, *after = (self._of(*pair, prefix) for pair in zip(taught, found, strict=True))
        return final + self.blocks * torch.stack(after).mean() if after else final

    def _of(self, taught: Tensor, found: Tensor, prefix: int) -> Tensor:
        kind = torch.promote_types(found.dtype, torch.float32)
        taught, found = taught.to(kind), found.to(kind)
        first, patches = taught.tensor_split([prefix], 1)
        our_first, ours = found.tensor_split([prefix], 1)
        loss = self.patch * _away(patches, ours)
        if prefix:
            loss = loss + self.prefix * _away(first, our_first)
        if self.centred:
            mean = patches.mean(1, keepdim=True)
            loss = loss + self.centred * _away(patches - mean, ours - mean)
        if self.smooth:
            scale = patches.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(kind).tiny)
            loss = loss + self.smooth * F.smooth_l1_loss(ours / scale, patches / scale)
        return loss


def _away(a: Tensor, b: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(a, b, dim=-1)).mean()


def part_loss(taught: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
    """The mean over parts of the mean squared error over the mean square of what is taught, so that all count alike."""
    errors = []
    for a, b in zip(taught, found, strict=True):
        kind = torch.promote_types(b.dtype, torch.float32)
        errors.append(F.mse_loss(b.to(kind), a.to(kind)) / a.to(kind).square().mean())
    return torch.stack(errors).mean()
