"""The table of what attentions make of the features of a pretrained model, without any training.

A photograph goes through the model as it is, and then through a copy with each attention, before the next one does.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from vit_efficient.attention import list_attentions
from vit_efficient.conversion import convert, sharing_weights
from vit_efficient.data.squares import Photograph, find_photographs, large_enough
from vit_efficient.fidelity import Fidelity, fidelity, final_tokens, given_back, same_neighbours
from vit_efficient.flops import count_flops
from vit_efficient.models.create import parse_layers
from vit_efficient.models.forward import kept_tokens
from vit_efficient.models.inputs import input_size
from vit_efficient.models.plans import is_plan
from vit_efficient.report.evaluation import open_model
from vit_efficient.report.plot import BUDGETS, Panel, Point, plot_accuracy
from vit_efficient.report.table import Column, Table
from vit_efficient.utils.checks import as_integer, is_real
from vit_efficient.utils.device import choose_device
from vit_efficient.utils.environment import describe_environment, one_line
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import check_can_write, read_text, write_text
from vit_efficient.utils.measurements import Measurements, digest
from vit_efficient.utils.options import parse_spec, write_options
from vit_efficient.utils.packages import import_optional, needing

logger = logging.getLogger(__name__)

AS_IT_IS = 'as it is'
_NEW = 'neighbours'
_KEPT = (*Fidelity._fields, _NEW)
COLUMNS = [Column('img_size', 'px'), Column('attention'), Column('keys', digits=0)]
COLUMNS += [Column('keys_percent', 'of patches (%)', 1), Column('patch', 'patch cosine', 3)]
_CENTRED = Column('centred', 'centred', 3)
COLUMNS += [_CENTRED, Column('prefix', 'class', 3)]
COLUMNS += [Column('neighbours', 'same neighbours', 3)]
COLUMNS += [Column('gmacs', 'GMACs', 1), Column('gmacs_ratio', 'of the model', 3)]
GIVEN_BACK = Column('given_back', 'given back (%)', 1)
TIMES = [Column('milliseconds', 'ms', 0), Column('speed_ratio', 'times as fast', 2)]


@dataclass(frozen=True)
class Wanted:
    """An attention of the table.

    Attributes:
        title: What the table calls it.
        curve: What the plot calls it: a line joins those that differ in a budget alone.
        attention, options: As `convert` takes them.
        folder: Of a model that has learned, in the place of an attention.
    """

    title: str
    curve: str
    attention: str
    options: dict[str, Any]
    folder: str = ''


def read_attentions(texts: Sequence[str]) -> list[Wanted]:
    """Attentions as they are written: `NAME[:KEY=VALUE,…]`, or `@FILE` for the lines of a file, without those of #; or
    run and model folders.

    Raises:
        UserError: If one is given twice, or there is none.
    """
    lines = []
    for text in texts:
        of_file = read_text(text[1:]).splitlines() if text.startswith('@') else [text]
        lines += [line.strip() for line in of_file if line.strip() and not line.lstrip().startswith('#')]
    if not lines:
        raise UserError(f'no attention in {" ".join(texts)}')
    for line in lines:
        if lines.count(line) > 1:
            raise UserError(f'{line} is given twice')
    return [_wanted(line) for line in lines]


def _wanted(text: str) -> Wanted:
    if Path(text).is_dir() and text not in list_attentions():  # ./NAME is a folder of such a name
        return Wanted(text, text, '', {}, text)
    name, options = parse_spec(text)
    if 'layers' in options:
        options['layers'] = parse_layers(options['layers'])
    others = write_options({key: value for key, value in options.items() if key not in BUDGETS})
    kind = 'plan' if is_plan(name) else name
    return Wanted(text, f'{kind} ({others})' if others else kind, name, options)


def fidelity_table(
    model: str,
    folders: Sequence[str | Path],
    img_sizes: Sequence[int],
    attentions: Sequence[str],
    format: str = 'markdown',
    out: Path | None = None,
    measured: Path | None = None,
    times: bool = True,
    enlarge: bool = False,
    device: str = 'auto',
) -> str:
    """The table as text: at each size the model as it is, and what each attention keeps of its features and costs.

    What is measured of a photograph is written to a file before the next one is begun: stopped, the same call goes on,
    and another one measures only what is new. That file knows models, photographs and attentions by what they are, and
    not the code of an attention: remove it when that has changed.

    Args:
        model: A run or model folder, or `NAME[:KEY=VALUE,…]` of timm, whose pretrained weights are taken.
        folders: Of photographs. Those whose shorter side is less than a size are left out of it.
        img_sizes: Sides of square images, in pixels, to which the shorter sides of photographs are resized.
        attentions: As `read_attentions` takes them. Random features are drawn from one seed.
        format: One of `report.table.FORMATS`, of the text that is returned.
        out: A folder for fidelity.md, fidelity.csv and fidelity.png (centred cosine against keys and GMACs).
        measured: The JSON file of what was measured; by default measured.json in `out`, else nothing is kept.
        times: Whether there are columns of the time of a forward pass: its median over photographs, and the median of
            the ratio of the model's own time to it, both of the same photograph in the same run.
        enlarge: Take photographs that are too small, enlarged.
        device: As of a recipe.

    Raises:
        UserError: If an argument is wrong, an attention cannot be had at a size, or no photograph is large enough.
    """
    device = choose_device(device, '--device')
    sizes = [as_integer('--img-size', size) for size in img_sizes]
    if len(set(sizes)) < len(sizes):
        raise UserError(f'--img-size: {" ".join(map(str, sizes))} has one twice')
    wanted = read_attentions(attentions)
    photographs = find_photographs(folders)
    chosen = {size: large_enough(photographs, size, enlarge) for size in sizes}
    if out:  # rather than when all is measured
        import_optional('matplotlib', 'the plot beside the table is drawn with', 'train')
        check_can_write(out / 'fidelity.md')
    known = Measurements(measured or (out / 'measured.json' if out else None), 'fidelity')
    at_sizes = [_AtSize(model, size, wanted, device) for size in sizes]
    rows = []
    for at_size in at_sizes:
        at_size.measure(chosen[at_size.size], known)
        rows += at_size.rows(chosen[at_size.size], known)

    columns = [*COLUMNS, *(TIMES if times else [])]
    if any(each.folder for each in wanted):
        columns.insert(columns.index(_CENTRED) + 1, GIVEN_BACK)
    keys = [column.key for column in columns]
    table = Table(columns, [{key: row.get(key) for key in keys} for row in rows])
    machines = dict.fromkeys(machine for at_size in at_sizes for machine in at_size.machines)
    text = f'{table.render()}\n{_notes(chosen, photographs, enlarge)}'
    text += ' '.join(f'Measured on {machine}.' for machine in machines) + '\n'
    if out:
        write_text(out / 'fidelity.md', text)
        write_text(out / 'fidelity.csv', table.render('csv'))
        plot_accuracy(_panels(rows, sizes), out / 'fidelity.png')
        logger.info('saved %s, fidelity.csv, fidelity.png', out / 'fidelity.md')
    return text if format == 'markdown' else table.render(format)


class _AtSize:
    """A model for images of a size, as it is and with each attention, all with the same weights."""

    def __init__(self, name: str, size: int, wanted: Sequence[Wanted], device: torch.device):
        self.size, self.wanted = size, wanted
        self.machine = one_line(describe_environment(device))
        self.machines: dict[str, None] = {}  # that have measured what is in the rows
        exact, self.preprocessing = open_model(name, size)
        exact.to(device)
        self.prefix = getattr(exact, 'num_prefix_tokens', 0)
        self.models = {AS_IT_IS: exact}
        for each in wanted:
            # What an attention draws is the same in every run.
            with torch.random.fork_rng([device] if device.type == 'cuda' else []):
                torch.manual_seed(0)
                try:
                    if each.folder:
                        converted = _same_tokens(open_model(each.folder, size)[0], exact)
                    else:
                        converted = convert(sharing_weights(exact), each.attention, **each.options)
                    kept_tokens(converted, size)
                except UserError as error:
                    raise UserError(f'{each.title} at {size} px: {error}') from error
            self.models[each.title] = converted.to(device).eval()
        full = convert(sharing_weights(exact), 'full')
        self.patches = kept_tokens(full, size)[0] - self.prefix
        self.own = {each.title: self._digest(self.models[each.title]) for each in wanted if each.folder}
        self.digest = self._digest(exact)

    def _digest(self, model: torch.nn.Module) -> str:
        return digest([(f'{model}{self.preprocessing}', torch.empty(0)), *model.state_dict().items()])

    def _spec(self, title: str) -> str:
        """The attention of each of its layers."""
        layers = [AS_IT_IS] if title == AS_IT_IS else self.models[title].attention_spec()
        return json.dumps(layers[0] if all(layer == layers[0] for layer in layers) else layers, default=str)

    def keys(self, title: str) -> tuple[str, str, str]:
        """Where what is measured of one of the models is kept, by photograph."""
        return self.digest, str(self.size), self.own.get(title, self._spec(title))

    def measure(self, photographs: Sequence[Photograph], known: Measurements) -> None:
        """Measures what was not yet."""
        with needing('train', 'progress is shown with'):
            from tqdm import tqdm

        of_models = {title: self.keys(title) for title in self.models}
        for photograph in tqdm(photographs, f'{self.size:,} px', disable=None):
            # What an older version has measured lacks the neighbours.
            cells = {title: known.get(*keys, photograph.digest) for title, keys in of_models.items()}
            left = [title for title, cell in cells.items() if not cell or _is_older(cell)]
            if not left:
                continue
            image = photograph.square(self.preprocessing)
            reference, own_seconds = self._run(AS_IT_IS, image)
            found = {}
            for title in left:
                tokens, seconds = (reference, own_seconds) if title == AS_IT_IS else self._run(title, image)
                kept = fidelity(reference, tokens, self.prefix)._asdict()
                kept[_NEW] = same_neighbours(reference, tokens, self.prefix)
                kept['prefix'] = kept['prefix'] if self.prefix else None  # JSON has no NaN
                times = {'seconds': seconds, 'own_seconds': own_seconds, 'machine': self.machine}
                found[(*of_models[title], photograph.digest)] = kept | times
            known.add(found)

    def _run(self, title: str, image: Tensor) -> tuple[Tensor, float]:
        start = time.perf_counter()
        (tokens,) = final_tokens(self.models[title], [image])  # on the CPU: a GPU is waited for
        return tokens, time.perf_counter() - start

    @staticmethod
    def _cell(known: Measurements, *keys: str) -> dict[str, Any]:
        cell, times = known.get(*keys), ('seconds', 'own_seconds')
        if not isinstance(cell, dict) or not {*_KEPT, *times, 'machine'} <= cell.keys():
            raise known.damaged(*keys)
        numbers = all(cell[name] is None or is_real(cell[name]) for name in _KEPT)
        if not numbers or not all(is_real(cell[name]) and cell[name] > 0 for name in times):
            raise known.damaged(*keys)
        return cell

    def rows(self, photographs: Sequence[Photograph], known: Measurements) -> list[dict[str, Any]]:
        """Those of the table, in which a mean is over photographs."""
        rows = []
        for title, curve in zip(self.models, [AS_IT_IS, *(each.curve for each in self.wanted)], strict=True):
            model = self.models[title]
            cells = [self._cell(known, *self.keys(title), photograph.digest) for photograph in photographs]
            self.machines |= dict.fromkeys(cell['machine'] for cell in cells)
            kept = [name for name in _KEPT if cells[0][name] is not None]
            on_grid = convert(sharing_weights(model), 'full', layers=[])  # timm's own models do not say their keys
            keys = fmean(kept_tokens(on_grid, self.size)) - self.prefix
            gmacs = count_flops(model, input_size(model, self.size)).total / 1e9
            row = dict(img_size=self.size, attention=title, curve=curve, gmacs=gmacs)
            row |= dict(keys=keys, keys_percent=100 * keys / self.patches)
            row |= {name: fmean(cell[name] for cell in cells) for name in kept}
            row['gmacs_ratio'] = gmacs / (rows[0]['gmacs'] if rows else gmacs)
            row['milliseconds'] = 1e3 * median(cell['seconds'] for cell in cells)
            row['speed_ratio'] = median(cell['own_seconds'] / cell['seconds'] for cell in cells)
            rows.append(row)
        self._say_given_back(rows)
        return rows

    def _say_given_back(self, rows: Sequence[dict[str, Any]]) -> None:
        """Of what has learned, the share that is given back of what the same attentions have lost without."""
        swapped = {self._spec(row['attention']): row['centred'] for row in rows if row['attention'] not in self.own}
        for row in rows:
            before = swapped.get(self._spec(row['attention']))
            if row['attention'] in self.own and before is not None:
                row['given_back'] = given_back(before, row['centred'])


def _is_older(cell: Any) -> bool:
    return isinstance(cell, dict) and cell.keys() >= {*Fidelity._fields} and _NEW not in cell


def _same_tokens(model: torch.nn.Module, exact: torch.nn.Module) -> torch.nn.Module:
    width, prefix = ([getattr(each, name, 0) for each in (model, exact)] for name in ('embed_dim', 'num_prefix_tokens'))
    if len({*width}) > 1 or len({*prefix}) > 1:
        raise UserError(
            f'its tokens have {width[0]} channels and {prefix[0]} of them are prefix tokens, those of the model have '
            f'{width[1]} and {prefix[1]}'
        )
    return convert(model, 'full', layers=[])


def _notes(chosen: dict[int, list[Photograph]], photographs: Sequence[Photograph], enlarge: bool) -> str:
    lines = [
        'Mean over photographs of the cosine of tokens, after the last norm, to those of the model as it is. Centred: '
        'its mean patch token is taken from both. Class: of its token, and of registers. Same neighbours: the share of '
        'the ten nearest patches of each patch that are among its ten nearest still. Keys: patches that a query '
        'attends to, mean over the layers.\n'
    ]
    for size, of_size in chosen.items():
        small = [each.path.name for each in photographs if each.shorter_side < size]
        what = 'enlarged' if enlarge else 'left out'
        aside = f'; {len(small)} of a shorter side below that are {what}, the first one {small[0]}' if small else ''
        lines.append(f'{size:,} px: {len(of_size)} photographs{aside}.\n')
    return '\n'.join(lines) + '\n'


def _panels(rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> list[list[Panel]]:
    """Centred cosines against shares of keys and GMACs, a row of panels for each size."""
    costs = {'keys_percent': 'keys (% of patches)', 'gmacs': 'GMACs per image'}
    return [
        [
            Panel(
                [Point(r['curve'], r[cost], r['centred']) for r in rows if r['img_size'] == size],
                x,
                f'centred cosine, {size:,} px',
            )
            for cost, x in costs.items()
        ]
        for size in sizes
    ]
