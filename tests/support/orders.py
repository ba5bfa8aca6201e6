"""Ways to ask torch for derivatives of first and second order, and calls as functions to ask them of."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import hvp
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import tritonattn
from tests.support.calls import operands
from tests.support.packed import offsets

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensor]


def _loss(f: Function) -> Function:
    return lambda *x: f(*x).sin().sum()


def _on_a_plane(f: Function, x: Tensors, u: Tensors) -> Function:
    """f of two numbers: as few columns of a Jacobian as tell tensors apart."""
    return lambda t: f(*[a + t[n % 2] * b for n, (a, b) in enumerate(zip(x, u, strict=True))])


def _origin(x: Tensors) -> Tensor:
    return x[0].new_full((2,), 0.1)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def _duals(x: Sequence[Tensor], u: Sequence[Tensor]) -> list[Tensor]:
    return [forward_ad.make_dual(a, b) for a, b in zip(x, u, strict=True)]


def _tangent(x: Tensor) -> Tensor:
    found = forward_ad.unpack_dual(x).tangent
    assert found is not None
    return found


def _by_duals(f: Function, x: Tensors, u: Tensors) -> Tensors:
    with forward_ad.dual_level():
        return (_tangent(f(*_duals(x, u))),)


def _gradient_of_gradient(f: Function, x: Tensors, u: Tensors) -> Tensors:
    leaves = _leaves(*x)
    found = torch.autograd.grad(_loss(f)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(found, leaves, u)


def _duals_through_a_backward(f: Function, x: Tensors, u: Tensors) -> Tensors:
    with forward_ad.dual_level():
        duals = _duals(_leaves(*x), u)
        return tuple(map(_tangent, torch.autograd.grad(_loss(f)(*duals), duals)))


def _gradient_of_duals(f: Function, x: Tensors, u: Tensors) -> Tensors:
    leaves = _leaves(*x, *u)
    with forward_ad.dual_level():
        tangent = _tangent(f(*_duals(leaves[: len(x)], leaves[len(x) :])))
        return torch.autograd.grad(tangent.sin().sum(), leaves)


def _gradient_of_jvp(f: Function, x: Tensors, u: Tensors) -> Tensors:
    of_both = grad(lambda x, u: jvp(f, x, u)[1].sin().sum(), argnums=(0, 1))(x, u)
    return (*of_both[0], *of_both[1])


def _product_with_hessian(f: Function, x: Tensors, u: Tensors) -> Tensors:
    every = tuple(range(len(x)))

    def along(*x: Tensor) -> Tensor:
        return torch.stack([(a * b).sum() for a, b in zip(grad(_loss(f), every)(*x), u, strict=True)]).sum()

    return grad(along, every)(*x)


# By name: results of a function f of tensors x, along tensors u.
FORMS: dict[str, Callable[[Function, Tensors, Tensors], Any]] = {
    "jvp": jvp,
    "duals": _by_duals,
    "jacfwd": lambda f, x, u: (jacfwd(_on_a_plane(f, x, u))(_origin(x)),),
    "vmap of jvp": lambda f, x, u: vmap(lambda s: jvp(f, x, tuple(s * b for b in u)))(_origin(x).cumsum(0)),
    "gradient of a gradient": _gradient_of_gradient,
    "jacrev of jacrev": lambda f, x, u: (jacrev(jacrev(_loss(_on_a_plane(f, x, u))))(_origin(x)),),
    "jvp of a gradient": lambda f, x, u: jvp(grad(_loss(f), argnums=tuple(range(len(x)))), x, u)[1],
    "duals through a backward": _duals_through_a_backward,
    "hessian": lambda f, x, u: (hessian(_loss(_on_a_plane(f, x, u)))(_origin(x)),),
    "gradient of a jvp": _gradient_of_jvp,
    "gradient of duals": _gradient_of_duals,
    "hvp": lambda f, x, u: hvp(_loss(f), x, u)[1],
    "jvp of an hvp in its direction": lambda f, x, u: jvp(lambda *u: _product_with_hessian(f, x, u), x, u)[1],
}


class Example:
    """A call of a public function, as a function of all its tensors that can have a derivative."""

    def __init__(
        self,
        function: Callable[..., Any] = tritonattn.attention,
        tensors: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        shapes = options.pop("shapes", {})
        given = {name: x.detach() for name, x in operands(**{"batch": 1, **shapes}).items()} | (tensors or {})
        self.names, self.x, self.function, self.options = [*given], tuple(given.values()), function, options
        random = torch.Generator().manual_seed(5)
        self.u = tuple(torch.randn(x.shape, generator=random, dtype=x.dtype) for x in self.x)
        if isinstance(scaling := options.get("scaling"), nn.Module):
            learned = {f"scaling.{name}": x.detach().double() for name, x in scaling.named_parameters()}
            self.names += learned
            self.x += tuple(learned.values())
            self.u += tuple(torch.randn(x.shape, generator=random, dtype=x.dtype) for x in learned.values())

    def on(self, backend: str) -> Function:
        """The output of the tensors, with lse as another column where aux is asked for."""
        holder = _Holder(self.function, {**self.options, "backend": backend})

        def call(*tensors: Tensor) -> Tensor:
            given = dict(zip(self.names, tensors, strict=True))
            learned = {name: given.pop(name) for name in self.names if "." in name}
            return functional_call(holder, learned, (given,)) if learned else holder(given)

        return call


class _Holder(nn.Module):
    """Attention with a scaling whose parameters `functional_call` can replace."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.options, self.scaling = function, options, options.get("scaling", "sqrt_dim")

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(0)  # of dropout
        options = {**self.options, "scaling": self.scaling} if "scaling" in self.options else self.options
        found = self.function(**{**options, **given})
        if isinstance(found, Tensor):
            return found
        out, aux = found
        return torch.cat([out, aux.lse.clamp(min=-9)[..., None]], dim=-1)


