"""The recipes that come with the package: in a wheel in this folder, in a checkout beside it."""

import re
from collections.abc import Iterator
from pathlib import Path

from vit_efficient_cli.parsing import nearest

PATTERNS = ('**/*.yaml', '*.sh', '**/prepare.py', 'cutouts/*.py')  # setup.py puts the same into wheels


def shipped_folder() -> Path:
    """The folder of recipes."""
    installed = Path(__file__).parent / 'recipes'
    return (installed if installed.is_dir() else Path(__file__).parents[1] / 'recipes').resolve()


def list_shipped(folder: str = '') -> Iterator[tuple[str, str]]:
    """Name and first sentence of each recipe and script of a folder, then its folders and how many recipes they hold.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    root = shipped_folder()
    within = find_shipped(f'{folder}/') if folder else root
    found = _paths(within)
    for path in found:
        if path.parent == within:
            yield _name(path), _about(path)
    for path in sorted({within / path.relative_to(within).parts[0] for path in found if path.parent != within}):
        held = sum(path in each.parents for each in found)
        yield f'{_name(path)}/', f'{held} files: `vit-efficient recipe list {_name(path)}`'


def find_shipped(name: str) -> Path:
    """The file or folder of a name, which may lack `.yaml`; of one that ends in a slash, the folder.

    Raises:
        FileNotFoundError: If there is none. It names the nearest.
    """
    root = shipped_folder()
    files = _paths(root)
    folders = {f'{_name(parent)}/': parent for path in files for parent in path.parents if root in parent.parents}
    known = folders if name.endswith('/') else {_name(path): path for path in files} | folders
    short = name.removeprefix('recipes/').rstrip('/')
    for each in (short.removesuffix('.yaml'), f'{short}/'):
        if each in known:
            return known[each]
    raise FileNotFoundError(
        f'{name}: no such recipe{nearest(name, list(known))}; `vit-efficient recipe list` shows all'
    )


def needed_by(path: Path) -> list[Path]:
    """A recipe and those that it extends, or the files of a folder and those that they extend."""
    found, left = [], _paths(path) if path.is_dir() else [path]
    while left:
        each = left.pop(0)
        if each not in found:
            found.append(each)
            left += [(each.parent / base).resolve() for base in _extends(each)]
    return found


def _about(path: Path) -> str:
    """The first sentence of the comment, or docstring, that a recipe or script opens with."""
    text = re.sub(r'^#!.*\n', '', path.read_text(encoding='utf-8'))
    text = re.sub(r'^(# ?|""")', '', text, flags=re.MULTILINE)
    return ' '.join(re.match(r'.*?[.;](?=\s|$)', text, re.DOTALL).group().rstrip('.;').split())


def _extends(path: Path) -> list[str]:
    return re.findall(r'^extends: (\S+)', path.read_text(encoding='utf-8'), re.MULTILINE)


def _name(path: Path) -> str:
    name = path.relative_to(shipped_folder()).as_posix()
    return name.removesuffix('.yaml')


def _paths(folder: Path) -> list[Path]:
    return sorted(path for pattern in PATTERNS for path in folder.glob(pattern))
