"""Modes at thresholds that short sequences reach, and learned ones away from where they start, for 4 heads of dim 8."""

from collections.abc import Callable

import torch

from tritonattn import SCALINGS, nn
from tritonattn.scaling import Scaling

HEADS, HEAD_DIM = 4, 8
SIGNS = (0.9, 0.0, -1.2, 1e-3)  # what a learned factor passes on its way through zero


def _set(module: torch.nn.Module, **values: tuple[float, ...]) -> torch.nn.Module:
    for name, value in values.items():
        parameter = module.get_parameter(name)
        parameter.data.copy_(torch.tensor(value, dtype=torch.float64))
        parameter.requires_grad_(True)
    return module


def _at(step: int, module: nn.Scheduled) -> nn.Scheduled:
    module.advance(step)
    return module


def _per_head(mode) -> torch.nn.Module:
    return _set(nn.PerHead(mode, heads=HEADS), theta=(0.4, -1.0, 0.0, 1.1))


def _ssmax(**bias: tuple[float, ...]) -> torch.nn.Module:
    return _set(nn.SSMax(HEADS, bias=bool(bias)), s=SIGNS, **bias)


def _cosine() -> torch.nn.Module:
    return _set(nn.LearnedCosine(HEADS, tau=5.0), theta=(0.4, -1.0, 0.0, 0.9))


def _power_law() -> torch.nn.Module:
    exponents = {"dim": (-0.5, 0.2, 0.0, -1.0), "count": (0.3, -0.5, 0.0, -1.0), "length": (0.4, 0.0, -1.0, -0.7)}
    named = {f"{name}_exponent": values for name, values in exponents.items()}
    return _set(nn.PowerLaw(HEADS), theta=(0.1, -0.3, 0.0, 0.5), **named)


def _query_adaptive() -> torch.nn.Module:
    module = nn.QueryAdaptiveSSMax(HEADS, HEAD_DIM)
    with torch.no_grad():
        module.w.copy_(torch.linspace(-0.9, 1.1, HEADS * HEAD_DIM).view(HEADS, HEAD_DIM))
    return _set(module, delta=SIGNS, gamma=(0.5, 1.0, 1.7, -0.4))


BIAS = (0.5, 0.0, 1.0, -0.2)
LEARNED: dict[str, Callable[[], torch.nn.Module]] = {
    "per_head of sqrt_dim": lambda: _per_head("sqrt_dim"),
    "per_head of key_norm_mean": lambda: _per_head("key_norm_mean"),
    "per_head of cosine": lambda: _per_head("cosine"),
    "per_head of ssmax": lambda: _per_head(_ssmax()),
    "ssmax": lambda: _ssmax(),
    "ssmax with bias": lambda: _ssmax(b=BIAS),
    "learned_cosine": _cosine,
    "power_law": _power_law,
    "learned_log_power": lambda: _set(nn.LearnedLogPower(HEADS, base=3), p=(0.5, 1.0, -0.3, 2.1)),
    "query_adaptive_ssmax": _query_adaptive,
    "linear": lambda: _at(3, nn.Scheduled("key_count", "key_norm_mean", steps=10)),
    "linear to learned": lambda: _at(4, nn.Scheduled(_power_law(), _ssmax(b=BIAS), steps=10)),
    "linear ended": lambda: _at(12, nn.Scheduled("sqrt_dim", _per_head("key_norm_max"), steps=10)),
    "geometric": lambda: _at(6, nn.Scheduled("key_norm_sum", "dim", steps=10, blend="geometric")),
    "geometric to cosine": lambda: _at(5, nn.Scheduled("log_key_count", _cosine(), steps=10, blend="geometric")),
    "geometric begun": lambda: nn.Scheduled(_per_head("log_key_count"), "cosine", steps=10, blend="geometric"),
}


def learned(name: str) -> torch.nn.Module:
    """A fresh example, its parameters float64 and asking for gradients."""
    return LEARNED[name]().double()


def small(name: str) -> Scaling:
    """The mode of a name, at thresholds that a short test reaches."""
    return SCALINGS[name](**SCALINGS[name].about.example)
