"""`python -m hf_robust_clip`, which `accelerate launch -m hf_robust_clip` runs in every process."""

import sys

from .cli.main import main

if __name__ == "__main__":
    # What the record of a run says that it was made with.
    sys.argv[0] = "hf-robust-clip"
    sys.exit(main())
