"""Wheel, sdist and editable install train outside the repository, each in its own environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests import timing, warm

ROOT = Path(__file__).parents[2]
MAX_HELP_S = 1.0

pytestmark = pytest.mark.system


def outside(cwd: Path) -> dict[str, str]:
    """An environment that sees nothing of the repository."""
    env = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    return env | {"CUDA_VISIBLE_DEVICES": "", "FSDP_QLORA_CACHE": str(cwd / "cache")}


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; it must succeed. It sees nothing of the repository."""
    streams = {"capture_output": True, "text": True}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=outside(cwd), **streams)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files (`source`), its packages (`dist`), a tiny model and rows."""
    place = tmp_path_factory.mktemp("package")
    (place / "source").mkdir()
    archive = subprocess.run(["git", "-C", ROOT, "stash", "create"], capture_output=True, text=True)
    tree = archive.stdout.strip() or "HEAD"
    files = subprocess.run(["git", "-C", ROOT, "archive", tree], capture_output=True, check=True)
    subprocess.run(["tar", "x", "-C", place / "source"], input=files.stdout, check=True)
    build = ("-m", "build", "--no-isolation", "--outdir", place / "dist", place / "source")
    run(sys.executable, *build, cwd=place)
    run(sys.executable, "-m", "twine", "check", "--strict", *(place / "dist").iterdir(), cwd=place)
    warm.call(warm.make_model, place)
    return place


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_an_installed_package_trains(place: Path, kind: str):
    """The libraries are those of this environment; fsdp_qlora is not."""
    home = place / kind
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=place)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    what = {
        "wheel": (next((place / "dist").glob("*.whl")),),
        "sdist": (next((place / "dist").glob("*.tar.gz")),),
        "editable": ("--editable", place / "source"),
    }[kind]
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install")
    run(*pip, "-qq", "--no-deps", "--no-build-isolation", *what, cwd=place)
    tool = home / "bin" / "fsdp-qlora"
    helped, seconds = timing.fastest([str(tool), "--help"], home, outside(home))
    assert helped.returncode == 0 and "train" in helped.stdout and seconds < MAX_HELP_S
    where = run(
        home / "bin" / "python", "-c", "import fsdp_qlora as f; print(f.__file__)", cwd=home
    )
    assert Path(where).is_relative_to(place / "source" if kind == "editable" else home)
    (home / "random.py").write_text("raise SystemExit('a file of the user is no module of ours')")
    flags = ("--recipe=text", "--world_size=2")
    flags += (f"--model_name={place / 'model'}", f"--dataset={place / 'data.jsonl'}")
    flags += ("--max_steps=2", "--context_length=64", "--output_dir=run", "--eval_every=2")
    run(tool, "train", *flags, cwd=home)
    assert (home / "run" / "adapter_model.safetensors").is_file()
    assert (home / "run" / "report.html").is_file()
    shutil.rmtree(home)


def test_the_constraints_admit_the_cuda_build_of_torch(tmp_path: Path, monkeypatch):
    """What a machine with a GPU installs; the CPU build asks for fewer packages (no triton)."""
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    pip = (sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed")
    other = ("--target", tmp_path, "--python-version", "3.13", "--only-binary=:all:")
    pins = ("--constraint", ROOT / ".ci" / "constraints.txt")
    output = run(*pip, *other, *pins, "torch", cwd=tmp_path)
    assert " triton-" in output.splitlines()[-1]
