"""Trains what brings features of half the resolution back to the whole image, from images without masks.

    python recipes/cutouts/train_upsampler.py [--out data/cutouts/upsampler]

The model sees each training image whole and reduced; the upsampler learns to make the latter's features those of the
former: their squared error, after each is normalised as the head does it. The folder is what
`model.init_from` of half-upsampled.yaml names. Whoever stops it begins again: it takes 12 minutes on one core.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from vit_efficient import DenseModel, save_model
from vit_efficient.data import MaskedImages, Preprocessing, Samples
from vit_efficient.data.preprocessing import WholeTransform
from vit_efficient.models import load_model
from vit_efficient.utils.checks import as_integer
from vit_efficient.utils.errors import UserError


def features_of(images: torch.Tensor, model: DenseModel) -> torch.Tensor:
    """(B, L, C, h, w), normalised over the channels."""
    features = model.features(images).movedim(2, -1)
    return F.layer_norm(features, features.shape[-1:])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', type=Path, default=Path('data/conversion/dinov2_small'), metavar='FOLDER')
    parser.add_argument('--images', type=Path, default=Path('data/cutouts/504/train'), metavar='FOLDER')
    parser.add_argument('--out', type=Path, default=Path('data/cutouts/upsampler'), metavar='FOLDER')
    parser.add_argument('--epochs', type=int, default=1)
    parser.add_argument('--lr', type=float, default=2e-3)
    args = parser.parse_args(argv)
    if (args.out / 'config.json').exists():
        print(f'{args.out}: there')
        return 0
    try:
        as_integer('--epochs', args.epochs)
        fit(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f'{args.out}: written')
    return 0


def fit(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    dataset = MaskedImages(args.images, classes=7)
    width, height = dataset[0][0].size
    whole, student = (
        DenseModel(
            load_model(args.model, img_size=(height // reduce, width // reduce), dynamic_img_size=True),
            *('multilayer', 7, reduce, reduce > 1),
        )
        for reduce in (1, 2)
    )
    student.freeze_backbone()
    student.upsampler.requires_grad_(True)
    samples = Samples(dataset, WholeTransform(Preprocessing.of(whole)), 3, 7, check_target=lambda *sizes: None)
    optimizer = torch.optim.AdamW(student.upsampler.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * len(samples))
    errors = []
    for epoch in range(args.epochs):
        bar = tqdm(torch.randperm(len(samples)).tolist(), f'epoch {epoch + 1}', disable=None)
        for index in bar:
            image = samples.normalize(samples[epoch, index][0])[None]
            with torch.no_grad():
                wanted = features_of(image, whole.eval())
            error = F.mse_loss(features_of(image, student), wanted)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
            errors.append(error.item())
        print(
            f'epoch {epoch + 1}: squared error {sum(errors[-len(samples) :]) / len(samples):.4f}, the last 100 images '
            f'{sum(errors[-100:]) / len(errors[-100:]):.4f}, the first {sum(errors[:100]) / len(errors[:100]):.4f}'
        )
    save_model(student, args.out)


if __name__ == '__main__':
    sys.exit(main())
