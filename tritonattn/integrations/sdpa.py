"""A scaling for any code that calls F.scaled_dot_product_attention: in a model's layers, or for a while everywhere."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from ..calls.checks import Backend
from ..core.hints import shortened, type_of
from ..nn.learned import as_mode, describe
from ..nn.tied import Hidden, check_parameters, tie_parameters, tied_names
from ..scaling import Scaling
from ..scaling.names import LayerMode, ModeName
from .arguments import scaling_for
from .attending import attending_methods
from .finder import NOT_ASKED, OWN_SOFTMAX, Finder, Layer, Refusing, ScaledSDPA, evaluating, matches
from .replacement import Change, Replacement
from .torch_modules import MultiheadAttention, multihead_changes


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
    """Give every module whose own code calls F.scaled_dot_product_attention a scaling, in any model.

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
    additive mask are kept. Rows that attend to no key give zeros. q of three axes has one head. Public methods have the
    scaling like forward, `encode()` or `generate()`. Modules that the run does not reach are found by their code: a
    mode without parameters serves them, for a learned one a warning names them, and their calls raise. Modules that
    form their softmax themselves stay as they are: `ReplacedSDPA.report()` lists them.

    Raises:
        TypeError, ValueError: A model without such a call, layers that do not exist, an invalid scaling, a learned one
            without an example; a learned one for a module whose calls differ in heads; parameters that do not exist; a
            model that is replaced already.
        NotImplementedError: A nested tensor, or a call of F.multi_head_attention_forward that asks for weights, with
            the module's name; later, a call that the example did not reach, for a learned scaling. After an error of
            `replace_sdpa`, or of the first call, the model is as it was.

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
                "model: expected a call of it after replace_sdpa without an example, got another replacement of a model"
                " that is replaced already: undo() the first, or call the model"
            )
        if isinstance(scaling_for(finder.asked, 1), nn.Module) and example is None:
            raise ValueError(
                "example: expected arguments of the model for a learned scaling, got None: its parameters have the"
                " heads of q, and optimizers and DDP take parameters before the first call"
            )
        self._pending = 0  # changes that the first call undoes
        super().__init__(model, "", [])
        try:
            self.change(model, multihead_changes(model, finder.choose, finder.backend))
            if example is None:
                self._await_first_call()
            else:
                with evaluating(model), finder.finding([]):
                    _run(model, example)
                self.finish()
        except BaseException:
            self.undo()
            raise

    def __repr__(self) -> str:
        finder = self._finder
        layers = shortened(self.names) if self.names else "none yet" if self._pending else "none"
        scaling = finder.asked if isinstance(finder.asked, str) else describe(finder.asked)
        state = "awaits the first call" if self._pending else "installed" if self._before else "undone"
        return f"{type(self).__name__}({type(finder.model).__name__}, layers: {layers}, scaling: {scaling}, {state})"

    def _await_first_call(self) -> None:
        """Have the layers found by the model's first call; its other methods have the scaling until then, too."""
        model, finder, before = self._finder.model, self._finder, len(self._before)
        for name, module, methods in finder.attending():
            scaling = scaling_for(finder.asked, 1) if finder.wants(name) else None
            for method in methods:
                if module is not model or method != "forward":
                    self.put(module, method, partial(_before_first_call, finder, scaling, getattr(module, method)))
        self.put(model, "forward", partial(_first_call, self, model.forward))
        self._pending = len(self._before) - before

    def complete(self) -> None:
        """Put scalings into the modules that the first call has found. After an error the model is as it was."""
        for _ in range(self._pending):
            self.restore()
        self._pending = 0
        try:
            self.finish()
        except ValueError:
            self.undo()
            raise

    def undo(self) -> None:
        self._pending = 0
        super().undo()

    def finish(self) -> None:
        """Put scalings into the modules that a run has found."""
        model, finder, found = self._finder.model, self._finder, self._finder.found
        unreached = finder.add_unreached()
        for selector in finder.layers or ():
            if not any(matches(selector, name) for name in found):
                names = shortened(list(found))
                raise ValueError(f"layers: expected names or patterns of {names}, or None for all, got {selector!r}")
        scaled = {name: layer for name, layer in found.items() if layer.scaling is not None}
        if not scaled:
            raise ValueError(_without_call(finder))
        tied = tied_names(finder.parameters, {name: (layer.module, layer.scaling) for name, layer in scaled.items()})
        for name, inner in tied.items():
            tie_parameters(found[name].scaling, found[name].module, inner)
        changes: list[Change] = []
        for name, layer in found.items():
            if name in unreached:
                changes += self._unreached_changes(name, layer, unreached[name])
            elif layer.scaling is not None and name not in self.names:
                changes += sdpa_changes(name, layer.module, layer.scaling, finder.backend)
            elif layer.left == NOT_ASKED and any(
                name.startswith(f"{above}.") or not above for above in [*scaled, *unreached]
            ):
                changes += _method_changes(layer.module, None, "auto")
        self.change(model, changes)
        if refused := [name or "the model" for name in unreached if found[name].scaling is None]:
            warnings.warn(
                f"example: expected one that reaches every call of F.scaled_dot_product_attention, got none for"
                f" {shortened(refused)}, whose calls raise: give as example a function of the model that runs them, or"
                " name layers without them",
                stacklevel=4,
            )

    def _unreached_changes(self, name: str, layer: Layer, methods: tuple[str, ...]) -> list[Change]:
        """The changes by which a module that no run has reached has the scaling, or refuses calls without one."""
        if layer.scaling is not None:
            return sdpa_changes(name, layer.module, layer.scaling, self._finder.backend)
        return [
            (None, layer.module, method, partial(_refused, name, getattr(layer.module, method))) for method in methods
        ]

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
    """The changes by which the calls of a module's own methods have a scaling."""
    return [*_method_changes(layer, layer, backend, Hidden(scaling)), (name, layer, "logit_scaling", scaling)]


