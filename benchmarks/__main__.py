"""All benchmarks, one after the other: `make bench`."""

from benchmarks import heatmaps, input_pipeline, memory, regularised_step

for benchmark in (input_pipeline, heatmaps, regularised_step, memory):
    print(f"\n{benchmark.__doc__.splitlines()[0]}", flush=True)
    benchmark.main()
