"""Set up every test run: quiet threads, no network. Must run before torch is imported."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fsdp_qlora.distributed.world import World

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
if "PYTEST_XDIST_WORKER" not in os.environ:  # what this user has measured or cached is no input
    CACHE = tempfile.TemporaryDirectory(prefix="fsdp_qlora_tests_")
    ENVIRONMENT["FSDP_QLORA_CACHE"] = CACHE.name
if shutil.which("nvidia-smi") is None:  # kernels are tried by Triton's interpreter, where it is
    ENVIRONMENT["TRITON_INTERPRET"] = "1"
os.environ.update(ENVIRONMENT)
# Files that take longest go first: what is left for the end is short, and two workers end together.
LONGEST = ("kill_sweep", "quickstart", "model_sweep", "shard", "resume", "streaming", "peers")
LONGEST += ("train_types", "run", "fitting", "old_runs", "api", "strategies", "doctor", "bench")


def _place(item: pytest.Item) -> int:
    name = item.path.stem.removeprefix("test_")
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; skip the tests marked `gpu` where there is no card."""
    items.sort(key=_place)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))


def pytest_configure() -> None:
    """Stop where REQUIRE_HQQ=1 promises hqq and it is absent: its tests would be skipped."""
    if os.environ.get("REQUIRE_HQQ") == "1" and importlib.util.find_spec("hqq") is None:
        raise pytest.UsageError("REQUIRE_HQQ=1 but hqq is not installed")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator["World"]:
    """The only rank, in this process."""
    import torch

    from fsdp_qlora.distributed.world import World

    store = f"file://{tmp_path_factory.mktemp('group') / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield World(0, 1, 0, 1, torch.device("cpu"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, its tokenizer and rows; torch is not imported here."""
    from tests import warm

    directory = tmp_path_factory.mktemp("place")
    warm.call(warm.make_model, directory)
    return directory


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of 300 MiB, where this process may make one."""
    number = os.getpid()
    for root, limit in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    ):
        place = Path(root) / f"fsdp_qlora_test_{number}"
        with suppress(OSError):
            place.mkdir()
            (place / limit).write_text(str(300 * 2**20))
            yield place
            place.rmdir()
            return
        with suppress(OSError):
            place.rmdir()
    pytest.skip("no control group can be made here")
