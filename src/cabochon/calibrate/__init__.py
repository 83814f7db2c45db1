"""Rounding a checkpoint while it reads texts: `texts` finds what it reads, `walk` takes it through, layer by layer."""
