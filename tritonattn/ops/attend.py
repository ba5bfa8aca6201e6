"""An attention call and the statistics of its keys, with gradients, as autograd functions and operators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from ..backends import BACKENDS, kernels
from ..core.autograd import (
    apply,
    apply_with_graph,
    first_order,
    is_transformed,
    needs_graph,
    runs_eagerly,
    without_autocast,
)
from ..core.call import AttentionCall, ForwardResult
from ..core.statistics import Statistics
from ..core.terms import Gradients, Needs, Terms
from .operators import (
    ARGUMENTS,
    GRADIENTS,
    SCHEMA,
    TENSORS,
    call_of,
    flat,
    in_one_batch,
    operator,
    vmap_of_call,
    with_values,
    without_repeats,
)


def attention(call: AttentionCall) -> ForwardResult:
    """Run a call on its backend, "triton" or "sdpa"; out and lse have gradients towards q, k, v, scales and sinks.

    max_logit and entropy are None without aux.
    """
    given = call.tensors()
    has_graph = needs_graph(*given)
    if not runs_eagerly(*given, call.visibility.key_lengths):
        keep_rounding = call.v.dtype.itemsize == 2 and (has_graph or is_transformed())
        run = _Transformed.apply if is_transformed() else _forward_operator
        results = run(*flat(without_repeats(with_values(call))), keep_rounding)
    elif has_graph:
        results = apply_with_graph(_Attention, *given, call)
    else:
        return _forward(call, has_graph=False)
    return ForwardResult(*results[: 4 if call.aux else 2])


def forward_pass(call: AttentionCall, keep_rounding: bool) -> tuple[Tensor, ...]:
    """out, lse, max_logit, entropy and rounding, without a graph: tensors of size 0 for those not asked for."""
    if runs_eagerly(*call.tensors()):
        return _filled(_forward_kept(call, keep_rounding))
    return _forward_operator(*flat(call), keep_rounding)


def backward_pass(
    call: AttentionCall,
    results: tuple[Tensor, Tensor, Tensor | None],
    d_out: Tensor | None,
    d_lse: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Gradients of a call whose `forward_pass` returned `results`: out, lse, and rounding where it was kept."""
    if runs_eagerly(call.q, call.k, call.v, d_out, d_lse):
        return _backward(call, results, d_out, d_lse, needs)
    if call.wide_q is not None:
        call = call.changed(q=call.q.float())
    if call.wide_k is not None:
        call = call.changed(k=call.k.float())
    filled = _backward_operator(*flat(call), *results, d_out, d_lse, list(needs))
    return Gradients(*(gradient if need else None for gradient, need in zip(filled, needs, strict=True)))


def _forward(call: AttentionCall, rounding: Tensor | None = None, *, has_graph: bool) -> ForwardResult:
    """Run a call on its backend. With a graph, forward and backward must multiply in the same tiles."""
    visible, backend = call.visibility, BACKENDS[call.backend]
    is_cache = call.cached and visible.sequences is None
    if call.block_table is not None and not (backend.reads_pages and (is_cache or call.k.shape[0] > 0)):
        call = call.gathered()
    if is_cache:
        if visible.invariant:
            call = call.by_ranges()
    elif call.q.numel() == 0 or call.k.numel() == 0:
        out, lse, max_logit, entropy, _ = _allocate_forward(call, keep_rounding=False)
        rows = (out.zero_(), lse.fill_(-torch.inf), max_logit.fill_(-torch.inf), entropy.zero_())
        return ForwardResult(*rows[: 4 if call.aux else 2])
    elif visible.invariant and (first := visible.first_keys()) is not None:
        call = call.from_keys(first)
    return backend.forward(call, rounding, has_graph)


