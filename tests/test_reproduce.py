"""The whole graph at the smoke preset, as a user meets it: run, run again, damage, kill."""

import json
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from graph import reproduce

from immunity_lib.attacks.suite import FAMILIES
from immunity_lib.claims import VERDICTS, read_claims
from immunity_lib.recipes import attacked_models, judged_models, table3_models, trained_models
from immunity_lib.records import ROOT, read_record, read_tensors
from immunity_lib.settings import load_preset

pytestmark = pytest.mark.slow
EXECUTED_LIMIT = 2_000_000  # bytes; larger notebooks are not rendered by web viewers


@pytest.fixture(scope="module")
def settings(smoke):
    return load_preset("smoke", output_folder=str(smoke[0]))


def test_it_ends_by_listing_every_table_and_figure(smoke, settings):
    _, done = smoke
    made = {path.stem for path in settings.figures.glob("*.json")}
    assert {"table1", "table2", "table3", "figure1", "figure2", "gate_worth", "claims"} <= made
    assert {f"explorer_{view}" for view in ("gallery", "attack", "gates", "methods")} <= made
    listing = done.stdout[done.stdout.index("Tables and figures of preset smoke") :]
    for name in made:
        files = [path for path in settings.figures.glob(f"{name}.*") if path.suffix != ".json"]
        assert files, f"{name} has no file beside its record"
        assert f"/{name} (" in listing
        assert read_record(settings.figures / f"{name}.json")["caption"] in listing


def test_it_shows_progress_of_every_model(smoke, settings):
    printed = smoke[1].stderr + smoke[1].stdout
    for name in trained_models(settings):
        assert f"{name} epoch {settings.epochs}/{settings.epochs}:" in printed


def test_every_model_is_trained_in_a_node_of_its_own(smoke, settings):
    """Not inside of the notebook that needs it first, where nothing would train beside it."""
    for name in trained_models(settings):
        assert (settings.runs / "notebooks" / f"02_training-{name}.ipynb").exists(), name


def test_every_model_has_its_weights_log_and_record(smoke, settings):
    for name in trained_models(settings):
        folder = settings.runs / "models" / str(name)
        record = read_record(folder / "record.json")
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert record["log"] == log and len(log) == settings.epochs
        assert not list(folder.glob("checkpoint*"))


def test_every_attack_of_every_model_is_recorded(smoke, settings):
    for name in attacked_models(settings):
        result = read_record(settings.runs / "records" / f"{name}.attacks.json")["result"]
        assert {entry["attack"] for entry in result["attacks"]} == set(settings.attacks)
        for entry in result["attacks"]:
            assert entry["worst"] <= entry["switched"] <= entry["best"]
            assert entry["every"] <= entry["worst"]


def test_every_judged_mixture_meets_every_attack_and_check(smoke, settings):
    for name in judged_models(settings):
        result = read_record(settings.runs / "records" / f"{name}.adaptive.json")["result"]
        assert {entry["family"] for entry in result["attacks"]} == set(FAMILIES)
        assert len(result["checks"]) == 8 and result["by_budget"][-1][0] == 1
        assert not (settings.runs / "records" / f"{name}.adaptive-unfinished.json").exists()


def test_every_claim_has_a_verdict(smoke, settings):
    found = pd.read_csv(settings.figures / "claims.csv")
    assert list(found["claim"]) == [claim.id for claim in read_claims()]
    assert set(found["verdict"]) <= set(VERDICTS)


def test_no_record_or_sidecar_names_a_path_of_this_machine(smoke, settings):
    for path in [*settings.runs.rglob("*.json"), *settings.figures.rglob("*.json")]:
        assert str(smoke[0]) not in path.read_text() and str(ROOT) not in path.read_text(), path


def test_executed_notebooks_are_whole_and_small(settings):
    for path in (settings.runs / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        assert path.stat().st_size < EXECUTED_LIMIT, path
        for cell in notebook.cells:
            assert cell.cell_type != "code" or cell.execution_count is not None


@pytest.mark.parametrize("notebook", sorted(path.stem for path in ROOT.glob("notebooks/*.ipynb")))
def test_batch_runs_come_to_their_end(smoke, settings, notebook, tmp_path, pytestconfig):
    """Again and again (`--batch-runs 20`): a widget in batch would hang one in three."""
    command = [sys.executable, "-m", "papermill", f"notebooks/{notebook}.ipynb"]
    command += [str(tmp_path / "out.ipynb"), "-k", "python3", "-p", "preset", "smoke"]
    command += ["-p", "output_folder", str(smoke[0]), "-p", "interactive", "False"]
    for _ in range(pytestconfig.getoption("batch_runs")):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]


def test_a_second_run_has_nothing_to_do(smoke):
    started = time.perf_counter()
    done = reproduce(smoke[0])
    assert done.returncode == 0
    assert "training parts10" not in done.stdout + done.stderr
    assert "Tables and figures of preset smoke" in done.stdout
    assert time.perf_counter() - started < 60  # it takes some ten seconds on an idle machine


def test_a_damaged_record_and_truncated_weights_are_set_aside_and_made_again(smoke, settings):
    name = attacked_models(settings)[0]
    record = settings.runs / "records" / f"{name}.attacks.json"
    weights = settings.runs / "models" / str(name) / "model.safetensors"
    scores = settings.runs / "records" / f"{table3_models(settings)[0]}.scores.json"
    numbers, scored = read_record(record)["result"], read_record(scores)["result"]
    trained = read_record(weights.parent / "record.json")["weights"]
    record.write_text(record.read_text()[:100])
    scores.write_text("{}")
    weights.write_bytes(weights.read_bytes()[:5000])
    done = reproduce(smoke[0])
    assert done.returncode == 0, done.stderr
    for path in (record, scores, weights):
        assert f"{path.name}.aside-" in done.stderr
        assert list(path.parent.glob(f"{path.name}.aside-*")), "what was damaged was deleted"
    read_tensors(weights, trained)  # the same seed gives the same weights
    for before, after in zip(
        numbers["attacks"], read_record(record)["result"]["attacks"], strict=True
    ):
        assert {**before, "seconds": 0} == {**after, "seconds": 0}
    assert read_record(scores)["result"] == scored


def papermill(notebook: str, output: Path, *parameters: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", f"notebooks/{notebook}.ipynb", str(output)]
    return subprocess.run(
        [*command, "-k", "python3", *parameters], cwd=ROOT, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip


def test_a_preset_file_and_a_model_by_hand(smoke, settings, tmp_path):
    name = str(attacked_models(settings)[0])
    done = papermill(
        "03_attacks", tmp_path / "out.ipynb", "-f", "presets/smoke.yaml", "-p", "model", name,
        "-p", "output_folder", str(smoke[0]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert name in (tmp_path / "out.ipynb").read_text()


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        (["-p", "epohcs", "3"], ["epohcs", "epochs"]),
        (["-p", "eps", "8"], ["eps"]),
        (["-p", "model", "parts10-nothing"], ["parts10-nothing", "immunity"]),
        (["-p", "preset", "nosuch"], ["nosuch", "demo"]),
    ],
)
def test_a_wrong_parameter_fails_before_computing(parameters, told, tmp_path):
    done = papermill("02_training", tmp_path / "out.ipynb", *parameters)
    assert done.returncode != 0
    for word in told:
        assert word in done.stderr


def test_an_unknown_preset_lists_the_valid_ones(tmp_path):
    done = reproduce(tmp_path, preset="nosuch")
    assert done.returncode == 2
    assert "nosuch" in done.stderr and "cifar10-small, demo, paper, smoke" in done.stderr
    assert "Traceback" not in done.stderr
