"""`python -m lrec` is the `lrec` command."""

import sys

from lrec.cli import main

sys.exit(main())
