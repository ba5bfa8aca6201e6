"""The tests. `ptx_emulator`, a package of its own in tests/emulator, is found by every one of them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("emulator")))
