# The paper as a graph: trained models -> measurements -> tables and figures. Every node is a
# notebook that papermill runs; a preset says how large. `make reproduce` starts it.

import shlex
import sys

from immunity_lib import recipes, results
from immunity_lib.settings import ROOT, load_preset

settings = load_preset(
    config["preset"],
    data_folder=config.get("data_folder") or "",
    output_folder=config.get("output_folder") or "",
    processes=config.get("processes"),
)
RUNS, FIGURES = settings.runs, settings.figures


# What Snakemake itself keeps lies with the results: the project's folder may be read-only
workdir: RUNS


NOTEBOOKS = ROOT / "notebooks"
LIBRARY = ROOT / "immunity_lib"
DRAWING = [
    LIBRARY / name
    for name in (
        "adaptive_plots.py", "adaptive_tables.py", "architecture.py", "artefacts.py", "claims.py",
        "claims.yaml", "comparisons.py", "intervals.py", "loss_weights.py", "plots.py",
        "printing.py", "reported.csv", "reported.py", "tables.py",
    )
]
EXPLORER = sorted(LIBRARY.glob("explorer/*.*"))


def run_notebook(name, model="", on_gpu=False):
    """The command that runs a notebook. What it prints is shown; what its kernel says beside that
    goes to the log, with the traceback of a cell that fails."""
    given = {
        "preset": config["preset"],
        "data": settings.data_folder,
        "output": settings.output_folder,
        "gpus": config.get("gpus", "") if on_gpu else "",
        "processes": settings.processes if name == "02_training" else 1,
    }
    options = [f"--{option}={value}" for option, value in given.items() if value]
    command = shlex.join([sys.executable, "-m", "immunity_lib.batch", name, *options])
    # exec: the job ends with the graph that started it. Braces would be wildcards
    return "exec " + command.replace("{", "{{").replace("}", "}}") + model


MODEL = " --model={wildcards.model}"
REQUESTS = config.get("requests", {})  # of a cluster; without one, jobs take what there is
GPU = int(bool(REQUESTS or config.get("gpus")))


def request(resource, name):
    """How much of a resource a job that computes asks a cluster for: more with every attempt."""

    def of_attempt(wildcards, attempt):
        job = f"{name}-{wildcards.model}" if hasattr(wildcards, "model") else name
        return attempt * REQUESTS.get(job, {}).get(resource, 0)

    return of_attempt


def trained(names):
    """Records of the trained models behind these names."""
    return [
        RUNS / "models" / str(name) / "record.json" for name in recipes.single(settings, names)
    ]


def drawn(*names, table=False):
    """The files of tables or figures."""
    endings = ("csv", "md", "tex", "json") if table else ("png", "pdf", "json")
    return [FIGURES / f"{name}.{ending}" for name in names for ending in endings]


def scores(names):
    """Records of the heat-map scores of these models."""
    return [RUNS / f"records/{name}.scores.json" for name in names]


# Of the models of both tables, the notebook of Table 1 makes the scores
OF_TABLE1 = recipes.table1_models(settings)
SCORED_ALONE = [
    name
    for name in recipes.table3_models(settings) + recipes.swept_models(settings)
    if name not in OF_TABLE1
]
JUDGED = recipes.judged_models(settings)


wildcard_constraints:
    model="[a-z0-9.-]+",


# Preset files and library files are not inputs of the long rules: a change of prose or of an
# unrelated field would train everything anew. The parameters below say what a result depends on.
rule train:
    output:
        weights=update(RUNS / "models/{model}" / settings.weights_file),
        record=update(RUNS / "models/{model}/record.json"),
        notebook=RUNS / "notebooks/02_training-{model}.ipynb",
    params:
        recipe=lambda wildcards: recipes.recipe(
            settings, recipes.ModelName.parse(wildcards.model)
        ).model_dump_json(),
    log:
        RUNS / "notebooks/02_training-{model}.log",
    resources:
        gpu=settings.processes * GPU,
        mem_mb=request("mem_mb", "02_training"),
        runtime=request("runtime", "02_training"),
    shell:
        run_notebook("02_training", MODEL, on_gpu=True)


rule attack:
    input:
        lambda wildcards: trained([recipes.ModelName.parse(wildcards.model)]),
    output:
        record=update(RUNS / "records/{model}.attacks.json"),
        notebook=RUNS / "notebooks/03_attacks-{model}.ipynb",
    params:
        asked=results.attack_question(settings),
    log:
        RUNS / "notebooks/03_attacks-{model}.log",
    resources:
        gpu=GPU,
        mem_mb=request("mem_mb", "03_attacks"),
        runtime=request("runtime", "03_attacks"),
    shell:
        run_notebook("03_attacks", MODEL, on_gpu=True)


rule judge:
    input:
        lambda wildcards: trained(
            [
                recipes.ModelName.parse(wildcards.model),
                *recipes.surrogates(settings, recipes.ModelName.parse(wildcards.model)),
            ]
        ),
    output:
        record=update(RUNS / "records/{model}.adaptive.json"),
        notebook=RUNS / "notebooks/06_adaptive_attacks-{model}.ipynb",
    params:
        asked=results.adaptive_question(settings),
    log:
        RUNS / "notebooks/06_adaptive_attacks-{model}.log",
    resources:
        gpu=GPU,
        mem_mb=request("mem_mb", "06_adaptive_attacks"),
        runtime=request("runtime", "06_adaptive_attacks"),
    shell:
        run_notebook("06_adaptive_attacks", MODEL, on_gpu=True)


