"""`python -m demos` opens the page, like `kimi-vl demo`, and takes the same options."""

import sys

from workbench.cli import main

sys.exit(main(["demo", *sys.argv[1:]]))
