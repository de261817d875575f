"""The whole graph at the smoke preset, as a user meets it: run, run again, damage, notebooks."""

import json
import re
import subprocess
import sys
import time

import nbclient
import nbformat
import pandas as pd
import pytest
import yaml
from graph import reproduce
from spoiling import spoil

from immunity_lib.attacks import FAMILIES
from immunity_lib.files import read_tensors
from study.catalogue import measured_models, table1_models, table3_models, trained_models
from study.settings import ROOT, load_preset
from study.store import own_folder, read_frame, read_json, read_record, record_path

pytestmark = pytest.mark.slow
EXECUTED_LIMIT = 2_000_000  # bytes; larger notebooks are not rendered by web viewers
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def settings(smoke):
    return load_preset("smoke", output_folder=str(smoke[0]))


def test_it_ends_by_listing_every_table_figure_and_claim(smoke, settings):
    _, done = smoke
    made = {path.stem for path in settings.figures.glob("*.json")}
    assert {"table1", "table2", "table3", "figure1", "figure2", "gate_worth", "claims"} <= made
    assert {f"explorer_{view}" for view in ("gallery", "attack", "gates", "methods")} <= made
    listing = done.stdout[done.stdout.index("Tables and figures of preset smoke") :]
    for name in made:
        assert len(list(settings.figures.glob(f"{name}.*"))) > 1, f"{name} has no file beside its record"
        assert f"/{name} (" in listing and read_json(settings.figures / f"{name}.json")["caption"] in listing
    claims = pd.read_csv(settings.figures / "claims.csv")
    assert len(claims) >= 10 and not claims["verdict"].isna().any()


def test_every_model_is_trained_in_a_job_of_its_own_that_shows_its_progress(smoke, settings):
    """Not inside of the notebook that needs it first, where nothing would train beside it."""
    printed = smoke[1].stderr + smoke[1].stdout
    for name in trained_models(settings):
        epochs, folder = settings.recipe.epochs, own_folder(settings, name)
        assert f"{name} epoch {epochs}/{epochs}:" in printed
        assert (settings.runs / "notebooks" / f"02_training-{name}.ipynb").exists(), name
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert read_json(folder / "record.json")["log"] == log and len(log) == epochs
        assert not list(folder.glob("checkpoint*"))


def test_every_model_is_measured_as_its_tables_need(settings):
    attacks = read_frame(settings, measured_models(settings, "attacks"), "attacks")
    for _, of_model in attacks.groupby("name"):
        assert set(of_model["attack"]) == {"clean", *settings.attacks, "pgd at 4/255"}
    adaptive = read_frame(settings, measured_models(settings, "adaptive"), "adaptive")
    for name, of_model in adaptive.groupby("name"):
        without = {"sampled"} if "standalone" in name else set()  # its gate has nothing to sample
        assert set(of_model["family"]) == {"clean", *FAMILIES} - without
        assert set(of_model.groupby(["attack", "sees"]).size()) == {settings.adaptive_count}
    for name in measured_models(settings, "adaptive"):
        summary = read_record(settings, name, "adaptive")["summary"]
        assert len(summary["checks"]) == 8 and summary["by_budget"][-1][0] == 1
        assert not list(settings.runs.glob("records/*unfinished*"))
    scores = read_frame(settings, table1_models(settings) + table3_models(settings), "scores")
    assert set(scores["split"]) == {"test", "test-shifted"}
    assert not scores["independence_score"].isna().any()


