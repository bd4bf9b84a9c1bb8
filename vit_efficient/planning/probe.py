"""A model as it is measured: its layers take any of several attentions, and a pass can begin at any block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vit_efficient.conversion import convert, sharing_weights
from vit_efficient.fidelity import final_tokens
from vit_efficient.flops import count_flops
from vit_efficient.models import blocks
from vit_efficient.models.served import served_model
from vit_efficient.utils.compat import model_args
from vit_efficient.utils.errors import UserError

Spec = tuple[str, dict[str, Any]]  # the name of an attention, and its options


class Probe:
    """A copy of a model with the same weights, and several attentions for each of its layers.

    The model itself is left alone. A layer is a block whose attention is among all patches; an assignment is the number
    of an option for each. Option 0 is what the layer has.

    Args:
        model: As `convert` takes it.
        input_size: Channels, height and width of the images.

    Attributes:
        model: The copy, in evaluation mode.
        arguments: Those of its entry point, with option 0.
        layers: The numbers of the blocks.
        specs: Of each option, by layer.
        macs, keys: What each option costs, by layer: multiply-accumulates of the block, MLP included, and the keys that
            a query attends to.
        total_macs: Of the whole model with option 0.
    """

    def __init__(self, model: nn.Module, input_size: Sequence[int]):
        self.model = sharing_weights(served_model(model)).eval()
        convert(self.model, 'full', layers=[])
        if self.device.type == 'meta':
            raise UserError('the model is on the meta device, without weights to measure: load them first')
        self.input_size = tuple(input_size)
        self.arguments = model_args(self.model)
        self.layers = list(blocks.grid_blocks(self.model))
        self.specs: list[list[Spec]] = []
        self.macs: list[list[int]] = []
        self.keys: list[list[int]] = []
        self._attentions: list[list[dict[str, nn.Module]]] = []
        self.total_macs = self._add(self.model.attention_spec())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def architecture(self) -> str:
        """The name by which timm knows the model that it was, or that of its class."""
        config = getattr(self.model, 'pretrained_cfg', None) or {}
        return self.arguments.get('base') or config.get('architecture') or type(self.model).__name__

    def add(self, name: str, options: dict[str, Any]) -> None:
        """Adds an option; what it draws at random is drawn from a seed of its own.

        Raises:
            UserError: If the model refuses it.
        """
        specs = [(name, dict(options)) for _ in self.layers]
        try:
            with torch.random.fork_rng([self.device] if self.device.type == 'cuda' else []):
                torch.manual_seed(0)
                convert(self.model, specs)
            self._add(specs)
        finally:
            self.put([0] * len(self.layers))

    def _add(self, specs: list[Spec]) -> int:
        """Adds the attentions that the layers have, and returns what the model costs with them."""
        count = count_flops(self.model, self.input_size)
        grid, served = self.model.grid_of(*self.input_size[1:]), blocks.grid_blocks(self.model)
        keys = [blocks.first_attention(block).num_attended(grid) for block in served.values()]
        self.specs.append(specs)
        self.macs.append([count.by_module[f'blocks.{i}'] for i in served])
        self.keys.append(keys)
        self._attentions.append(
            [{f'blocks.{i}.{name}': each for name, each in blocks.attentions_of(b).items()} for i, b in served.items()]
        )
        return count.total

    def put(self, assignment: Sequence[int]) -> None:
        """Gives the layers of the copy their attentions."""
        found = {}
        for layer, option in enumerate(assignment):
            found |= self._attentions[option][layer]
        blocks.set_attentions(self.model, found)

    def tokens(self, image: Tensor, assignment: Sequence[int], inputs: Sequence[Tensor] = ()) -> Tensor:
        """The tokens of an image, as `vit_efficient.fidelity.final_tokens` gives them.

        Args:
            image: (C, H, W)
            assignment: The option of each layer.
            inputs: What blocks of the model as it is are given, up to that of the first layer that is not as it is. The
                blocks before that are not run; with none given all are.
        """
        self.put(assignment)
        with self._standing_in(inputs):
            [tokens] = final_tokens(self.model, [image])
        return tokens

    def exact(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The tokens of the model as it is, and what each of its blocks is given."""
        with self._called(self.model.blocks) as calls:
            tokens = self.tokens(image, [0] * len(self.layers))
        return tokens, [args[0] for args, _ in calls]

    def milliseconds(self, image: Tensor, layer: int) -> list[float]:
        """The least time of the block of a layer with each option, in turns."""
        from vit_efficient.benchmark.timing import Call  # with what benchmarks import

        block = self.model.blocks[self.layers[layer]]
        with self._called([block]) as calls:
            self.tokens(image, [0] * len(self.layers))
        [(args, kwargs)] = calls

        def call(option: int) -> Call:
            chosen = [0] * len(self.layers)
            chosen[layer] = option
            return Call(partial(block, *args, **kwargs), lambda _: self.put(chosen), torch.no_grad)

        return self._least([call(option) for option in range(len(self.specs))])

    def total_milliseconds(self, image: Tensor) -> float:
        """The least time of the whole model as it is."""
        from vit_efficient.benchmark.timing import Call

        self.put([0] * len(self.layers))
        batch = image[None].to(self.device, next(self.model.parameters()).dtype)
        return self._least([Call(partial(self.model, batch), context=torch.no_grad)])[0]

    def _least(self, calls: list[Callable[[], object]]) -> list[float]:
        from vit_efficient.benchmark import timing

        timed = timing.take_turns(calls, self.device, rounds=3, max_seconds=20)
        return [1e3 * min(seconds) for seconds in timed]

    @contextmanager
    def _called(self, modules: Sequence[nn.Module]) -> Iterator[list[tuple[tuple, dict]]]:
        """Arguments with which modules are called, in order."""
        calls = []
        hooks = [
            module.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True)
            for module in modules
        ]
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _standing_in(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """A context in which blocks give what the next one was given, but for the last of these, which runs."""
        stand_ins = self.model.blocks[: max(len(inputs) - 1, 0)]
        for block, following in zip(stand_ins, inputs[1:], strict=True):
            block.forward = lambda *_, given=following, **__: given
        try:
            yield
        finally:
            for block in stand_ins:
                del block.forward
