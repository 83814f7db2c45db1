"""Rounding a checkpoint while it reads texts: `texts` finds what it reads, `walk` takes it through, layer by layer."""

TOKENS = 32_768
"""That are read when nothing else is asked for."""
