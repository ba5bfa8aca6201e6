"""Arithmetic instructions as expressions on arrays: their semantics."""

from __future__ import annotations

import numpy as np

from .instruction import Instruction
from .operands import Operands, elements, raw_type
from .types import FLOAT_ENCODINGS, RAW, ROUND_TO_INTEGER, SIXTEEN_BIT_ENCODINGS, TYPES

_EXPRESSIONS = {
    "add": "{0}+{1}", "sub": "{0}-{1}", "mul": "{0}*{1}", "mul.lo": "{0}*{1}", "mul.hi": "multiply_high({0},{1})",
    "mul24.lo": "({0}&u4(0xffffff))*({1}&u4(0xffffff))", "mad.lo": "{0}*{1}+{2}",
    "mad.hi": "multiply_high({0},{1})+{2}", "fma": "fma({0},{1},{2})", "mad": "fma({0},{1},{2})",
    "sad": "np.maximum({0},{1})-np.minimum({0},{1})+{2}", "rem": "integer_remainder({0},{1})",
    "neg": "-{0}", "abs": "np.abs({0})", "copysign": "np.copysign({1},{0})",
    "not": "~{0}", "and": "{0}&{1}", "or": "{0}|{1}", "xor": "{0}^{1}", "lop3": "lop3({0},{1},{2},{3})",
    "brev": "reverse_bits({0})", "rcp": "f4(1)/{0}", "sqrt": "np.sqrt({0})", "rsqrt": "reciprocal_sqrt({0})",
    "ex2": "np.exp2({0})", "lg2": "np.log2({0})", "sin": "np.sin({0})", "cos": "np.cos({0})", "tanh": "np.tanh({0})",
}  # fmt: skip
_MODIFIERS = {"lo", "hi", "wide", "rn", "ftz", "approx", "full", "sat", "relu", "NaN", "noftz"}
_COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
_BOOLEAN = {"and": "&", "or": "|", "xor": "^"}
_ROUNDINGS = ("rn", "rz", "rna", "rni", "rzi", "rmi", "rpi")
_REFUSED_ROUNDINGS = ("rm", "rp", "rs", "satfinite")


