"""Finding the modules of a model that call F.scaled_dot_product_attention, and contexts that take the calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from types import FunctionType, MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention, softmax
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from ..calls.checks import Backend
from ..core.private_names import DisableTorchFunction
from ..scaling import Scaling
from .arguments import attend, scaling_for
from .attending import attending_methods

_OPTIONS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_SOFTMAX = (softmax, torch.softmax, Tensor.softmax)
NOT_ASKED, OWN_SOFTMAX = "not among the layers asked for", "it forms a softmax itself"
_NO_FORWARD, _NOT_REACHED = "in no module's forward", "not reached by the example"


class ScaledSDPA(TorchFunctionMode):
    """A context in which F.scaled_dot_product_attention is `attention` with a scaling; None leaves the calls alone.

    An inner context comes before an outer one, and calls of `tritonattn.attention` stay as they are.
    """

    def __init__(self, scaling: Scaling | None, backend: Backend = "auto") -> None:
        super().__init__()
        self.scaling = scaling
        self.backend: Backend = backend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func is scaled_dot_product_attention:
            with DisableTorchFunction():  # modes around this one, too
                return self.take(args, keywords)
        if func is multi_head_attention_forward:
            if self.scaling is not None and keywords.get("need_weights", True):
                raise NotImplementedError(
                    "need_weights: expected False in F.multi_head_attention_forward with a scaling, got True: the"
                    " layers of `torch_modules` form weights"
                )
            with self:
                return _multi_head(*args, **keywords)
        if torch.compiler.is_compiling() and (func is Tensor.unflatten or func is Tensor.split):
            # torch traces calls of these methods, but not their functions
            return getattr(args[0], func.__name__)(*args[1:], **keywords)
        return func(*args, **keywords)

    def take(self, args: Any, keywords: dict[str, Any]) -> Any:
        """The result of a call of F.scaled_dot_product_attention."""
        if self.scaling is None:
            return scaled_dot_product_attention(*args, **keywords)
        return attend(self.scaling, self.backend, *args, **keywords)


class Refusing(ScaledSDPA):
    """A context in which the calls of a module that an example has not reached are refused."""

    def __init__(self, name: str) -> None:
        super().__init__(None)
        self.name = name

    def take(self, args: Any, keywords: dict[str, Any]) -> Any:
        raise NotImplementedError(
            f"{self.name or 'the model'}: expected an example that reaches this call of F.scaled_dot_product_attention,"
            " for a learned scaling with its heads, got one that does not: undo the replacement, and give as example a"
            " function of the model that runs it, or name layers without this one"
        )


# F.multi_head_attention_forward, which a mode sees instead of the call inside, without the question for modes.
_multi_head = FunctionType(
    multi_head_attention_forward.__code__,
    {**multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=multi_head_attention_forward.__defaults__,
)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, without gradients; its mode and torch's random numbers are as before afterwards."""
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@dataclass
class Layer:
    """A module that attends: what it is given, or the reason why it is left alone, and its calls."""

    module: Any
    scaling: Scaling | None = None
    left: str = ""
    heads: int | None = None
    calls: int | None = None
    arguments: set[str] = field(default_factory=set)


