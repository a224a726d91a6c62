"""What a run runs on: packages, Python, system, card and driver."""

import contextlib
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "hqq",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "liger-kernel",
    "flash-attn",
)


def versions(device: torch.device) -> dict[str, str]:
    """What this run runs on: packages, Python, system, and the card with its driver.

    Args:
        device: the device of this rank.

    Returns:
        Name -> version; packages that are not installed are left out.
    """
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["card"] = torch.cuda.get_device_name(device)
        found["num_cards"] = str(torch.cuda.device_count())
        driver = Path("/proc/driver/nvidia/version")
        number = re.search(r"\d{3,}\.\d+(\.\d+)?", driver.read_text() if driver.exists() else "")
        found["driver"] = number[0] if number else "unknown"
    return found
