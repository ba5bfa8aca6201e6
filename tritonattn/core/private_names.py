"""Names of other libraries that are not public, listed in one place, and what a user gets when one has gone."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

_MISSING: Any = object()


class PrivateName(NamedTuple):
    """A name that a release of its library may take away without notice.

    purpose   what tritonattn reads it for
    without   what a user gets when the name has gone
    """

    purpose: str
    without: str


_NO_IMPORT = "import of tritonattn raises ImportError"
_NO_KERNELS = "calls that take Triton's kernels raise ImportError"
_NO_PATCH = "import of tritonattn.huggingface raises ImportError"
_NOT_SERVED = "the plugin serves no patched model, and a warning says so"

PRIVATE_NAMES = {
    "torch._C._are_functorch_transforms_active": PrivateName("tells whether torch.func transforms a call", _NO_IMPORT),
    "torch._C._len_torch_dispatch_stack": PrivateName("tells whether a dispatch mode records a call", _NO_IMPORT),
    "torch._C._functorch.is_legacy_batchedtensor": PrivateName("tells batched gradients from tensors", _NO_IMPORT),
    "torch.autograd.forward_ad._current_level": PrivateName("tells whether dual numbers are in use", _NO_IMPORT),
    "torch.autograd.forward_ad._set_fwd_grad_enabled": PrivateName("reads a primal inside of a jvp", _NO_IMPORT),
    "torch._C.DisableTorchFunction": PrivateName("calls PyTorch's attention inside of a function mode", _NO_IMPORT),
    "torch._C._nn.scaled_dot_product_attention": PrivateName(
        "tells whether F.scaled_dot_product_attention was replaced",
        "the function that F has when tritonattn is imported is taken for PyTorch's",
    ),
    "torch._C._current_autograd_node": PrivateName(
        "finds the operands of PyTorch's kernel again",
        'gradients of gradients on sdpa raise ImportError; backend="reference" computes them',
    ),
    "torch._C._current_graph_task_id": PrivateName(
        "tells a recomputation of gradient checkpointing from a forward",
        "a Monitor counts calls that a checkpoint recomputes twice",
    ),
    **{
        f"torch.autograd.graph.Node._saved_{name}": PrivateName(
            "reads the operands that PyTorch's kernel saved", "gradients of gradients on sdpa raise ImportError"
        )
        for name in ("query", "key", "value")
    },
    "torch.distributed.tensor.experimental._attention._cp_options": PrivateName(
        "reads the layout of torch's context_parallel", "calls inside of that context raise NotImplementedError"
    ),
    "torch._assert_async": PrivateName(
        "checks on the device that a compiled padding mask has no holes",
        "compiled models that are called with a padding mask raise ImportError",
    ),
    "torch._subclasses.FakeTensor": PrivateName(
        "leaves the arguments of a traced call over ranks uncompared", "they are compared, which tracing may refuse"
    ),
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": PrivateName(
        "runs PyTorch's CPU kernel on parts of a call and returns its lse", "such calls take the slower tiles"
    ),
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": PrivateName(
        "differentiates PyTorch's CPU kernel on parts of a call", "such calls take the slower tiles"
    ),
    "torch.ops.aten._softmax_backward_data": PrivateName(
        "differentiates a softmax in one pass", "the gradient of a bias over few keys takes three passes"
    ),
    "triton.runtime.jit.create_function_from_signature": PrivateName(
        "finds the compiled code of a launch without Triton's own look-up", _NO_KERNELS
    ),
    "triton.experimental.gluon._runtime.GluonASTSource": PrivateName(
        "compiles the Hopper kernel ahead of time", "tuning.compile_kernel raises ImportError for that kernel"
    ),
    "transformers.PreTrainedModel._initialize_missing_keys": PrivateName(
        "starts learned values that a checkpoint lacks at the model's own scale", _NO_PATCH
    ),
    "transformers.PreTrainedModel._check_and_adjust_attn_implementation": PrivateName(
        "chooses a model's former attention when a patch is undone", "undo of a loaded patch raises ImportError"
    ),
    "transformers.PreTrainedModel._supports_sdpa": PrivateName(
        "tells models whose layers need explicit masks", "patch raises ImportError"
    ),
    "transformers.AttentionInterface._global_mapping": PrivateName(
        "takes a registered attention away again", "huggingface.unregister raises ImportError"
    ),
    "diffusers.models.attention_dispatch._AttentionBackendRegistry": PrivateName(
        "registers an attention backend", "import of tritonattn.integrations.diffusers raises ImportError"
    ),
    **{
        f"diffusers.models.attention_dispatch._AttentionBackendRegistry.{name}": PrivateName(
            "takes a registered backend away again", "diffusers.unregister raises ImportError"
        )
        for name in ("_backends", "_constraints", "_supported_arg_names")
    },
    "vllm.v1.attention.selector._cached_get_attn_backend": PrivateName(
        "chooses the backend of a patched model", _NOT_SERVED
    ),
    **{
        f"vllm.model_executor.layers.attention.Attention._{name}": PrivateName(
            "reads the factors of 8-bit caches", "layers with 8-bit caches raise ImportError"
        )
        for name in ("k_scale", "k_scale_float", "v_scale", "v_scale_float")
    },
    "vllm.v1.attention.backend.AttentionMetadataBuilder._init_reorder_batch_threshold": PrivateName(
        "puts sequences of one new token first", "a patched model raises ImportError"
    ),
    "vllm.transformers_utils.model_arch_config_convertor.ModelArchConfigConvertorBase._normalize_quantization_config": (
        PrivateName("loads a checkpoint that names tritonattn in its config", _NOT_SERVED)
    ),
    "sglang.srt.configs.model_config.ModelConfig._parse_quant_hf_config": PrivateName(
        "loads a checkpoint that names tritonattn in its config", _NOT_SERVED
    ),
    "sglang.srt.model_loader.loader.DefaultModelLoader._get_weights_iterator": PrivateName(
        "keeps the learned values of a checkpoint", "a patched model raises ImportError"
    ),
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes": PrivateName(
        "leaves room for records of key norms", "a patched model raises ImportError"
    ),
}


def private(path: str, instead: Any = _MISSING) -> Any:
    """Return the object of a name in PRIVATE_NAMES, or `instead` where the installed library lacks it.

    Raises ImportError without `instead`.
    """
    try:
        return _look_up(path)
    except (ImportError, AttributeError) as error:
        if instead is not _MISSING:
            return instead
        raise ImportError(message(path)) from error


def deferred(path: str) -> Callable[..., Any]:
    """Return the function of a name in PRIVATE_NAMES, or a function that raises ImportError when it is called."""

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise ImportError(message(path))

    return private(path, missing)


def attribute(owner: Any, path: str) -> Any:
    """Return the attribute of an object that the last word of a path in PRIVATE_NAMES names, or raise ImportError."""
    try:
        return getattr(owner, path.rpartition(".")[2])
    except AttributeError as error:
        raise ImportError(message(path)) from error


def message(path: str) -> str:
    """Say which name has gone, what it was for, what follows and what to do."""
    package = path.partition(".")[0]
    try:
        installed = f"{package} {version(package)}"
    except PackageNotFoundError:
        installed = f"the installed {package}"
    name = PRIVATE_NAMES[path]
    return (
        f"tritonattn: expected {path}, which {name.purpose}; {installed} has no such name. Without it {name.without}."
        f" Install a {package} that CHANGELOG.md names, or a newer tritonattn"
    )


def _look_up(path: str) -> Any:
    """Import the longest part of a path that is a module, and read the attributes behind it."""
    module_name, names = path, []
    while True:
        try:
            found: Any = import_module(module_name)
            break
        except ModuleNotFoundError:
            module_name, _, name = module_name.rpartition(".")
            if not module_name:
                raise
            names.insert(0, name)
    for name in names:
        found = getattr(found, name)
    return found


DisableTorchFunction = private("torch._C.DisableTorchFunction")
