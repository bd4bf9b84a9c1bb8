"""Models that tell the class of every patch or pixel: a vision transformer, and a head on the features of its blocks.

Dimensions: B images, L layers, C channels, h × w patches, K classes.
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vit_efficient.conversion import swap_attentions
from vit_efficient.models.backbone import BACKBONE, WithBackbone
from vit_efficient.models.checkpoints import checkpoint_filter_fn
from vit_efficient.models.forward import GridForward
from vit_efficient.models.registered import DEFAULT_CFG, build_model
from vit_efficient.models.saving import model_arguments
from vit_efficient.models.served import served_model
from vit_efficient.upsampling import GuidedUpsampler
from vit_efficient.utils.checks import argument_names, as_integer, check_choice, check_options, is_integer, is_real
from vit_efficient.utils.compat import set_model_args
from vit_efficient.utils.errors import UserError

# Arguments of timm.create_model that are of the model as a whole, and not of its backbone.
_OF_BUILDER = (
    'num_classes',
    'pretrained_cfg',
    'pretrained_cfg_overlay',
    'pretrained_model_args',
    'pretrained_strict',
    'cache_dir',
    'features_only',
)


class LinearHead(nn.Module):
    """A linear map of the normalised features of the last block, the same for every patch.

    Args:
        dim, depth: Channels of the features, and blocks of the model.
        num_classes: K.
        dropout: Probability that a channel is left out of an image, in training.
    """

    def __init__(self, dim: int, depth: int, num_classes: int, dropout: float = 0.0):
        super().__init__()
        self.layers = [depth - 1]
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.dropout = nn.Dropout2d(_rate(dropout))
        self.classify = nn.Conv2d(dim, num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, 1, C, h, w) -> (B, K, h, w)"""
        x = self.norm(features[:, 0].movedim(1, -1)).movedim(-1, 1)
        return self.classify(self.dropout(x))


class MultiLayerHead(nn.Module):
    """A light head on the features of several blocks, at the token grid: each normalised, all together mapped to
    `width` channels, two residual convolutions, and logits, which may be finer than the grid.

    It reads what DPT reads (Ranftl, Bochkovskiy, Koltun, ICCV 2021, arXiv 2103.13413), and has no pyramid; finer logits
    lie in its channels (Shi et al., CVPR 2016, arXiv 1609.05158). Nothing in it depends on the other images of a batch.

    Args:
        dim, depth: Channels of the features, and blocks of the model.
        num_classes: K.
        layers: Blocks whose features it reads, negative ones counted from the end; by default the last of each quarter.
        width: Channels.
        upscale: Logits along a side of a patch.
        dropout: Probability that a channel is left out of an image, in training.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_classes: int,
        layers: Sequence[int] | None = None,
        width: int = 256,
        upscale: int = 2,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.layers = _layers(layers, depth)
        width, upscale = as_integer('width', width), as_integer('upscale', upscale)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.project = nn.Conv2d(len(self.layers) * dim, width, 1)
        self.mix = nn.ModuleList(_Mix(width) for _ in range(2))
        self.dropout = nn.Dropout2d(_rate(dropout))
        self.classify = nn.Conv2d(width, num_classes * upscale**2, 1)
        self.shuffle = nn.PixelShuffle(upscale)

    def forward(self, features: Tensor) -> Tensor:
        """(B, L, C, h, w) -> (B, K, h · upscale, w · upscale)"""
        x = self.norm(features.movedim(2, -1)).movedim(-1, 2).flatten(1, 2)
        x = self.project(x)
        for mix in self.mix:
            x = mix(x)
        return self.shuffle(self.classify(self.dropout(x)))


class _Mix(nn.Module):
    """x + a convolution of 3 × 3 of GELU of x, which is normalised over all channels and places of an image."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(nn.functional.gelu(self.norm(x)))


HEADS: dict[str, type[nn.Module]] = {'linear': LinearHead, 'multilayer': MultiLayerHead}