def test_no_record_names_a_path_of_this_machine_and_notebooks_are_whole_and_small(smoke, settings):
    for path in [*settings.runs.rglob("*.json"), *settings.figures.rglob("*.json")]:
        assert str(smoke[0]) not in path.read_text() and str(ROOT) not in path.read_text(), path
    for path in (settings.runs / "notebooks").glob("*.ipynb"):
        assert path.stat().st_size < EXECUTED_LIMIT, path
        for cell in nbformat.read(path, 4).cells:
            assert cell.cell_type != "code" or cell.execution_count is not None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_B1_every_notebook_runs_twice_in_one_kernel(smoke, path):
    """Run All, and Run All again, from the notebook's own folder, as JupyterLab does."""
    notebook = nbformat.read(path, 4)
    given = {"preset": '"smoke"', "output_folder": f'"{smoke[0]}"', "interactive": "False"}
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            for name, value in given.items():
                changed = re.sub(f"(?m)^{name} = [^ ]+", f"{name} = {value}", cell.source)
                assert changed != cell.source, f"{name} is no parameter of {path.stem}"
                cell.source = changed
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
    )  # fmt: skip
    with client.setup_kernel():
        for _ in range(2):
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)


def test_a_second_run_has_nothing_to_do(smoke):
    started = time.perf_counter()
    done = reproduce(smoke[0])
    assert done.returncode == 0
    assert "training parts10" not in done.stdout + done.stderr
    assert "Tables and figures of preset smoke" in done.stdout
    assert time.perf_counter() - started < 100  # it takes some ten seconds on an idle machine


@pytest.mark.parametrize(("change", "anew"), [({}, False), ({"baselines": []}, True)])
def test_a_preset_that_says_something_else_is_drawn_anew(smoke, settings, tmp_path, change, anew):
    """What is there of the models that are left is not made anew."""
    asked = yaml.safe_load((settings.runs / "graph.yaml").read_text()) | {"preset": str(tmp_path / "changed.yaml")}
    changed = yaml.safe_load((ROOT / "presets/smoke.yaml").read_text()) | change
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed))
    (tmp_path / "graph.yaml").write_text(yaml.safe_dump(asked))
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "all", "--dry-run", "--nolock", "--rerun-triggers", "mtime", "params",
         "--snakefile", ROOT / "Snakefile", "--cores", "2", "--directory", settings.runs,
         "--configfile", tmp_path / "graph.yaml"],
        capture_output=True, text=True,
    )  # fmt: skip
    rules = set(re.findall(r"^rule (\w+):", done.stdout + done.stderr, re.MULTILINE)) - {"all"}
    drawn = {"start_here", "expert_selection", "attacks", "ablation", "heatmaps", "adaptive_attacks", "claims"}
    assert done.returncode == 0 and rules == (drawn if anew else set())


def test_what_was_damaged_is_set_aside_and_made_again(smoke, settings):
    """When it is used: at the latest by the second run of the same command."""
    name = measured_models(settings, "attacks")[0]
    record = record_path(settings, name, "attacks")
    scores = record_path(settings, table3_models(settings)[0], "scores").with_suffix(".parquet")
    weights = own_folder(settings, name) / "model.safetensors"
    tensors, frame = read_tensors(weights)[0], pd.read_parquet(record.with_suffix(".parquet"))
    scored = pd.read_parquet(scores)
    for path in (record, scores, weights):
        spoil(path, "truncated")
    printed = ""
    for _ in range(3):
        done = reproduce(smoke[0])
        printed += done.stderr
        if done.returncode == 0:
            break
    assert done.returncode == 0, printed
    for path in (record, scores, weights):
        assert list(path.parent.glob(f"{path.name}.aside-*")), "what was damaged was deleted"
    again = read_tensors(weights)[0]  # the same seed gives the same weights
    assert all(again[key].equal(value) for key, value in tensors.items())
    pd.testing.assert_frame_equal(pd.read_parquet(record.with_suffix(".parquet")), frame)
    pd.testing.assert_frame_equal(pd.read_parquet(scores), scored)


def test_an_unknown_parameter_of_papermill_fails_before_computing(tmp_path):
    """papermill itself only warns of it."""
    command = [sys.executable, "-m", "papermill", "notebooks/02_training.ipynb", str(tmp_path / "out.ipynb")]
    done = subprocess.run([*command, "-p", "epohcs", "3", "-k", "python3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "unknown parameter 'epohcs'; valid names: " in done.stderr, done.stderr
