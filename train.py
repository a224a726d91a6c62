"""Fine-tune a large language model over a 4-bit base: `python train.py --help`."""

import sys

from fsdp_qlora.errors import redact_tracebacks
from fsdp_qlora.run import main

if __name__ == "__main__":
    redact_tracebacks()
    sys.exit(main(sys.argv[1:]))
