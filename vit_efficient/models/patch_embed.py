"""Patch embedding from the lowest frequencies of each patch.

A patch embedding is one linear map of the p × p pixels of a patch. The orthonormal 2-D DCT keeps inner products, so the
same map can be written in DCT coefficients, and cut to the f × f lowest of them: C · f² instead of C · p² products with
each output channel, after a transform of C · p · f · (p + f). To give a network coefficients in the place of pixels is
the idea of Gueguen et al., "Faster Neural Networks Straight from JPEG", NeurIPS 2018, and, for ViTs, of Park and
Johnson, "RGB no more: Minimally-decoded JPEG Vision Transformers", CVPR 2023, arXiv 2211.16421.

Letters: B images, C channels, H × W pixels, h × w patches of p × q pixels, f × g coefficients kept, K of all channels,
E output channels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Format, PatchEmbed, nchw_to, register_notrace_function, resample_patch_embed, to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient import dct
from vit_efficient.dct.window import FrequencyWindow
from vit_efficient.grid import plain_sizes
from vit_efficient.models.patch_kernels import YCBCR, kernel_to_weight, split_channels, truncated, weight_to_kernel
from vit_efficient.utils.checks import check_choice, check_flag, is_integer, is_pair, multiples_around
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.modes import keeping_modes
from vit_efficient.utils.projections import is_plain

Keep = int | Sequence[int | Sequence[int]] | None

# Arguments that timm's PatchEmbed does not have.
PATCH_OPTIONS = ('keep', 'color', 'input', 'window')
# Those of timm's that it keeps under the same name.
_LAYOUT = ('img_size', 'patch_size', 'strict_img_size', 'dynamic_img_pad', 'flatten')


def _truncation(keep: Keep, patch_size: tuple[int, int], in_chans: int) -> list[tuple[int, int]]:
    """Rows and columns of the coefficients that are left of each channel."""
    several = isinstance(keep, Sequence) and not isinstance(keep, str)
    values = list(keep) if several else [patch_size if keep is None else keep] * in_chans
    if len(values) != in_chans:
        raise UserError(f'patch_keep must be an integer or one for each of the {in_chans} channels, got {keep!r}')
    pairs = [tuple(value) if is_pair(value) else (value, value) for value in values]
    for pair in pairs:
        if not all(is_integer(f, 1) and f <= p for f, p in zip(pair, patch_size, strict=True)):
            raise UserError(
                f'patch_keep={keep!r}: coefficients kept are integers from 1 to the {patch_size[0]}×{patch_size[1]} '
                'pixels of a patch, for all channels or for each'
            )
    return [(int(f), int(g)) for f, g in pairs]


# A leaf for FX, where sizes are not yet numbers.
@torch.fx.wrap
@register_notrace_function
def check_input(height, width, unit: tuple, built_for: tuple, padded: bool, kind: str) -> None:
    """Raises UserError if images of pixels or coefficients are not of the size built for, or not of whole patches."""
    for side, size, step, wanted in zip(('height', 'width'), (height, width), unit, built_for, strict=True):
        if type(size) is not int:
            continue
        if wanted is not None and size != wanted:
            raise UserError(
                f'the {side} of the input is {size} {kind}, the model was built for {wanted}; set img_size, or '
                'dynamic_img_size=True'
            )
        if size < 1 or (size % step and not padded):
            way_out = ', or dynamic_img_pad=True to pad' if kind == 'pixels' else ''
            raise UserError(
                f'the {side} of the input is {size} {kind}, which is not a multiple of {step} for a patch; '
                f'use {multiples_around(size, step)}{way_out}'
            )


class PatchDct(nn.Module):
    """The lowest DCT coefficients of each patch. It has no weights, and exists so that FLOPs carry its name."""

    flop_role = 'patch transform'

    def forward(self, x: Tensor, patch_size: tuple[int, int], keep: tuple[int, int]) -> Tensor:
        """(B, C, H, W) → (B, C, h, f, w, g)"""
        return dct.dct2(_in_patches(x, patch_size), keep, dims=(3, 5))


def _in_patches(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) → (B, C, h, p, w, q)"""
    B, C, H, W = x.shape
    p, q = patch_size
    return x.reshape(B, C, H // p, p, W // q, q)


class DctPatchEmbed(PatchEmbed):
    """timm's `PatchEmbed` on the lowest DCT coefficients of each patch.

    `linear.weight` (E, K) has the coefficients of the first channel, row by row, then those of the next.

    On CUDA, PyTorch computes the convolution of timm's module in TF32, unless `torch.backends.cudnn.allow_tf32` is
    False; this one has products of float32. So there the two differ by 5e-4, not 1e-6, with nothing truncated.

    Args:
        img_size, patch_size, in_chans, embed_dim, **kwargs: As timm's `PatchEmbed`.
        keep: Coefficients kept along each axis, for all channels or a list of one for each, which may be a number or a
            pair; all by default.
        color: What the channels are: 'rgb', as they come; 'ycbcr', JPEG's luma and chroma, which are made of red, green
            and blue after the transform, so that `keep=[16, 8, 8]` spends less on chroma.
        input: 'pixels', or 'coefficients': the module is then given a coefficient image (B, C, h · f, w · g), each
            patch of it the coefficients of the patch that lies there, such as `vit_efficient.data` reads off JPEGs.
            f and g are the largest that a channel keeps. Sizes in arguments remain those in pixels.
        window: Learn how many are kept: they are weighed by a `FrequencyWindow`, one for all channels, which `freeze`
            turns into a hard truncation.

    Raises:
        UserError: If an argument is out of range. By `forward`, if an image does not fit.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        keep: Keep = None,
        color: str = 'rgb',
        input: str = 'pixels',
        window: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        **kwargs,
    ):
        if min(to_2tuple(patch_size)) < 1:
            raise UserError(f'patch_size must be at least 1, got {patch_size=}')
        super().__init__(img_size, patch_size, in_chans, embed_dim, bias=bias, device=device, dtype=dtype, **kwargs)
        check_choice('patch_color', color, ('rgb', 'ycbcr'))
        if color == 'ycbcr' and in_chans != 3:
            raise UserError(f"patch_color='ycbcr' needs the 3 channels red, green and blue, got {in_chans=}")
        check_choice('patch_input', input, ('pixels', 'coefficients'))
        check_flag('patch_window', window)
        if input == 'coefficients' and self.dynamic_img_pad:
            raise UserError("patch_input='coefficients' cannot be padded; set dynamic_img_pad=False")
        self.in_chans = in_chans
        self.color = color
        self.input = input
        self.truncation = _truncation(keep, self.patch_size, in_chans)
        self.dct = PatchDct()
        self.window = FrequencyWindow(device=device) if window else None
        del self.proj
        num_coefficients = sum(f * g for f, g in self.truncation)
        self.linear = nn.Linear(num_coefficients, embed_dim, bias=bias, device=device, dtype=dtype)
        self.init_weights()

    @property
    def keep(self) -> tuple[int, int]:
        """f and g: the most coefficients that a channel keeps."""
        return max(f for f, _ in self.truncation), max(g for _, g in self.truncation)

    @property
    def options(self) -> dict[str, Any]:
        """`PATCH_OPTIONS` in types that JSON has."""
        keep = [f if f == g else [f, g] for f, g in self.truncation]
        same = all(sides == keep[0] for sides in keep) and isinstance(keep[0], int)
        return dict(keep=keep[0] if same else keep, color=self.color, input=self.input, window=self.window is not None)

    def init_weights(self) -> None:
        """Draws what timm's convolution has by default; its linear layers have another distribution."""
        bound = (self.in_chans * self.patch_size[0] * self.patch_size[1]) ** -0.5
        for parameter in self.linear.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_conv(cls, embedding: PatchEmbed, keep: Keep = None, **options) -> 'DctPatchEmbed':
        """The patch embedding that a convolutional one is in DCT coefficients; the two share the norm, if there is one.

        With nothing truncated the outputs are equal. Truncated, they are those of the convolution on an image whose
        patches have no other coefficients (`dct.truncate`): of all maps of the coefficients kept, the one whose kernel
        is nearest. `keep` and the options are those of the constructor. Raises a UserError if `embedding.proj` is no
        convolution of stride and kernel equal to the patch size, or an option is out of range.
        """
        conv = getattr(embedding, 'proj', None)
        if not isinstance(embedding, PatchEmbed) or not isinstance(conv, nn.Conv2d):
            raise UserError(f'patch_embed: {type(embedding).__name__} is not a PatchEmbed of timm, of one convolution')
        plain = conv.kernel_size == conv.stride == tuple(embedding.patch_size) and conv.groups == 1
        if not plain or conv.padding not in ((0, 0), 'valid') or conv.dilation != (1, 1):
            raise UserError(f'patch_embed.proj: {conv} is not one convolution over each {embedding.patch_size} patch')
        new = cls(**_layout(embedding, conv), in_chans=conv.in_channels, keep=keep, **options)
        return _filled(new, new.linear, new.coefficients_of(conv.weight), embedding, conv)

    def to_conv(self) -> PatchEmbed:
        """The convolutional patch embedding that computes the same from pixels; it shares the norm, if there is one."""
        new = self.empty_conv(self.linear.weight.device)
        return _filled(new, new.proj, self.kernel(), self, self.linear)

    def empty_conv(self, device: torch.device | str) -> PatchEmbed:
        """A convolutional patch embedding of the same shape."""
        return PatchEmbed(**_layout(self, self.linear) | {'device': device}, in_chans=self.in_chans)

    def coefficients_of(self, kernel: Tensor) -> Tensor:
        """What `linear.weight` (E, K) is for the kernel (E, C, p, q) of a convolution; computed in float64."""
        return self.before_gains(kernel_to_weight(kernel, self.truncation, self.color)).to(kernel.dtype)

    def before_gains(self, weight: Tensor) -> Tensor:
        """What `linear.weight` has to be for the window to make `weight` (E, K) of it.

        What is outside the window is lost, and what is faint stays so: weights divided by next to nothing could not be
        trained.
        """
        if self.window is None:
            return weight
        gains = self._gains().detach().to(torch.promote_types(weight.dtype, torch.float32))
        return torch.where(gains > 0, weight / gains.clamp(min=1 / 16), 0.0).to(weight.dtype)

    def kernel(self) -> Tensor:
        """The kernel (E, C, p, q) of the convolution that computes the same; computed in float64."""
        weight = self._weight()
        return weight_to_kernel(weight, self.truncation, self.patch_size, self.color).to(weight.dtype)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """As timm's. With another patch size the kernel is resampled as timm does, and as many coefficients are kept.

        Raises a UserError, and changes nothing, if a patch would have fewer pixels than coefficients kept.
        """
        patch_size = self.patch_size if patch_size is None else to_2tuple(patch_size)
        if patch_size != self.patch_size:
            whole = all(pair == self.patch_size for pair in self.truncation)
            truncation = _truncation(None if whole else self.truncation, patch_size, self.in_chans)
            kernel = resample_patch_embed(self.kernel(), patch_size)
            self.patch_size, self.truncation = patch_size, truncation
            self.linear.in_features = sum(f * g for f, g in truncation)
            weight = self.coefficients_of(kernel)
            self.linear.weight = nn.Parameter(weight, requires_grad=self.linear.weight.requires_grad)
            img_size = img_size or self.img_size
            self.img_size = None  # the grid is made anew, even if the image stays
        super().set_input_size(img_size)

    def macs(self, sizes: Sequence[tuple]) -> Any:
        """Multiply-accumulates per patch with these coefficients of each channel, rows and columns; numbers or tensors.

        All channels are transformed to as many rows, and as many columns, as the one that keeps the most of them.
        """
        p, q = self.patch_size
        embedding = sum(f * g for f, g in sizes) * self.linear.out_features
        if self.input == 'coefficients':
            return embedding
        rows, columns = zip(*self.truncation, strict=True)
        f, g = sizes[rows.index(max(rows))][0], sizes[columns.index(max(columns))][1]
        return embedding + self.in_chans * f * (p * q + g * q)

    def freeze(self, keep: Sequence[tuple[int, int]] | None = None) -> 'DctPatchEmbed':
        """The same without a window: coefficients outside are cut, the others keep their gains, in the weights.

        `keep` has rows and columns of each channel, instead of those that are inside.
        """
        if self.window is None:
            raise UserError('this patch embedding has no window to freeze; build it with window=True')
        keep = [self.window.hard_size(f, g) for f, g in self.truncation] if keep is None else list(keep)
        fits = len(keep) == len(self.truncation) and all(
            len(pair) == 2 and 1 <= pair[0] <= f and 1 <= pair[1] <= g
            for pair, (f, g) in zip(keep, self.truncation, strict=True)
        )
        if not fits:
            raise UserError(f'keep must be a pair for each channel, at most {self.truncation}, got {keep=}')
        options = dict(in_chans=self.in_chans, keep=keep, color=self.color, input=self.input)
        new = type(self)(**_layout(self, self.linear), **options)
        cut = truncated(split_channels(self._weight().detach(), self.truncation), new.truncation)
        return _filled(new, new.linear, cut, self, self.linear)

    def pixel_size(self, height, width) -> tuple:
        """Height and width in pixels of an image that the module is given, which may be one of coefficients."""
        if self.input == 'pixels':
            return height, width
        return height // self.keep[0] * self.patch_size[0], width // self.keep[1] * self.patch_size[1]

    def input_size(self, height, width) -> tuple:
        """The other way round: of what the module is given for an image of so many pixels."""
        if self.input == 'pixels':
            return height, width
        return height // self.patch_size[0] * self.keep[0], width // self.patch_size[1] * self.keep[1]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        """Kernels over pixels load too, as they are in the checkpoints of timm."""
        kernel = state_dict.get(f'{prefix}proj.weight')
        if kernel is not None and kernel.shape == (self.linear.out_features, self.in_chans, *self.patch_size):
            del state_dict[f'{prefix}proj.weight']
            state_dict[f'{prefix}linear.weight'] = self.coefficients_of(kernel)
            if f'{prefix}proj.bias' in state_dict:
                state_dict[f'{prefix}linear.bias'] = state_dict.pop(f'{prefix}proj.bias')
            if self.window is not None:
                state_dict[f'{prefix}window.share'] = self.window.share.detach().clone()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), or coefficient images (B, C, h · f, w · g) → tokens, in the layout of timm's module."""
        height, width = plain_sizes((x.shape[-2], x.shape[-1]))
        unit = self.patch_size if self.input == 'pixels' else self.keep
        strict = self.strict_img_size and self.img_size is not None
        built_for = self.input_size(*self.img_size) if strict else (None, None)
        check_input(height, width, unit, built_for, self.dynamic_img_pad, self.input)
        if self.dynamic_img_pad:
            x = F.pad(x, (0, -width % unit[1], 0, -height % unit[0]))
        y = self.dct(x, self.patch_size, self.keep) if self.input == 'pixels' else _in_patches(x, self.keep)
        y_BhwK = self._together(y)
        # The layer itself where that will do, for hooks and for what wraps it.
        if self.window is None or not is_plain(self.linear):
            x_BhwE = self.linear(y_BhwK if self.window is None else y_BhwK * self._gains().to(y_BhwK.dtype))
        else:
            x_BhwE = F.linear(y_BhwK, self._weight(), self.linear.bias)
        if self.flatten:
            return self.norm(x_BhwE.flatten(1, 2))
        if self.output_fmt != Format.NHWC:
            x_BhwE = nchw_to(x_BhwE.permute(0, 3, 1, 2), self.output_fmt)
        return self.norm(x_BhwE)

    def _together(self, y_BChfwg: Tensor) -> Tensor:
        """The coefficients of a patch side by side: (B, h, w, K)"""
        if self.color == 'rgb' and len(set(self.truncation)) == 1:
            return y_BChfwg.permute(0, 2, 4, 1, 3, 5).flatten(3)
        channels = [y_BChfwg[:, c] for c in range(self.in_chans)]
        parts = []
        for c, (f, g) in enumerate(self.truncation):
            part = channels[c][:, :, :f, :, :g]
            if self.color == 'ycbcr':
                low = [channel[:, :, :f, :, :g] * factor for channel, factor in zip(channels, YCBCR[c], strict=True)]
                part = low[0] + low[1] + low[2]
            parts.append(part.permute(0, 1, 3, 2, 4).flatten(3))
        return torch.cat(parts, dim=3)

    def _weight(self) -> Tensor:
        """(E, K), each coefficient weighed by its gain."""
        weight = self.linear.weight
        return weight if self.window is None else weight * self._gains().to(weight.dtype)

    def _gains(self) -> Tensor:
        """(K,), of the window."""
        return torch.cat([self.window(f, g).flatten() for f, g in self.truncation])

    def extra_repr(self) -> str:
        options = self.options
        return f'keep={options["keep"]}, ' + ', '.join(f"{name}='{options[name]}'" for name in ('color', 'input'))


