"""`python -m flash_entmax` is the command `flash-entmax`."""

import sys

from .programs.cli import main

sys.exit(main())
