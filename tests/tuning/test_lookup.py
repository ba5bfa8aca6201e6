"""The table that a call's config comes from; a bad table stops no call."""

import warnings
from dataclasses import replace

import pytest
import torch
import triton

from tests.support.versions import TRITON
from tritonattn.tuning import cache_dir, config, lookup
from tritonattn.tuning.config import Problem, Target, TileConfig
from tritonattn.tuning.defaults import default_config
from tritonattn.tuning.gpus import GPUS, table_name
from tritonattn.tuning.table import Entry, Key, Table, gluon_fingerprint, kernels_fingerprint, write_table

H100, H200 = Target("cuda", "90", "NVIDIA H100 80GB HBM3"), Target("cuda", "90", "NVIDIA H200")
PROBLEM = Problem(64, 64, torch.bfloat16)
KEY = Key("forward", 64, "none", "long")
NEEDS_GLUON = pytest.mark.skipif(TRITON < (3, 6), reason="Gluon needs triton 3.6")
SHIPPED = {gpu.name for gpu in GPUS}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    shipped, user = tmp_path / "shipped", tmp_path / "user"
    shipped.mkdir()
    monkeypatch.setattr(cache_dir, "shipped_tables", lambda: shipped)
    monkeypatch.setattr(cache_dir, "user_cache", lambda: user)
    lookup.clear_cache()
    yield shipped, user / "autotune"
    lookup.clear_cache()


def put(path, block_n: int, *, target=H100, kernels: str = "", key=KEY, version: str = "", **config) -> None:
    entry = Entry(TileConfig(64, block_n, 4, 2, **config), "static", {"triton": version or triton.__version__})
    write_table(path, Table(path.stem, target, kernels or kernels_fingerprint(), {key: entry}))
    lookup.clear_cache()


def found(target: Target = H100, problem: Problem = PROBLEM) -> int:
    return lookup.config_for("forward", problem, target).block_n


def test_the_order_of_the_search(folders):
    shipped, user = folders
    default = default_config("forward", PROBLEM, H100)
    assert lookup.find("forward", PROBLEM, H100)[:3] == (default, None, None)
    put(shipped / "h200.json", 16)
    assert lookup.find("forward", PROBLEM, H100).path == shipped / "h200.json"
    put(shipped / "h100.json", 32)
    assert found() == 32
    put(user / "h100.json", 64)
    assert found() == 64
    invariant = replace(PROBLEM, invariant=True)
    assert lookup.find("forward", invariant, H100)[:3] == (default_config("forward", invariant, H100), None, None)
    assert found(H200) == 16
    assert found(Target("cuda", "90")) in (16, 32)
    assert lookup.find("forward", PROBLEM, Target("cuda", "80", "NVIDIA A100-SXM4-80GB")).path is None


def test_an_entry_of_the_head_dim_comes_before_one_of_its_padded_width(folders):
    shipped, user = folders
    odd = Problem(40, 40, torch.bfloat16)
    put(user / "h100.json", 32)
    assert found(problem=odd) == found() == 32
    put(shipped / "h200.json", 16, key=KEY._replace(head_dim=40))
    assert (found(problem=odd), found()) == (16, 32)


def test_a_damaged_table_is_named_once_and_skipped(folders):
    shipped, user = folders
    put(shipped / "h100.json", 32)
    user.mkdir(parents=True)
    (user / "h100.json").write_text('{"schema_version": 7}', encoding="utf-8")
    with pytest.warns(UserWarning, match=r"skips a table .*user.autotune.h100.json.*expected 1, got 7"):
        assert found() == 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found() == 32


def test_a_table_for_other_kernels_or_another_gpu_is_skipped(folders):
    shipped, _ = folders
    put(shipped / "h100.json", 32, kernels="feedfeedfeedfeed")
    with pytest.warns(UserWarning, match="kernels: expected .*, got 'feedfeedfeedfeed'"):
        assert lookup.find("forward", PROBLEM, H100).path is None
    write_table(shipped / "h100.json", Table("h200", H200, kernels_fingerprint(), {}))
    lookup.clear_cache()
    with pytest.warns(UserWarning, match="gpu: expected h100, got 'h200'"):
        assert lookup.find("forward", PROBLEM, H100).path is None
    for other in (Target("hip", "gfx942"), Target("cuda", "100")):
        put(shipped / "h100.json", 32, target=other)
        with pytest.warns(UserWarning, match=f"target: expected sm_90, got {other.name}"):
            assert lookup.find("forward", PROBLEM, H100).path is None


def test_a_config_that_a_compiler_refused_is_passed_over(folders):
    """For that call alone, with a warning, until the files are read again."""
    shipped, user = folders
    put(shipped / "h100.json", 32)
    put(user / "h100.json", 64)
    other = Problem(64, 64, torch.bfloat16, right=True)
    refused, why = lookup.config_for("forward", PROBLEM, H100), RuntimeError("out of resource")
    with pytest.warns(UserWarning, match=r"skips a tuned config: .*user.autotune.h100.json: forward/.*out of resource"):
        assert lookup.reject_config("forward", PROBLEM, H100, refused, why)
    assert (found(), found(problem=other)) == (32, 64)
    assert not lookup.reject_config("forward", PROBLEM, H100, refused, why)  # is in use no more
    assert found() == 32
    lookup.clear_cache()
    assert found() == 64
    single = Problem(64, 64, torch.float32)
    assert not lookup.reject_config("forward", single, H100, lookup.config_for("forward", single, H100), why)


