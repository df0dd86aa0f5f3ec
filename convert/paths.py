"""How the place of a tensor in its file is written: the tables above it, and the tables of which its name is made."""

from __future__ import annotations

WITHIN = "//"
"""Between a table inside a state dict and what it holds; a family sees a dot there."""
