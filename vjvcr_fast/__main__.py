"""`python -m vjvcr_fast` is `vjvcr-fast`."""

import sys

from vjvcr_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
