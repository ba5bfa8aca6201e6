"""The tests. They find `ptx_emulator`, a separate package, in tests/emulator."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("emulator")))
