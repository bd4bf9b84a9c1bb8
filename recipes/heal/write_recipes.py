"""Writes the recipes of families/: pretrained ViTs of timm, healed at three sizes; and hours.md, what they would take.

    python recipes/heal/write_recipes.py

Hours are a projection: the multiply-accumulates of the teacher once and of the student three times (a training step),
over the rate of a training step of ViT-B at 1,024 px that was measured on an H200 (recipes/benchmarks/h200.md). None of
these recipes has been run.
"""

from pathlib import Path

import timm
import torch

from vit_efficient import convert
from vit_efficient.flops import count_flops
from vit_efficient.report.table import Column, Table
from vit_efficient.utils.files import write_text

FOLDER = Path(__file__).parent
IMAGES, EPOCHS = 100_000, (4, 1)  # of recover, and of refine
SMALL = 560  # px, at most, of the images of recover
FAMILIES = {
    'dinov2': ('vit_base_patch14_dinov2.lvd142m', 14, (518, 1022, 2044)),
    'dinov3': ('vit_base_patch16_dinov3.lvd1689m', 16, (512, 1024, 2048)),
    'siglip': ('vit_base_patch16_siglip_512.v2_webli', 16, (512, 1024, 2048)),
    'deit': ('deit3_base_patch16_384.fb_in22k_ft_in1k', 16, (512, 1024, 2048)),
}
ATTENTIONS = {
    'dct-x': ('dct', {'keep_ratio': '1/4'}),
    'dct-block': ('dct', {'keep_ratio': '1/4', 'place': 'block'}),
    'pool': ('pool', {'keep_ratio': '1/4'}),
    'combiner': ('combiner', {'window_size': 12, 'cell_size': 4}),
}
RATE = 32.6 * 3 * 657.0  # GMACs a second: images a second, of a step of three forward passes of so many GMACs


def gmacs(name: str, size: int, attention: str | None, options: dict) -> float:
    with torch.device('meta'):
        model = timm.create_model(name, img_size=size)
        if attention:
            given = {key: 0.25 if value == '1/4' else value for key, value in options.items()}
            convert(model, attention, **given)
    return count_flops(model, (3, size, size)).total / 1e9


def smaller(size: int, patch: int) -> int:
    """The side of most images that a model for `size` learns from."""
    return min(round(0.55 * size / patch), SMALL // patch) * patch


def main() -> None:
    rows = []
    for family, (name, patch, sizes) in FAMILIES.items():
        for size in sizes:
            small = smaller(size, patch)
            folder = FOLDER / 'families' / family
            folder.mkdir(parents=True, exist_ok=True)
            for title, (attention, options) in ATTENTIONS.items():
                hours = 0.0
                for side, epochs in zip((small, size), EPOCHS, strict=True):
                    cost = gmacs(name, side, None, {}) + 3 * gmacs(name, side, attention, options)
                    hours += epochs * IMAGES * cost / RATE / 3600
                rows.append({'model': name, 'px': size, 'attention': title, 'hours': hours})
            write_text(folder / f'{size}.yaml', recipe(family, name, size, small))
    hours = Column('hours', 'GPU hours (projection)', 1)
    text = Table([Column('model'), Column('px', digits=0), Column('attention'), hours], rows).render()
    print(text, end='')
    write_text(FOLDER / 'hours.md', f'# What healing at scale would take\n\n{ABOUT}\n\n{text}')


ABOUT = (
    f'Of {IMAGES:,} images: {EPOCHS[0]} epochs of recover, at {SMALL} px at most, and {EPOCHS[1]} of refine at the '
    'size of use, on one H200. A projection from multiply-accumulates and one measured rate, by write_recipes.py; '
    'none was run. A plan of half of the multiply-accumulates takes about as much as `pool`.'
)


def recipe(family: str, name: str, size: int, small: int) -> str:
    """The text of a recipe."""
    return f"""# {name} at {size} px, healed from images without labels. Not run: hours.md has what it would take.
#     vit-efficient heal recipes/heal/families/{family}/{size}.yaml data.train=IMAGES data.val=OTHERS
# or with model.attention=combiner 'model.attention_kwargs={{window_size: 12, cell_size: 4}}', or =plan.yaml:
#     vit-efficient plan {name} --images OTHERS --img-size {size} --budget 0.5 --out plan.yaml

extends: ../base.yaml

model:
  name: {name}
  args:
    img_size: {size}
    dynamic_img_size: true

data:
  img_size: [{size}, {size}]
  schedule:
  - {{epoch: 0, img_size: [{small}, {small}]}}
  - {{epoch: {EPOCHS[0]}, img_size: [{size}, {size}]}}
"""


if __name__ == '__main__':
    main()
