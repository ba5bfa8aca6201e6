"""The package as users get it: a wheel, an editable checkout, a bare interpreter."""

import json
import re
import runpy
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import tritonattn
from tritonattn.cli.main import COMMANDS
from tritonattn.tuning import cache_dir

from .test_layers import FILES, outside

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"transformers", "matplotlib", "sklearn", "scipy", "tqdm"}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Build a wheel, standard or editable, by the hooks that pip calls."""
    backend = pytest.importorskip("hatchling.build", reason="builds the wheel: pip install 'tritonattn[test]'")

    def wheel(form: str) -> Path:
        folder = tmp_path_factory.mktemp(form)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            return folder / getattr(backend, f"build_{form}")(str(folder))

    return wheel


@pytest.fixture(scope="module")
def wheel(build) -> Path:
    return build("wheel")


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tritonattn"}
    text = "lab/compare/data/alice.txt"
    for wanted in ("py.typed", "autotune_cache/README.md", text, "backends/triton/block.py"):
        assert f"tritonattn/{wanted}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_page_of_an_index(wheel):
    """PyPI shows no <picture>, and its links are relative to its page."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    readme, page = (ROOT / "README.md").read_text(encoding="utf-8"), metadata.get_payload()
    code = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
    assert code.findall(page) == code.findall(readme)
    links = re.findall(r'(?:\]\(|href="|src=")([^)"]*)', code.sub("", page))
    assert len(links) > 9
    assert [link for link in links if not link.startswith("https://")] == []
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL", []))
    assert all(one.startswith(urls["Repository"]) for name, one in urls.items() if name != "Documentation")
    owner, project = urls["Repository"].split("/")[-2:]
    assert urls["Documentation"] == f"https://{owner}.github.io/{project}/"


def test_what_a_wheel_requires_is_imported(wheel):
    """Besides numpy, which torch wants."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    lines = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    required = {re.match(r"[\w-]+", line)[0] for line in lines}
    assert required == {"numpy", "tabulate", "torch", "triton"}
    assert required - {"numpy"} <= {name for path in FILES for name in outside(path)}


def test_pictures_and_links_of_an_index():
    source = (
        '<picture>\n<source srcset="docs/dark.png">\n<img alt="A" src="docs/light.png">\n</picture>\n'
        "![B](docs/b.png) [C](docs/c.md#d) [`E`](#e) [F](https://f.org) `G[0](h)`"
    )
    assert runpy.run_path(str(ROOT / "hatch_build.py"))["described"](source, "https://r", "v1") == (
        '<img alt="A" src="https://r/raw/v1/docs/light.png">\n![B](https://r/raw/v1/docs/b.png) '
        "[C](https://r/blob/v1/docs/c.md#d) [`E`](https://r/blob/v1/README.md#e) [F](https://f.org) `G[0](h)`"
    )


# In one process, as the import of torch takes most of its time.
INSTALLED = """
import json, runpy, sys, time

def added():
    return sorted({name.split(".")[0] for name in set(sys.modules) - before})

sys.path.insert(0, sys.argv.pop())
sys.modules["triton"] = None  # as if it were not installed: an import of it fails
import torch
before, start = set(sys.modules), time.process_time()
import tritonattn
found = {"seconds": time.process_time() - start, "imported": added(), "file": tritonattn.__file__}
for words in ["--version"], ["--help"], ["compare", "--help"], ["tune", "--help"]:
    sys.argv[1:] = words
    try:
        runpy.run_module("tritonattn", run_name="__main__")
    except SystemExit as done:
        assert done.code == 0
found["imported by help"] = added()
q = torch.randn(1, 2, 5, 4)
out = tritonattn.attention(q, q, q, causal=True)
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
try:
    tritonattn.attention(q, q, q, backend="triton")
except (RuntimeError, NotImplementedError, ValueError, ImportError) as error:
    found["without triton"] = str(error)
del sys.modules["triton"]
from importlib import metadata
from tritonattn.tuning.cache_dir import shipped_tables
found["tables"] = str(shipped_tables())
found["versions"] = [tritonattn.__version__, metadata.version("tritonattn")]
[script] = metadata.entry_points(group="console_scripts", name="tritonattn")
found["script"] = script.value
print(json.dumps(found))
"""


@pytest.mark.slow
def test_wheel_works_is_light_and_needs_no_triton(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path, wheel]
    subprocess.run(list(map(str, pip)), check=True)
    command = [sys.executable, "-I", "-c", INSTALLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT.anchor)
    assert done.returncode == 0, done.stdout + done.stderr
    version, *helped, last = done.stdout.splitlines()
    found = json.loads(last)
    assert found["file"] == str(tmp_path / "tritonattn" / "__init__.py")
    assert found["tables"] == str(tmp_path / "tritonattn" / "autotune_cache")
    assert found["script"] == "tritonattn.cli.main:main"
    assert version == f"tritonattn {found['versions'][0]}"
    assert found["versions"][0] == found["versions"][1]
    assert "tritonattn" in found["imported"]
    assert not {*found["imported"]} & {*HEAVY, "numpy"}
    assert not {*found["imported by help"]} & HEAVY
    assert {*COMMANDS} <= {line.split()[0] for line in helped if line.startswith("    ") and line[4] != " "}
    assert "triton" in found["without triton"]
    assert "install" in found["without triton"]
    assert found["seconds"] < 0.3


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
    for name in ("TRITONATTN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir.user_cache() == Path(wanted).expanduser()


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
    public = {"diffusers", "hub_kernel", "sdpa", "sglang", "timm", "torch_modules", "torchtitan", "vllm"}
    public |= {"x_transformers"}
    assert "torch_modules" in dir(tritonattn.integrations)
    assert set(dir(tritonattn.integrations)) <= public


def test_a_name_that_is_elsewhere_is_pointed_at():
    elsewhere = {"SSMax": "nn", "Monitor": "analysis", "patch": "huggingface", "shard": "distributed"}
    hints = {name: f"; there is tritonattn.{folder}.{name}" for name, folder in elsewhere.items()}
    for name, hint in (*hints.items(), ("attenton", ""), ("_private", "")):
        with pytest.raises(AttributeError, match=f"^module 'tritonattn' has no attribute '{name}'{hint}$") as caught:
            getattr(tritonattn, name)
        assert caught.value.name == name  # by which Python names the nearest one
    assert not hasattr(tritonattn, "none_of_ours")


@pytest.mark.parametrize("name", ["analysis", "distributed", "huggingface", "integrations", "tuning"])
def test_a_public_folder_is_imported_at_its_first_use(name, monkeypatch):
    folder = pytest.importorskip(f"tritonattn.{name}")
    monkeypatch.delattr(tritonattn, name)
    assert getattr(tritonattn, name) is folder
    assert name in dir(tritonattn)
    monkeypatch.setattr(tritonattn, "find_spec", lambda name: None)
    assert (name in dir(tritonattn)) == (name != "huggingface")  # whose import fails without transformers


def test_a_module_that_is_not_imported_yet_is_named(monkeypatch):
    monkeypatch.delattr(tritonattn, "cli")
    with pytest.raises(AttributeError, match=r"'cli'; before its use: import tritonattn\.cli$"):
        _ = tritonattn.cli