class DenseModel(WithBackbone):
    """A vision transformer without its classifier, and a head on features of its blocks.

    It trains, converts, compiles, exports and saves as its backbone does: `timm.create_model('local-dir:…')` gives it
    back, and `convert(model, …)` swaps the attention of the backbone.

        backbone = timm.create_model('vit_small_patch14_dinov2', img_size=504, pretrained=True)
        model = DenseModel(backbone, 'multilayer', num_classes=19)
        model(torch.zeros(1, 3, 504, 504))  # (1, 19, 72, 72)

    Args:
        backbone: As for `convert`, and it becomes one of ours. It is used, not copied.
        head: linear (`LinearHead`) or multilayer (`MultiLayerHead`).
        num_classes: K.
        reduce: Images are averaged over so many × so many pixels before the backbone sees them.
        upsample: Whether features are brought back to the patches of the whole image (`GuidedUpsampler`); it belongs to
            the backbone, and learns where that does.
        **options: Of the head.

    Raises:
        UserError: If the backbone cannot be served or has no patches of one size, or there is no such head or option.
    """

    frozen = False  # whether the backbone does not learn

    def __init__(
        self,
        backbone: nn.Module,
        head: str = 'linear',
        num_classes: int = 2,
        reduce: int = 1,
        upsample: bool = False,
        **options: Any,
    ):
        super().__init__()
        check_choice('head', head, HEADS)
        as_integer('num_classes', num_classes)
        self.reduce = as_integer('reduce', reduce)
        if upsample and self.reduce == 1:
            raise UserError('upsample=True gives back what reduce has taken, which is 1; set it to 2 or more')
        own = argument_names(HEADS[head])[0]
        check_options(f'head={head}', options, [name for name in own if name not in ('dim', 'depth', 'num_classes')])
        backbone = served_model(backbone)
        if not hasattr(backbone, 'patch_embed') or hasattr(backbone, 'neck'):
            raise UserError(f'a head for patches needs the tokens of one grid, which a {type(backbone).__name__} lacks')
        if not isinstance(backbone, GridForward):
            swap_attentions(backbone, 'full', layers=[])
        if backbone.num_classes:
            backbone.reset_classifier(0)
        depth = len(backbone.blocks)
        self.upsampler = None
        if upsample:
            patch = tuple(backbone.patch_embed.patch_size)
            self.upsampler = GuidedUpsampler(backbone.in_chans, backbone.embed_dim, patch, self.reduce)
        self.backbone, self.head_name, self.head_options = backbone, head, dict(options)
        self.num_classes = int(num_classes)
        self.head = HEADS[head](backbone.embed_dim, depth, self.num_classes, **options)
        config = {**backbone.pretrained_cfg, 'architecture': 'vit_dense', 'num_classes': self.num_classes}
        config |= {'classifier': 'head.classify', 'first_conv': f'{BACKBONE}{config.get("first_conv")}'}
        config['fixed_input_size'] = False  # its size is an argument of the backbone
        self.pretrained_cfg = self.default_cfg = config
        set_model_args(self, self.construction())

    def construction(self) -> dict[str, Any]:
        """The arguments of its entry point, as it stands."""
        return dict(
            backbone=self.backbone.pretrained_cfg['architecture'],
            backbone_args=model_arguments(self.backbone),
            head=self.head_name,
            head_args=self.head_options,
            num_classes=self.num_classes,
            reduce=self.reduce,
            upsample=self.upsampler is not None,
        )

    @property
    def patch_size(self) -> tuple[int, int]:
        """Sides, in pixels of the whole image, of what the backbone sees as a patch: they divide images."""
        height, width = self.patch_embed.patch_size
        return height * self.reduce, width * self.reduce

    def features(self, images: Tensor) -> Tensor:
        """Images (B, channels, height, width) -> what the head reads, (B, L, C, h, w)."""
        seen = nn.functional.avg_pool2d(images, self.reduce) if self.reduce > 1 else images
        found = self.backbone.forward_intermediates(
            seen, self.head.layers, stop_early=True, intermediates_only=True, output_fmt='NCHW'
        )
        features = torch.stack(found, 1)
        return features if self.upsampler is None else self.upsampler(images, features)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, height, width), or their `features` -> logits (B, K, h, w), or finer ones."""
        features = x if x.ndim == 5 else self.features(x)
        return self.head(features.to(self.head.classify.weight.dtype))

    def reset_classifier(self, num_classes: int) -> None:
        """Puts a new head of the same kind in the place of the old one."""
        self.num_classes = as_integer('num_classes', num_classes)
        weight = self.head.classify.weight
        head = HEADS[self.head_name](
            self.backbone.embed_dim, len(self.backbone.blocks), self.num_classes, **self.head_options
        )
        self.head = head.to(weight.device, weight.dtype)
        self.pretrained_cfg['num_classes'] = self.num_classes
        set_model_args(self, self.construction())

    def freeze_backbone(self) -> None:
        """Only the head learns from now on, and the backbone is what it is in evaluation, in training too."""
        self.backbone.requires_grad_(False)
        if self.upsampler is not None:
            self.upsampler.requires_grad_(False)
        self.frozen = True
        self.backbone.eval()

    def train(self, mode: bool = True) -> 'DenseModel':
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self


def _layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    if layers is None:
        return sorted({max(depth * quarter // 4 - 1, 0) for quarter in range(1, 5)})
    if (
        not isinstance(layers, list | tuple)
        or not layers
        or not all(is_integer(i, -depth) and i < depth for i in layers)
    ):
        raise UserError(f'layers must list blocks of the model, 0 … {depth - 1}, got {layers!r}')
    return sorted({int(i) % depth for i in layers})


def _rate(dropout: float) -> float:
    if not is_real(dropout) or not 0 <= dropout < 1:
        raise UserError(f'dropout must be at least 0 and below 1, got {dropout!r}')
    return float(dropout)


default_cfgs = generate_default_cfgs(
    {
        'vit_dense': {
            **DEFAULT_CFG,
            'first_conv': 'backbone.patch_embed.proj',
            'classifier': 'head.classify',
            'fixed_input_size': False,
        }
    }
)


@register_model
def vit_dense(
    pretrained: bool = False,
    backbone: str | None = None,
    backbone_args: dict[str, Any] | None = None,
    head: str = 'linear',
    head_args: dict[str, Any] | None = None,
    reduce: int = 1,
    upsample: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A `DenseModel`: what a saved one is rebuilt by."""
    if not backbone or not timm.is_model(backbone):
        raise UserError(f"vit_dense: backbone must name a timm ViT, such as 'vit_base_patch16_224', got {backbone=}")

    own = {name: kwargs.pop(name) for name in [*kwargs] if name not in _OF_BUILDER}
    given = {**(backbone_args or {}), **own}

    def build(num_classes: int = 2, **defaults: Any) -> nn.Module:  # what timm has by default is of no backbone
        inner = timm.create_model(backbone, **given)
        return DenseModel(inner, head, num_classes, reduce, upsample, **(head_args or {}))

    return build_model(build, 'vit_dense', pretrained, filter_fn=filter_backbone, **kwargs)


def filter_backbone(state_dict: dict[str, Tensor], model: DenseModel) -> dict[str, Tensor]:
    """`checkpoint_filter_fn` of the backbone's part of a checkpoint."""
    inner = {name.removeprefix(BACKBONE): value for name, value in state_dict.items() if name.startswith(BACKBONE)}
    rest = {name: value for name, value in state_dict.items() if not name.startswith(BACKBONE)}
    found = checkpoint_filter_fn(inner, model.backbone)
    return {f'{BACKBONE}{name}': value for name, value in found.items()} | rest
