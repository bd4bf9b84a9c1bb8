"""The documentation as HTML: `make docs`. Pages are Markdown; those of the API are made from docstrings."""

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from vit_efficient.train.config import describe_keys  # noqa: E402
from vit_efficient.version import __version__  # noqa: E402

# What was measured stands beside its recipes; the pages link to it, so it is built with them.
RECIPES = Path(__file__).parent / 'recipes'
shutil.rmtree(RECIPES, ignore_errors=True)
shutil.copytree(ROOT / 'recipes', RECIPES, ignore=shutil.ignore_patterns('__pycache__'))

project = 'vit_efficient'
release = __version__
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
exclude_patterns = ['_build']
suppress_warnings = ['toc.not_included']  # tables in full, which pages link to
html_theme = 'furo'
html_title = f'{project} {release}'
html_copy_source = False
myst_heading_anchors = 3
# Docstrings are read as text first: `name` is code there, and an indented part is an example.
default_role = 'code'
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # they stand in the signature
autodoc_preserve_defaults = True
autodoc_default_options = {'exclude-members': 'extra_repr'}

SECTIONS = ('Args:', 'Returns:', 'Raises:', 'Yields:', 'Attributes:')


def mark_examples(app, what, name, obj, options, lines: list[str]) -> None:
    """Makes literal blocks of what is indented after an empty line, which to reStructuredText is a quotation."""
    marked, in_section, in_example = [], False, False
    for line in lines:
        if line and not line[0].isspace():
            in_section, in_example = line in SECTIONS, False
        elif line.strip() and not in_section and not in_example and marked and not marked[-1].strip():
            in_example = True
            marked += ['::', '']
        # Arguments that share a description, such as "keep, **options:", are emphasis without an end to it.
        marked.append(line if in_example else re.sub(r'(?<![\w*`])(\*{1,2})(?=\w)', lambda m: '\\*' * len(m[1]), line))
    if what in ('attribute', 'property'):  # or napoleon takes what stands before a colon for a type
        marked = ['..', '', *marked]
    lines[:] = marked


def write_keys(app, docname: str, source: list[str]) -> None:
    """Puts a section for each group of keys, and a table of them, into the page of recipe keys."""
    if docname != 'keys':
        return
    groups: dict[str, list[dict]] = {}
    for row in describe_keys():
        groups.setdefault(row['key'].partition('.')[0] if '.' in row['key'] else 'The run', []).append(row)
    text = []
    for group, rows in groups.items():
        text += [f'\n## {group}\n', '| key | type | default | range | resumes | meaning |', '| --- ' * 6 + '|']
        for row in rows:
            default = json.dumps(row['default'], ensure_ascii=False)
            cells = [
                f'`{row["key"]}`',
                row['type'],
                f'`{default}`',
                row['range'],
                {True: 'yes', False: 'no'}.get(row['resume'], row['resume']),
                row['help'],
            ]
            text.append('| ' + ' | '.join(str(cell).replace('|', '\\|').replace('*', '\\*') for cell in cells) + ' |')
    source[0] = source[0].replace('<!-- the keys -->', '\n'.join(text))


def mend_links(app, docname: str, source: list[str]) -> None:
    """Points links to the copy of the recipes, and those to a folder to its README.md, as hosts of code show them."""

    def mend(link: re.Match) -> str:
        target, hash_, anchor = link[1].partition('#')
        moved = ('docs/', '') if docname.startswith('recipes/') else ('../recipes/', 'recipes/')
        target = target.replace(*moved, 1)
        if target and (Path(__file__).parent / docname).parent.joinpath(target, 'README.md').is_file():
            target = target.rstrip('/') + '/README.md'
        return f']({target}{hash_}{anchor})'

    source[0] = re.sub(r'\]\(([^)\s]+)\)', mend, source[0])


def setup(app) -> None:
    app.connect('autodoc-process-docstring', mark_examples, priority=400)  # before napoleon's
    app.connect('source-read', write_keys)
    app.connect('source-read', mend_links)
