import io
import shutil
import struct
import subprocess
import sys
import types

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.data.trees import pixels
from vit_efficient.data import read_image, to_array
from vit_efficient.data.files import images, tiff
from vit_efficient.data.files.pixels import UnfitImage
from vit_efficient.utils.packages import MissingPackage

pytestmark = pytest.mark.once


def tiff_of(image, **options):
    if image.ndim == 3 and image.shape[2] == 1:
        image, options['planarconfig'] = image[..., 0], None
    stream = io.BytesIO()
    tifffile.imwrite(stream, image, **{'metadata': None, **options})
    return stream.getvalue()


def load(data, in_chans):
    """(H, W, in_chans) in [0, 1]."""
    found = to_array(read_image(io.BytesIO(data)), in_chans)
    return found / (255 if found.dtype == np.uint8 else 1)


def with_tag(data, name, value):
    """The file with the value of a short tag of its first page replaced."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        place = file.pages.first.tags[name].valueoffset
    return data[:place] + struct.pack('<H', value) + data[place + 2 :]


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'float16', 'float64'])
def test_white_may_be_zero_in_samples_and_pages_and_alpha_stays(dtype):
    image = pixels(0, (3, 20, 24), dtype)
    top = 1 if dtype.startswith('float') else np.iinfo(dtype).max
    expected = np.moveaxis(1 - image / top, 0, -1)
    assert np.abs(load(tiff_of(image, photometric='miniswhite'), 3) - expected).max() < 1e-3
    both = np.ascontiguousarray(np.moveaxis(image[:2], 0, -1))
    data = tiff_of(both, photometric='miniswhite', planarconfig='contig', extrasamples=['unassalpha'])
    expected = np.stack([1 - both[..., 0] / top, both[..., 1] / top], -1)
    assert np.abs(load(data, 2) - expected).max() < 1e-3
    assert np.abs(load(data, 1) - expected[..., :1]).max() < 1e-3


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('scale', [1, 257])
def test_palettes_of_bytes_and_of_words(bits, scale):
    """Some writers give bytes where the standard has 16 bits."""
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 255, (3, 2**bits), endpoint=True).astype(np.uint16)
    indices = pixels(1, (20, 24), f'uint{bits}')
    found = load(tiff_of(indices, photometric='palette', colormap=palette * np.uint16(scale)), 3)
    assert np.abs(found - palette.T[indices] / 255).max() < 1e-6


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'float32'])
@pytest.mark.parametrize('colours', [1, 3])
def test_colours_that_alpha_multiplies_are_divided(dtype, colours):
    """Those of 8 bits in RGB by Pillow, which cuts where the others round."""
    top = 1 if dtype == 'float32' else np.iinfo(dtype).max
    image = (pixels(0, (20, 24, colours + 1), 'float32') * 0.5 + 0.5) * top
    image[..., -1][:5] = 0
    stored = image.copy()
    stored[..., :-1] *= image[..., -1:] / top
    stored = stored if dtype == 'float32' else stored.round()
    options = dict(photometric='rgb' if colours == 3 else 'minisblack', planarconfig='contig')
    data = tiff_of(stored.astype(dtype), extrasamples=['assocalpha'], **options)
    found = load(data, 3)
    assert np.abs(found[5:] - image[5:, :, :-1] / top).max() < (0.01 if dtype == 'uint8' else 1e-4)
    assert not found[:5].any()


@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
@pytest.mark.parametrize('told', [True, False])
def test_a_fourth_sample_that_is_no_alpha_is_left_out_with_a_word(dtype, told, caplog):
    image = pixels(0, (20, 24, 4), dtype)
    data = tiff_of(image, photometric='rgb', extrasamples=['unspecified'])
    if not told:  # the tag becomes a private one, of which nobody knows
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            place = file.pages.first.tags['ExtraSamples'].offset
        data = data[:place] + struct.pack('<H', 65000) + data[place + 2 :]
    images._say_left_out.cache_clear()
    top = np.iinfo(dtype).max
    assert np.allclose(load(data, 4), image / top)
    assert not caplog.records
    for _ in range(2):
        assert np.allclose(load(data, 3), image[..., :3] / top)
    [record] = caplog.records
    assert 'model.args.in_chans=4' in record.getMessage()
    with pytest.raises(ValueError, match='it has 4 channels, the model takes 5'):
        load(data, 5)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'float32'])
@pytest.mark.parametrize('channels', [1, 3, 5])
def test_orientation_is_applied_as_by_pillow(orientation, dtype, channels):
    image = pixels(0, (20, 24, channels), dtype)
    top = 1 if dtype == 'float32' else np.iinfo(dtype).max
    photometric = 'rgb' if channels == 3 else 'minisblack'
    tags = [(274, 'H', 1, orientation, True)]
    found = load(tiff_of(image, photometric=photometric, planarconfig='contig', extratags=tags), channels)
    turns = (None, 0, 3, 1, 5, 4, 6, 2)  # of Image.transpose: Image.Transpose.FLIP_LEFT_RIGHT, …
    turn = turns[orientation - 1]
    planes = [Image.fromarray((image[..., channel] / top).astype(np.float32)) for channel in range(channels)]
    expected = [np.asarray(plane if turn is None else plane.transpose(turn)) for plane in planes]
    assert np.allclose(found, np.stack(expected, -1), atol=1e-6)


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'float32'])
@pytest.mark.parametrize('aside', ['thumbnail', 'mask', 'thumbnail of old'])
def test_thumbnails_and_masks_before_the_image_are_passed_over(dtype, aside):
    image = pixels(0, (20, 24, 3), dtype)
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as file:
        how = {'extratags': [(255, 'H', 1, 2, True)]} if aside == 'thumbnail of old' else {'subfiletype': 1}
        file.write(np.ascontiguousarray(image[::4, ::4]), photometric='rgb', metadata=None, **how)
        file.write(image, photometric='rgb', metadata=None)
    data = stream.getvalue() if aside != 'mask' else with_tag(stream.getvalue(), 'NewSubfileType', 4)
    top = 1 if dtype == 'float32' else np.iinfo(dtype).max
    assert np.allclose(load(data, 3), image / top)


@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
def test_the_image_may_lie_below_its_thumbnail(dtype):
    """In a directory of its own, as cameras have it."""
    image = pixels(0, (20, 24, 3), dtype)
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as file:
        small = np.ascontiguousarray(image[::4, ::4])
        file.write(small, photometric='rgb', metadata=None, subfiletype=1, subifds=1)
        file.write(image, photometric='rgb', metadata=None)
    assert np.allclose(load(stream.getvalue(), 3), image / np.iinfo(dtype).max)


@pytest.mark.parametrize('compression', ['packbits', 'zlib', None])
@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
def test_predictors_are_undone_whatever_the_compression(compression, dtype):
    image = pixels(0, (12, 9, 3), dtype)
    data = tiff_of(image, photometric='rgb', compression=compression, predictor=compression is not None)
    assert abs(load(data, 3) - image / np.iinfo(dtype).max).max() < 1e-6


@pytest.mark.parametrize('photometric', ['separated', 'cielab', 'icclab', 'cfa', 'linear_raw', 'logluv'])
def test_colours_that_are_not_converted_are_refused(photometric):
    image = pixels(0, (20, 24, {'separated': 4, 'cfa': 1}.get(photometric, 3)), 'uint16')
    data = tiff_of(image.squeeze(), photometric='minisblack' if photometric == 'cfa' else 'rgb', planarconfig=None)
    data = with_tag(data, 'PhotometricInterpretation', int(tifffile.PHOTOMETRIC[photometric.upper()]))
    for in_chans in (1, 3, 4):
        with pytest.raises(UnfitImage, match='its colours are .* not converted; store it as grey or RGB'):
            load(data, in_chans)


@pytest.mark.parametrize(('height', 'width', 'channels'), [(200, 210, 1), (200, 210, 3), (100, 110, 30)])
@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
def test_the_limit_of_pixels_holds_for_all(height, width, channels, dtype, monkeypatch):
    image = np.zeros((height, width, channels), dtype)
    photometric = 'rgb' if channels == 3 else 'minisblack'
    data = tiff_of(image, photometric=photometric, planarconfig='contig', compression='zlib')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 20_000)
    monkeypatch.setattr(tiff, '_decode', None)
    with pytest.raises(UnfitImage, match='PIL decodes at most 40,000 pixels'):
        load(data, channels)
    monkeypatch.undo()
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    assert load(data, channels).shape == image.shape


@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
@pytest.mark.parametrize('bigtiff', [False, True])
@pytest.mark.parametrize('byteorder', ['<', '>'])
@pytest.mark.parametrize(('pages', 'back'), [(1, 0), (3, 0), (3, 2), (150, 0)])
def test_pages_that_go_in_a_circle_or_lie_outside(dtype, bigtiff, byteorder, pages, back):
    options = dict(photometric='minisblack', bigtiff=bigtiff, byteorder=byteorder)
    data = bytearray(tiff_of(pixels(0, (pages, 4, 5), dtype), **options))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        offsets, place = [page.offset for page in file.pages], file.pages.next_page_offset
    pack = byteorder + ('Q' if bigtiff else 'I')
    for target, words in ((offsets[back], 'go round in a circle'), (len(data) + 100, f'cut off after {pages} pages')):
        struct.pack_into(pack, data, place, target)
        with pytest.raises(ValueError, match=f'its pages {words}|it is {words}'):
            load(bytes(data), pages)


@pytest.mark.skipif(not shutil.which('tiffcp'), reason='needs tiffcp')
@pytest.mark.parametrize('compression', ['lzw', 'zip', 'packbits', 'zstd', 'lzma'])
@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
@pytest.mark.parametrize('channels', [1, 3])
def test_files_of_libtiff_are_read_or_name_the_package(tmp_path, compression, dtype, channels):
    image = pixels(0, (20, 24, channels), dtype)
    tifffile.imwrite(tmp_path / 'plain.tif', image, photometric='rgb' if channels == 3 else 'minisblack')
    command = ['tiffcp', '-c', compression, tmp_path / 'plain.tif', tmp_path / 'image.tif']
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    try:
        found = load((tmp_path / 'image.tif').read_bytes(), channels)
    except MissingPackage as error:
        assert dtype == 'uint16' and 'imagecodecs' not in sys.modules and 'imagecodecs' in str(error)
    else:
        assert np.allclose(found, image / np.iinfo(dtype).max)


@pytest.mark.skipif(not shutil.which('tiffcp'), reason='needs tiffcp')
@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
@pytest.mark.parametrize('odd', ['turned', 'white', 'infrared', 'planes'])
def test_odd_files_of_lzw_are_read_right_or_name_the_package(tmp_path, dtype, odd):
    image = pixels(0, (20, 24, 4 if odd == 'infrared' else 3), dtype)
    expected = image / np.iinfo(dtype).max
    if odd == 'turned':
        options, expected = {'extratags': [(274, 'H', 1, 6, True)]}, np.rot90(expected, -1)
    elif odd == 'planes':
        image, options = np.ascontiguousarray(np.moveaxis(image, -1, 0)), {'planarconfig': 'separate'}
    elif odd == 'white':
        image, options = image[..., 0], {'photometric': 'miniswhite'}
        expected = 1 - expected[..., :1]
    else:
        options = {'extrasamples': ['unspecified']}
    tifffile.imwrite(tmp_path / 'plain.tif', image, **{'photometric': 'rgb', **options})
    command = ['tiffcp', '-c', 'lzw', tmp_path / 'plain.tif', tmp_path / 'image.tif']
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    try:
        found = load((tmp_path / 'image.tif').read_bytes(), expected.shape[2])
    except MissingPackage as error:
        assert (dtype == 'uint16' or odd == 'infrared') and 'imagecodecs' in str(error)
    else:
        assert found.shape == expected.shape and np.allclose(found, expected)


def test_twelve_bits_are_scaled():
    pytest.importorskip('imagecodecs')
    image = pixels(0, (20, 24), 'uint16') >> 4
    for photometric, expected in (('minisblack', image / 4095), ('miniswhite', 1 - image / 4095)):
        data = tiff_of(image, photometric=photometric, bitspersample=12)
        assert np.abs(load(data, 1)[..., 0] - expected).max() < 1e-4


@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
@pytest.mark.parametrize('kind', ['grey', 'multiplied', 'palette'])
def test_damage_in_directories_is_named(tmp_path, dtype, kind):
    """Whatever is there, it is read or refused, and no error of ours."""
    rng, image = np.random.default_rng(0), pixels(0, (20, 24), dtype)
    palette = pixels(0, (3, np.iinfo(dtype).max + 1), 'uint16')
    data = {
        'grey': lambda: tiff_of(image, photometric='minisblack'),
        'multiplied': lambda: tiff_of(pixels(0, (20, 24, 4), dtype), photometric='rgb', extrasamples=['assocalpha']),
        'palette': lambda: tiff_of(image, photometric='palette', colormap=palette),
    }[kind]()
    for _ in range(100):
        damaged = bytearray(data)
        for place in rng.integers(0, 220, 3):
            damaged[place] = rng.choice([0, 1, 2, 3, 4, 255])
        (tmp_path / 'image.tif').write_bytes(damaged)
        try:
            read_image(tmp_path / 'image.tif')
        except ValueError as error:
            assert 'image.tif: ' in str(error)


def test_slips_of_ours_are_not_damage(monkeypatch):
    def slip(data):
        return ()[0]

    slip = types.FunctionType(slip.__code__, vars(tiff))  # as if it stood in that module
    monkeypatch.setattr(tiff, 'read_tiff', slip)
    with pytest.raises(IndexError):
        read_image(io.BytesIO(tiff_of(pixels(0, (20, 24)))))
