"""A context that records the operators of a piece of code and the largest memory that they fill."""

from collections import Counter

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Counts operators by name ("aten::bmm") and notes the most bytes of a result in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.calls[operator._schema.name] += 1
        given = {_memory(x).data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _memory(leaf).data_ptr() not in given:
                self.largest = max(self.largest, _memory(leaf).nbytes())
        return result


def _memory(x: Tensor) -> UntypedStorage:
    return x.untyped_storage()