def packed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """q, k and v of one batch entry as two sequences of `attention_varlen`."""
    starts = [offsets((2, x.shape[2] - 2)) for x in (q, k)]
    longest = [x.shape[2] - 2 for x in (q, k)]
    return tritonattn.attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), *starts, *longest, **options)


def scaled(q: Tensor, k: Tensor, v: Tensor, query_scale: Tensor, key_scale: Tensor, **options: Any) -> Any:
    return tritonattn.scaled_attention(q, k, v, query_scale, key_scale, **options)


def every_term() -> dict[str, Tensor]:
    """All tensors that `attention` takes besides its operands, for (B, Hq, Hkv, Sq, Sk) = (1, 4, 2, 5, 7)."""
    random = torch.Generator().manual_seed(7)
    shapes = {"gain": (4, 5), "key_bias": (2, 7), "sinks": (4,), "bias": (1, 4, 5, 7), "relative_bias": (1, 4, 1, 4)}
    return {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in shapes.items()}


def assert_as_reference(
    example: Example,
    form: str,
    backend: str = "sdpa",
    tolerance: float = 1e-9,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> None:
    """A backend's results in a form, of operands in a dtype, are the reference's in float64."""
    exact = FORMS[form](example.on("reference"), example.x, example.u)
    x, u = (tuple(one.to(device, dtype) for one in some) for some in (example.x, example.u))
    ours = FORMS[form](example.on(backend), x, u)
    largest = max(y.abs().max() for y in exact)
    assert len(ours) == len(exact)
    assert largest > 1e-3
    for n, (x, y) in enumerate(zip(ours, exact, strict=True)):
        assert (x.shape, x.dtype) == (y.shape, dtype)
        assert (x.to(y) - y).abs().max() <= tolerance * max(y.abs().max(), 1e-4 * largest), f"{form} {n}"
