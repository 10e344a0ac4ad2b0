"""`python -m burnish` is the `burnish` command."""

from __future__ import annotations

import sys

from burnish.cli.main import console

sys.exit(console())
