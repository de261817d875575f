"""All benchmarks, one after the other: `make bench`."""

from benchmarks import (
    attacks,
    cells,
    exact,
    heatmaps,
    input_pipeline,
    memory,
    plan,
    regularised_step,
)

for benchmark in (input_pipeline, heatmaps, attacks, exact, regularised_step, cells, plan, memory):
    print(f"\n{benchmark.__doc__.splitlines()[0]}", flush=True)
    benchmark.main()