def _filled(new: PatchEmbed, layer: nn.Module, weight: Tensor, old: PatchEmbed, source: nn.Module) -> PatchEmbed:
    """A new embedding whose layer has this weight, and all else of an old one and its layer, `source`."""
    new.norm = old.norm
    with torch.no_grad():
        layer.weight.copy_(weight)
        if source.bias is not None:
            layer.bias.copy_(source.bias)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(getattr(source, name).requires_grad)
    with keeping_modes(old):  # of the norm that both have
        return new.train(old.training)


def _layout(embedding: PatchEmbed, layer: nn.Module) -> dict[str, Any]:
    """The arguments that place the patches of an embedding and its tokens, and those of its layer's weights."""
    layout = {name: getattr(embedding, name) for name in _LAYOUT}
    if not embedding.flatten and embedding.output_fmt != Format.NCHW:
        layout['output_fmt'] = embedding.output_fmt.value
    weight = layer.weight
    own = dict(embed_dim=len(weight), bias=layer.bias is not None, device=weight.device, dtype=weight.dtype)
    return layout | own


def patch_embed_layer(
    kind: str, keep: Keep = None, color: str = 'rgb', input: str = 'pixels', window: bool = False
) -> Callable[..., PatchEmbed]:
    """What builds the patch embedding of a model: timm's for 'conv', ours for 'dct'."""
    check_choice('patch_embed', kind, ('conv', 'dct'))
    if kind == 'dct':
        return partial(DctPatchEmbed, keep=keep, color=color, input=input, window=window)
    values, defaults = (keep, color, input, window), (None, 'rgb', 'pixels', False)
    for name, value, default in zip(PATCH_OPTIONS, values, defaults, strict=True):
        if value != default:
            raise UserError(f"patch_{name}={value!r} is an option of patch_embed='dct', got patch_embed='conv'")
    return PatchEmbed
