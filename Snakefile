# The paper as a graph: trained models -> measurements -> tables and figures. Every node is a
# notebook that papermill runs; a preset says how large. `make reproduce` starts it.

from study import catalogue
from study.graph import job_command
from study.settings import NOT_OF_THE_RESULT, ROOT, load_preset
from study.store import WEIGHTS, code_files, find_record, question_of, will_have_weights

settings = load_preset(
    config["preset"],
    data_folder=config.get("data_folder") or "",
    output_folder=config.get("output_folder") or "",
    pretrained=config.get("pretrained", False),
)
RUNS, FIGURES = settings.runs, settings.figures
NOTEBOOKS = ROOT / "notebooks"


# What Snakemake itself keeps lies with the results: the project's folder may be read-only
workdir: RUNS


# What is drawn depends on all that may draw it: both packages, but for the graph's own commands
CODE = [path for path in code_files() if path.parent != ROOT / "study/graph"]
# And on all that the preset says, as which models there are
DRAWN = settings.model_dump(mode="json", exclude=NOT_OF_THE_RESULT) | {"classes": config.get("classes")}
DATA = config.get("data", {})  # checksums, by the name of the data set
REQUESTS = config.get("requests", {})  # of a cluster; without one, jobs take what there is
GPU = int(bool(REQUESTS or config.get("gpus")))


def run_notebook(name, model="", on_gpu=False):
    """The command that runs a notebook. What it prints is shown; what its kernel says beside that
    goes to the log, with the traceback of a cell that fails."""
    gpus = config.get("gpus", "") if on_gpu else ""
    command = job_command(name, config["preset"], settings, gpus=gpus) + " --pretrained" * settings.pretrained
    # exec: the job ends with the graph that started it. Braces would be wildcards
    return "exec " + command.replace("{", "{{").replace("}", "}}") + model


MODEL = " --model={wildcards.model}"


def images_of(wildcards):
    """Checksums of the images that a model is about: your own may change under one name."""
    return DATA.get(catalogue.ModelName.parse(wildcards.model).dataset)


def requests(name):
    """What a job that computes asks for: a GPU and, of a cluster, memory and time, more with every attempt."""

    def of(resource):
        def of_attempt(wildcards, attempt):
            job = f"{name}-{wildcards.model}" if hasattr(wildcards, "model") else name
            return attempt * REQUESTS.get(job, {}).get(resource, 0)

        return of_attempt

    return {"gpu": GPU, "mem_mb": of("mem_mb"), "runtime": of("runtime")}


def trained(names):
    """Weights and records of the trained models behind these names; of what comes with the project, what there is."""
    records = [find_record(settings, name, "training") for name in catalogue.single(settings, names)]
    files = [file for record in records for file in (record.with_name(WEIGHTS), record)]
    return [path for path in files if path.is_relative_to(RUNS) or path.exists()]


def measured(names, kind):
    """Records of a kind of measurement, and the frames beside them."""
    paths = [find_record(settings, name, kind) for name in names]
    return paths + [path.with_suffix(".parquet") for path in paths]


def measured_here(names, kind):
    """Those of them that do not come with the project."""
    return [path for path in measured(names, kind) if path.is_relative_to(RUNS)]


def drawn(*names, table=False):
    """The files of tables or figures."""
    endings = ("csv", "md", "tex", "json") if table else ("png", "pdf", "json")
    return [FIGURES / f"{name}.{ending}" for name in names for ending in endings]


# Of the models of both tables, the notebook of Table 1 makes the scores
SCORED = catalogue.measured_models(settings, "scores")
OF_TABLE1 = catalogue.table1_models(settings)
OF_TABLE3 = catalogue.table3_models(settings)
SCORED_ALONE = [name for name in SCORED if name not in OF_TABLE1]
ATTACKED = catalogue.measured_models(settings, "attacks")
ADAPTIVE = catalogue.measured_models(settings, "adaptive")


wildcard_constraints:
    model="[a-z0-9.-]+",


# Preset files and library files are not inputs of the long rules: a change of prose or of an
# unrelated field would train everything anew. The parameters below say what a result depends on.
rule train:
    output:
        weights=update(RUNS / "models/{model}" / WEIGHTS),
        record=update(RUNS / "models/{model}/record.json"),
        notebook=RUNS / "notebooks/02_training-{model}.ipynb",
    params:
        recipe=lambda wildcards: catalogue.recipe_of(
            settings, catalogue.ModelName.parse(wildcards.model)
        ).as_json(),
        data=images_of,
    log:
        RUNS / "notebooks/02_training-{model}.log",
    resources:
        **requests("02_training"),
    shell:
        run_notebook("02_training", MODEL, on_gpu=True)


rule measure_attacks:
    input:
        lambda wildcards: trained([catalogue.ModelName.parse(wildcards.model)]),
    output:
        record=update(RUNS / "records/{model}.attacks.json"),
        frame=update(RUNS / "records/{model}.attacks.parquet"),
        notebook=RUNS / "notebooks/03_attacks-{model}.ipynb",
    params:
        asked=question_of(settings, "attacks"),
        data=images_of,
    log:
        RUNS / "notebooks/03_attacks-{model}.log",
    resources:
        **requests("03_attacks"),
    shell:
        run_notebook("03_attacks", MODEL, on_gpu=True)


