"""A scaling for any code that calls F.scaled_dot_product_attention: in a model's layers, or for a while everywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from types import FunctionType, MappingProxyType
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention, softmax
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from ..calls.checks import Backend
from ..core.hints import shortened, type_of
from ..core.private_names import DisableTorchFunction
from ..nn.learned import as_mode, describe
from ..nn.tied import Hidden, check_parameters, tie_parameters, tied_names
from ..scaling import Scaling
from ..scaling.names import LayerMode, ModeName
from .arguments import attend, scaling_for
from .replacement import Change, Replacement
from .torch_modules import multihead_changes

_OPTIONS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_SOFTMAX = (softmax, torch.softmax, Tensor.softmax)
_NOT_ASKED, _OWN_SOFTMAX = "not among the layers asked for", "it forms a softmax itself"
_NO_FORWARD = "in no module's forward"


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


# F.multi_head_attention_forward, which a mode sees instead of the call inside, without the question for modes.
_multi_head = FunctionType(
    multi_head_attention_forward.__code__,
    {**multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=multi_head_attention_forward.__defaults__,
)


def scaled_sdpa(scaling: ModeName | str | Scaling, backend: Backend = "auto") -> ScaledSDPA:
    """A context in which every call of F.scaled_dot_product_attention has a scaling, in whatever code.

    Args:
        scaling: A name in `tritonattn.SCALINGS`, or a `Scaling`; of a learned one all calls share the parameters.
        backend: As in `tritonattn.attention`.

    Calls are translated as `replace_sdpa` says. Gradients that a checkpoint recomputes need the context too: backward
    inside it.

    Raises:
        TypeError, ValueError: An invalid scaling; calls raise as `replace_sdpa` says.

    >>> import torch
    >>> from tritonattn.integrations.sdpa import scaled_sdpa
    >>> q = k = v = torch.randn(2, 4, 10, 8)
    >>> with scaled_sdpa("log_key_count:64"):
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    """
    return ScaledSDPA(as_mode(scaling), backend)


def replace_sdpa(
    model: nn.Module,
    scaling: LayerMode | Scaling = "sqrt_dim",
    layers: str | Iterable[str] | None = None,
    example: Any = None,
    backend: Backend = "auto",
    parameters: Mapping[str, str] | None = None,
) -> ReplacedSDPA:
    """Give every module whose own forward calls F.scaled_dot_product_attention a scaling, in any model.

        logit = scale * sqrt(D) * factor * (q . k) + attn_mask,    scale: the call's, usually 1 / sqrt(D)

    Args:
        model: Any nn.Module. Its nn.MultiheadAttention layers become `torch_modules.MultiheadAttention`.
        scaling: A name in `tritonattn.SCALINGS`; one in `tritonattn.nn.LEARNED`, of which every module gets one that
            starts at sqrt_dim, as the model was, as its submodule `logit_scaling`, with the heads of q: give its
            parameters to the optimiser; or a `Scaling`, which all modules share.
        layers: Names of modules, or of modules above them, or patterns of names as in the shell. None is all.
        example: Arguments of the model, a tensor, tuple or dict, or a function of the model that runs it. One run, in
            eval mode and without gradients, finds the modules. None finds them at the model's first call, which has the
            scaling already; learned scalings and torch.compile need an example.
        backend: As in `tritonattn.attention`.
        parameters: As in `tritonattn.huggingface.patch`, with a learned scaling by name and an example.

    Masks, is_causal (top-left, as torch's), scale, dropout, broadcast batches, grouped heads and gradients of an
    additive mask are kept. Rows that attend to no key give zeros. q of three axes has one head. Modules that are not
    found, as those that form their softmax themselves, stay as they are: `ReplacedSDPA.report()` lists them.

    Raises:
        TypeError, ValueError: A model without such a call, layers that do not exist, an invalid scaling, a learned one
            without an example; a learned one for a module whose calls differ in heads; parameters that do not exist.
        NotImplementedError: A nested tensor, or a call of F.multi_head_attention_forward that asks for weights, with
            the module's name. After an error the model is as it was.

    >>> import torch
    >>> from tritonattn.integrations.sdpa import replace_sdpa
    >>> class Attention(torch.nn.Linear):
    ...     def forward(self, x):
    ...         q, k, v = super().forward(x).unflatten(-1, (3, 4, -1)).transpose(1, 3).unbind(2)
    ...         return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> model, x = torch.nn.Sequential(Attention(32, 96)), torch.randn(2, 10, 32)
    >>> with replace_sdpa(model, "ssmax", example=x) as replaced:
    ...     print(replaced.names, [name for name in model.state_dict() if "scaling" in name])
    ['0'] ['0.logit_scaling.s', '0.logit_scaling.b']
    """
    if parameters is not None:
        check_parameters(parameters)
        if not isinstance(scaling, str):
            raise TypeError(
                f"scaling: expected a name, such as 'ssmax', with parameters, got {type_of(scaling)}, which all share"
            )
    return ReplacedSDPA(Finder(model, scaling, layers, backend, parameters or {}), example)


class ReplacedSDPA(Replacement):
    """A `Replacement` by `replace_sdpa`, with a report; without an example complete after the model's first call."""

    def __init__(self, finder: Finder, example: Any) -> None:
        self._finder, model = finder, finder.model
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type_of(model)}")
        if any(type(module).__name__ == "OptimizedModule" for module in model.modules()):
            raise ValueError("model: expected one that is not compiled yet, got a compiled one: replace, then compile")
        if getattr(vars(model).get("forward"), "func", None) is _first_call:
            raise ValueError(
                "model: expected a call of it after replace_sdpa without an example, got another replacement"
            )
        if isinstance(scaling_for(finder.asked, 1), nn.Module) and example is None:
            raise ValueError(
                "example: expected arguments of the model for a learned scaling, got None: its parameters have the"
                " heads of q, and optimizers and DDP take parameters before the first call"
            )
        super().__init__(model, "", [])
        try:
            self.change(model, multihead_changes(model, finder.choose, finder.backend))
            if example is None:
                self.put(model, "forward", partial(_first_call, self, model.forward))
            else:
                with evaluating(model), finder.finding([]):
                    _run(model, example)
                self.finish()
        except BaseException:
            self.undo()
            raise

    def finish(self) -> None:
        """Put scalings into the modules that a run has found."""
        model, finder, found = self._finder.model, self._finder, self._finder.found
        for selector in finder.layers or ():
            if not any(_matches(selector, name) for name in found):
                names = shortened(list(found))
                raise ValueError(f"layers: expected names or patterns of {names}, or None for all, got {selector!r}")
        scaled = {name: layer for name, layer in found.items() if layer.scaling is not None}
        if not scaled:
            own = [name or "the model" for name, layer in found.items() if layer.left == _OWN_SOFTMAX]
            raise ValueError(
                f"model: expected one whose modules call F.scaled_dot_product_attention, got {type(model).__name__}"
                + f", in which a softmax is formed by {shortened(own)}" * bool(own)
            )
        tied = tied_names(finder.parameters, {name: (layer.module, layer.scaling) for name, layer in scaled.items()})
        for name, inner in tied.items():
            tie_parameters(found[name].scaling, found[name].module, inner)
        changes: list[Change] = []
        for name, layer in found.items():
            if layer.scaling is not None and name not in self.names:
                changes += sdpa_changes(name, layer.module, layer.scaling, finder.backend)
            elif layer.left == _NOT_ASKED and any(name.startswith(f"{above}.") or not above for above in scaled):
                changes.append((None, layer.module, "forward", partial(_forward, None, layer.module.forward, "auto")))
        self.change(model, changes)

    def report(self) -> str:
        """A table of the modules that attend: heads, calls in the run, arguments used, and the scaling.

        Modules that are left alone have the reason.
        """
        rows = []
        for name, layer in self._finder.found.items():
            scaling = f"left alone: {layer.left}" if layer.scaling is None else describe(layer.scaling)
            arguments = ", ".join(sorted(layer.arguments))
            rows.append((name, type(layer.module).__name__, layer.heads, layer.calls, arguments, scaling))
        headers = ("module", "class", "heads", "calls", "arguments", "scaling")
        return tabulate(rows, headers, "simple", disable_numparse=True)


