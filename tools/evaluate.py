"""The same as `vit-efficient evaluate`, for use without installing the package's commands."""

import sys

from vit_efficient_cli import main

if __name__ == '__main__':
    sys.exit(main(['evaluate', *sys.argv[1:]]))