rule measure_adaptive:
    input:
        lambda wildcards: trained(
            [
                catalogue.ModelName.parse(wildcards.model),
                *catalogue.surrogates(settings, catalogue.ModelName.parse(wildcards.model)),
            ]
        ),
    output:
        record=update(RUNS / "records/{model}.adaptive.json"),
        frame=update(RUNS / "records/{model}.adaptive.parquet"),
        notebook=RUNS / "notebooks/06_adaptive_attacks-{model}.ipynb",
    params:
        asked=question_of(settings, "adaptive"),
        data=images_of,
    log:
        RUNS / "notebooks/06_adaptive_attacks-{model}.log",
    resources:
        **requests("06_adaptive_attacks"),
    shell:
        run_notebook("06_adaptive_attacks", MODEL, on_gpu=True)


rule start_here:
    input:
        notebook=NOTEBOOKS / "00_start_here.ipynb",
        code=CODE,
    output:
        drawn("figure1"),
        notebook=RUNS / "notebooks/00_start_here.ipynb",
    params:
        drawn=DRAWN,
    log:
        RUNS / "notebooks/00_start_here.log",
    shell:
        run_notebook("00_start_here")


rule expert_selection:
    input:
        trained(OF_TABLE1),
        notebook=NOTEBOOKS / "01_expert_selection.ipynb",
        code=CODE,
    output:
        drawn("table1", table=True),
        [update(path) for path in measured_here(OF_TABLE1, "scores")],
        notebook=RUNS / "notebooks/01_expert_selection.ipynb",
    params:
        drawn=DRAWN,
        data=DATA,
    log:
        RUNS / "notebooks/01_expert_selection.log",
    resources:
        **requests("01_expert_selection"),
    shell:
        run_notebook("01_expert_selection", on_gpu=True)


rule attacks:
    input:
        measured(ATTACKED, "attacks"),
        notebook=NOTEBOOKS / "03_attacks.ipynb",
        code=CODE,
    output:
        drawn("table2", "gates", table=True),
        drawn("attacks"),
        notebook=RUNS / "notebooks/03_attacks.ipynb",
    params:
        drawn=DRAWN,
    log:
        RUNS / "notebooks/03_attacks.log",
    shell:
        run_notebook("03_attacks")


rule ablation:
    input:
        measured(OF_TABLE3, "attacks"),
        measured([name for name in OF_TABLE3 if name in OF_TABLE1], "scores"),
        trained([catalogue.first_model(settings, "immunity-literal")]),
        notebook=NOTEBOOKS / "04_ablation.ipynb",
        code=CODE,
    output:
        drawn("table3", table=True),
        [update(path) for path in measured_here(SCORED_ALONE, "scores")],
        drawn("ablation_curves", "literal_maps"),
        notebook=RUNS / "notebooks/04_ablation.ipynb",
    params:
        drawn=DRAWN,
        data=DATA,
    log:
        RUNS / "notebooks/04_ablation.log",
    resources:
        **requests("04_ablation"),
    shell:
        run_notebook("04_ablation", on_gpu=True)


rule heatmaps:
    input:
        trained(OF_TABLE3),
        notebook=NOTEBOOKS / "05_heatmaps.ipynb",
        code=CODE,
    output:
        drawn("figure2", "figure2_moe"),
        drawn("explorer_gallery", "explorer_attack", "explorer_gates", "explorer_methods"),
        [FIGURES / f"stepper.{ending}" for ending in ("html", "json")],
        # Only Parts-10 knows its true parts
        drawn("part_coverage") if settings.recipe.dataset == "parts10" else [],
        notebook=RUNS / "notebooks/05_heatmaps.ipynb",
    params:
        drawn=DRAWN,
    log:
        RUNS / "notebooks/05_heatmaps.log",
    resources:
        **requests("05_heatmaps"),
    shell:
        run_notebook("05_heatmaps", on_gpu=True)


rule adaptive_attacks:
    input:
        measured(ADAPTIVE, "adaptive"),
        notebook=NOTEBOOKS / "06_adaptive_attacks.ipynb",
        code=CODE,
    output:
        drawn("gate_worth", "attack_suite", table=True),
        drawn("adaptive_attacks", "attack_strength"),
        notebook=RUNS / "notebooks/06_adaptive_attacks.ipynb",
    params:
        drawn=DRAWN,
    log:
        RUNS / "notebooks/06_adaptive_attacks.log",
    shell:
        run_notebook("06_adaptive_attacks")


rule claims:
    input:
        measured(ATTACKED, "attacks"),
        measured(ADAPTIVE, "adaptive"),
        measured(SCORED, "scores"),
        notebook=NOTEBOOKS / "07_claims.ipynb",
        code=CODE,
    output:
        drawn("claims", table=True),
        drawn("verdicts"),
        notebook=RUNS / "notebooks/07_claims.ipynb",
    params:
        drawn=DRAWN,
    log:
        RUNS / "notebooks/07_claims.log",
    shell:
        run_notebook("07_claims")


rule all:
    default_target: True
    input:
        # Not only the last of each chain: whatever is missing on the way is made again too
        trained(catalogue.trained_models(settings)),
        measured(ATTACKED, "attacks"),
        measured(ADAPTIVE, "adaptive"),
        rules.start_here.output,
        rules.expert_selection.output,
        rules.attacks.output,
        rules.ablation.output,
        rules.heatmaps.output if will_have_weights(settings, OF_TABLE3) else [],
        rules.adaptive_attacks.output,
        rules.claims.output,
