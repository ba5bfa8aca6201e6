"""Memory, matrix, warp and synchronisation instructions: calls of the machine."""

from __future__ import annotations

import re

from numpy import uint64 as u8

from .access import Access, MatrixAccess, TensorCopy, WarpgroupProduct, WarpOperation
from .atomics import OPERATIONS
from .flow import guarded_by
from .instruction import Instruction, access_width, vector_length
from .matrix_units import ProductGroup
from .operands import Operands, elements, raw_type
from .tensor_map import FIELDS
from .types import TYPES

PARAMETER_SYMBOL = ".param"  # the address of the copy of parameters that are arrays
_WGMMA = re.compile(r"m64n(\d+)k(\d+)\.f32\.(f16|bf16|tf32)\.")
_REFUSED_COPIES = {
    "tile::gather4", "tile::scatter4", "im2col", "im2col_no_offs", "multicast::cluster", "cta_group::1", "cta_group::2",
}  # fmt: skip


class MemoryCode(Operands):
    """Each `translate_*` returns the lines of one instruction; NotImplementedError for what is not supported."""

    def translate_cvta(self, one: Instruction, act: str | None) -> list[str]:
        if not {"global", "param"} & set(one.parts):
            raise NotImplementedError
        expression = self.read(one.sources[0], "b64")
        if "param" in one.parts:
            expression += f"+{self.constant(u8(self.symbols[PARAMETER_SYMBOL]))}"
        return self.write(one.results[0], expression, "b64", act)

    # ---- loads, stores, atomics
    def _access(self, one: Instruction, registers: tuple = (), operation: str | None = None) -> Access:
        if "async" in one.parts or any("::cluster" in part for part in one.parts):
            raise NotImplementedError
        space = next(space for space in ("shared", "global", "local", "param", "const") if one.names(space))
        size, vector = TYPES[one.parts[-1]].size, vector_length(one)
        return Access(one, "global" if space == "const" else space, one.parts[-1], size, vector, registers, operation)

    def _memory_address(self, one: Instruction, access: Access) -> str:
        operand = next(operand for operand in one.operands if operand.form == "memory")
        narrow = access.space != "global" and operand.value.form != "register"
        return self.address(operand, "b32" if narrow else None)

    def translate_ld(self, one: Instruction, act: str | None) -> list[str]:
        access = self._access(one, tuple(self.register_or_none(part) for part in elements(one.results[0])))
        if access.space == "param":
            source = one.sources[0]
            name = source.value.value
            return [f"m.load_parameter({self.constant(access)},R,{name!r},{source.offset},{act})"]
        return [f"m.load({self.constant(access)},R,{self._memory_address(one, access)},{act})"]

    translate_ldu = translate_ld

    def translate_st(self, one: Instruction, act: str | None) -> list[str]:
        access = self._access(one)
        if access.space == "param":
            raise NotImplementedError
        values = ",".join(self.read(part, raw_type(access.type)) for part in elements(one.operands[1]))
        return [f"m.store({self.constant(access)},{self._memory_address(one, access)},[{values}],{act})"]

    def translate_atom(self, one: Instruction, act: str | None) -> list[str]:
        operation = one.one_of(*OPERATIONS)
        registers = tuple(self.register_or_none(part) for part in one.results)
        access = self._access(one, registers, operation)
        address, raw = self._memory_address(one, access), raw_type(access.type)
        name = self.constant(access)
        operands = [operand for operand in one.sources if operand.form != "memory"]
        if access.vector > 1:  # one element after the other
            if one.base != "red":
                raise NotImplementedError
            step, values = access.size, elements(operands[0])
            return [
                f"m.atomic({name},R,{address}+u8({step * i}),{self.read(value, raw)},None,{act})"
                for i, value in enumerate(values)
            ]
        values = [self.read(operand, raw) for operand in operands[: 2 if operation == "cas" else 1]]
        return [f"m.atomic({name},R,{address},{values[0]},{values[1] if len(values) > 1 else None},{act})"]

    translate_red = translate_atom

    # ---- cp.async
    def translate_cp(self, one: Instruction, act: str | None) -> list[str]:
        parts = one.parts
        if "bulk" in parts:
            return self._bulk(one, act)
        if parts[1] != "async":
            raise NotImplementedError
        if parts[2] == "commit_group":
            return [f"m.commit_async_copies({act})"]
        if parts[2] == "wait_group":
            return [f"m.wait_async_copies({one.operands[0].value},{act})"]
        if parts[2] == "wait_all":
            return [f"m.wait_async_copies(None,{act})"]
        if parts[2] not in ("ca", "cg"):
            raise NotImplementedError
        width, optional = access_width(one), one.operands[3:]
        if any("cache_hint" in part for part in parts):
            optional = optional[:-1]
        size = "None"
        if optional:
            size = self.read(optional[0], "u32")
            if optional[0].form == "register" and self.kernel.register_sizes[optional[0].value] == 0:
                size = f"np.where({self.read(optional[0], 'pred')},u4(0),u4({width}))"  # a predicate: ignore the source
        access = self.constant(Access(one, "global", "b8", 1, width))
        destination, source = self.address(one.operands[0], "b32"), self.address(one.operands[1], "b64")
        return [f"m.copy_async({access},{destination},{source},{size},{act})"]

    # ---- bulk tensor copies, tensor maps, mbarriers
    def _bulk(self, one: Instruction, act: str | None) -> list[str]:
        parts = one.parts
        if parts[-1] == "commit_group":
            return [f"m.commit_bulk_stores({act})"]
        if "wait_group" in parts:
            return [f"m.wait_bulk_stores({one.operands[0].value},{act})"]
        hints = sum("cache_hint" in part for part in parts)
        if "tensor" not in parts or len(one.operands) > 3 + hints or set(parts) & _REFUSED_COPIES:
            raise NotImplementedError
        tensor = next(operand for operand in one.operands if operand.form == "tensor").value
        descriptor = self.address(tensor[0], "b64")
        coordinates = ",".join(self.read(one, "u32") for one in tensor[1:])
        if one.operands[0].form == "tensor":
            operation = parts[parts.index("bulk_group") - 1] if parts[1] == "reduce" else None
            if operation is not None and operation not in OPERATIONS:
                raise NotImplementedError
            copy, source = self.constant(TensorCopy(one, operation)), self.address(one.operands[1], "b32")
            return [f"m.bulk_store({copy},{descriptor},[{coordinates}],{source},{act})"]
        copy = self.constant(TensorCopy(one))
        destination, barrier = self.address(one.operands[0], "b32"), self.address(one.operands[2], "b32")
        return [f"m.bulk_load({copy},{destination},{descriptor},[{coordinates}],{barrier},{act})"]

    def translate_tensormap(self, one: Instruction, act: str | None) -> list[str]:
        if one.parts[1] == "cp_fenceproxy":
            destination, source = (self.address(operand, "b64") for operand in one.operands[:2])
            return [f"m.copy_map({self.constant(one)},{destination},{source},{act})"]
        if not one.names("shared"):
            raise NotImplementedError
        field, target = FIELDS[one.parts[3]], one.operands[0]
        offset = field.offset + (field.size * one.operands[1].value if len(one.operands) == 3 else 0)
        access = self.constant(Access(one, "shared", f"b{8 * field.size}", field.size))
        address = self.address(target._replace(offset=target.offset + offset), "b32")
        return [f"m.store({access},{address},[{self.read(one.operands[-1], f'b{8 * field.size}')}],{act})"]

    def translate_mbarrier(self, one: Instruction, act: str | None) -> list[str]:
        parts, name = one.parts, self.constant(one)
        if any("cluster" in part for part in parts if "shared" in part) or not one.names("shared"):
            raise NotImplementedError
        address = self.address(next(operand for operand in one.operands if operand.form == "memory"), "b32")
        if parts[1] in ("init", "inval"):
            arrivals = one.operands[1].value if parts[1] == "init" else None
            return [f"m.init_barrier({name},{address},{arrivals},{act})"]
        if parts[1] in ("try_wait", "test_wait") and "parity" in parts:
            lines = [f"c=m.wait_barrier({name},{address},{self.read(one.sources[1], 'u32')},{act})"]
            return lines + self.write(one.results[0], "c", "pred", act, full=True)
        returns_state = bool(one.results) and one.results[0].form != "sink"
        if parts[1] not in ("arrive", "expect_tx") or "noComplete" in parts or returns_state:
            raise NotImplementedError
        value = self.read(one.sources[1], "u32") if len(one.sources) > 1 else "1"
        expects = "expect_tx" in parts
        count = "0" if parts[1] == "expect_tx" else "1" if expects else value
        return [f"m.arrive({name},{address},{count},{value if expects else '0'},{act})"]

    # ---- warps and matrices
    def translate_elect(self, one: Instruction, act: str | None) -> list[str]:
        lane, elected = elements(one.results[0])
        ballot = self.constant(WarpOperation(one, "ballot"))
        return [
            f"x=m.vote({ballot},np.ones(m.lanes,bool),{act})",
            "x=highest_bit(x&(u4(0)-x))",
            *self.write(lane, "x", "b32", act, full=True),
            *self.write(elected, "x==S['%laneid']", "pred", act, full=True),
        ]

    def _matrix(self, one: Instruction, act: str | None) -> list[str]:
        if "m8n8" not in one.parts or one.parts[-1] != "b16":
            raise NotImplementedError
        loads = one.base == "ldmatrix"
        memory, values = one.operands[::-1] if loads else one.operands
        count, registers = int(one.one_of("x1", "x2", "x4")[1:]), elements(values)
        access = MatrixAccess(one, count, "trans" in one.parts, tuple(map(self.register_or_none, registers)))
        name, address = self.constant(access), self.address(memory, "b32")
        if loads:
            return [f"m.load_matrix({name},R,{address},{act})"]
        return [f"m.store_matrix({name},{address},[{','.join(self.read(part, 'b32') for part in registers)}],{act})"]

    translate_ldmatrix = translate_stmatrix = _matrix

    def translate_mma(self, one: Instruction, act: str | None) -> list[str]:
        group = ProductGroup(one)
        group.add(one)
        return [f"m.multiply({self.constant(group.close())},R,{act})"]

    def translate_wgmma(self, one: Instruction, act: str | None) -> list[str]:
        if one.parts[1] == "fence":
            return []
        if one.parts[1] == "commit_group":
            return [f"m.commit_products({act})"]
        if one.parts[1] == "wait_group":
            return [f"m.wait_products({one.operands[0].value},{act})"]
        shape = _WGMMA.search(one.opcode)
        if shape is None or "sp" in one.parts:
            raise NotImplementedError
        d, a, b, accumulate, *rest = one.operands
        a_sign, b_sign, *transposed = (operand.value for operand in rest)
        a_transposed, b_transposed = [0, 0, *transposed][-2:]
        product = WarpgroupProduct(
            one,
            int(shape[1]),
            int(shape[2]),
            shape[3],
            a_sign * b_sign,
            bool(a_transposed),
            bool(b_transposed),
            tuple(part.value for part in d.value),
            guarded_by(one),
        )
        if a.form == "vector":
            left = f"[{','.join(self.read(part, 'b32') for part in a.value)}]"
        else:
            left = self.read(a, "b64")
        added = bool(accumulate.value) if accumulate.form == "integer" else self.read(accumulate, "pred")
        return [f"m.multiply_warpgroup({self.constant(product)},R,{left},{self.read(b, 'b64')},{added},{act})"]

    def translate_shfl(self, one: Instruction, act: str | None) -> list[str]:
        operation = self.constant(WarpOperation(one, one.one_of("up", "down", "bfly", "idx")))
        value, step, clamp = (self.read(source, "b32") for source in one.sources[:3])
        if one.sources[0].form != "register":
            value = f"np.full(m.lanes,{value})"
        lines = [f"x,c=m.shuffle({operation},{value},{step},{clamp},{act})"]
        for result, name, type_name in zip(elements(one.results[0]), ("x", "c"), ("b32", "pred"), strict=False):
            lines += self.write(result, name, type_name, act, full=True)
        return lines

    def translate_vote(self, one: Instruction, act: str | None) -> list[str]:
        mode = one.one_of("ballot", "any", "all", "uni")
        lines = [f"x=m.vote({self.constant(WarpOperation(one, mode))},{self.read(one.sources[0], 'pred')},{act})"]
        return lines + self.write(one.results[0], "x", "b32" if mode == "ballot" else "pred", act, full=True)

    def translate_activemask(self, one: Instruction, act: str | None) -> list[str]:
        lines = [f"x=m.vote({self.constant(WarpOperation(one, 'ballot'))},np.ones(m.lanes,bool),{act})"]
        return lines + self.write(one.results[0], "x", "b32", act, full=True)

    def translate_redux(self, one: Instruction, act: str | None) -> list[str]:
        operation = WarpOperation(one, one.one_of("add", "min", "max", "and", "or", "xor"))
        lines = [f"x=m.reduce({self.constant(operation)},{self.read(one.sources[0], one.parts[-1])},{act})"]
        return lines + self.write(one.results[0], "x", one.parts[-1], act, full=True)

    # ---- order
    def translate_bar(self, one: Instruction, act: str | None) -> list[str]:
        """The scheduler does the rest; lanes of a warp run in step, so bar.warp.sync is nothing."""
        if "warp" in one.parts:
            return []
        literal = all(operand.form == "integer" for operand in one.operands) or self.specialised
        if set(one.parts) & {"red", "arrive", "cluster"} or one.predicate is not None or not literal:
            raise NotImplementedError
        if len(one.operands) > 1 and not self.specialised:
            return [f"m.require_whole_cta({self.constant(one)},{one.operands[1].value})"]
        return []

    translate_barrier = translate_bar

    def translate_fence(self, one: Instruction, act: str | None) -> list[str]:
        if "acquire" in one.parts and one.operands:
            return [f"m.acquire_map({self.constant(one)},{self.address(one.operands[0], 'b64')},{act})"]
        return [f"m.fence_proxy({act})"] if "async" in one.parts else []

    def _nothing(self, one: Instruction, act: str | None) -> list[str]:
        return []

    translate_setmaxnreg = translate_membar = translate_prefetch = translate_nanosleep = translate_discard = _nothing
    translate_nop = _nothing  # `Instruction.left_out`
