"""What part of a vision transformer an operator belongs to.

A module says so itself, by an attribute `flop_role`: one of `ROLES` for all that is computed inside it, or 'attention',
whose multiplications by weights are projections and whose products of two activations are attention products. The
innermost module that has a role decides. Modules of timm, which have no such attribute, are known by class and name.

Which of the two a matrix product inside an attention is, follows from its operator and from the module that calls it:
`linear` takes a weight; `matmul` and the like are of two activations, unless they stand in a module within the
attention that has parameters of its own, such as an adapter. Where that is not so, the module can have a `flop_role`.
"""

from timm.layers import Attention, ConvMlp, GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU
from torch import nn

from vit_efficient.flops.formulas import BATCHED, PRODUCTS
from vit_efficient.utils.errors import UserError

ROLES = (
    'attention products',
    'attention projections',
    'transform',
    'mlp',
    'patch embedding',
    'patch transform',
    'rest',
)
ATTENTION = 'attention'

_BY_CLASS = {Attention: ATTENTION, **dict.fromkeys((Mlp, GluMlp, SwiGLU, GlobalResponseNormMlp, ConvMlp), 'mlp')}
_BY_NAME = {'attn': ATTENTION, 'mlp': 'mlp', 'patch_embed': 'patch embedding', 'embeds': 'patch embedding'}


def _module_role(name: str, module: nn.Module) -> str | None:
    """The role of what is computed in a module: its own, or that of timm's; None leaves it to its parent."""
    role = getattr(module, 'flop_role', None)
    if role is not None and role not in (*ROLES, ATTENTION):
        known = ', '.join((ATTENTION, *ROLES))
        raise UserError(f'flop_role of {type(module).__name__} must be one of {known}, got {role!r}')
    return role or next((r for cls, r in _BY_CLASS.items() if isinstance(module, cls)), _BY_NAME.get(name))


def role_of(path: str, operator: str, modules: dict[str, nn.Module]) -> str:
    """The role, of `ROLES`, of an operator, by its short name and the path of the module that calls it."""
    role, owner = None, path
    while owner and not (role := _module_role(owner.rpartition('.')[2], modules[owner])):
        owner = owner.rpartition('.')[0]
    if role in ('transform', 'patch transform'):
        return role
    if role == ATTENTION and operator.startswith('fft_'):
        return 'transform'
    if operator not in PRODUCTS:
        return 'rest'
    if operator == 'scaled_dot_product_attention':
        return 'attention products'
    if role != ATTENTION:
        return role or 'rest'
    by_weight = owner != path and any(True for _ in modules[path].parameters(recurse=False))
    return 'attention products' if operator in BATCHED and not by_weight else 'attention projections'