class Finder(ScaledSDPA):
    """Finds the innermost module of a model in whose forward a call is made, and gives that call its scaling."""

    def __init__(
        self,
        model: Any,
        scaling: Any,
        layers: str | Iterable[str] | None,
        backend: Backend,
        parameters: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(None, backend)
        self.model, self.asked, self.parameters = model, scaling, parameters
        self.layers = (layers,) if isinstance(layers, str) else layers
        self.found: dict[str, Layer] = {}
        self.is_finding = False

    def attending(self) -> list[tuple[str, nn.Module, tuple[str, ...]]]:
        """Modules without a scaling whose code makes calls: name, module, methods that do."""
        named = ((name, module, attending_methods(type(module))) for name, module in self.model.named_modules())
        return [
            (name, module, methods)
            for name, module, methods in named
            if methods and not hasattr(module, "logit_scaling")
        ]

    def add_unreached(self) -> dict[str, tuple[str, ...]]:
        """Add modules that no run has reached to those found. Returns the methods of those asked for that attend."""
        shared = scaling_for(self.asked, 1)
        of_heads = isinstance(shared, nn.Module) and not isinstance(self.asked, nn.Module)
        own = [name for name, layer in self.found.items() if layer.left == OWN_SOFTMAX]
        unreached = {}
        for name, module, methods in self.attending():
            if name in self.found or any(inside.startswith(f"{name}.") for inside in own):
                continue
            if not self.wants(name):
                self.found[name] = Layer(module, None, NOT_ASKED, calls=0)
                continue
            scaling, left = (None, _NOT_REACHED) if of_heads else (shared, "")
            self.found[name], unreached[name] = Layer(module, scaling, left, calls=0), methods
        return unreached

    def wants(self, name: str) -> bool:
        return self.layers is None or any(matches(one, name) for one in self.layers)

    def choose(self, name: str, layer: nn.MultiheadAttention) -> Any:
        """The scaling for one of torch's layers, which need no run to be found."""
        if not self.wants(name) or type(layer).forward is not nn.MultiheadAttention.forward:
            return None
        scaling = scaling_for(self.asked, layer.num_heads, layer.out_proj.weight.device, self.parameters.values())
        self.found[name] = Layer(layer, scaling, heads=layer.num_heads)
        return scaling

    @contextmanager
    def finding(self, running: list[Any]) -> Iterator[None]:
        """A context that finds modules, inside of those that are running already."""
        self._names: dict[Any, str] = {module: name for name, module in self.model.named_modules()}
        self._running, self.is_finding = running, True

        def leave(*_: Any) -> None:
            running.pop()

        def inside(module: Any, former: Any, *arguments: Any, **keywords: Any) -> Any:
            running.append(module)
            try:
                return former(*arguments, **keywords)
            finally:
                running.pop()

        entered = [
            (module, method, vars(module).get(method))
            for _, module, methods in self.attending()
            for method in methods
            if method != "forward"
        ]
        for module, method, _ in entered:
            vars(module)[method] = partial(inside, module, getattr(module, method))
        enter = register_module_forward_pre_hook(lambda module, _: running.append(module))
        hooks = (enter, register_module_forward_hook(leave, always_call=True))
        try:
            with self:
                yield
        finally:
            self.is_finding = False
            for hook in hooks:
                hook.remove()
            for module, method, before in entered:
                if before is None:
                    del vars(module)[method]
                else:
                    vars(module)[method] = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SOFTMAX and args[0].dim() > 2:
            module = self._innermost()
            self.found.setdefault(self._names.get(module, _NO_FORWARD), Layer(module, left=OWN_SOFTMAX))
        return super().__torch_function__(func, types, args, kwargs)

    def take(self, args: Any, keywords: dict[str, Any]) -> Any:
        module = self._innermost()
        name = self._names.get(module, _NO_FORWARD)
        arguments = dict(zip(("query", "key", "value", *_OPTIONS), args, strict=False)) | keywords
        try:
            return ScaledSDPA(self._scaling(module, name, **arguments), self.backend).take(args, keywords)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise type(error)(f"{name}: {error}") from error

    def _innermost(self) -> Any:
        """The innermost running module of the model; None outside of all."""
        return next((module for module in reversed(self._running) if module in self._names), None)

    def _scaling(self, module: Any, name: str, query: Tensor, **options: Any) -> Scaling | None:
        """The scaling of a call by a module, which its first call makes. Raises ValueError for other heads than its."""
        heads = query.shape[-3] if query.dim() > 3 or options.get("enable_gqa") else 1
        layer = self.found.get(name)
        if layer is None or layer.left == OWN_SOFTMAX:
            layer = self.found[name] = Layer(module, None, _NO_FORWARD if module is None else NOT_ASKED, heads, 0)
            if module is not None and self.wants(name):
                if hasattr(module, "logit_scaling"):
                    raise ValueError("logit_scaling: expected no attribute of this name in the module, got one")
                layer.scaling, layer.left = scaling_for(self.asked, heads, query.device, self.parameters.values()), ""
        if heads != layer.heads and isinstance(layer.scaling, nn.Module):
            raise ValueError(f"layers: expected calls of {layer.heads} heads for a learned scaling, got {heads} heads")
        layer.calls = (layer.calls or 0) + 1
        layer.arguments |= {option for option in _OPTIONS if isinstance(x := options.get(option), Tensor) or x}
        return layer.scaling


def matches(selector: str, name: str) -> bool:
    return fnmatchcase(name, selector) or name.startswith(f"{selector}.")
