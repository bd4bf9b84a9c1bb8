import io
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data.jpegs import MODES, jpeg, photograph, pil_jpeg
from vit_efficient.data import ReducedReader, read_image, read_quantized
from vit_efficient.data.files.images import UnfitImage
from vit_efficient.data.files.jpeg import QuantizedReader

pytestmark = pytest.mark.once


def stored(tmp_path, data, name='image.jpg'):
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize('mode', MODES)
def test_at_full_size_pixels_are_those_of_pil(tmp_path, mode):
    path = stored(tmp_path, jpeg(photograph('coffee', 131, 97), 90, mode))
    found = ReducedReader(100, 80)(path)
    theirs = np.asarray(read_image(path))
    assert found.shape == (131, 97, 1 if mode == 'grey' else 3) and found.dtype == np.uint8
    assert np.abs(found.squeeze().astype(int) - theirs).max() <= 1  # two versions of libjpeg-turbo


@pytest.mark.parametrize(
    ('size', 'least', 'reduction'),
    [
        ((400, 600), (224, 224), 1),
        ((448, 600), (224, 224), 2),
        ((447, 600), (224, 224), 2),  # 447 / 2 is rounded up
        ((446, 600), (224, 224), 1),
        ((2048, 1000), (224, 224), 4),
        ((2048, 2048), (224, 224), 8),
        ((100, 2048), (224, 224), 1),
    ],
)
def test_what_is_resized_as_a_whole_stays_above_the_input(tmp_path, size, least, reduction):
    reader = ReducedReader(*least)
    assert reader.reduction(*size) == reduction
    path = stored(tmp_path, jpeg(np.zeros((*size, 3), np.uint8)))
    assert reader(path).shape[:2] == tuple(-(-side // reduction) for side in size)


def test_no_crop_is_enlarged_by_the_reduction():
    """Against the crops that albumentations draws, to the rounding of their sides."""
    import albumentations as A

    rng = np.random.default_rng(0)
    for _ in range(150):
        height, width = rng.integers(100, 3000, 2).tolist()
        scale, ratio = float(rng.uniform(0.05, 1)), sorted(rng.uniform(0.4, 2.5, 2).tolist())
        reader = ReducedReader(96, 64, scale, tuple(ratio))
        reduction = reader.reduction(height, width)
        if reduction == 1:
            continue
        drawn = A.RandomResizedCrop((96, 64), scale=(scale, scale), ratio=tuple(ratio))
        drawn.set_random_seed(int(rng.integers(2**31)))
        shape = -(-height // reduction), -(-width // reduction), 3
        for _ in range(20):
            box = drawn.get_params_dependent_on_data({'shape': shape}, {})['crop_coords']
            assert box[3] - box[1] >= 95 and box[2] - box[0] >= 63
            assert -(-height // reduction) >= 96 and -(-width // reduction) >= 64


def test_the_least_crop_decides():
    assert ReducedReader(224, 224).reduction(2048, 2048) == 8
    assert ReducedReader(224, 224, 0.08).reduction(2048, 2048) == 2  # its least side: 2048 · (0.08 · 3 / 4)^½ = 502
    assert ReducedReader(224, 224, 0.08).reduction(1024, 1024) == 1


def test_a_reduced_image_is_the_image_made_smaller(tmp_path):
    image = photograph('astronaut')
    path = stored(tmp_path, jpeg(image, 95, '4:4:4'))
    for reduction in (2, 4, 8):
        found = ReducedReader(512 // reduction, 512 // reduction)(path)
        mean = np.asarray(Image.fromarray(image).reduce(reduction)).astype(float)
        assert found.shape == mean.shape
        assert np.abs(found - mean).mean() < 2.5


@pytest.mark.parametrize('mode', ['444', '420', '422', '440', '411'])
@pytest.mark.parametrize('size', [(256, 320), (251, 317)])
def test_reduced_chroma_is_that_of_a_full_decode_made_smaller(tmp_path, mode, size):
    import simplejpeg

    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([128 + 80 * np.sin(x / 9), 128 + 80 * np.cos(y / 7), 128 + 60 * np.sin((x + y) / 11)], -1)
    path = stored(tmp_path, simplejpeg.encode_jpeg(image.astype(np.uint8), 95, 'RGB', mode))
    for reduction in (2, 4, 8):
        expected = np.asarray(read_image(path).convert('RGB').reduce(reduction)).astype(float)
        found = ReducedReader(*expected.shape[:2])(path)
        assert found.shape == expected.shape and found.dtype == np.uint8
        assert np.abs(found - expected)[:-1, :-1].mean() < 0.8


def test_the_limit_of_pixels_holds_for_what_is_decoded(tmp_path, monkeypatch):
    path = stored(tmp_path, pil_jpeg(photograph(height=96, width=96)))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 2000)
    assert ReducedReader(24, 24)(path).shape == (24, 24, 3)
    for reader in (ReducedReader(96, 96), read_image, read_quantized):
        with pytest.raises(UnfitImage, match=r'image\.jpg: PIL decodes at most 4,000 pixels'):
            reader(path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    assert read_quantized(path).height == 96


@pytest.mark.parametrize('data', ['png', 'cmyk', 'npy'])
def test_other_files_are_read_as_ever(tmp_path, data):
    image, stream = photograph(height=40, width=50), io.BytesIO()
    if data == 'png':
        Image.fromarray(image).save(stream, 'PNG')
    elif data == 'npy':
        np.save(stream, image)
    content = pil_jpeg(Image.fromarray(image).convert('CMYK')) if data == 'cmyk' else stream.getvalue()
    path = stored(tmp_path, content)
    reader = ReducedReader(8, 8)
    assert np.array_equal(np.asarray(reader(path)), np.asarray(read_image(path)))
    assert np.array_equal(np.asarray(reader(io.BytesIO(content))), np.asarray(read_image(path)))


def test_orientation_is_left_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = stored(tmp_path, pil_jpeg(photograph(height=40, width=64), exif=exif))
    assert ReducedReader(40, 64)(path).shape == (40, 64, 3)
    assert read_quantized(path).height == np.asarray(read_image(path)).shape[0] == 40


@pytest.mark.parametrize('progressive', [False, True])
@pytest.mark.parametrize('share', [0.02, 0.3, 0.6, 0.99])
def test_truncated_files_are_found_out(tmp_path, share, progressive):
    """By both readers: libjpeg would fill in what is missing, in grey."""
    data = pil_jpeg(photograph(height=200), progressive=progressive)
    path = stored(tmp_path, data[: int(share * len(data))])
    for reader in (read_quantized, ReducedReader(8, 8), read_image):
        with pytest.raises(ValueError, match=r'image\.jpg: '):
            reader(path)
    if share >= 0.3:
        with pytest.raises(ValueError, match='the JPEG is truncated: it has no end'):
            read_quantized(path)


def test_what_follows_the_end_does_not_hide_it(tmp_path):
    """A thumbnail ahead of the image has an end of its own; a film may follow the image, and hold any bytes."""
    data = pil_jpeg(photograph(height=64, width=64))
    thumbnail = b'\xff\xe1' + (len(data) + 2).to_bytes(2, 'big') + data
    both = data[:2] + thumbnail + data[2:]
    assert read_quantized(stored(tmp_path, both + b'\xff\xda film')).height == 64
    with pytest.raises(ValueError, match='truncated'):
        read_quantized(stored(tmp_path, both[:-100]))


@pytest.mark.parametrize('reader', [read_quantized, ReducedReader(8, 8)])
def test_files_that_are_none_are_named(tmp_path, reader):
    for content in (b'', b'not an image', b'\xff\xd8', b'\xff\xd8\xff\xd9', b'\xff\xd8\xff\xda\xff\xd9' + bytes(9)):
        with pytest.raises(ValueError, match=r'image\.jpg: '):
            reader(stored(tmp_path, content))
    with pytest.raises(ValueError, match=r'missing\.jpg: not a readable image \(No such file'):
        reader(tmp_path / 'missing.jpg')


def test_images_without_coefficients_to_read_name_the_way_out(tmp_path):
    image = Image.fromarray(photograph(height=32, width=32))
    image.save(tmp_path / 'image.png')
    with pytest.raises(ValueError, match=r'image\.png: not a JPEG.*data\.decode=pixels'):
        read_quantized(tmp_path / 'image.png')
    cmyk = stored(tmp_path, pil_jpeg(image.convert('CMYK')))
    with pytest.raises(ValueError, match=r'image\.jpg: a JPEG of 4 components \(CMYK\?\).*data\.decode=pixels'):
        read_quantized(cmyk)


def test_an_image_below_the_input_is_named_with_both_sizes(tmp_path):
    path = stored(tmp_path, jpeg(photograph(height=60, width=99)))
    assert QuantizedReader(60, 99)(path).width == 99
    for size in ((61, 99), (60, 100)):
        with pytest.raises(
            ValueError, match=rf'image.jpg: its 60×99 pixels are fewer than the {size[0]}×{size[1]}.*img_size'
        ):
            QuantizedReader(*size)(path)


def test_damage_in_the_header_is_an_error_not_a_crash(tmp_path):
    data = pil_jpeg(photograph(height=64, width=64))
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        for place in rng.integers(2, 700, 3):
            damaged[place] = rng.integers(256)
        path = stored(tmp_path, bytes(damaged))
        try:
            read_quantized(path)
        except ValueError as error:
            assert 'image.jpg' in str(error)


@pytest.mark.parametrize(('module', 'package'), [('simplejpeg', 'simplejpeg'), ('jpegio', 'pyjpegio')])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{package}.*pip install.*vit-efficient\[jpeg\]'):
        (ReducedReader if module == 'simplejpeg' else QuantizedReader)(8, 8)


def with_tables(data: bytes, spare: int, renamed: int) -> bytes:
    """The JPEG with its second table under another number, and one more that no component uses."""
    found = bytearray(data)
    at = 2
    while found[at + 1] != 0xDA:
        length = int.from_bytes(found[at + 2 : at + 4], 'big')
        if found[at + 1] == 0xDB:
            for table in range(at + 4, at + 2 + length, 65):
                found[table] = renamed if found[table] == 1 else found[table]
        if found[at + 1] == 0xC0:
            for component in range(found[at + 9]):
                number = at + 12 + 3 * component
                found[number] = renamed if found[number] == 1 else found[number]
        at += 2 + length
    return bytes(found[:2]) + b'\xff\xdb\x00\x43' + bytes([spare]) + bytes([7] * 64) + bytes(found[2:])


@pytest.mark.parametrize(('spare', 'renamed'), [(3, 1), (3, 2), (1, 3), (1, 2)])
def test_tables_that_no_component_uses(tmp_path, spare, renamed):
    data = jpeg(photograph('coffee', 48, 64), 60, '4:2:0')
    expected = read_quantized(stored(tmp_path, data))
    found = read_quantized(stored(tmp_path, with_tables(data, spare, renamed), 'renamed.jpg'))
    for ours, theirs in zip(found.tables, expected.tables, strict=True):
        assert np.array_equal(ours, theirs)
