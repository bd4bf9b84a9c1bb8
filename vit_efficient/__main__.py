"""`python -m vit_efficient COMMAND …`: the command line, for torchrun."""

import sys

from vit_efficient_cli import main

if __name__ == '__main__':
    sys.exit(main())