rule start_here:
    input:
        notebook=NOTEBOOKS / "00_start_here.ipynb",
        library=DRAWING,
    output:
        drawn("figure1"),
        notebook=RUNS / "notebooks/00_start_here.ipynb",
    log:
        RUNS / "notebooks/00_start_here.log",
    shell:
        run_notebook("00_start_here")


rule expert_selection:
    input:
        trained(OF_TABLE1),
        notebook=NOTEBOOKS / "01_expert_selection.ipynb",
        library=DRAWING,
    output:
        drawn("table1", table=True),
        [update(record) for record in scores(OF_TABLE1)],
        notebook=RUNS / "notebooks/01_expert_selection.ipynb",
    log:
        RUNS / "notebooks/01_expert_selection.log",
    resources:
        gpu=GPU,
        mem_mb=request("mem_mb", "01_expert_selection"),
        runtime=request("runtime", "01_expert_selection"),
    shell:
        run_notebook("01_expert_selection", on_gpu=True)


rule attacks:
    input:
        [RUNS / f"records/{name}.attacks.json" for name in recipes.attacked_models(settings)],
        notebook=NOTEBOOKS / "03_attacks.ipynb",
        library=DRAWING,
    output:
        drawn("table2", "gates", table=True),
        drawn("attacks"),
        notebook=RUNS / "notebooks/03_attacks.ipynb",
    log:
        RUNS / "notebooks/03_attacks.log",
    shell:
        run_notebook("03_attacks")


rule ablation:
    input:
        [
            RUNS / f"records/{name}.attacks.json"
            for name in recipes.table3_models(settings) + recipes.swept_models(settings)
        ],
        scores(name for name in recipes.table3_models(settings) if name in OF_TABLE1),
        trained([recipes.literal_model(settings)]),
        notebook=NOTEBOOKS / "04_ablation.ipynb",
        library=DRAWING,
    output:
        drawn("table3", table=True),
        [update(record) for record in scores(SCORED_ALONE)],
        drawn("ablation_curves", "loss_weights", "literal_maps"),
        notebook=RUNS / "notebooks/04_ablation.ipynb",
    log:
        RUNS / "notebooks/04_ablation.log",
    resources:
        gpu=GPU,
        mem_mb=request("mem_mb", "04_ablation"),
        runtime=request("runtime", "04_ablation"),
    shell:
        run_notebook("04_ablation", on_gpu=True)


rule heatmaps:
    input:
        trained(recipes.table3_models(settings)),
        notebook=NOTEBOOKS / "05_heatmaps.ipynb",
        library=DRAWING + EXPLORER,
    output:
        drawn("figure2", "figure2_moe"),
        drawn("explorer_gallery", "explorer_attack", "explorer_gates", "explorer_methods"),
        [FIGURES / f"stepper.{ending}" for ending in ("html", "json")],
        # Only Parts-10 knows its true parts
        drawn("part_coverage") if settings.dataset == "parts10" else [],
        notebook=RUNS / "notebooks/05_heatmaps.ipynb",
    log:
        RUNS / "notebooks/05_heatmaps.log",
    resources:
        gpu=GPU,
        mem_mb=request("mem_mb", "05_heatmaps"),
        runtime=request("runtime", "05_heatmaps"),
    shell:
        run_notebook("05_heatmaps", on_gpu=True)


rule adaptive_attacks:
    input:
        [RUNS / f"records/{name}.adaptive.json" for name in JUDGED],
        notebook=NOTEBOOKS / "06_adaptive_attacks.ipynb",
        library=DRAWING,
    output:
        drawn("gate_worth", "attack_suite", table=True),
        drawn("adaptive_attacks", "attack_strength"),
        notebook=RUNS / "notebooks/06_adaptive_attacks.ipynb",
    log:
        RUNS / "notebooks/06_adaptive_attacks.log",
    shell:
        run_notebook("06_adaptive_attacks")


rule claims:
    input:
        [RUNS / f"records/{name}.attacks.json" for name in recipes.attacked_models(settings)],
        [RUNS / f"records/{name}.adaptive.json" for name in JUDGED],
        scores(OF_TABLE1 + SCORED_ALONE),
        notebook=NOTEBOOKS / "07_claims.ipynb",
        library=DRAWING,
    output:
        drawn("claims", table=True),
        drawn("verdicts"),
        notebook=RUNS / "notebooks/07_claims.ipynb",
    log:
        RUNS / "notebooks/07_claims.log",
    shell:
        run_notebook("07_claims")


rule all:
    default_target: True
    input:
        # Not only the last of each chain: whatever is missing on the way is made again too
        [
            RUNS / "models" / str(name) / file
            for name in recipes.trained_models(settings)
            for file in (settings.weights_file, "record.json")
        ],
        [RUNS / f"records/{name}.attacks.json" for name in recipes.attacked_models(settings)],
        [RUNS / f"records/{name}.adaptive.json" for name in JUDGED],
        rules.start_here.output,
        rules.expert_selection.output,
        rules.attacks.output,
        rules.ablation.output,
        rules.heatmaps.output,
        rules.adaptive_attacks.output,
        rules.claims.output,
