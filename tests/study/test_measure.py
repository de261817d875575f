"""What is measured of a model: true to the library, made once, and remade when the question is."""

import shutil
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from publish import publish_measurements
from spoiling import spoil

from immunity_lib import evaluate
from immunity_lib.attacks import Effort, adaptive_attacks
from immunity_lib.evaluate import verdicts_over_gates, verdicts_under_attack
from immunity_lib.files import DamagedFile, read_tensors, write_tensors
from study import measure, store
from study.catalogue import ModelName
from study.measure import measure_adaptive, measure_attacks, measure_scores, part_coverage
from study.store import question_of, read_frame, read_json, read_record, record_path, trained_model

NAME = ModelName.parse("parts10-moe-resnet18-standard-seed0")
SMALL = {
    "epochs": 1, "attacks": ["fgsm", "pgd"], "attack_gates": ["trained", "uniform"], "adaptive_images": 6,
    "gate_samples": [1], "auto_attack_steps": 1, "steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished_folder(make_settings, dataset, tmp_path_factory):
    """An output folder with a trained model and two of its frames."""
    folder = tmp_path_factory.mktemp("measured")
    settings = make_settings(output_folder=str(folder), **SMALL)
    measure_attacks(settings, NAME, dataset)
    measure_scores(settings, NAME, dataset)
    return folder


@pytest.fixture
def settings(make_settings, finished_folder, tmp_path):
    shutil.copytree(finished_folder, tmp_path, dirs_exist_ok=True)
    return make_settings(output_folder=str(tmp_path), **SMALL)


@pytest.fixture
def measurement(monkeypatch):
    """What measures accuracy, and counts its calls."""
    monkeypatch.setattr(evaluate, "verdicts_over_gates", spy := Mock(wraps=evaluate.verdicts_over_gates))
    return spy


KINDS = pytest.mark.parametrize(("make", "kind"), [(measure_attacks, "attacks"), (measure_scores, "scores")])


@KINDS
def test_what_was_measured_is_used_again_and_its_record_says_what_of(settings, dataset, measurement, make, kind):
    path = record_path(settings, NAME, kind)
    before, record = path.read_bytes(), read_json(path)
    make(settings, NAME, dataset)
    assert not measurement.called and path.read_bytes() == before
    assert (record["kind"], record["model"]) == (kind, str(NAME))
    assert record["weights"] == [read_record(settings, NAME, "training")["weights"]]
    assert record["provenance"]["packages"] and record["provenance"]["library"]


def drop_columns(path):
    pd.read_parquet(path).drop(columns=["gates", "sees"]).to_parquet(path)


def write_another(path):
    """A whole frame, of which the record does not speak."""
    pd.read_parquet(path).assign(switched=1.0).to_parquet(path)


@KINDS
@pytest.mark.parametrize(
    ("ending", "damage", "told"),
    [(".json", lambda path: spoil(path, "truncated"), ""), (".parquet", lambda path: spoil(path, "truncated"), ""),
     (".parquet", drop_columns, " cannot be read (it lacks gates, sees)"),
     (".parquet", write_another, " cannot be read (its record speaks of another)")],
)  # fmt: skip
def test_D7_D8_neighbours_what_is_not_whole_or_of_another_record_is_set_aside_and_remade(
    settings, dataset, measurement, capsys, make, kind, ending, damage, told
):
    path = record_path(settings, NAME, kind)
    before = read_frame(settings, [NAME], kind)
    damage(path.with_suffix(ending))
    make(settings, NAME, dataset)
    pd.testing.assert_frame_equal(read_frame(settings, [NAME], kind), before)
    (aside,) = path.parent.glob(f"{path.name}.aside-*")
    assert measurement.called and f"set aside as {aside}" in (said := capsys.readouterr().err)
    assert f"{path.with_suffix(ending).name}{told}" in said and "it is made anew" in said


def test_D7_neighbours_a_disk_that_fails_now_costs_no_measurement(settings, monkeypatch):
    path = record_path(settings, NAME, "attacks")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Stale"):
        patch.setattr(type(path), "read_bytes", Mock(side_effect=OSError(116, "Stale file handle")))
        read_frame(settings, [NAME], "attacks")
    assert len(read_frame(settings, [NAME], "attacks")) and not list(path.parent.glob("*.aside-*"))


@KINDS
def test_a_record_about_other_data_is_remade(settings, dataset, measurement, capsys, make, kind):
    path = record_path(settings, NAME, kind)
    before = read_json(path)
    make(settings, NAME, replace(dataset, splits=dataset.splits | {"test": dataset.splits["test"].first(20)}))
    assert measurement.called and read_json(path)["data"] != before["data"]
    assert "it is about other weights, data or settings" in capsys.readouterr().err


def test_what_comes_with_the_project_needs_no_weights_and_answers_its_own_question_alone(
    settings, dataset, measurement, monkeypatch, tmp_path
):
    """So a study that took days goes on, and is drawn, where nothing of it is but records and frames."""
    monkeypatch.setattr(store, "PRETRAINED", tmp_path / "pretrained")
    publish_measurements(settings, NAME)
    elsewhere = settings.model_copy(update={"output_folder": str(tmp_path / "elsewhere")})
    measure_attacks(elsewhere, NAME, dataset)
    assert not measurement.called and not elsewhere.runs.exists()
    pd.testing.assert_frame_equal(read_frame(elsewhere, [NAME], "attacks"), read_frame(settings, [NAME], "attacks"))
    for change in ({"steps": 2}, {"recipe": replace(settings.recipe, learning_rate=0.01)}):
        with pytest.raises(FileNotFoundError, match="no record of its attacks with these settings yet"):
            read_frame(elsewhere.model_copy(update=change), [NAME], "attacks")
    model = trained_model(settings, NAME, dataset)
    monkeypatch.setattr(store, "trained_model", lambda *_: model)
    measure_attacks(elsewhere.model_copy(update={"steps": 2}), NAME, dataset)
    assert measurement.called and record_path(elsewhere, NAME, "attacks").exists()
    # Measured here, of a training that came along; without its frame, it is as if it were not
    publish_measurements(other := elsewhere.model_copy(update={"steps": 2}), NAME)
    shipped = store.pretrained_folder(settings, NAME) / "attacks.json"
    assert read_json(shipped)["asked"]["steps"] == 2 and len(read_frame(other, [NAME], "attacks"))
    before = shipped.read_bytes()
    record_path(other, NAME, "attacks").with_suffix(".parquet").unlink()
    publish_measurements(other, NAME)
    assert shipped.read_bytes() == before


def test_what_is_of_other_settings_is_not_published(settings, dataset, measurement, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(store, "PRETRAINED", tmp_path / "pretrained")
    publish_measurements(settings, NAME)
    before = (store.pretrained_folder(settings, NAME) / "attacks.json").read_bytes()
    other = settings.model_copy(update={"steps": 2})
    measure_attacks(other, NAME, dataset)
    publish_measurements(settings, NAME)
    assert "of other settings or weights and was left out" in capsys.readouterr().out
    assert (store.pretrained_folder(settings, NAME) / "attacks.json").read_bytes() == before
    assert measurement.called


@pytest.mark.parametrize(("ending", "how"), [(".json", "truncated"), (".json", "foreign"), (".parquet", "truncated")])
def test_D8_neighbours_a_damaged_record_of_the_project_stays_and_is_measured_here(
    settings, dataset, measurement, monkeypatch, tmp_path, capsys, ending, how
):
    monkeypatch.setattr(store, "PRETRAINED", tmp_path / "pretrained")
    publish_measurements(settings, NAME)
    shipped = store.pretrained_folder(settings, NAME) / f"attacks{ending}"
    record_path(settings, NAME, "attacks").unlink()
    spoil(shipped, how)
    damaged = shipped.read_bytes()
    with pytest.raises(FileNotFoundError if ending == ".json" else DamagedFile, match="make reproduce|git checkout"):
        read_frame(settings, [NAME], "attacks")
    measure_attacks(settings, NAME, dataset)
    assert measurement.called and "is not used" in capsys.readouterr().out
    assert shipped.read_bytes() == damaged and len(read_frame(settings, [NAME], "attacks"))


@pytest.mark.parametrize(
    ("kind", "own", "recipe"),
    [("attacks", {"steps": 2}, {}), ("attacks", {"attacks": ["fgsm"]}, {}), ("attacks", {"attacked_images": 8}, {}),
     ("attacks", {"attack_gates": ["uniform"]}, {}), ("attacks", {}, {"learning_rate": 0.01}),
     ("attacks", {}, {"width": 0.03125}), ("scores", {}, {"learning_rate": 0.01}), ("adaptive", {}, {})],
)  # fmt: skip
def test_what_answers_another_question_or_none_is_not_shown_and_made_anew(
    settings, dataset, measurement, capsys, kind, own, recipe
):
    other = settings.model_copy(update=own | {"recipe": replace(settings.recipe, **recipe)})
    told = f"{NAME} has no record of its {kind} with these.* yet.*; run: make reproduce PRESET=<the file of tiny>"
    with pytest.raises(FileNotFoundError, match=told):
        read_frame(other, [NAME], kind)
    if kind != "adaptive":  # which was never measured here
        before = read_json(record_path(settings, NAME, kind))
        {"attacks": measure_attacks, "scores": measure_scores}[kind](other, NAME, dataset)
        assert measurement.called and "it is about other weights, data or settings" in capsys.readouterr().err
        assert (read_record(other, NAME, kind)["weights"] != before["weights"]) == bool(recipe)
        attacked = read_frame(other, [NAME], kind).query("family == 'paper'").groupby(["attack", "sees"]).size()
        assert len(attacked) == len(other.attacks) * len(other.attack_gates) * (kind == "attacks")
        assert (attacked == other.attacked_images).all()


def test_each_setting_that_a_frame_depends_on_is_asked(settings):
    changes = {"adaptive_images": 8, "auto_attack_images": 8, "steps": 9, "gate_samples": [9], "test_images": 9}
    for name, value in changes.items():
        other = settings.model_copy(update={name: value})
        assert question_of(other, "adaptive") != question_of(settings, "adaptive"), name
    fewer = settings.model_copy(update={"adaptive_images": None, "attacked_images": 8})
    assert question_of(fewer, "adaptive")["adaptive_count"] == 8


def bits(frame, gates):
    """Right or wrong under each permutation, (images, gates)."""
    packed = np.stack([np.frombuffer(row, np.uint8) for row in frame["gates"]])
    return np.unpackbits(packed, axis=1, count=gates).astype(bool)


def test_the_frame_of_attacks_holds_what_evaluation_measures(settings, dataset):
    frame, model = read_frame(settings, [NAME], "attacks"), trained_model(settings, NAME, dataset)
    for split in ("test", "test-shifted"):
        rows = dataset.splits[split]
        expected = verdicts_over_gates(model, [(rows.images.float() / 255, rows.labels)]).accuracy
        own = frame.query("attack == 'clean' and split == @split")
        assert own["switched"].mean() == pytest.approx(expected.switched)
        assert own["uniform"].mean() == expected.uniform and len(own) == 32
        assert bits(own, 2).mean(0).max() == expected.best
        assert own["label"].tolist() == rows.labels.tolist()
    attacked = frame.query("family == 'paper'")
    found = list(attacked.groupby(["sees", "attack"], sort=False).groups)
    assert found == [("trained", "fgsm"), ("trained", "pgd"), ("uniform", "fgsm"), ("uniform", "pgd")]
    test = dataset.splits["test"]
    first, strength = test.select(test.balanced(16)), {"eps": 8 / 255, "step_size": 2 / 255, "steps": 1}
    expected = verdicts_under_attack(model, first, "pgd", "uniform", **strength)
    last = attacked.query("attack == 'pgd' and sees == 'uniform'")
    assert (bits(last, 2) == expected.switched.numpy()).all()
    assert last["uniform"].tolist() == expected.uniform.tolist()
    assert last["image"].tolist() == test.balanced(16).tolist()


def test_a_stand_alone_network_is_attacked_under_one_gate(settings, dataset):
    name = NAME.model_copy(update={"method": "standalone"})
    measure_attacks(settings, name, dataset)
    frame = read_frame(settings, [name], "attacks").query("family == 'paper'")
    assert set(frame["sees"]) == {"trained"} and set(frame["attack"]) == {"fgsm", "pgd"}
    assert (frame["uniform"] == frame["trained"]).all()


def test_scores_are_within_their_ranges(settings):
    frame, summary = read_frame(settings, [NAME], "scores"), read_record(settings, NAME, "scores")["summary"]
    assert frame["mutual_information"].between(-1e-6, np.log(2) + 1e-6).all()
    assert (frame[["independence_score", "causality_score"]] >= 0).all(axis=None)
    assert frame["empty_maps"].isin([0, 0.5, 1]).all()
    for split, own in frame.groupby("split"):
        right = np.unpackbits(np.frombuffer(b"".join(own["experts"]), np.uint8)[:, None], axis=1)[:, :2].mean(0)
        assert right == pytest.approx(summary[split]["expert_accuracy"]) and len(own) == 32
        assert own["background"].between(0.4, 1).all()
        assert own["background_heat"].mean() == pytest.approx(np.mean(summary[split]["background_heat"]))
        shares = [*summary[split]["part_coverage"], summary[split]["background_heat"]]
        assert all(0 <= share <= 1 for of_expert in shares for share in of_expert)


def test_part_coverage_is_what_plain_loops_give():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(5, 2, 6, 6, generator=generator, dtype=torch.float64)
    maps = maps / maps.sum((2, 3), keepdim=True)
    masks = torch.rand(5, 3, 6, 6, generator=generator) < 0.3
    masks[0, 1] = masks[3, 1] = False  # not visible there
    masks[:, 2] = False  # visible nowhere
    expected = np.zeros((2, 3))
    for i, p in np.ndindex(2, 3):
        shares = [maps[q, i][masks[q, p]].sum().item() for q in range(5) if masks[q, p].any()]
        expected[i, p] = np.mean(shares) if shares else 0
    torch.testing.assert_close(part_coverage(maps, masks), torch.as_tensor(expected))


def test_adaptive_attacks_that_were_stopped_go_on(settings, dataset, monkeypatch):
    name = ModelName.parse("parts10-immunity-resnet18-standard-seed0")
    unfinished = record_path(settings, name, "adaptive").with_suffix(".unfinished")
    made, cut, attack = [], "pgd-trained", evaluate._attack

    def stop(target, images, labels, one, eps):
        made.append(one.name)
        if one.name == cut:
            raise RuntimeError("a power cut")
        return attack(target, images, labels, one, eps)

    monkeypatch.setattr(evaluate, "_attack", stop)
    with pytest.raises(RuntimeError, match="power cut"):
        measure_adaptive(settings, name, dataset)
    tensors, notes = read_tensors(unfinished)
    assert [attack for attack, _ in notes["told"]] == ["fgsm", "bim", "mim", "pgd"]
    cut = None
    measure_adaptive(settings, name, dataset)
    assert made.count("fgsm") == 1 and made.count("pgd-trained") == 2
    assert not unfinished.exists()
    resumed, summary = read_frame(settings, [name], "adaptive"), read_record(settings, name, "adaptive")["summary"]
    assert {one["attack"] for one in summary["attacks"]} == set(resumed["attack"]) - {"clean"}
    assert (resumed.groupby("attack").size() == 6).all()

    record_path(settings, name, "adaptive").unlink()
    wrong = {one: ~right for one, right in tensors.items()}
    write_tensors(unfinished, wrong, notes | {"question": notes["question"] | {"library": "another version"}})
    measure_adaptive(settings, name, dataset)  # what was kept and read again is what an undisturbed run finds
    pd.testing.assert_frame_equal(read_frame(settings, [name], "adaptive"), resumed)

    fewer = adaptive_attacks(trained_model(settings, name, dataset), Effort(0.1, 0.1, 1, (1,), 1), {})[1:]
    monkeypatch.setattr(measure, "adaptive_attacks", lambda *_: fewer)  # as a suite that knew less
    cut = "fgsm"
    with pytest.raises(RuntimeError, match="power cut"):  # a record of another suite answers another question
        measure_adaptive(settings, name, dataset)
