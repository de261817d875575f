"""The reproduction: which models are trained, what is measured of them, and what is shown."""
