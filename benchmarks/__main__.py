"""All benchmarks, one after the other: `make bench`."""

from benchmarks import (
    cells,
    exact,
    heatmaps,
    input_pipeline,
    memory,
    plan,
    regularised_step,
)

for benchmark in (input_pipeline, heatmaps, exact, regularised_step, cells, plan, memory):
    print(f"\n{benchmark.__doc__.splitlines()[0]}", flush=True)
    benchmark.main()
