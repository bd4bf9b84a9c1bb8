"""The convolution of a patch embedding, as one product on a GPU."""

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.utils.device import on_gpu


class PatchConvolution(nn.Conv2d):
    """A convolution whose kernels lie side by side; made of one by `use_products`, with the same parameters.

    Of one image of 2,048 px in bfloat16 cuDNN's takes 1 ms on an H100, as long as a ViT-B's block of 16,384 patches.
    """

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, self.stride)


def use_products(embedding: nn.Module) -> None:
    """Makes the convolution of a patch embedding, `proj`, a `PatchConvolution` in place, if it can be one."""
    conv = getattr(embedding, 'proj', None)
    if type(conv) is not nn.Conv2d or conv.kernel_size != conv.stride:
        return
    if (conv.padding, conv.dilation, conv.groups) == ((0, 0), (1, 1), 1):
        conv.__class__ = PatchConvolution


# A leaf for FX, where the device is not known.
@torch.fx.wrap
@register_notrace_function
def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
    """(B, C, H, W), kernels (E, C, p, q) at strides (p, q) → (B, E, ⌊H / p⌋, ⌊W / q⌋)"""
    if not on_gpu(x):
        return F.conv2d(x, weight, bias, stride)
    (p, q), (height, width) = stride, x.shape[2:]
    rows, columns = height // p, width // q
    x_BChpwq = x[:, :, : rows * p, : columns * q].unflatten(2, (rows, p)).unflatten(4, (columns, q))
    x_BhwK = x_BChpwq.permute(0, 2, 4, 1, 3, 5).flatten(3)
    return F.linear(x_BhwK, weight.flatten(1), bias).permute(0, 3, 1, 2)
