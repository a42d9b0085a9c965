"""`python -m imaml` is `imaml`."""

import sys

from imaml.cli import main

sys.exit(main())
