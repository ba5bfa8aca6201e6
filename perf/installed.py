"""All that a wheel holds of perf, as perf/__main__.py: the way to a checkout."""

import sys

if __name__ == "__main__":
    sys.exit(
        "python -m perf: expected a checkout of tritonattn, with perf/, tests/ and the commit that figures name, got an"
        " installed package: run it in the folder of the sources that holds perf/"
    )
