"""What is used of dependencies beyond their public names, one small function each: they can break here only."""

import inspect
import os
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from os import PathLike
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vit_efficient.utils.errors import UserError

#: The mode under which every operator passes one method, `__torch_dispatch__`.
OperatorMode = TorchDispatchMode

#: Wrappers of a model, as `module`, that share out its batches.
DATA_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def model_args(model: nn.Module) -> dict[str, Any]:
    """A copy of the arguments that timm recorded when it built a model, none being left out."""
    return dict(getattr(model, '_model_args', {}))


def set_model_args(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Replaces the arguments that timm recorded of a model."""
    model._model_args = arguments


def keep_first_layer(model: nn.Module) -> None:
    """Tells timm that the model's own checkpoint filter fits its first layer to the channels of the images."""
    model._traits = {**getattr(model, '_traits', {}), 'first_conv': None}


def save_model_config(model: nn.Module, path: str | PathLike, arguments: dict[str, Any], **more: Any) -> None:
    """Writes the config.json of timm's `local-dir:` layout, with the arguments of the entry point and with `more`."""
    from timm.models._hub import save_config_for_hf  # timm's public save_for_hf writes the weights too, into a folder

    save_config_for_hf(model, path, model_config=more, model_args=arguments)


def saved_model_config(folder: str | PathLike) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """pretrained_cfg, architecture and arguments in the config.json of timm's `local-dir:` layout, of any version."""
    from timm.models._hub import load_model_config_from_path

    return load_model_config_from_path(folder)


def feature_indices(depth: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """timm's reading of `indices` in `forward_intermediates`: those of `depth` blocks, and the last of them."""
    from timm.models._features import feature_take_indices

    return feature_take_indices(depth, indices)


def held_model(wrapper: nn.Module) -> nn.Module | None:
    """The model that a wrapper of timm's `features_only` or of `torch.compile` calls as it stands; None of others.

    What is compiled is compiled again where the classes of modules have changed.
    """
    from timm.models._features import FeatureGetterNet, FeatureHookNet

    places = {FeatureGetterNet: 'model', FeatureHookNet: 'body', torch._dynamo.OptimizedModule: '_orig_mod'}
    place = places.get(type(wrapper))
    return None if place is None else getattr(wrapper, place)


def unwrap(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what it holds, as in `held_model` or as data parallelism does; the last one is no wrapper.

    Raises:
        UserError: If it is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f'model must be an nn.Module, such as timm.create_model returns, got {type(model).__name__}')
    while model is not None:
        yield model
        model = model.module if isinstance(model, DATA_PARALLEL) else held_model(model)


def as_written(model: nn.Module) -> nn.Module:
    """The model without what compiles it, or shares out its batches: it computes the same. Raises as `unwrap`."""
    wrappers = (torch._dynamo.OptimizedModule, *DATA_PARALLEL)
    return next(part for part in unwrap(model) if not isinstance(part, wrappers))


def without_recompile_limit() -> AbstractContextManager:
    """A context in which `torch.compile` compiles as often as there are shapes, classes or options."""
    return torch._dynamo.config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize)


def own_names(module: nn.Module) -> set[str]:
    """The names of everything that a module has of its own: attributes, modules, parameters and buffers."""
    return {*vars(module), *module._modules, *module._parameters, *module._buffers}


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of a module itself; one that is pruned or parametrised is not among them."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The buffers of a module itself."""
    return module._buffers


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a tensor is wrapped by a transform of `torch.func`, or by autograd that is handed several gradients at
    once, and of no use outside of it."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def assume(condition: bool | torch.SymBool) -> None:
    """Raises an error if a condition on sizes is false; an exported graph has it as a guard."""
    torch._check(condition)


def are_numbers(*sizes: Any) -> bool:
    """Whether sizes are numbers; to `torch.compile` a symbol, whose value is open, is of type int too."""
    return all(type(size) is int and has_static_value(size) for size in sizes)


def pil_decoder_arguments(image: Image.Image) -> tuple[Any, ...]:
    """What PIL hands to the decoder of an image that it has opened and not yet loaded; empty if that is no tuple."""
    args = image.tile[0][3] if image.tile else ()
    return args if isinstance(args, tuple) else ()


_COMPRESSIONS = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ': 'xz', b'(\xb5/\xfd': 'zstd', b'PK': 'zip'}


def tar_members(path: str, start: int = 0, size: int | None = None) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed tar file, of which none is held in memory; or of one that lies in another file.

    Names are UTF-8, and other bytes of them are kept as `os.fsdecode` keeps them.

    Args:
        path: The file.
        start, size: Where the tar file lies in it, in bytes; by default it is all of it.

    Raises:
        OSError: If it cannot be read.
        tarfile.TarError: If it is compressed, is damaged, even between members, which tarfile takes for its end, goes
            on after its end, or holds a sparse file.
    """
    with open(path, 'rb') as file:
        end = os.fstat(file.fileno()).st_size if size is None else start + size
        file.seek(start)
        try:
            archive = tarfile.TarFile(fileobj=file, encoding='utf-8', errors='surrogateescape')
        except tarfile.ReadError:
            file.seek(start)
            magic = file.read(8)
            kinds = [kind for beginning, kind in _COMPRESSIONS.items() if magic.startswith(beginning)]
            if kinds:
                raise tarfile.ReadError(f'it is compressed by {kinds[0]}; decompress it') from None
            raise
        with archive:
            for member in archive:
                if member.issparse():
                    raise tarfile.ReadError(f'{member.name} is stored as a sparse file; pack without --sparse')
                if member.offset_data + (member.size if member.isreg() else 0) > end:
                    raise tarfile.ReadError(f'cut off at byte {end}')
                yield member
                archive.members = []
            position = archive.offset
            file.seek(position)  # the end is an empty block
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE) or file.tell() > end:
                raise tarfile.ReadError(f'damaged or cut off at byte {position}')
            while rest := file.read(min(2**20, end - file.tell())):
                if rest.strip(b'\0'):
                    raise tarfile.ReadError(
                        f'more follows the end of the archive at byte {position}, as where archives are joined by cat; '
                        'unpack it with --ignore-zeros'
                    )


def map_instances(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    """A tree of containers with `function` of each leaf that is an instance of `kind`."""
    return tree_map_only(kind, function, tree)


def flash_attention_on_gpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention and the logarithms of its denominators, without gradients, in half precision on a GPU.

    Args:
        q, k, v: (B, H, queries, D), (B, H, keys, D), (B, H, keys, E), E ≤ D, D a multiple of 8.

    Returns:
        (B, H, queries, E) and, in float32, (B, H, queries).
    """
    dim = v.shape[-1]
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    y, lse = attention(q, k, F.pad(v, (0, q.shape[-1] - dim)), 0.0, False, scale=scale)[:2]
    return y[..., :dim], lse


def flash_attention_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused attention of CPUs and the logarithms of its denominators: of no gradient.

    Args:
        q, k, v: (B, H, queries or keys, D)
        mask: Added to the scores, of four axes.

    Returns:
        (B, H, queries, D) and (B, H, queries), in float32 at least.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attention(q, k, v, 0.0, False, attn_mask=mask, scale=scale)


def flash_attention_on_cpu_backward(
    dy: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of queries, keys and values, from that of the output y of `flash_attention_on_cpu`."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(dy, q, k, v, y, lse, 0.0, False, attn_mask=mask, scale=scale)


def attend_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    most_queries: int,
    most_keys: int,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """Softmax attention inside groups of rows that lie one after the other, on a GPU: (rows, D) three times → (rows, D)

    In half precision by PyTorch's `varlen_attn`, which has no dropout; otherwise by the kernel below the "efficient"
    attention of `F.scaled_dot_product_attention`. Neither takes float64.

    Args:
        ends_q, ends_k: Where groups begin, and the last one ends, int32; at most 65,535 groups.
        most_queries, most_keys: Of a group.
    """
    dim = v.shape[-1]
    q, k, v = (F.pad(t, (0, -dim % 8)) for t in (q, k, v)) if dim % 8 else (q, k, v)
    sizes = (ends_q, ends_k, most_queries, most_keys)
    if dropout or dim > 256 or q.dtype == torch.float32 or not has_flash_attention(q.device):
        keep = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        q, k, v = (t[None, :, None] for t in (q, k, v))
        y = torch.ops.aten._efficient_attention_forward(q, k, v, None, *sizes, dropout, 0, keep, scale=scale)[0]
        return y[0, :, 0, :dim]
    varlen_attn, known = _varlen_attn()
    how = {'scale': scale} if 'scale' in known else {}
    if not how:  # torch 2.10
        q = q * (scale * q.shape[-1] ** 0.5)
    if 'num_splits' in known and not torch.version.hip:
        how['num_splits'] = 1  # asks for flash attention: cuDNN would build a plan for each size
    return varlen_attn(*(t.unsqueeze(1) for t in (q, k, v)), *sizes, **how)[:, 0, :dim]


@lru_cache
def _varlen_attn() -> tuple[Callable, frozenset[str]]:
    """PyTorch's function and the names of its arguments."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def has_flash_attention(device: torch.device) -> bool:
    """Whether PyTorch's flash attention runs on a device, of half precision; on what stands for a GPU it does."""
    if device.type == 'cuda' and torch.cuda.is_available():  # fake tensors are on GPUs that need not be there
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type in ('cuda', 'meta', 'cpu')


def sdpa_order(device: torch.device) -> list[str]:
    """The backends of `F.scaled_dot_product_attention` in the order in which a GPU tries them, such as 'cudnn'."""
    q = torch.zeros(1, 1, 16, 64, dtype=torch.float16, device=device)
    torch._fused_sdp_choice(q, q, q)  # the order becomes that of this GPU with the first choice
    names = (torch.nn.attention.SDPBackend(number).name for number in torch._C._get_sdp_priority_order())
    return [name.removesuffix('_ATTENTION').lower() for name in names if name != 'OVERRIDEABLE']