def _forward_kept(call: AttentionCall, keep_rounding: bool) -> tuple[Tensor | None, ...]:
    """The results of `_forward`, and rounding: None for those not asked for."""
    q, v = call.q, call.v
    rounding = v.new_empty((*q.shape[:3], v.shape[3]), dtype=torch.int8) if keep_rounding else None
    has_graph = keep_rounding or v.dtype.itemsize > 2  # nothing here tells which wider ones have one
    return (*_forward(call, rounding, has_graph=has_graph), rounding)


def _backward(
    call: AttentionCall,
    results: tuple[Tensor, Tensor, Tensor | None],
    d_out: Tensor | None,
    d_lse: Tensor | None,
    needs: Needs,
) -> Gradients:
    out, lse, rounding = results
    if call.q.numel() == 0 or call.k.numel() == 0:
        pairs: Any = zip(call.tensors(), needs, strict=True)
        return Gradients(*(x.new_zeros(x.shape) if need else None for x, need in pairs))
    d_out = torch.zeros_like(out) if d_out is None else d_out.to(out.dtype).resolve_neg()  # a compiler may widen it
    d_lse = None if d_lse is None else d_lse.resolve_neg()
    first = call.visibility.first_keys() if call.visibility.invariant else None
    if first is not None:
        call = call.from_keys(first)
    found = BACKENDS[call.backend].backward(call, (out, lse, rounding), d_out, d_lse, needs)
    return found if first is None else found.rolled(call.visibility.k_len - first)


def _allocate_forward(call: AttentionCall, keep_rounding: bool) -> tuple[Tensor, ...]:
    rows, out_shape = call.q.shape[:3], (*call.q.shape[:3], call.v.shape[3])
    lse = call.q.new_empty(rows, dtype=torch.promote_types(call.q.dtype, torch.float32))
    max_logit, entropy = (lse.new_empty(rows if call.aux else (0,)) for _ in range(2))
    rounding = call.v.new_empty(out_shape, dtype=torch.int8) if keep_rounding else lse.new_empty(0)
    return call.v.new_empty(out_shape), lse, max_logit, entropy, rounding


