"""A stand-in for SGLang's compiled kernels, which the wheel `sgl_kernel` of a CPU build brings and PyPI does not have.

SGLang imports names from it at start; on a CPU without AMX its layers compute by PyTorch and call none. A call raises
NotImplementedError. Models whose files ask torch.ops.sgl_kernel for operators are not imported.
"""

__version__ = "0"


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name}")

    return missing
