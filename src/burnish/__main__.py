"""`python -m burnish` is the `burnish` command."""

from __future__ import annotations

import sys

from burnish.cli.main import main

sys.exit(main())
