"""The same as `vit-efficient table`, for use without installing the package's commands."""

import sys

from vit_efficient_cli import main

if __name__ == '__main__':
    sys.exit(main(['table', *sys.argv[1:]]))