def _filled(results: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Replace None by a tensor of size 0: an operator returns tensors, laid out as its fake says."""
    _, lse, *_ = results
    assert lse is not None
    return tuple(lse.new_empty(0) if result is None else result.contiguous() for result in results)


@operator(
    "forward",
    f"{SCHEMA}, bool keep_rounding",
    "(Tensor out, Tensor lse, Tensor max_logit, Tensor entropy, Tensor rounding)",
)
def _forward_operator(*arguments):
    *arguments, keep_rounding = arguments
    with without_autocast(arguments[0]):
        return _filled(_forward_kept(call_of(arguments), keep_rounding))


@_forward_operator.register_fake
def _(*arguments):
    *arguments, keep_rounding = arguments
    return _allocate_forward(call_of(arguments), keep_rounding)


@operator(
    "backward",
    f"{SCHEMA}, Tensor out, Tensor lse, Tensor? rounding, Tensor? d_out, Tensor? d_lse, bool[] needs",
    f"({', '.join(f'Tensor d_{name}' for name in Gradients._fields)})",
)
def _backward_operator(*arguments):
    *arguments, out, lse, rounding, d_out, d_lse, needs = arguments
    call = call_of(arguments)
    found = _backward(call, (out, lse, rounding), d_out, d_lse, Needs(*needs))
    return tuple(call.q.new_empty(0) if x is None else x.contiguous() for x in found)


@_backward_operator.register_fake
def _(*arguments):
    pairs = zip(arguments[:GRADIENTS], arguments[-1], strict=True)
    return tuple(x.new_empty(x.shape) if need else arguments[0].new_empty(0) for x, need in pairs)


class _Attention(Function):
    """A call that runs eagerly, after the tensors that may have a gradient."""

    @staticmethod
    def forward(ctx, *arguments):
        call: AttentionCall = arguments[-1]
        out, lse, *aux, rounding = _forward_kept(call, call.v.dtype.itemsize == 2)
        terms, visible = call.logits, call.visibility
        # Autograd saves all tensors, so that writes to them are noticed and hooks can move them.
        masks = () if visible.depends_on_sizes_only else visible.tensors
        rest = visible.without_tensors() if masks else visible
        of_bias = terms.relative_right, terms.bias_after_softcap
        ctx.rest = rest, terms.scale, terms.softcap, of_bias, call.dropout, call.is_part, call.backend
        ctx.set_materialize_grads(False)
        if call.aux:
            ctx.mark_non_differentiable(*aux)
        wide = call.wide_q, call.wide_k
        ctx.save_for_backward(out, lse, rounding, call.q, call.k, *arguments[2:-1], *wide, *masks)
        return out, lse, *aux

    @staticmethod
    @first_order
    def backward(ctx, saved, d_out, d_lse, *none):
        out, lse, rounding, q, k, v, query_scale, key_scale, key_bias, sinks, bias, relative, *rest = saved
        wide_q, wide_k, *masks = rest
        visible, scale, softcap, of_bias, dropout, is_part, backend = ctx.rest
        terms = Terms(scale, query_scale, key_scale, key_bias, sinks, bias, relative, softcap, *of_bias)
        visible = visible.with_tensors(*masks) if masks else visible
        wide = {"wide_q": wide_q, "wide_k": wide_k, "is_part": is_part}
        call = AttentionCall(q, k, v, visible, terms, dropout, backend, **wide)
        needs = Needs(*ctx.needs_input_grad[:GRADIENTS])
        return (*backward_pass(call, (out, lse, rounding), d_out, d_lse, needs), None)


def _keep_arguments(ctx, inputs, output) -> None:
    out, lse, max_logit, entropy, rounding = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(max_logit, entropy, rounding)
    ctx.save_for_backward(*inputs[:TENSORS], out, lse, rounding)
    *ctx.settings, ctx.keep_rounding = inputs[TENSORS:]


@first_order
def _of_operator(ctx, saved, d_out, d_lse, *none):
    *tensors, out, lse, rounding = saved
    results = out, lse, rounding if ctx.keep_rounding else None
    needs = Needs(*ctx.needs_input_grad[:GRADIENTS])
    found = backward_pass(call_of((*tensors, *ctx.settings)), results, d_out, d_lse, needs)
    return (*found, *[None] * (len(ARGUMENTS) + 1 - GRADIENTS))


class _Transformed(Function):
    """The operator under torch.func, whose transforms do not take what `register_autograd` makes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return _forward_operator(*arguments)

    setup_context = staticmethod(_keep_arguments)
    backward = staticmethod(_of_operator)


_forward_operator.register_autograd(_of_operator, setup_context=_keep_arguments)
_forward_operator.register_vmap(functools.partial(vmap_of_call, _forward_operator))
_backward_operator.register_vmap(functools.partial(vmap_of_call, _backward_operator))


# ---- Statistics of keys


def _operator_of(name: str, arguments: str, result: str, empty: Callable[..., Tensor]) -> Any:
    """A pass of the "triton" backend, under its name there, as an operator. empty: its result without values."""

    def run(*given: Tensor | None) -> Tensor:
        return getattr(kernels(), name)(*given)

    made = operator(name, arguments, f"Tensor {result}")(run)
    made.register_fake(empty)
    made.register_vmap(lambda info, dims, *given: in_one_batch(made, info.batch_size, dims, given))
    return made


_prefix_sums_operator = _operator_of(
    "prefix_sums",
    "Tensor x, Tensor? restarts",
    "sums",
    lambda x, _: x.new_empty((*x.shape[:-1], x.shape[-1] + 1), dtype=torch.float64),
)
_argmax_operator = _operator_of(
    "argmax_over_ranges",
    "Tensor x, Tensor lo, Tensor hi",
    "keys",
    lambda x, lo, hi: lo.new_empty((*x.shape[:-1], lo.shape[-1])),
)
_key_norms_operator = _operator_of(
    "key_norms",
    "Tensor k, Tensor? seen",
    "norms",
    lambda k, seen: k.new_empty(k.shape[:3], dtype=torch.float32),
)
_key_norms_backward_operator = _operator_of(
    "key_norms_backward",
    "Tensor k, Tensor? seen, Tensor norms, Tensor d_norms, Tensor? added",
    "d_k",
    lambda k, *_: k.new_empty(k.shape),
)


def _prefix_sums(x: Tensor, restarts: Tensor | None) -> Tensor:
    """`ranges.prefix_sum` of x [B, H, n]: one launch instead of dozens on a GPU."""
    return (kernels().prefix_sums if runs_eagerly(x, restarts) else _prefix_sums_operator)(x, restarts)


def _argmax_over_ranges(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """`ranges.argmax_over_ranges`: one launch instead of a dozen a power of two."""
    return (kernels().argmax_over_ranges if runs_eagerly(x, lo, hi) else _argmax_operator)(x, lo, hi)


def _key_norms(k: Tensor, seen: Tensor | None) -> Tensor:
    return kernels().key_norms(k, seen) if runs_eagerly(k, seen) else _key_norms_operator(k, seen)


class KernelStatistics(Statistics):
    """Statistics whose norms, prefix sums and maxima come from kernels of the "triton" backend.

    Norms take one pass over keys or queries, where torch's operators on a GPU take several over copies in fp32.
    """

    _scan = staticmethod(_prefix_sums)
    _argmax = staticmethod(_argmax_over_ranges)

    _has_values = False

    def _counted_keys(self) -> Tensor | None:
        visible = self.visibility
        if visible.attends_to_every_key:
            return None
        if visible.invariant or not runs_eagerly(visible.key_lengths, visible.key_ranges):
            return super()._counted_keys()
        return kernels().seen_keys(visible)

    def _norms_of(self, x: Tensor, seen: Tensor | None) -> Tensor:
        if not (needs_graph(x) or is_transformed()):
            return _key_norms(x, seen)
        self._has_values = x.dtype == torch.float32 or not runs_eagerly(x)
        norms, wide = apply(_NormsAndInput, x, seen, self._has_values)
        self.wide.append((x, wide))
        return norms

    def widened(self, call: AttentionCall) -> AttentionCall:
        if not self.wide:
            return call
        q = k = None
        for x, other in self.wide:
            q, k = other if x is call.q else q, other if x is call.k else k
        if not self._has_values:
            return call._replace(wide_q=q, wide_k=k)
        _, _, *rest = call  # torch 2.8 traces no slice
        q, k = call.q if q is None else q, call.k if k is None else k
        return AttentionCall(q, k, *rest)  # pyright: ignore[reportArgumentType]


class _NormsAndInput(Function):
    """Norms of x [B, H, S, D], fp32 [B, H, S], and fp32 of x's shape: gradients of both are added, and rounded once.

    has_values   the second holds the values of x; else it has no memory, and only takes a gradient
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, seen, has_values):
        if has_values:
            wide = x.view_as(x) if x.dtype == torch.float32 else x.float()
        else:
            wide = x.new_empty((), dtype=torch.float32).expand(x.shape)
        return _key_norms(x, seen), wide

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, seen, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, seen, output[0])

    @staticmethod
    @first_order
    def backward(ctx, saved, d_norms, d_wide):
        x, seen, norms = saved
        if d_norms is None:
            return (None if d_wide is None else d_wide.to(x.dtype)), None, None
        run = kernels().key_norms_backward if runs_eagerly(*saved, d_norms, d_wide) else _key_norms_backward_operator
        return run(x, seen, norms, d_norms, d_wide), None, None


def _keep_norms(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output)


@first_order
def _of_norms(ctx, saved, d_norms):
    return _key_norms_backward_operator(*saved, d_norms, None), None


_key_norms_operator.register_autograd(_of_norms, setup_context=_keep_norms)