def _method_changes(module: Any, layer: Any, backend: Backend, hidden: Hidden | None = None) -> list[Change]:
    """The changes by which calls in a module's methods have the scaling of a layer, or none where it is None.

    hidden   hides the layer's own tensors that are the scaling's
    """
    changes: list[Change] = []
    for method in ("forward", *(name for name in attending_methods(type(module)) if name != "forward")):
        former = getattr(module, method)
        former = partial(hidden.run, former) if hidden is not None and hidden.ties else former
        changes.append((None, module, method, partial(_forward, layer, former, backend)))
    return changes


def _refused(name: str, former: Callable, *arguments: Any, **keywords: Any) -> Any:
    """A method of a module that the example did not reach."""
    with Refusing(name):
        return former(*arguments, **keywords)


def _before_first_call(finder: Finder, scaling: Any, former: Callable, *arguments: Any, **keywords: Any) -> Any:
    """A method that is called before the model, with the scaling; inside the model's first call the finder gives it."""
    if finder.is_finding:
        return former(*arguments, **keywords)
    with ScaledSDPA(scaling, finder.backend):
        return former(*arguments, **keywords)


def _forward(layer: Any, former: Callable, backend: Backend, *arguments: Any, **keywords: Any) -> Any:
    """A module's former forward, with its scaling; with none where layer is None."""
    with ScaledSDPA(getattr(layer, "logit_scaling", None), backend):
        return former(*arguments, **keywords)


def _first_call(replaced: ReplacedSDPA, former: Callable, *arguments: Any, **keywords: Any) -> Any:
    """A model's former forward, in which the modules that attend are found."""
    if torch.compiler.is_compiling():  # without fullgraph torch then runs this uncompiled
        raise RuntimeError("example: expected one in replace_sdpa, or a call of the model, before torch.compile")
    with replaced._finder.finding([replaced._finder.model]):
        out = _uncompiled(former)(*arguments, **keywords)
    _uncompiled(replaced.complete)()
    return out


def _uncompiled(function: Callable) -> Callable:
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def _run(model: Any, example: Any) -> None:
    if isinstance(example, Mapping):
        model(**example)
    elif isinstance(example, (tuple, list)):
        model(*example)
    elif callable(example):
        example(model)
    else:
        model(example)


def _without_call(finder: Finder) -> str:
    """The error for a model in which no call is found that could have the scaling."""
    modules, name = finder.model.named_modules(), type(finder.model).__name__
    got = f"model: expected one whose modules call F.scaled_dot_product_attention, got {name}"
    if replaced := [name or "the model" for name, module in modules if _is_replaced(module)]:
        return f"{got}, in which {shortened(replaced)} are replaced already: undo() the first replacement, then replace"
    own = [name or "the model" for name, layer in finder.found.items() if layer.left == OWN_SOFTMAX]
    return got + f", in which a softmax is formed by {shortened(own)}" * bool(own)


def _is_replaced(module: nn.Module) -> bool:
    return isinstance(module, MultiheadAttention) or getattr(vars(module).get("forward"), "func", None) is _forward