def test_an_entry_of_another_triton_serves_as_long_as_its_code_does_not_spill(folders):
    """Its code is seen when a call compiles it; that of an entry of this Triton was read when it was found."""
    shipped, user = folders
    put(shipped / "h100.json", 32)
    put(user / "h100.json", 64, version="3.1.4")
    used = lookup.find("forward", PROBLEM, H100)
    assert (used.config.block_n, used.is_of_another_triton) == (64, True)
    assert not lookup.refuse_spills("forward", PROBLEM, H100, used.config, 0)
    assert not lookup.refuse_spills("forward", PROBLEM, H100, TileConfig(16, 16, 4, 1), 9), "not the one in use"
    with pytest.warns(UserWarning, match=rf"user.*h100.json: {KEY}: .*triton {triton.__version__} spills 9 .*3\.1\.4"):
        assert lookup.refuse_spills("forward", PROBLEM, H100, used.config, 9)
    used = lookup.find("forward", PROBLEM, H100)
    assert (used.config.block_n, used.is_of_another_triton) == (32, False)
    assert not lookup.refuse_spills("forward", PROBLEM, H100, used.config, 9)
    single = Problem(64, 64, torch.float32)
    default = lookup.find("forward", single, H100)
    assert not default.is_of_another_triton
    assert not lookup.refuse_spills("forward", single, H100, default.config, 9)


NEAREST = {
    ("NVIDIA H20", "sm_90"): ["h200", "h100"],
    ("NVIDIA GH200 480GB", "sm_90"): ["h100", "h200"],
    ("NVIDIA H200", "sm_90"): ["h200", "h100"],
    ("NVIDIA GeForce RTX 4090", "sm_89"): ["l40s"],
    ("AMD Instinct MI325X", "gfx942"): ["mi300x"],
    ("NVIDIA GB10", "sm_121"): [],
}


@pytest.mark.parametrize("card", NEAREST, ids=lambda card: card[0])
def test_a_card_takes_the_tables_of_the_nearest(card, folders):
    """Near in processors and FLOP per byte of memory, within its architecture: an H20 has few of either."""
    shipped, user = folders
    name, arch = card
    target = Target.parse(arch)._replace(card=name)
    tables = [path.stem for path in lookup.paths(target) if path.parent == shipped]
    assert [table for table in tables if table in SHIPPED] == NEAREST[card]
    assert lookup.paths(target)[0] == user / f"{table_name(target)}.json"


def test_an_illegal_entry_never_runs(folders):
    shipped, user = folders
    put(shipped / "h100.json", 32)
    put(user / "h100.json", 64, descriptors=True)
    assert found() == 64
    unaligned = Problem(64, 64, torch.bfloat16, aligned=False)
    assert found(problem=unaligned) == 32, "descriptors cannot address it"
    put(user / "h100.json", 1024)
    assert found() == 32, "too much shared memory"


def in_use(problem: Problem = PROBLEM, target: Target = H100) -> str:
    return lookup.config_for("forward", problem, target).kernel


def put_gluon(path, fingerprint: str | None = None) -> None:
    details = {"triton": triton.__version__, "gluon": fingerprint or gluon_fingerprint()}
    entry = Entry(TileConfig(192, 128, 4, 2, descriptors=True, kernel="gluon"), "measured", details)
    write_table(path, Table(path.stem, H100, kernels_fingerprint(), {KEY: entry}))
    lookup.clear_cache()


@NEEDS_GLUON
def test_a_table_may_name_the_kernel_in_gluon(folders):
    """Another such kernel makes its entry stale, and no other entry of the table."""
    put_gluon(folders[0] / "h100.json")
    assert in_use() == "gluon"
    put_gluon(folders[0] / "h100.json", "0123456789abcdef")
    with pytest.warns(UserWarning, match="Gluon's is asked for: .*forward/64/none/long: of another such kernel"):
        assert in_use() == "triton"


@NEEDS_GLUON
def test_the_kernel_in_gluon_is_forced_where_it_is_legal_and_makes_way_where_refused(folders, monkeypatch):
    monkeypatch.setenv("TRITONATTN_GLUON", "1")
    assert in_use() == "gluon"
    assert lookup.config_for("grad_query", PROBLEM, H100).kernel == "triton"
    assert in_use(replace(PROBLEM, invariant=True)) == "triton"
    for problem, target, reason in (
        (replace(PROBLEM, mask=True), H100, "no mask"),
        (PROBLEM, Target.parse("sm_100"), "sm_90"),
        (replace(PROBLEM, head_dim=32, value_dim=32), H100, "64, 128 and 256"),
    ):
        with pytest.warns(UserWarning, match=reason):
            assert in_use(problem, target) == "triton"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert in_use(problem, target) == "triton"
    chosen = lookup.config_for("forward", PROBLEM, H100)
    with pytest.warns(UserWarning, match="TRITONATTN_GLUON: forward: .*no such name"):
        assert lookup.reject_config("forward", PROBLEM, H100, chosen, AttributeError("no such name"))
    assert in_use() == "triton"
    lookup.clear_cache()
    monkeypatch.setattr(config, "triton_version", lambda: (3, 5))
    with pytest.warns(UserWarning, match="gluon needs triton 3.6"):
        assert in_use() == "triton"
