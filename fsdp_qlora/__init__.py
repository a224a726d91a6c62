"""Fine-tune large language models over a 4-bit base, sharded with FSDP2: the public API."""

from fsdp_qlora.api import TrainError, TrainResult, load_model, merge, plan, train
from fsdp_qlora.config import TrainConfig

__version__ = "0.3.0.dev0"
__all__ = ["TrainConfig", "TrainError", "TrainResult", "__version__"]
__all__ += ["load_model", "merge", "plan", "train"]
