"""Linear layers of which only the weights that are not 0 are stored, and computed with: for inference on a CPU.

Dense products do not care for zeros; these do. They are PyTorch's products of matrices in compressed sparse rows (CSR).

Dimensions: F inputs of a linear layer, O outputs, S weights that are not 0, N tokens of all images.
"""

import os
import warnings
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from vit_efficient.models.saving import model_folder, read_model_config
from vit_efficient.utils.checks import as_share
from vit_efficient.utils.compat import unwrap
from vit_efficient.utils.errors import UserError, one_line
from vit_efficient.utils.projections import is_plain

DTYPES = (torch.float32, torch.float64)
#: How many tokens a product takes at a time: with all at once rows are so long that caches do not hold them.
TOKENS = 32


# One operator, since a compiler would write out the loop.
@torch.library.custom_op('vit_efficient::sparse_linear', mutates_args=())
def _multiply(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """(N, F) → (N, O)"""
    size = len(starts) - 1, x.shape[1]
    weight = torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False)
    bias, y = values.new_zeros(()) if bias is None else bias, x.new_empty(len(x), size[0])
    for some, of_some in zip(x.split(TOKENS), y.split(TOKENS), strict=True):
        torch.add((weight @ some.T).T, bias, out=of_some)
    return y


@_multiply.register_fake
def _(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(starts) - 1)


