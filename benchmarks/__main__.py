"""All benchmarks, one after the other, or those that are named: `make bench`."""

from argparse import ArgumentParser
from importlib import import_module

import torch

from study.store import provenance

NAMES = (
    "input_pipeline",
    "heatmaps",
    "exact",
    "attacks",
    "regularised_step",
    "stacked_experts",
    "cells",
    "plan",
    "memory",
)

parser = ArgumentParser(prog="python -m benchmarks", description="Time the library beside its peers.")
parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; none: all")
names = parser.parse_args().names or NAMES
if unknown := sorted(set(names) - set(NAMES)):
    parser.error(f"unknown benchmark {unknown[0]!r}; valid names: {', '.join(NAMES)}")
torch.set_num_threads(1)
made = provenance()
print(f"commit {made['commit']}, {made['hardware']}, PyTorch {made['packages']['torch']}, one thread", flush=True)
for name in names:
    benchmark = import_module(f"benchmarks.{name}")
    print(f"\n{benchmark.__doc__.splitlines()[0]}", flush=True)
    benchmark.main()