class ArithmeticCode(Operands):
    """Each `translate_*` returns the lines of one instruction; NotImplementedError for what is not supported."""

    def translate_arithmetic(self, one: Instruction, act: str | None) -> list[str]:
        """An instruction that applies one expression to its operands, in the type that the opcode ends with."""
        parts, type_name = one.parts, one.parts[-1]
        if "cc" in parts or one.base in ("addc", "subc", "madc"):
            return self._extended_precision(one, act)
        if set(parts[1:-1]) - _MODIFIERS:
            raise NotImplementedError
        if "wide" in parts:
            return self._widening(one, act)
        encoding = TYPES[type_name].encoding
        expression = self._expression(one, encoding)
        operands = [self.read(source, type_name) for source in one.sources]
        flush = "ftz" in parts and type_name in ("f32", "f32x2") and one.base != "ex2"
        if flush:
            operands = [f"flush_subnormals({operand})" for operand in operands]
        expression = expression.format(*operands)
        if flush:
            expression = f"flush_subnormals({expression})"
        if "sat" in parts:
            if encoding not in FLOAT_ENCODINGS:
                raise NotImplementedError
            expression = f"saturate({expression})"
        if "relu" in parts:
            expression = self._relu(expression, type_name)
        return self.write(one.results[0], expression, type_name, act)

    def _expression(self, one: Instruction, encoding: str) -> str:
        if one.base in ("min", "max"):
            if encoding in FLOAT_ENCODINGS:
                return f"float_{one.base}({{0}},{{1}},{'NaN' in one.parts})"
            return f"np.{one.base}imum({{0}},{{1}})"
        if one.base == "div":
            return "{0}/{1}" if encoding in FLOAT_ENCODINGS else "integer_divide({0},{1})"
        if one.base == "fma" and encoding in SIXTEEN_BIT_ENCODINGS:
            return "fma_to_odd({0},{1},{2})"
        if one.base == "ex2" and "ftz" in one.parts and encoding == "float":
            return "exp2_flushed({0})"
        part = next((part for part in ("lo", "hi") if part in one.parts), None)
        return _EXPRESSIONS[f"{one.base}.{part}" if part else one.base]

    def _relu(self, expression: str, type_name: str) -> str:
        """The maximum with 0 of the same type."""
        dtype = np.dtype(TYPES[type_name].dtype if TYPES[type_name].encoding in ("signed", "float") else "f4")
        maximum = "np.maximum({},{})" if TYPES[type_name].encoding == "signed" else "float_max({},{},True)"
        return maximum.format(expression, self.constant(dtype.type(0)))

    def _widening(self, one: Instruction, act: str | None) -> list[str]:
        """mul.wide, mad.wide: the product in twice the bits."""
        narrow = one.parts[-1]
        wide = f"{narrow[0]}{2 * int(narrow[1:])}"
        dtype = TYPES[wide].dtype
        left, right = (f"{self.read(source, narrow)}.astype({dtype})" for source in one.sources[:2])
        expression = f"{left}*{right}"
        if one.base == "mad":
            expression += "+" + self.read(one.sources[2], wide)
        return self.write(one.results[0], expression, wide, act)

    def _extended_precision(self, one: Instruction, act: str | None) -> list[str]:
        """32-bit integer arithmetic with a carry."""
        if act not in (None, "mask") or one.parts[-1] not in ("u32", "s32", "b32"):
            raise NotImplementedError
        a = [f"{self.read(source, 'u32')}.astype(u8)" for source in one.sources]
        base = one.base.removesuffix("c")
        if base == "mad":
            expression = f"(({a[0]}*{a[1]}){'>>u8(32)' if 'hi' in one.parts else '&u8(0xffffffff)'})+{a[2]}"
        else:
            expression = f"{a[0]}{'+' if base == 'add' else '-'}{a[1]}"
        if one.base.endswith("c"):
            expression += "-m.carry" if base == "sub" else "+m.carry"
        lines = [f"x={expression}+np.zeros(m.lanes,u8)"]
        if "cc" in one.parts:
            carry = "(x>>u8(32)&u8(1)).astype(u4)"
            lines.append(f"m.carry={carry}" if act is None else f"m.carry=np.where(mask,{carry},m.carry)")
        return lines + self.write(one.results[0], "x.astype(u4)", "u32", act, full=True)

    def _shift(self, one: Instruction, act: str | None) -> list[str]:
        type_name = one.parts[-1]
        _, size, encoding = TYPES[type_name]
        count = self.read(one.sources[1], "u32")
        if size == 8:
            count += ".astype(u8)"
        if size == 2:
            count = f"np.minimum({count},16).astype(u2)"
        if encoding == "signed":
            count += ".astype(i2)" if size == 2 else f".view(i{size})"
        operator = "<<" if one.base == "shl" else ">>"
        return self.write(one.results[0], f"{self.read(one.sources[0], type_name)}{operator}{count}", type_name, act)

    translate_shl = translate_shr = _shift

    def _bit_search(self, one: Instruction, act: str | None) -> list[str]:
        """popc, clz, bfind: a u32 whatever the operand's type."""
        type_name = one.parts[-1]
        template = {
            "popc": "count_bits({})", "bfind": "highest_bit({})",
            "clz": f"u4({8 * TYPES[type_name].size - 1})-highest_bit({{}})",
        }[one.base]  # fmt: skip
        return self.write(one.results[0], template.format(self.read(one.sources[0], type_name)), "u32", act)

    translate_popc = translate_clz = translate_bfind = _bit_search

    def translate_mov(self, one: Instruction, act: str | None) -> list[str]:
        """Also packs parts into a register, and unpacks them."""
        type_name, result, source = one.parts[-1], one.results[0], one.sources[0]
        if source.form != "vector" and result.form != "vector":
            raw = raw_type(type_name)
            return self.write(result, self.read(source, raw), raw, act)
        size = TYPES[type_name].size
        raw, parts = f"u{size}", elements(source if source.form == "vector" else result)
        part_size = size // len(parts)
        part_type = f"b{8 * part_size}"
        shifts = [8 * part_size * i for i in range(len(parts))]
        if source.form == "vector":
            shifted = [
                f"({self.read(part, part_type)}.astype({raw})<<{raw}({shift}))"
                for part, shift in zip(parts, shifts, strict=True)
            ]
            return self.write(result, "|".join(shifted), type_name, act)
        if source.form != "register":
            raise NotImplementedError
        lines = [f"x={self.read(source, raw_type(type_name))}"]
        for part, shift in zip(parts, shifts, strict=True):
            lines += self.write(part, f"(x>>{raw}({shift})).astype(u{part_size})", part_type, act, full=True)
        return lines

    def translate_cvt(self, one: Instruction, act: str | None) -> list[str]:
        parts = one.parts
        to, source = parts[-2:]
        if set(parts) & set(_REFUSED_ROUNDINGS):
            raise NotImplementedError
        if (to, source) == ("f16x2", "e4m3x2") and len(parts) == 4:
            return self.write(one.results[0], f"half_pair_of_e4m3({self.read(one.sources[0], 'b16')})", "b32", act)
        rounding = next((part for part in parts if part in _ROUNDINGS), None)
        values = [self.read(operand, source) for operand in one.sources]
        if "ftz" in parts and source == "f32":
            values = [f"flush_subnormals({value})" for value in values]
        if "relu" in parts:
            values = [self._relu(value, source) for value in values]
        if to in ("f16x2", "bf16x2"):
            function = self._narrowing(to.removesuffix("x2"), rounding)
            high, low = (f"{function}({value})" for value in values)
            return self.write(one.results[0], f"pack({low},{high})", "b32", act)
        if to == "tf32":
            if rounding != "rna":
                raise NotImplementedError
            return self.write(one.results[0], f"({values[0]}.view(u4)+u4(0x1000))&u4(0xffffe000)", "b32", act)
        from_float, to_float = (TYPES[name].encoding in FLOAT_ENCODINGS for name in (source, to))
        if from_float and to_float:
            return self._float_to_float(one, values[0], to, source, rounding, act)
        dtype = TYPES[to].dtype
        if from_float:
            return self.write(one.results[0], f"to_integer({values[0]},{dtype},{rounding!r})", to, act)
        if (to_float and rounding != "rn") or "sat" in parts:
            raise NotImplementedError
        wide = dtype if not to_float or TYPES[to].encoding == "float" else "f8"
        return self.write(one.results[0], f"{values[0]}.astype({wide})", to, act)

    def _float_to_float(self, one, value: str, to: str, source: str, rounding: str | None, act) -> list[str]:
        if rounding in ROUND_TO_INTEGER:
            value = f"ROUND_TO_INTEGER[{rounding!r}]({value})"
        if "sat" in one.parts:
            value = f"saturate({value})"
        if rounding == "rz" and TYPES[to].size < TYPES[source].size:
            if source != "f32":
                raise NotImplementedError
            return self.write(one.results[0], f"{self._narrowing(to, rounding)}({value})", "b16", act)
        if TYPES[to].encoding == "float":
            value = f"{value}.astype({TYPES[to].dtype})"
        if "ftz" in one.parts and to == "f32":
            value = f"flush_subnormals({value})"
        return self.write(one.results[0], value, to, act)

    def _narrowing(self, to: str, rounding: str | None) -> str:
        """The function from float32 to a 16-bit type."""
        name = {"f16": "to_half", "bf16": "to_bfloat"}[to]
        return {"rn": name, "rz": f"{name}_toward_zero"}[rounding]

    def translate_setp(self, one: Instruction, act: str | None) -> list[str]:
        parts, type_name = one.parts, one.parts[-1]
        comparison, encoding = parts[1], TYPES[type_name].encoding
        combine = next((_BOOLEAN[part] for part in parts[2:-1] if part in _BOOLEAN), None)
        a, b = (self.read(source, type_name) for source in one.sources[:2])
        if encoding in FLOAT_ENCODINGS and comparison not in ("eq", "lt", "le", "gt", "ge"):
            expression = f"compare_floats({comparison!r},{a},{b})"
        else:
            expression = f"{a}{_COMPARISONS[comparison]}{b}"
        lines = [f"c={expression if 'R[' in expression else f'np.full(m.lanes,{expression})'}"]
        results = elements(one.results[0])
        pairs = encoding.endswith("pair") and len(results) == 2
        for i, result in enumerate(results):
            value = f"c[...,{i}]" if pairs else ("c", "~c")[i]
            if combine:
                value = f"({value}){combine}{self.read(one.sources[2], 'pred')}"
            lines += self.write(result, value, "pred", act, full=True)
        return lines

    def translate_selp(self, one: Instruction, act: str | None) -> list[str]:
        raw = raw_type(one.parts[-1])
        yes, no = (self.read(source, raw) for source in one.sources[:2])
        return self.write(one.results[0], f"np.where({self.read(one.sources[2], 'pred')},{yes},{no})", raw, act)

    def translate_slct(self, one: Instruction, act: str | None) -> list[str]:
        raw = raw_type(one.parts[-2])
        yes, no = (self.read(source, raw) for source in one.sources[:2])
        sign = self.read(one.sources[2], one.parts[-1])
        return self.write(one.results[0], f"np.where({sign}>=0,{yes},{no})", raw, act)

    def translate_bfe(self, one: Instruction, act: str | None) -> list[str]:
        type_name = one.parts[-1]
        dtype, size, encoding = TYPES[type_name]
        value, (position, length) = self.read(one.sources[0], raw_type(type_name)), one.sources[1:]
        signed, bits = encoding == "signed", 8 * size
        known = position.form == length.form == "integer"
        if not known or not 0 < length.value <= bits - position.value:
            position, length = (self.read(operand, "u32") for operand in (position, length))
            return self.write(one.results[0], f"extract_bits({value},{position},{length},{signed})", type_name, act)
        if signed:
            number = np.dtype(dtype).type
            left, right = number(bits - position.value - length.value), number(bits - length.value)
            expression = f"({value}.view({dtype})<<{self.constant(left)})>>{self.constant(right)}"
        else:
            field = RAW[size]((1 << length.value) - 1)
            expression = f"({value}>>{self.constant(RAW[size](position.value))})&{self.constant(field)}"
        return self.write(one.results[0], expression, type_name, act)

    def translate_bfi(self, one: Instruction, act: str | None) -> list[str]:
        type_name = one.parts[-1]
        operands = map(self.read, one.sources, (type_name, type_name, "u32", "u32"))
        return self.write(one.results[0], f"insert_bits({','.join(operands)})", type_name, act)

    def translate_prmt(self, one: Instruction, act: str | None) -> list[str]:
        if len(one.parts) != 2:
            raise NotImplementedError
        operands = ",".join(self.read(source, "b32") for source in one.sources)
        return self.write(one.results[0], f"permute_bytes({operands})", "b32", act)

    def translate_shf(self, one: Instruction, act: str | None) -> list[str]:
        operands = ",".join(self.read(source, "b32") for source in one.sources)
        left, wrap = one.parts[1] == "l", "wrap" in one.parts
        return self.write(one.results[0], f"funnel_shift({operands},{left},{wrap})", "b32", act)

    def translate_createpolicy(self, one: Instruction, act: str | None) -> list[str]:
        """A cache policy: of no consequence here."""
        return self.write(one.results[0], self.constant(np.uint64(0)), "b64", act)
