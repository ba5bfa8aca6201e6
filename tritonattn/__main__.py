"""`python -m tritonattn`."""

import sys

from .cli import main

sys.exit(main())