def sdpa_changes(name: str, layer: Any, scaling: Any, backend: Backend) -> list[Change]:
    """The changes by which the calls of a module's own forward have a scaling."""
    hidden = Hidden(scaling)
    former = partial(hidden.run, layer.forward) if hidden.ties else layer.forward
    forward = partial(_forward, layer, former, backend)
    return [(name, layer, "forward", forward), (name, layer, "logit_scaling", scaling)]


def _forward(layer: Any, former: Callable, backend: Backend, *arguments: Any, **keywords: Any) -> Any:
    """A module's former forward, with its scaling; with none where layer is None."""
    with ScaledSDPA(getattr(layer, "logit_scaling", None), backend):
        return former(*arguments, **keywords)


def _first_call(replaced: ReplacedSDPA, former: Callable, *arguments: Any, **keywords: Any) -> Any:
    """A model's former forward, in which the modules that attend are found."""
    if torch.compiler.is_compiling():  # without fullgraph torch then runs this uncompiled
        raise RuntimeError("example: expected one in replace_sdpa, or a call of the model, before torch.compile")
    run = torch.compiler.disable(former) if "torch._dynamo" in sys.modules else former
    with replaced._finder.finding([replaced._finder.model]):
        out = run(*arguments, **keywords)
    replaced.restore()
    try:
        replaced.finish()
    except ValueError:
        replaced.undo()
        raise
    return out


