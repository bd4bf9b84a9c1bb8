"""fvcore's engine: a trace of a forward pass that really runs, with its handlers corrected."""

from collections import Counter

import torch
from torch import Tensor, nn

from vit_efficient.flops.formulas import FORMULAS, FVCORE_IS_RIGHT, is_listed, short_name


def count_with_fvcore(model: nn.Module, x: Tensor) -> tuple[dict, dict]:
    """MACs by (module path, operator), and the calls of operators that count nothing."""
    from fvcore.nn import FlopCountAnalysis

    def unwrap(value):
        if value.isCompleteTensor():
            return tuple(value.type().sizes())
        if value.node().kind() in ('prim::ListConstruct', 'prim::TupleConstruct'):
            return [unwrap(v) for v in value.node().inputs()]
        return value.toIValue()

    def handle(operator, formula):
        return lambda inputs, outputs: Counter(
            {short_name(operator): formula([unwrap(v) for v in inputs], unwrap(outputs[0]))}
        )

    analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle(**{name: handle(name, f) for name, f in FORMULAS.items() if name not in FVCORE_IS_RIGHT})
    with torch.no_grad():
        inclusive = analysis.by_module_and_operator()
    counts = Counter({(path, operator): n for path, each in inclusive.items() for operator, n in each.items()})
    for path, each in inclusive.items():
        if path:  # what a module's children compute is not its own
            for operator, n in each.items():
                counts[path.rpartition('.')[0], operator] -= n
    return counts, {short_name(name): n for name, n in analysis.unsupported_ops().items() if is_listed(name)}
