"""`python -m spinfold` is `spinfold`."""

import sys

from spinfold.cli import main

sys.exit(main())
