"""Models as graphs that run without this package: PyTorch's exported programs (.pt2), and ONNX (.onnx).

What is written has been run and compared with the model: a graph that computes something else is an error, not a file.

With it goes what its input has to be, and what its outputs mean: `input_size`, `mean`, `std`, `interpolation`,
`crop_pct`, `crop_mode` and `labels`, as far as they are known, each as JSON: in an ONNX file's metadata (onnxruntime's
`get_modelmeta().custom_metadata_map`), and in a .pt2's metadata.json (`torch.export.load(…, extra_files=…)`).
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_efficient.attention import GridAttention
from vit_efficient.models.truncation import has_windows
from vit_efficient.utils.checks import as_integer, is_integer
from vit_efficient.utils.compat import as_written
from vit_efficient.utils.errors import UserError, one_line
from vit_efficient.utils.files import replacing
from vit_efficient.utils.modes import evaluating
from vit_efficient.utils.packages import import_optional

SUFFIXES = ('.onnx', '.pt2')
TOLERANCE = 1e-4  # of the largest output
# What the graph's tensors and the axis of images are called.
INPUT, OUTPUT, BATCH = 'images', 'logits', 'batch'
METADATA = 'metadata.json'  # within a .pt2
_PREPROCESSING = ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


def export_model(
    model: nn.Module,
    path: str | Path,
    input_size: tuple[int, int, int],
    fixed_batch: int = 0,
    preprocessing: Mapping[str, Any] | None = None,
) -> float:
    """Exports a model in evaluation mode, for one image size and any number of images.

    Args:
        model: Of this package or of timm, returning one tensor; it is left as it was. The graph takes images of its
            dtype, which for ONNX is float32, and, in a .pt2 file, of its device.
        path: Ends in .onnx or .pt2.
        input_size: Channels, height and width of what the model takes.
        fixed_batch: Images of a batch; 0 leaves their number open.
        preprocessing: Entries of timm's `pretrained_cfg`, such as mean and std, that are not as the model's says.

    Returns:
        The largest difference between what the graph and the model compute from random images, as a share of the
        largest output.

    Raises:
        UserError: If the path has another suffix, the model cannot take such images or cannot be exported, or the
            graph computes something else.
        MissingPackage: If ONNX's packages are not installed.
    """
    path, model = Path(path), as_written(model)
    if path.suffix not in SUFFIXES:
        raise UserError(f'export: the file must end in {" or ".join(SUFFIXES)}, got {path}')
    if path.suffix == '.onnx':
        for module in ('onnx', 'onnxscript', 'onnxruntime'):  # PyTorch's exporter needs the first two
            import_optional(module, 'export to ONNX needs', 'onnx')
    fixed_batch = as_integer('fixed_batch', fixed_batch, 0, '0 or a number of images')
    sides = input_size if isinstance(input_size, (tuple, list)) else ()
    if len(sides) != 3 or not all(is_integer(side, 1) for side in sides):
        raise UserError(f'export: input_size must be (C, H, W), three positive integers, got {input_size=}')
    if has_windows(model):
        raise UserError(
            'export: the model learns a truncation; make it hard first, by vit_efficient.freeze_truncation, or export '
            "the folder 'model' that `vit-efficient train` writes at the end of a run, which has it hard"
        )
    for module in model.modules():
        if isinstance(module, GridAttention) and (reason := module.export_error(path.suffix)):
            raise UserError(f'export: {reason}')
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise UserError("export: the device 'meta' holds no weights; create the model on another one, and load them")
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0, dtype=torch.float32))
    if path.suffix == '.onnx' and like.dtype != torch.float32:
        raise UserError(f'export: ONNX takes a model of float32, got {like.dtype}; export model.float(), or to .pt2')
    examples = []
    for batch in (fixed_batch,) if fixed_batch else (2, 3):  # exported with the first, compared with all
        x = torch.randn(batch, *input_size, generator=torch.Generator().manual_seed(batch))
        examples.append(x.to(like.device, like.dtype))
    with evaluating(model):
        expected = [_output(model, x) for x in examples]
        shapes = None if fixed_batch else ({0: torch.export.Dim(BATCH)},)
        try:
            with _quiet():
                program = torch.export.export(model, (examples[0],), dynamic_shapes=shapes)
        # What cannot be traced fails in many ways, each with a page of text.
        except Exception as error:
            raise UserError(f'export: {type(model).__name__} cannot be exported: {_reason(error)}') from error
        with replacing(path) as temporary:
            write = _write_onnx if path.suffix == '.onnx' else _write_program
            run = write(program, temporary, _metadata(model, input_size, preprocessing or {}))
            found = [run(x) for x in examples]
            scale = max(y.abs().max().item() for y in expected)
            differences = [(a - b).abs().max().item() for a, b in zip(found, expected, strict=True)]
            difference = max(differences) / max(scale, 1e-12)
            if not difference <= TOLERANCE:  # NaN too
                raise UserError(
                    f'export: the graph computes something else than the model, by {difference:.2g} of its largest '
                    f'output (allowed: {TOLERANCE:g}); nothing was written'
                )
    return difference


def _output(model: nn.Module, x: Tensor) -> Tensor:
    name, input_size = type(model).__name__, tuple(x.shape[1:])
    try:
        with torch.no_grad():
            y = model(x)
    # What does not fit fails in many ways, from an AssertionError of timm to a RuntimeError of PyTorch.
    except Exception as error:
        raise UserError(
            f'export: {name} does not run on {x.dtype} images of {input_size=}: {_reason(error)}; give the size that '
            'the model was built for, or build it for that one'
        ) from error
    if not isinstance(y, Tensor):
        raise UserError(
            f'export: the model must return one tensor, {name} returns a {type(y).__name__}; build it without '
            'features_only, or wrap it in a module that returns one'
        )
    return y


def _metadata(model: nn.Module, input_size: tuple[int, int, int], preprocessing: Mapping[str, Any]) -> dict[str, str]:
    """What goes with the graph, each value as JSON."""
    config = {**(getattr(model, 'pretrained_cfg', None) or {}), **preprocessing}
    known = {'input_size': [int(side) for side in input_size], **{name: config.get(name) for name in _PREPROCESSING}}
    known['labels'] = config.get('label_names')
    return {name: json.dumps(value, ensure_ascii=False) for name, value in known.items() if value is not None}


def _write_program(program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str]):
    program.example_inputs = None  # they would be in the file
    stream = io.BytesIO()
    values = {name: json.loads(value) for name, value in metadata.items()}
    torch.export.save(program, stream, extra_files={METADATA: json.dumps(values, ensure_ascii=False)})
    path.write_bytes(stream.getvalue())
    stream.seek(0)
    return torch.export.load(stream).module()


def _write_onnx(program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str]):
    import onnxruntime

    gib = sum(tensor.nbytes for tensor in program.state_dict.values()) / 2**30
    if gib >= 2:
        raise UserError(f'export: the weights are {gib:.1f} GiB, one ONNX file holds less than 2; export to .pt2')
    try:
        # With gradients, attention with a learned mask would be taken apart into other layouts than were traced.
        with _quiet(), torch.no_grad():
            names = dict(input_names=[INPUT], output_names=[OUTPUT])
            graph = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)
            _name_batch(graph.model.graph)
            graph.model.metadata_props.update(metadata)
            graph.save(path, external_data=False)
    except Exception as error:  # of the exporter, with a page of text
        raise UserError(f'export: ONNX cannot have this model: {_reason(error)}') from error
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {INPUT: x.cpu().numpy()})[0]).to(x.device)


def _name_batch(graph: Any) -> None:
    """Gives the open axis of images, which the exporter calls by PyTorch's symbol, its name wherever it stands."""
    (images,) = graph.inputs
    symbol = images.shape[0]
    if isinstance(symbol, int):
        return
    values = [images, *(value for node in graph.all_nodes() for value in node.outputs)]
    for shape in (value.shape for value in values if value.shape is not None):
        for axis, side in enumerate(shape):
            if side == symbol:
                shape[axis] = BATCH


def _reason(error: BaseException) -> str:
    """What the innermost cause says, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither the exporters' warnings nor their progress, which are for those who write exporters."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
