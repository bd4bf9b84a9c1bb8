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
            UserError: In training mode, or for inputs that are not on the CPU or of another dtype than the weights.
        """
        if self.training:
            raise UserError('a SparseLinear does not learn: call model.eval(); to train a pruned model use its Masks')
        if x.device.type != 'cpu' or self.values.device.type != 'cpu':
            device = next(str(each.device) for each in (x, self.values) if each.device.type != 'cpu')
            raise UserError(f'a SparseLinear computes on the CPU, got {device}; keep the model dense on other devices')
        if x.dtype != self.values.dtype or x.dtype not in DTYPES:
            raise UserError(
                f'a SparseLinear computes in float32 or float64, inputs and weights alike, got {x.dtype} and '
                f'{self.values.dtype}; leave autocast, or convert a dense model before it becomes sparse'
            )
        weight = torch.sparse_csr_tensor(
            self.starts, self.columns, self.values, (self.out_features, self.in_features), check_invariants=False
        )
        tokens = x.reshape(-1, self.in_features).T
        y = weight @ tokens if self.bias is None else torch.addmm(self.bias[:, None], weight, tokens)
        # Attention is slow on strides; with two axes, as here, PyTorch transposes fast.
        return y.T.contiguous().view(*x.shape[:-1], self.out_features)

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
    replaced, lowest = {}, 1.0
    for name, layer in inner.named_modules():
        if not is_plain(layer) or not isinstance(layer, nn.Linear) or _is_read(inner, name):
            continue
        density = layer.weight.count_nonzero().item() / layer.weight.numel()
        lowest = min(lowest, density)
        if density > below:
            continue
        if layer.weight.device.type != 'cpu' or layer.weight.dtype not in DTYPES:
            raise UserError(
                f'{name}: its weight is {layer.weight.dtype} on {layer.weight.device}; sparse layers are float32 or '
                'float64 on the CPU: model.cpu().float()'
            )
        replaced[name] = layer
    if not replaced:
        raise UserError(f'{below=}: the sparsest linear layer has a density of {lowest:.3f}; prune the model first')
    for name, layer in replaced.items():
        inner.set_submodule(name, SparseLinear.from_linear(layer))
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
        model = timm.create_model(f'local-dir:{folder}')
        for key in [key.removesuffix('.starts') for key in state if key.endswith('.starts')]:
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
