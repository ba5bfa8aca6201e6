"""The package as users get it: a wheel, an editable checkout, a bare interpreter."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fresh(code: str, python: str | Path = sys.executable) -> str:
    """Standard output of code in a fresh process outside the checkout."""
    return run(python, "-I", "-c", code, cwd=ROOT.anchor).strip()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="builds the wheel: pip install 'tritonattn[test]'")
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


def fresh_venv(folder: Path, *install: str | Path) -> Path:
    """The python of a new venv with one thing installed, that sees this interpreter's other packages."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    # Plain path entries: they do not process the .pth file on which an editable tritonattn hangs.
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "others.pth").write_text("\n".join(sorted(others)))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--no-build-isolation", *install)
    return python


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    return fresh_venv(tmp_path_factory.mktemp("venv"), wheel)


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tritonattn", "perf"}
    assert [name for name in names if name.startswith("perf/")] == ["perf/__main__.py"]
    texts = ("lab/demo/data/alice.txt", "lab/texts/wonderland.txt")
    for wanted in ("py.typed", "autotune_cache/README.md", *texts, "kernels/__init__.py"):
        assert f"tritonattn/{wanted}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_works_finds_its_tables_and_has_one_version(installed):
    code = """
import pathlib, torch, tritonattn
from importlib import metadata
from tritonattn.tuning.cache_dir import shipped_tables
q = torch.ones(1, 2, 3, 4)
assert tritonattn.attention(q, q, q, causal=True).shape == q.shape
print(pathlib.Path(tritonattn.__file__).parent, shipped_tables(), (shipped_tables() / "README.md").is_file())
[script] = metadata.entry_points(group="console_scripts", name="tritonattn")
print(tritonattn.__version__, metadata.version("tritonattn"), script.value)
"""
    package, tables, found, own, version, script = fresh(code, installed).split()
    assert Path(package).parent.is_relative_to(installed.parent.parent)
    assert tables == f"{package}/autotune_cache"
    assert found == "True"
    assert (own, script) == (version, "tritonattn.cli.main:main")
    assert run(installed, "-m", "tritonattn", "--version").split() == ["tritonattn", own]


def test_editable_checkout_finds_its_tables_and_leaves_no_copy(tmp_path):
    python = fresh_venv(tmp_path, "--editable", ROOT)
    code = "from tritonattn.tuning.cache_dir import shipped_tables; print(shipped_tables())"
    assert Path(fresh(code, python)) == ROOT / "autotune_cache"
    (site,) = tmp_path.glob("lib/python*/site-packages")
    assert not (site / "tritonattn").exists()


def test_missing_tables_are_named(monkeypatch, tmp_path):
    from tritonattn.tuning import cache_dir

    monkeypatch.setattr(cache_dir, "_PACKAGE", tmp_path / "tritonattn")
    with pytest.raises(FileNotFoundError, match="got neither"):
        cache_dir.shipped_tables()
    for folder in (tmp_path, tmp_path / "tritonattn"):  # what lies beside an installed package is another's
        (folder / "autotune_cache").mkdir(parents=True)
        assert cache_dir.shipped_tables() == folder / "autotune_cache"


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"TRITONATTN_CACHE_DIR": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"TRITONATTN_CACHE_DIR": "~/a"}, "~/a"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/tritonattn"),
        ({"XDG_CACHE_HOME": "relative"}, "~/.cache/tritonattn"),
        ({}, "~/.cache/tritonattn"),
    ],
)
def test_user_cache(monkeypatch, environment, wanted):
    from tritonattn.tuning.cache_dir import user_cache

    for name in ("TRITONATTN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert user_cache() == Path(wanted).expanduser()


def test_dir_shows_what_is_public():
    pytest.importorskip("transformers")
    import tritonattn.analysis
    import tritonattn.distributed
    import tritonattn.huggingface
    import tritonattn.integrations.torch_modules
    import tritonattn.tuning

    folders = {"analysis", "distributed", "huggingface", "integrations", "tuning"}
    modules = (tritonattn.nn, tritonattn.analysis, tritonattn.distributed, tritonattn.huggingface, tritonattn.tuning)
    assert set(dir(tritonattn)) == {*tritonattn.__all__, *folders}
    for module in modules:
        assert dir(module) == sorted(module.__all__)
        assert all(hasattr(module, name) for name in dir(module))
    public = {"diffusers", "hub_kernel", "timm", "torch_modules", "torchtitan", "vllm", "x_transformers"}
    assert "torch_modules" in dir(tritonattn.integrations)
    assert set(dir(tritonattn.integrations)) <= public


def test_import_is_light_and_quick():
    code = """
import sys, time, torch
before, start = set(sys.modules), time.perf_counter()
import tritonattn
print(time.perf_counter() - start, *{name.split(".")[0] for name in set(sys.modules) - before})
"""
    taken = []
    while not any(seconds < 0.3 for seconds in taken) and len(taken) < 3:
        seconds, *added = run(sys.executable, "-c", code, cwd=ROOT).split()
        taken.append(float(seconds))
        assert "tritonattn" in added
        assert not {*added} & {"triton", "transformers", "matplotlib", "numpy", "tqdm"}
    assert min(taken) < 0.3


def test_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, tritonattn
q = torch.randn(1, 2, 5, 4)
out = tritonattn.attention(q, q, q, causal=True)
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
try:
    tritonattn.attention(q, q, q, backend="triton")
except (RuntimeError, NotImplementedError, ValueError, ImportError) as error:
    print(type(error).__name__, error)
"""
    message = run(sys.executable, "-c", code, cwd=ROOT)
    assert "triton" in message
    assert "pip install" in message or "install" in message
