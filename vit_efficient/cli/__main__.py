"""`python -m vit_efficient.cli COMMAND …`, for torchrun."""

import sys

from vit_efficient.cli import main

sys.exit(main())
