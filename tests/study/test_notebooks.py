"""The notebooks as files: parameters, prose, no outputs. That they run, test_reproduce.py shows."""

import ast
import json
import math
import re
import sys

import pytest
from IPython.core.error import UsageError

from study import figures, store, tables
from study.catalogue import MIXTURES, table2_models
from study.settings import ROOT, TRAINING, Settings

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LITERALS = (ast.Constant, ast.List, ast.Dict, ast.Tuple)
CONSTANTS = {  # that answers quote: mathematics gives them, and no run changes them
    "1.0986": math.log(3),
    "1.609": math.log(5),
    "8.05": 5 * math.log(5),
    "13.8": 6 * math.log(10),
    "1.461": math.log(math.e + 9) - 1,  # of a softmax too many, over ten classes
    "2.461": math.log(math.e + 9),
    "0.942": sum(math.comb(5, k) * 0.8**k * 0.2 ** (5 - k) for k in (3, 4, 5)),
}


def cells(path, kind=None):
    return [cell for cell in json.loads(path.read_text())["cells"] if kind in (None, cell["cell_type"])]


def source(cell):
    return "".join(cell["source"])


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def test_committed_without_outputs_and_with_parameters_that_are_explained_literals_validated_right_below(notebook):
    tagged = ["parameters" in cell["metadata"].get("tags", []) for cell in cells(notebook, "code")]
    assert tagged.index(True) == 0 and sum(tagged) == 1, "papermill injects after exactly one cell tagged 'parameters'"
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells(notebook, "code"))
    text, below = (source(cell) for cell in cells(notebook, "code")[:2])
    assert text.startswith("# Parameters"), "by which `notebook_settings` knows the cell"
    assert "settings = notebook_settings(globals())" in below
    for statement in ast.parse(text).body:
        # papermill's values do not reach what is derived inside of this cell
        assert isinstance(statement, ast.Assign) and isinstance(statement.value, LITERALS)
        (target,) = statement.targets
        assert target.id in Settings.model_fields.keys() | TRAINING
        assert "#" in text.splitlines()[statement.lineno - 1]


@pytest.mark.parametrize("path", [NOTEBOOKS[0], NOTEBOOKS[5]], ids=lambda path: path.stem)
def test_opened_without_the_repository_it_says_what_to_run(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "study.settings", None)
    with pytest.raises(UsageError, match=r"clone .*%cd .*%pip install -e \.\[study\]"):
        exec(source(cells(path, "code")[1]), {})


def test_closes_with_exercises_and_their_answers_folded_away(notebook):
    last = source(cells(notebook)[-1])
    exercises = re.split(r"^### \d", last.removeprefix("## Exercises"), flags=re.MULTILINE)[1:]
    assert last.startswith("## Exercises") and 3 <= len(exercises) <= 5
    for exercise in exercises:
        question, answer = exercise.split("<details><summary>Answer</summary>\n\n")
        assert len(question) > 80 and answer.strip().endswith("</details>")
        for snippet in re.findall(r"```python\n(.*?)```", answer, re.DOTALL):
            ast.parse(snippet)


def test_G8_batches_for_a_trained_model_are_made_where_it_lies(notebook):
    """In cells and worked answers; without a device they are the CPU's, as are models that are built there."""
    prose = "".join(source(cell) for cell in cells(notebook, "markdown"))
    for code in [*map(source, cells(notebook, "code")), *re.findall("```python\n(.*?)```", prose, re.DOTALL)]:
        calls = [one for one in ast.walk(ast.parse(code)) if isinstance(one, ast.Call)]
        of_cpu = {"build_model", "train"} & {ast.unparse(one.func) for one in calls}
        for call in calls:
            if ast.unparse(call.func) in ("evaluation_batches", "training_batches", "verdicts_under_attack"):
                assert of_cpu or "chosen_device()" in ast.unparse(call), ast.unparse(call)


def test_A7_neighbours_no_caption_prints_a_budget_as_an_exact_fraction(notebook):
    assert not re.search(r"\{[^{}()]*\.(eps|step_size)\}", "".join(map(source, cells(notebook, "code"))))