def _run(model: Any, example: Any) -> None:
    if isinstance(example, Mapping):
        model(**example)
    elif isinstance(example, (tuple, list)):
        model(*example)
    elif callable(example):
        example(model)
    else:
        model(example)


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
class _Layer:
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
        self.found: dict[str, _Layer] = {}

    def wants(self, name: str) -> bool:
        return self.layers is None or any(_matches(one, name) for one in self.layers)

    def choose(self, name: str, layer: nn.MultiheadAttention) -> Any:
        """The scaling for one of torch's layers, which need no run to be found."""
        if not self.wants(name) or type(layer).forward is not nn.MultiheadAttention.forward:
            return None
        scaling = scaling_for(self.asked, layer.num_heads, layer.out_proj.weight.device, self.parameters.values())
        self.found[name] = _Layer(layer, scaling, heads=layer.num_heads)
        return scaling

    @contextmanager
    def finding(self, running: list[Any]) -> Iterator[None]:
        """A context that finds modules, inside of those that are running already."""
        self._names: dict[Any, str] = {module: name for name, module in self.model.named_modules()}
        self._running = running

        def leave(*_: Any) -> None:
            running.pop()

        enter = register_module_forward_pre_hook(lambda module, _: running.append(module))
        hooks = (enter, register_module_forward_hook(leave, always_call=True))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SOFTMAX and args[0].dim() > 2:
            module = self._innermost()
            self.found.setdefault(self._names.get(module, _NO_FORWARD), _Layer(module, left=_OWN_SOFTMAX))
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
        if layer is None or layer.left == _OWN_SOFTMAX:
            layer = self.found[name] = _Layer(module, None, _NO_FORWARD if module is None else _NOT_ASKED, heads, 0)
            if module is not None and self.wants(name):
                if hasattr(module, "logit_scaling"):
                    raise ValueError("logit_scaling: expected no attribute of this name in the module, got one")
                layer.scaling, layer.left = scaling_for(self.asked, heads, query.device, self.parameters.values()), ""
        if heads != layer.heads and isinstance(layer.scaling, nn.Module):
            raise ValueError(f"layers: expected calls of {layer.heads} heads for a learned scaling, got {heads} heads")
        layer.calls = (layer.calls or 0) + 1
        layer.arguments |= {option for option in _OPTIONS if isinstance(x := options.get(option), Tensor) or x}
        return layer.scaling


def _matches(selector: str, name: str) -> bool:
    return fnmatchcase(name, selector) or name.startswith(f"{selector}.")
