"""Tables of configs as files: round trips, faults, and the key of a call."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from tritonattn.tuning import fingerprint, table
from tritonattn.tuning.config import OPTIONS, SHARES, Problem, Target, TileConfig
from tritonattn.tuning.table import Entry, Key, Table, TableError, keys, read_table, write_table

CONFIG = TileConfig(128, 64, 8, 2)
KEY = Key("forward", 128, "query", "long")


def keys_of(kernel: str, problem: Problem, target: str = "sm_90") -> tuple[Key, ...]:
    return table.keys_of(kernel, problem, Target.parse(target))


def example(entries: int = 1) -> Table:
    keys = [KEY, Key("decode", 64, "none", "short"), Key("grad_query", 96, "query+key+gradient", "long")][:entries]
    found = {key: Entry(CONFIG, "static", {"registers": 200}) for key in keys}
    return Table("a100", Target("cuda", "80"), "0123456789abcdef", found)


def test_a_written_table_is_read_back(tmp_path):
    path = tmp_path / "new folder" / "a100.json"
    write_table(path, example(3))
    assert read_table(path) == example(3)
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644, "others may read it"
    assert not any(name in example(3).text() for name in (*SHARES, *OPTIONS))
    shared = [replace(CONFIG, **one) for one in ({"l2_percent": 200}, {"split_blocks": 16}, {"waves_per_eu": 2})]
    shared.append(replace(CONFIG, descriptors=True, warp_specialize=True))
    entries = {key: Entry(one, "measured", {}) for key, one in zip(keys(), shared, strict=False)}
    write_table(path, replace(example(3), entries=entries))
    assert read_table(path).entries == entries
    assert replace(example(3), entries=dict(reversed(example(3).entries.items()))).text() == example(3).text()


DEEP = "[" * 100_000 + "]" * 100_000
FILES = {
    "empty": ("", "Expecting value"),
    "truncated": (example().text()[:90], "a100.json"),
    "not UTF-8": (b"\xff\xfe\x00", "utf-8"),
    "a list": ("[]", "expected an object, got list"),
    "deep": (DEEP, "a100.json"),
    "a huge number": ('{"schema_version": ' + "9" * 5000 + "}", "a100.json"),
    "huge": (" " * (2**22 + 1), "expected at most 4194304 bytes"),
    "without a schema": ("{}", "schema_version: expected 1, got None"),
    "a name twice": ('{"gpu": "h100", "gpu": "a100"}', "expected each name once, got 'gpu' 2 times"),
}
KEYS = (
    "../../etc/passwd row_terms/64/none/long forward/65/none/long forward/64/query+gradient/long forward/64/none/longer"
)
TARGETS = "H100", "sm_12", "sm_\u00b2", "gfx" + 10**6 * "9"  # LLVM ends the process over some
FIELDS = [
    ({"schema_version": 2}, "schema_version: expected 1, got 2"),
    ({"schema_version": True}, "schema_version: expected 1, got True"),
    ({"gpu": 5}, "gpu: expected str, got 5"),
    *(({"target": name}, "target: expected sm_<number from 70>") for name in TARGETS),
    ({"target": "gfx942\nroot"}, r"target: expected sm_<number from 70> .*gfx942\\nroot"),
    ({"kernels": None}, "kernels: expected str, got None"),
    ({"entries": []}, "entries: expected dict"),
    ({"faster": 3}, "faster: expected str, got 3"),
    *(({"entries": {key: {}}}, "entries: expected kernel/head_dim/scales/lengths") for key in KEYS.split()),
    ({"entries": {str(KEY): "128"}}, "expected an object with a config"),
    ({"entries": {str(KEY): {"config": {"block_m": 16}, "source": "static"}}}, "config: expected block_m"),
    ({"entries": {str(KEY): {"config": asdict(CONFIG), "source": "guess"}}}, "source: expected one of"),
]
CONFIGS = [
    {"command": "rm"},
    {"block_m": 128.0},
    {"num_warps": True},
    {"descriptors": 1},
    {"block_n": 10**300},
    {"block_m": 2048},
    {"num_warps": 64},
    {"num_stages": 17},
    {"num_stages": -1},
    {"block_m": 0},
    {"block_m": "128"},
    {"l2_percent": 0},
    {"l2_percent": 10_001},
    {"split_blocks": 8.0},
    {"waves_per_eu": -1},
    {"waves_per_eu": 9},
    {"warp_specialize": 1},
]


@pytest.mark.parametrize("fault", FILES)
def test_faults_of_files(fault, tmp_path):
    content, message = FILES[fault]
    path = tmp_path / "a100.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TableError, match=message):
        read_table(path)


def test_faults_of_fields(tmp_path):
    path = tmp_path / "a100.json"
    configs = [{"config": asdict(CONFIG) | one, "source": "static"} for one in CONFIGS]
    for fields, message in [*FIELDS, *(({"entries": {str(KEY): entry}}, str(KEY)) for entry in configs)]:
        path.write_text(json.dumps(json.loads(example().text()) | fields), encoding="utf-8")
        with pytest.raises(TableError, match=message) as caught:
            read_table(path)
        assert len(str(caught.value)) < len(str(path)) + 400


def test_the_key_of_a_call():
    problem = Problem(64, 64, torch.bfloat16, softcap=True, right=True)
    assert keys_of("forward", problem) == (Key("forward", 64, "none", "long"),)
    assert keys_of("forward", replace(problem, query_scale=True, short=True)) == (Key("forward", 64, "query", "short"),)
    assert keys_of("forward", replace(problem, key_scale=True)) == (Key("forward", 64, "query+key", "long"),)
    assert keys_of("row_terms", problem) == ()
    assert {keys_of("decode", replace(problem, **one)) for one in ({"block_table": True}, {"packed_rows": 32})} == {()}
    of_no_key = [{"dropout": True}, {"mask": True}, {"value_dim": 272}, {"value_dim": 136}, {"dtype": torch.float32}]
    assert {keys_of("forward", replace(problem, **changed)) for changed in of_no_key} == {()}
    assert keys_of("forward", replace(problem, value_dim=40, key_scale=True), "gfx942") == ()
    assert keys_of("forward", replace(problem, head_dim=17, value_dim=144)) == ()


def test_a_head_dim_of_models_has_its_own_key_before_that_of_its_padded_width():
    for sizes, key_scale, target, wanted in (
        ((72, 72), False, "gfx942", [72, 128]),
        ((72, 40), False, "sm_90", [72, 128]),
        ((40, 40), True, "sm_90", [40, 64]),
        ((40, 40), True, "gfx942", [40]),
        ((40, 80), False, "sm_90", [128]),
        ((104, 104), False, "sm_90", [128]),
    ):
        found = keys_of("decode", Problem(*sizes, torch.bfloat16, key_scale=key_scale), target)
        assert [key.head_dim for key in found] == wanted, (sizes, target)


def test_the_gradient_of_a_query_scale_has_keys_of_its_own():
    """It takes registers for its sums."""
    for scales, wanted in (
        ("", "none"),
        ("query_scale", "query"),
        ("query_scale_grad", "query+gradient"),
        ("query_scale query_scale_grad", "query+gradient"),
        ("key_scale", "query+key+gradient"),
        ("query_scale key_scale query_scale_grad", "query+key+gradient"),
    ):
        problem = Problem(64, 64, torch.bfloat16, **dict.fromkeys(scales.split(), True))
        assert [key.scales for key in keys_of("grad_query", problem)] == [wanted]
        assert "gradient" not in keys_of("grad_key_value", problem)[0].scales


def test_every_key_prints_and_parses():
    for key in keys():
        assert Key.parse(str(key)) == key
        assert keys_of(key.kernel, key.problem)[0] == key


def test_the_fingerprint_is_of_the_code_alone():
    code, of = 'def f(x):\n    """Doc."""\n    return x + 1  # why\n', fingerprint._code
    assert of(code) == of("# top\ndef f(x):\n\n    return x + 1\n") != of(code.replace("1", "2"))
    assert of('# top\n\n"""Doc."""\n\nx = "a"\n') == of('x = "a"\n') != of('x = "b"\n')


def test_the_fingerprint_is_of_what_a_gpu_runs():
    code = "ONE = tl.constexpr(1)\n@triton.jit(x=ONE)\ndef f():\n    return ONE\n"
    code += "def launch():\n    return 1\nLIMIT = 1\n"
    on_device = [("constexpr(1)", "constexpr(2)"), ("x=ONE", "y=ONE"), ("return ONE", "return -ONE")]
    on_host = [("launch", "begin"), ("return 1", "return 2"), ("LIMIT = 1", "LIMIT = 2")]
    assert len({fingerprint.device_code([code.replace(*change)]) for change in [("ONE", "ONE"), *on_device]}) == 4
    assert len({fingerprint.device_code([code.replace(*change)]) for change in [("ONE", "ONE"), *on_host]}) == 1
