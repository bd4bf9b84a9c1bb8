"""Photographs as JPEG files, and a decoder that is plain to see: the coefficients' blocks, one by one, in float64."""

import io

import numpy as np
from PIL import Image
from scipy.fft import dctn, idctn
from skimage import data

MODES = {'4:4:4': '444', '4:2:2': '422', '4:2:0': '420', '4:4:0': '440', 'grey': 'Gray'}


def photograph(name='astronaut', height=None, width=None):
    return np.ascontiguousarray(getattr(data, name)()[:height, :width])


def jpeg(image, quality=90, mode='4:2:0'):
    """The bytes of a file of (H, W, 3) pixels."""
    import simplejpeg

    if mode == 'grey':
        image = np.asarray(Image.fromarray(image).convert('L'))[..., None].copy()
    colours = 'GRAY' if mode == 'grey' else 'RGB'
    return simplejpeg.encode_jpeg(image, quality, colours, MODES[mode])


def pil_jpeg(image, **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, 'JPEG', **options)
    return stream.getvalue()


def decode(quantized, rounded=False):
    """What a decoder computes with plain upsampling of chroma: (H, W, 1 or 3), float64.

    With `rounded`, samples and then colours are brought to integers in 0…255, as libjpeg does.
    """

    def finish(values):
        return values.round().clip(0, 255) if rounded else values

    samples = []
    for plane, table, (sy, sx) in zip(quantized.planes, quantized.tables, quantized.subsampling, strict=True):
        out = np.zeros(plane.shape)
        for y in range(0, plane.shape[0], 8):
            for x in range(0, plane.shape[1], 8):
                block = plane[y : y + 8, x : x + 8].astype(float) * table
                out[y : y + 8, x : x + 8] = idctn(block, norm='ortho') + 128
        samples.append(finish(out).repeat(sy, 0).repeat(sx, 1)[: quantized.height, : quantized.width])
    if quantized.space != 'YCbCr':
        return np.stack(samples, -1)
    y, cb, cr = samples[0], samples[1] - 128, samples[2] - 128
    # The rounded constants of the JFIF standard.
    return finish(np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1))


def patch_dct(pixels, patch, keep, mean, std):
    """The coefficient image of (H, W, C) pixels in 0…255: (C, R · f, S · f), float64."""
    image = ((pixels / 255 - mean) / std).transpose(2, 0, 1)
    channels, rows, columns = len(image), image.shape[1] // patch, image.shape[2] // patch
    image = image[:, : rows * patch, : columns * patch].reshape(channels, rows, patch, columns, patch)
    found = dctn(image, axes=(2, 4), norm='ortho')[:, :, :keep, :, :keep]
    return found.reshape(channels, rows * keep, columns * keep)
