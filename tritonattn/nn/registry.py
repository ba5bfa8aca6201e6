"""The learned scalings by name."""

from .learned import Cosine, PerHead, SSMax
from .power_law import PowerLaw

# Each is made with heads=Hq, and otherwise its defaults.
LEARNED: dict[str, type[PerHead | SSMax | PowerLaw]] = {
    "per_head": PerHead,
    "ssmax": SSMax,
    "learned_cosine": Cosine,
    "power_law": PowerLaw,
}
