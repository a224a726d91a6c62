"""Stands for pynvml: NVIDIA's driver lists what the environment variable FAKE_GPUS says."""

import json
import os
import types

NVML_ERROR_DRIVER_NOT_LOADED, NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_NOT_SUPPORTED = 9, 12, 3
VERSION_MISMATCH = 18
nvmlMemory_v2 = 2


class NVMLError(Exception):
    """As pynvml raises it."""

    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


def gpus(*names: str, gib: float | None = 24, used_gib: float = 0, capability=(8, 6)) -> str:
    """FAKE_GPUS for GPUs with the UUIDs GPU-0, GPU-1 ...; None GiB: memory shared with the host."""
    rows = [(name, gib, used_gib, capability) for name in names]
    return json.dumps({f"GPU-{i}": row for i, row in enumerate(rows)})


def broken(value: int) -> str:
    """FAKE_GPUS for a driver that fails with an error of NVML."""
    return json.dumps(value)


def _rows() -> dict[str, tuple]:
    rows = json.loads(os.environ.get("FAKE_GPUS", str(NVML_ERROR_LIBRARY_NOT_FOUND)))
    if isinstance(rows, int):
        raise NVMLError(rows)
    return rows


def nvmlInit() -> None:
    _rows()


def nvmlSystemGetDriverVersion() -> str:
    return "580.0"


def nvmlDeviceGetCount() -> int:
    return len(_rows())


def nvmlDeviceGetHandleByIndex(index: int) -> str:
    return [*_rows()][index]


def nvmlDeviceGetUUID(handle: str) -> str:
    return handle


def nvmlDeviceGetName(handle: str) -> str:
    return _rows()[handle][0]


def nvmlDeviceGetMemoryInfo(handle: str, version: int | None = None) -> types.SimpleNamespace:
    _, gib, used_gib, _ = _rows()[handle]
    if gib is None:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    return types.SimpleNamespace(total=gib * 2**30, used=used_gib * 2**30)


def nvmlDeviceGetCudaComputeCapability(handle: str) -> list[int]:
    return _rows()[handle][3] or _fail()


def nvmlDeviceGetMigMode(handle: str) -> list[int]:
    return _fail()


def _fail() -> list[int]:
    raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
