"""The networks of architecture search that Table 2 compares Immunity with, from their published
descriptions: one cell network, four designs."""