def _save_weight(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _gradient(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, starts, columns, values = ctx.saved_tensors
    rows = torch.arange(grad.shape[1]).repeat_interleave(starts.diff(), output_size=len(values))
    weight = values.new_zeros(grad.shape[1], x.shape[1]).index_put((rows, columns.long()), values)
    return grad @ weight, None, None, None, None


_multiply.register_autograd(_gradient, setup_context=_save_weight)


class SparseLinear(nn.Module):
    """A linear layer whose weight (O, F) is in compressed sparse rows; it does not learn.

    Its state is `values` (S,), `columns` (S,), the input of each, `starts` (O + 1,), where rows begin, and `bias` (O,).

    Args:
        in_features, out_features: F and O.
        stored: S.
        bias: Whether it has one.
        dtype: float32 or float64.
    """

    def __init__(
        self, in_features: int, out_features: int, stored: int, bias: bool = True, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer('values', torch.zeros(stored, dtype=dtype))
        self.register_buffer('columns', torch.zeros(stored, dtype=torch.int32))
        self.register_buffer('starts', torch.zeros(out_features + 1, dtype=torch.int32))
        self.register_buffer('bias', torch.zeros(out_features, dtype=dtype) if bias else None)
        with warnings.catch_warnings():  # PyTorch says once, of the first such matrix, that they are a beta
            warnings.filterwarnings('ignore', 'Sparse CSR tensor support')
            torch.zeros(1, 1).to_sparse_csr()

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> 'SparseLinear':
        """Of a layer on the CPU, in float32 or float64."""
        weight = layer.weight.detach()
        rows, columns = weight.nonzero(as_tuple=True)
        made = cls(layer.in_features, layer.out_features, len(rows), layer.bias is not None, weight.dtype)
        made.values, made.columns = weight[rows, columns], columns.int()
        made.starts[1:] = torch.bincount(rows, minlength=len(weight)).cumsum(0)
        if layer.bias is not None:
            made.bias = layer.bias.detach().clone()
        return made.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """(…, F) → (…, O)

        Raises:
            UserError: In training mode, under autocast, or for inputs that are not on the CPU, or of another dtype or
                width than the weights.
        """
        if self.training:
            raise UserError('a SparseLinear does not learn: call model.eval(); to train a pruned model use its Masks')
        if not x.ndim or x.shape[-1] != self.in_features:
            raise UserError(f'x must be (…, {self.in_features}), as in_features says, got {tuple(x.shape)}')
        if x.device.type != 'cpu' or self.values.device.type != 'cpu':
            device = next(str(each.device) for each in (x, self.values) if each.device.type != 'cpu')
            raise UserError(f'a SparseLinear computes on the CPU, got {device}; keep the model dense on other devices')
        low = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
        if low != self.values.dtype or x.dtype not in DTYPES:
            raise UserError(
                f'a SparseLinear computes in float32 or float64, inputs and weights alike, got {low} and '
                f'{self.values.dtype}; leave autocast, or convert a dense model before it becomes sparse'
            )
        y = _multiply(x.reshape(-1, self.in_features), self.starts, self.columns, self.values, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        share = len(self.values) / (self.in_features * self.out_features)
        return f'in_features={self.in_features}, out_features={self.out_features}, density={share:.3f}'


def sparse_linear(model: nn.Module, below: float = 0.2) -> nn.Module:
    """Replaces the linear layers of a pruned model that are sparse enough by `SparseLinear` layers, in place.

        prune(model, 0.95)
        sparse_linear(model.eval())

    `save_model` saves what it becomes, in a smaller file, which `load_sparse` reads, and timm alone does not.

    Args:
        model: On the CPU, in float32 or float64.
        below: The density, above 0 and at most 1, up to which a layer is replaced. With more weights the dense product
            is the faster one.

    Returns:
        The model itself. Layers whose weight the attention of timm's EVA reads by itself stay as they are.

    Raises:
        UserError: If no layer is sparse enough, or one of them is not on the CPU or of another dtype.
    """
    below = as_share('below', below)
    *_, inner = unwrap(model)
    if isinstance(inner, nn.Linear):
        raise UserError('sparse_linear replaces layers inside of a model, got a layer; SparseLinear.from_linear(layer)')
    replaced, lowest = {}, 1.0
    for name, layer in inner.named_modules(remove_duplicate=False):
        if not is_plain(layer) or not isinstance(layer, nn.Linear) or _is_read(inner, name):
            continue
        if not layer.weight.numel():
            continue
        if layer.weight.device.type != 'cpu':
            raise UserError(f'{name}: its weight is on {layer.weight.device}; sparse layers need model.cpu()')
        density = layer.weight.count_nonzero().item() / layer.weight.numel()
        lowest = min(lowest, density)
        if density > below:
            continue
        if layer.weight.dtype not in DTYPES:
            raise UserError(
                f'{name}: its weight is {layer.weight.dtype}; sparse layers are float32 or float64: model.float()'
            )
        replaced[name] = layer
    if not replaced:
        raise UserError(f'{below=}: the sparsest linear layer has a density of {lowest:.3f}; prune the model first')
    made = {layer: SparseLinear.from_linear(layer) for layer in replaced.values()}
    for name, layer in replaced.items():
        inner.set_submodule(name, made[layer])
    return model


def _is_read(model: nn.Module, name: str) -> bool:
    """Whether an attention multiplies by the weight itself, beside which it has biases."""
    parent, _, own = name.rpartition('.')
    return own == 'qkv' and getattr(model.get_submodule(parent), 'q_bias', None) is not None


def load_sparse(folder: str | os.PathLike) -> nn.Module:
    """The model that `sparse_linear` has made and `save_model` has saved, in evaluation mode.

    Raises:
        UserError: If the folder holds no such model.
    """
    import safetensors.torch

    folder = model_folder(Path(folder))
    read_model_config(folder)  # for what it says of a file that is none
    try:
        state = safetensors.torch.load_file(folder / 'model.safetensors')
        keys = [key.removesuffix('.starts') for key in state if key.endswith('.starts')]
        if not keys:
            raise ValueError('none of its layers is sparse; timm reads it')
        model = timm.create_model(f'local-dir:{folder}').to(state[f'{keys[0]}.values'].dtype)
        for key in keys:
            layer, values = model.get_submodule(key), state[f'{key}.values']
            bias = layer.bias is not None
            model.set_submodule(
                key, SparseLinear(layer.in_features, layer.out_features, len(values), bias, values.dtype)
            )
        model.load_state_dict(state)
    # A file of another model surfaces as anything from a KeyError to a RuntimeError of PyTorch.
    except Exception as error:
        raise UserError(f'{folder}: not a sparse model that save_model has saved: {one_line(error)}') from error
    return model.eval()
