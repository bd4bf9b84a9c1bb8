"""Data sets of Hugging Face's `datasets` library, by index: from the hub, in local files, or saved to disk."""

import hashlib
import io
from pathlib import Path
from typing import Any, BinaryIO

from timm.data.readers.reader import Reader

from vit_efficient.data.sources.folders import is_hidden, natural_order
from vit_efficient.utils.errors import UserError, one_line
from vit_efficient.utils.packages import import_optional


class HuggingFaceReader(Reader):
    """A reader as timm's `hfds/`, of (image as stored, label), which opens data sets that are saved to disk as well.
    With a `target_key` that is a column of images, it is (image as stored, mask as stored).

    Args:
        name: A data set on the hub, or a builder, such as `parquet`; or a folder: of images or Parquet files, as
            `datasets.load_dataset` reads it, or of splits that `save_to_disk` has written.
        split: Such as train; of saved ones, the folder in the folder.
        cache_dir: Where the library keeps what it has downloaded and prepared; by default its own folder.
        input_key: Column of the images: of the type `Image`, or of the bytes of image files.
        target_key: Column of labels: of the type `ClassLabel`, integers, or names, which are numbered in natural order.
            Or of masks, of the type `Image`.
        **options: Further arguments of `datasets.load_dataset`.

    Raises:
        UserError: If the library cannot open it, there are no such columns, they are of other types, or it is a stream.
        MissingPackage: If `datasets` is not installed.
    """

    def __init__(
        self,
        name: str,
        /,
        split: str,
        cache_dir: str | None = None,
        input_key: str = 'image',
        target_key: str = 'label',
        **options: Any,
    ):
        super().__init__()
        datasets = import_optional('datasets', 'hfds/… needs', 'hf')
        saved = Path(name, split)
        if _is_saved(Path(name)) and not _is_saved(saved):
            parent, folder = Path(name).parent, Path(name).name
            raise UserError(f'{name} is a single split, as a saved data set; its name is hfds/{parent}, split {folder}')
        passed_over = next((path for depth in ('__*', '*/__*') for path in _folders(Path(name), depth)), None)
        if passed_over and not _is_saved(saved):
            raise UserError(
                f'{passed_over}: the datasets library passes over folders whose names begin with __; rename it, or '
                'read class folders without it: data.train is their folder, data.dataset is not set'
            )
        try:
            if _is_saved(saved):
                dataset = datasets.load_from_disk(str(saved), **options)
            else:
                dataset = datasets.load_dataset(name, split=split, cache_dir=cache_dir, **options)
        except Exception as error:  # whatever the library, its builders and the network raise
            raise UserError(_reasons(error)) from error
        if not isinstance(dataset, datasets.Dataset):
            raise UserError('it is a stream, its samples have no index; leave streaming out')
        features = dataset.features
        for key in (input_key, target_key):
            if key not in features:
                raise UserError(f'there is no column {key!r} (input_key, target_key), only {", ".join(features)}')
        image, label = features[input_key], features[target_key]
        self.of_masks = isinstance(label, datasets.Image)
        for key in (input_key, target_key):
            if isinstance(features[key], datasets.Image):
                dataset = dataset.cast_column(key, datasets.Image(decode=False))
        if not isinstance(image, datasets.Image) and getattr(image, 'dtype', None) not in ('binary', 'large_binary'):
            raise UserError(f'column {input_key!r} must hold images or the bytes of image files, it holds {image}')
        self.dataset = dataset.select_columns([input_key, target_key])
        self.images = dataset.select_columns([input_key]).with_format('arrow')
        self.split, self.input_key, self.target_key = split, input_key, target_key
        self.numbers: dict[str, int] | None = None  # of labels that are names
        self.classes = getattr(label, 'names', None)
        if getattr(label, 'dtype', None) in ('string', 'large_string'):
            self.classes = natural_order(set(dataset.unique(target_key)) - {None})
            self.numbers = {name: number for number, name in enumerate(self.classes)}
        elif (
            self.classes is None
            and not self.of_masks
            and not str(getattr(label, 'dtype', '')).startswith(('int', 'uint', 'bool'))
        ):
            raise UserError(f'column {target_key!r} must hold labels, integers or names, or images, it holds {label}')

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int | BinaryIO]:
        item = self.dataset[int(index)]
        label = item[self.target_key]
        if label is None:
            raise UserError(f'it has no {"mask" if self.of_masks else "label"} ({self.target_key})')
        if self.of_masks:
            return _file(item, self.input_key), _file(item, self.target_key)
        return _file(item, self.input_key), int(label if self.numbers is None else self.numbers[label])

    def digest(self) -> str:
        """A hash of the names and the sizes of the images, of their labels and of their order."""
        import pyarrow as pa  # which `datasets` needs
        import pyarrow.compute as pc

        def names_and_sizes(images: pa.Array) -> tuple[list[str | None], list[int | None]]:
            has_names = pa.types.is_struct(images.type)
            names = images.field('path').to_pylist() if has_names else []
            sizes = pc.binary_length(images.field('bytes') if has_names else images).to_pylist()
            return [name and Path(name).name for name in names], sizes

        digest = hashlib.sha256(repr(self.classes).encode(errors='surrogateescape'))
        for batch in self.dataset.with_format('arrow').iter(1000):
            images, labels = (batch[key].combine_chunks() for key in (self.input_key, self.target_key))
            told = names_and_sizes(labels) if self.of_masks else labels.to_pylist()
            digest.update(repr((*names_and_sizes(images), told)).encode(errors='surrogateescape'))
        return digest.hexdigest()

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        image = self.images[int(index)][self.input_key].chunk(0)  # not read, for the sake of its name
        path = image.field('path')[0].as_py() if hasattr(image, 'field') else None
        if path and Path(path).is_absolute():
            return path
        return f'{self.split}[{index}] {path}' if path else f'{self.split}[{index}]'


def _file(item: dict[str, Any], key: str) -> BinaryIO:
    """The image in a column, as an open file."""
    image = item[key]
    data, path = (image.get('bytes'), image.get('path')) if isinstance(image, dict) else (image, None)
    if data is None and not path:
        raise UserError(f'it has no image ({key})')
    return open(path, 'rb') if data is None else io.BytesIO(data)


def _reasons(error: BaseException | None) -> str:
    """What an error says, and what its causes say; some say no more than that something has happened."""
    reasons: list[str] = []
    while error:
        reason = one_line(error, 2000)
        if not any(reason in each for each in reasons):
            reasons.append(reason)
        error = error.__cause__
    return ': '.join(reasons)


def _folders(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_dir() and not is_hidden(path.name))


def _is_saved(folder: Path) -> bool:
    return (folder / 'state.json').is_file() and (folder / 'dataset_info.json').is_file()
