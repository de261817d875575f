"""The library beside its rivals: each claim a ratio, both sides taking turns in one run."""