@pytest.fixture
def written(monkeypatch):
    """Captions and records of what cells would write, by its name; without the numbers."""
    found = {}

    def note(_, __, name, caption, records, *text):
        found[name] = caption, records
        return []

    for module, function in ((tables, "write_table"), (figures, "save_figure")):
        monkeypatch.setattr(module, function, note)
    for drawn in ("strength_curves", "attack_dots"):
        monkeypatch.setattr(figures, drawn, lambda *_: None)
    monkeypatch.setattr(tables, "budget_curves", lambda *_: None)
    return found


def run_cells(path, settings, *having, **names):
    for cell in map(source, cells(path, "code")):
        if any(text in cell for text in having):
            exec(cell, names := {"settings": settings, "tables": tables, **names})


def test_the_gates_rest_on_records_of_mixtures_alone(make_settings, written, monkeypatch):
    """Wherever they lie: those that come with the project have the model's name in their folder's."""
    monkeypatch.setattr(store, "find_record", lambda _, name, kind: ROOT / f"pretrained/tiny/{name}/{kind}.json")
    settings = make_settings(baselines=["pdarts"], controls=["standalone", "ensemble"])
    run_cells(NOTEBOOKS[3], settings, '"table2"', '"gates"', table=None, gates=None)
    _, records = written["gates"]
    mixtures = [str(name) for name in table2_models(settings) if name.method in MIXTURES]
    assert [path.parent.name for path in records] == mixtures


def test_captions_say_which_attacks_met_fewer_images_than_the_others(make_settings, written):
    for count, few in ((500, 200), (100, None)):
        settings = make_settings(test_images=500, adaptive_images=count, auto_attack_images=few)
        names = {"suite": {"model": ["Immunity"]}, "names": [], "headline": None}
        run_cells(NOTEBOOKS[6], settings, '"attack_strength"', '"gate_worth"', '"adaptive_attacks"', **names)
        told = "; AutoAttack, Square and noise met the first 200 images alone."
        for name in ("gate_worth", "attack_suite", "adaptive_attacks"):
            assert (told in written[name][0]) == (few == 200)
        assert written["attack_strength"][0].endswith("by eps, on the first 250 images alone.") == (count == 500)


def answers(path):
    """The text of each folded answer, without its snippets."""
    prose = "".join(source(cell) for cell in cells(path, "markdown"))
    folded = re.findall("<details>(.*?)</details>", prose, re.DOTALL)
    return [re.sub("```python\n.*?```", "", answer, flags=re.DOTALL) for answer in folded]


def measured_like(text):
    """The numbers in a text with a decimal point or a percent sign."""
    numbers = re.findall(r"\d[\d.,]*(?:\s*\\?%)?", text)
    return {number.rstrip(".,") for number in numbers if re.search(r"\.\d|%", number)}


def test_no_folded_answer_quotes_a_run_whose_numbers_the_next_one_changes(notebook):
    for answer in answers(notebook):
        assert "It prints" not in answer and "```" not in answer
        assert measured_like(answer) <= CONSTANTS.keys()


def test_constants_of_answers_are_what_mathematics_gives_and_all_in_use():
    for text, value in CONSTANTS.items():
        assert text == f"{value:.{len(text.partition('.')[2])}f}"
    assert set().union(*(measured_like(answer) for path in NOTEBOOKS for answer in answers(path))) == CONSTANTS.keys()
    assert measured_like("1 in 5. Then 46.9 %, 8\\% and 0.89, of 1,000.") == {"46.9 %", "8\\%", "0.89"}


def test_every_equation_stands_in_library_and_notebook_and_is_computed_by_hand_too():
    """In a cell of its own; that both agree, the notebook itself asserts."""
    library = "".join(path.read_text() for path in (ROOT / "immunity_lib").rglob("*.py"))
    prose = "".join(source(cell) for path in NOTEBOOKS for cell in cells(path, "markdown"))
    for number in (1, 2, 3, 9, 10, 11, 12):
        assert f"Eq. ({number})" in library, f"no line of the library is marked Eq. ({number})"
        assert f"\\tag{{{number}}}" in prose, f"no notebook states eq ({number})"
    code = [source(cell) for cell in cells(NOTEBOOKS[0], "code")]
    by_hand = "".join(cell for cell in code if "side_by_side" in cell or "by hand" in cell)
    for function in (
        "mixture", "switched_probabilities", "classification_loss", "grad_cam", "mutual_information",
        "mutual_information_loss", "centre_of_mass", "position_stability_loss", "immunity_loss",
        "independence_score", "causality_score",
    ):  # fmt: skip
        assert f"{function}(" in by_hand, function
