"""Tables of configs as files: round trips, faults, and the key of a call."""

import json
import os
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
    os.umask(mask := os.umask(0))
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask, "others may read it where the process lets them"
    assert not any(name in example(3).text() for name in (*SHARES, *OPTIONS))
    shared = [replace(CONFIG, **one) for one in ({"l2_percent": 200}, {"split_blocks": 16}, {"waves_per_eu": 2})]
    shared.append(replace(CONFIG, descriptors=True, warp_specialize=True))
    entries = {key: Entry(one, "measured", {}) for key, one in zip(keys(), shared, strict=False)}
    write_table(path, replace(example(3), entries=entries))
    assert read_table(path).entries == entries
    assert replace(example(3), entries=dict(reversed(example(3).entries.items()))).text() == example(3).text()


DEEP = "[" * 100_000 + "]" * 100_000
FILES = {
    "no object": ("null", "expected an object, got NoneType"),
    "empty": ("", "Expecting value"),
    "not UTF-8": (b"\xff\xfe\x00", "utf-8"),
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
    {"num_stages": 0},
    {"block_m": "128"},
    {"waves_per_eu": -1},
    {"waves_per_eu": 9},
    {"kernel": "cuda"},
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


# By kernel: what differs from causal bf16 of head dim 64, and head dims, scales and length of its keys on sm_90.
KEYS_OF = {
    "forward": [
        ({"softcap": True}, "64/none/long"),
        ({"query_scale": True, "short": True}, "64/query/short"),
        ({"key_scale": True}, "64/query+key/long"),
        *(({name: True}, "") for name in ("dropout", "mask")),
        *(({"value_dim": dim}, "") for dim in (272, 136)),
        ({"dtype": torch.float32}, ""),
        ({"head_dim": 17, "value_dim": 144}, ""),
    ],
    "row_terms": [({}, "")],
    "decode": [
        ({"block_table": True}, ""),
        ({"packed_rows": 32}, ""),
        ({"head_dim": 72, "value_dim": 72}, "72/none/long 128/none/long"),
        ({"head_dim": 72}, "72/none/long 128/none/long"),
        ({"head_dim": 40, "value_dim": 40, "key_scale": True}, "40/query+key/long 64/query+key/long"),
        ({"head_dim": 40, "value_dim": 80}, "128/none/long"),
        ({"head_dim": 104, "value_dim": 104}, "128/none/long"),
    ],
    "grad_key_value": [({"query_scale_grad": True}, "64/none/long")],
    "tangent": [
        ({}, "64/query/long"),
        ({"head_dim": 72, "value_dim": 80, "key_scale": True}, "128/query+key/long"),
        ({"head_dim": 192, "key_bias": True, "query_scale_grad": True}, "256/query/long"),
        *(({name: True}, "") for name in ("softcap", "key_ranges", "bias", "dropout")),
    ],
    "grad_query": [
        ({}, "64/none/long"),
        ({"query_scale": True}, "64/query/long"),
        ({"query_scale_grad": True}, "64/query+gradient/long"),
        ({"query_scale": True, "query_scale_grad": True}, "64/query+gradient/long"),
        ({"key_scale": True}, "64/query+key+gradient/long"),
        ({"query_scale": True, "key_scale": True, "query_scale_grad": True}, "64/query+key+gradient/long"),
    ],
}


@pytest.mark.parametrize("kernel", KEYS_OF)
def test_the_keys_of_a_call(kernel):
    """A head dim of models has a key before that of its padded width; gradients of a query scale have other keys."""
    problem = Problem(64, 64, torch.bfloat16, right=True)
    for changed, wanted in KEYS_OF[kernel]:
        found = keys_of(kernel, replace(problem, **changed))
        assert " ".join(map(str, found)) == " ".join(f"{kernel}/{one}" for one in wanted.split()), changed


def test_key_scales_of_odd_head_dims_have_no_keys_of_a_padded_width_on_amd():
    problem = Problem(40, 40, torch.bfloat16, right=True)
    assert [key.head_dim for key in keys_of("forward", problem, "gfx942")] == [40, 64]
    assert [key.head_dim for key in keys_of("forward", replace(problem, key_scale=True), "gfx942")] == [40]
    assert keys_of("forward", replace(problem, head_dim=64, key_scale=True), "gfx942") == ()


def test_every_key_prints_and_parses():
    for key in keys():
        assert Key.parse(str(key)) == key
        assert keys_of(key.kernel, key.problem)[0] == key


def test_the_fingerprint_is_of_the_code_alone():
    code, of = 'def f(x):\n    """Doc."""\n    return x + 1  # why\n', fingerprint._code
    assert of(code) == of("# top\ndef f(x):\n\n    return x + 1\n") != of(code.replace("1", "2"))
    assert of('# top\n\n"""Doc."""\n\nx = "a"\n') == of('x = "a"\n') != of('x = "b"\n')
