"""Is the project what its files say: one version, a clean wheel, a light and silent import, documents that run?"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import lora_lite

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_lite"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str) -> str:
    """What a fresh interpreter prints: without the typing hook, without what other tests have imported."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- one version, one set of sources ----------------------------------------------------------------------------------


def test_the_version_has_one_home():
    home = ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]
    assert "version" not in PYPROJECT["project"] and "version" in PYPROJECT["project"]["dynamic"]
    assert re.findall(r'^__version__ = "(.+)"$', home.read_text(), re.M) == [lora_lite.__version__]
    assert [path for path in PACKAGE.rglob("*.py") if re.search(r"^__version__ *=", path.read_text(), re.M)] == [home]


def test_the_changelog_begins_with_this_version():
    assert re.findall(r"^## \[?([0-9][^\]\s]*)", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == lora_lite.__version__


def test_the_drawer_at_the_top_is_a_link():
    assert (ROOT / "variants").is_symlink()
    assert (ROOT / "variants").resolve() == PACKAGE / "variants"


def test_the_constraints_hold_every_requirement_at_one_plain_version():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines), "no local builds (+cpu), no addresses"
    pinned = {normal(line.split("==")[0]) for line in lines}
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    asked = {normal(re.match(r"[A-Za-z0-9._-]+", r)[0]) for group in (PYPROJECT["project"]["dependencies"], *extras) for r in group}
    assert not asked - pinned - {"lora-lite"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- what is shipped --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel_is_the_package_and_nothing_else(built: Path):
    (wheel,) = built.glob("*.whl")
    info = f"lora_lite-{lora_lite.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert {name.split("/")[0] for name in names} == {"lora_lite", info}
    assert {"lora_lite/py.typed", "lora_lite/__init__.py", "lora_lite/variants/lora.py", f"{info}/licenses/LICENSE"} <= names
    sources = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    assert f"\nVersion: {lora_lite.__version__}\n" in metadata
    assert "lora-lite = lora_lite.cli:main" in scripts


def test_the_sdist_holds_each_source_once(built: Path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames()]
    assert "lora_lite/variants/lora.py" in names and "Makefile" in names and "tests/conftest.py" in names
    assert not [name for name in names if name.split("/")[0] in {"variants", ".venv", "out", "dist"}]
    assert len(names) == len(set(names))


# --- what importing it does -------------------------------------------------------------------------------------------


def test_importing_is_light():
    heavy = ("transformers", "matplotlib", "peft", "typer", "rich", "torch._dynamo", "torch._inductor")
    before = f"import sys, torch; before = {{m for m in {heavy!r} if m in sys.modules}}; "
    assert python(before + f"import lora_lite; print(sorted({{m for m in {heavy!r} if m in sys.modules}} - before))") == "[]"


def test_a_heavy_import_would_be_seen():
    assert python("import sys, matplotlib; print('matplotlib' in sys.modules)") == "True"


SPEAK = "exec('logger.info(1 + 1)', {'logger': logger, '__name__': 'lora_lite.adapter'})"  # loguru asks whose line it is


@pytest.mark.parametrize(("enable", "heard"), [("", False), ("logger.enable('lora_lite'); ", True)])
def test_the_library_is_silent_until_asked(enable: str, heard: bool):
    code = f"import sys; from loguru import logger; logger.remove(); logger.add(sys.stdout); import lora_lite; {enable}{SPEAK}"
    assert ("- 2" in python(code)) is heard


# --- the documents ----------------------------------------------------------------------------------------------------


def tracked() -> list[Path]:
    """The files that are committed, or would be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:  # an unpacked sdist has no git
        paths = [path for name in ("lora_lite", "tests", "benchmarks", "docs", "examples") for path in (ROOT / name).rglob("*")]
        paths += list(ROOT.glob("*"))
    return [path for path in paths if path.is_file() and not path.is_symlink()]


HOME = re.compile(r"(?<![\w.~/])/(?:home|Users|root|work|opt|mnt|srv|scratch|private)/[\w.-]+|\b[A-Z]:\\\\?Users")
INDEX = re.compile(r"(?:extra-)?index-url[ =]+\S|https?://\S*/simple(?:[/\s]|$)")


def test_no_file_names_this_machine():
    found = []
    for path in tracked():
        text = path.read_bytes().decode("utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {hit[0]}" for rule in (HOME, INDEX) for hit in rule.finditer(text)]
    assert not found


@pytest.mark.parametrize("parts", [("", "home", "ann", "x.py"), ("", "root", ".cache"), ("", "work", "main"), ("C:", "Users", "ann")])
def test_a_path_of_a_machine_would_be_seen(parts: tuple[str, ...]):
    assert HOME.search("see " + ("\\" if parts[0] else "/").join(parts))
    assert INDEX.search("pip install --index" + "-url file") and not HOME.search("docs/home/x a/root/b")


def blocks(document: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.M | re.S)


@pytest.mark.parametrize("document", ["README.md", "DEVELOPER.md", "CHANGELOG.md"])
def test_links_between_documents_lead_somewhere(document: str):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / document).read_text())
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("document", ["README.md", "DEVELOPER.md"])
def test_every_make_target_in_the_documents_exists(document: str):
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([a-z-]+)", (ROOT / document).read_text()))
    assert named and named <= rules


WORKED = """
import lora_lite as ll
from torch import nn
torch.manual_seed(5)  # where a frozen factor that kept the SVD's column-major layout gives other last bits once it is loaded
model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
x = torch.randn(7, 6)
base = model(x)
data = {"0": torch.randn(20, 6), "2": torch.randn(20, 5)}
for config, seen in ((LoRACoreConfig(r=4, alpha=2.0), None), (ScaledLoRACoreConfig(r=4, alpha=2.0), data)):
    adapter = ll.attach(model, config, calibration_data=seen, seed=0)
    assert torch.equal(model(x), base) and adapter.num_parameters() == 4 * 4 + 3 * 3
    model(x).square().sum().backward()
    for p in adapter.parameters():
        assert p.grad.any()
        p.data -= 0.1 * p.grad
    A, B, g = adapter.factors()["0"]
    W = model[0].weight.detach()
    assert (B @ A).abs().max() > 1e-3
    moved = model(x)
    with adapter.merged():
        assert torch.allclose(model(x), moved, atol=1e-6)
    adapter.save(folder + "/it.safetensors")
    adapter.detach()
    assert torch.equal(model(x), base)
    again = ll.load(model, folder + "/it.safetensors")
    assert torch.equal(model(x), moved)
    again.detach()
print(sorted(adapter.diagnostics))
"""


def test_the_worked_variant_is_short_and_keeps_the_promises(tmp_path: Path):
    worked, calibrated = blocks("DEVELOPER.md")
    assert len(worked.splitlines()) < 60
    (tmp_path / "worked.py").write_text(f"{worked}\n{calibrated}\nfolder = {str(tmp_path)!r}\n{WORKED}")  # a variant is a file
    assert python(f"import runpy; runpy.run_path({str(tmp_path / 'worked.py')!r})") == "['kept_energy']"


def test_the_readme_runs_as_it_stands(tmp_path: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "What": 2, "a": 3, "kind": 4, "answer": 5, ".": 6}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(tmp_path / "model")
    small = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**small, max_position_embeddings=64, pad_token_id=1)).save_pretrained(tmp_path / "model")

    example, *more = blocks("README.md")
    assert len([line for line in example.splitlines() if line]) == 10
    code = "\n".join([example, *more]).replace('"Qwen/Qwen3-0.6B"', repr(str(tmp_path / "model")))
    assert "Qwen" not in code
    printed = python(code.replace('"kind', f'"{tmp_path}/kind').replace("\\n", "\n"))
    assert "Adapter('default': lora r=16" in printed and "second" in printed


def test_the_page_on_training_runs_as_it_stands(tmp_path: Path):
    printed = python("\n".join(["import os", f"os.chdir({str(tmp_path)!r})", *blocks("docs/training.md")]))
    assert printed.endswith("3.0 ranks a layer are left")
    assert (tmp_path / "kind.safetensors").exists()


@pytest.mark.parametrize("blocks_of_the_model", [4, 5, 12, 16, 24, 28, 32, 48, 64])
def test_the_readme_dials_a_layer_that_its_adapter_is_on(blocks_of_the_model: int):
    example, *more = blocks("README.md")
    ((low, high),) = re.findall(r"layer_range=\(([\d.]+), ([\d.]+)\)", example)
    (pattern,) = re.findall(r'c=\{r"(.+?)": ', "\n".join(more))
    inside = [i for i in range(blocks_of_the_model) if float(low) * blocks_of_the_model <= i < float(high) * blocks_of_the_model]
    assert any(re.search(pattern, f"model.layers.{i}.mlp.up_proj") for i in inside)
