"""Models whose weights are shared out over the processes (PyTorch's FSDP2), and states that do not tell.

What is loaded and what is given back here is whole: the state dicts that the model and its optimiser have in one
process.
"""

import copy
import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from vit_efficient.models.forward import backbone_of
from vit_efficient.train.distributed import Processes
from vit_efficient.train.optim import IMPLEMENTATIONS
from vit_efficient.utils.compat import map_instances


def shard(model: nn.Module, processes: Processes, amp: str = 'none') -> None:
    """Splits the weights among processes, in place: by blocks, so that whole ones are never held of more than a few.

    For `amp` bf16 weights are gathered in bf16; gradients are summed in float32 either way.
    """
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    # What blocks hand on stays as autocast leaves it: the sum of their outputs in float32.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = policy if amp == 'bf16' else MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in getattr(backbone_of(model), 'blocks', ()):
        fully_shard(block, mesh=mesh, mp_policy=policy)
        if hasattr(block, 'run_attention'):
            register_fsdp_forward_method(block, 'run_attention')
    # By default what is not in blocks stays gathered until a backward pass, which evaluation has not.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def copy_empty(model: nn.Module, device: torch.device | str) -> nn.Module:
    """A copy whose parameters have no values yet. Buffers are copied, as those that a state does not hold must be."""
    parameters = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, parameters)


def model_state(model: nn.Module, everywhere: bool = False) -> dict[str, Tensor]:
    """The weights, whole; of a sharded model on the CPU and in the first process only, the others have an empty dict.

    With `everywhere` all processes get them, on the device. If the model is sharded, all must call.
    """
    if not isinstance(model, FSDPModule):
        return dict(model.state_dict())
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=not everywhere))


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads what `model_state` gave, of any number of processes; all have it."""
    if isinstance(model, FSDPModule):
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)


# As for models, torch.distributed.checkpoint has functions for optimisers. They take a step to find out what the state
# is made of, know no optimiser without one (SGD), and name parameters, where optimisers number them.


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state, whole; of sharded parameters on the CPU and in the first process only. Then all must call."""

    def gather(shards: DTensor) -> Tensor | None:
        whole = shards.full_tensor()
        return whole.cpu() if dist.get_rank() == 0 else None

    return map_instances(DTensor, gather, optimizer.state_dict())


def share_as(parameter: DTensor, whole: Tensor) -> DTensor:
    """A tensor of the shape of a parameter, whole in all processes, shared out as that is."""
    whole = whole.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads what `optimizer_state` gave, of any number of processes; all have it.

    How the optimiser computes stays: what was saved on a GPU goes on elsewhere, and otherwise.
    """
    parameters = list(itertools.chain.from_iterable(group['params'] for group in optimizer.param_groups))

    def share(parameter: nn.Parameter, value: Any) -> Any:
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
            return share_as(parameter, value)
        return value

    shared = {
        number: {name: share(parameters[number], value) for name, value in values.items()}
        for number, values in state['state'].items()
    }
    groups = [
        saved | {name: group[name] for name in IMPLEMENTATIONS if name in group}
        for saved, group in zip(state['param_groups'], optimizer.param_groups, strict=False)
    ]
    groups += state['param_groups'][len(groups) :]  # PyTorch compares how many there are
    optimizer.load_state_dict({**state, 'state': shared, 'param_groups': groups})
