"""Records of results: used again while they are true, set aside and remade when they are not."""

import shutil

import numpy as np
import pytest
import torch

from immunity_lib import results
from immunity_lib.data import Dataset
from immunity_lib.evaluation import (
    accuracy_over_gates,
    verdicts_under_attack,
)
from immunity_lib.models import model_folder, trained_model
from immunity_lib.per_image import unpacked
from immunity_lib.recipes import ModelName
from immunity_lib.records import read_record
from immunity_lib.results import (
    attack_record,
    part_coverage,
    record_path,
    score_record,
)

NAME = ModelName.parse("parts10-moe-resnet18-standard-seed0")
SMALL = {"epochs": 1, "attacks": ["fgsm", "pgd"], "attack_gates": ["trained", "uniform"]}


@pytest.fixture(scope="module")
def finished_folder(make_settings, dataset, tmp_path_factory):
    """An output folder with a trained model and both of its records."""
    folder = tmp_path_factory.mktemp("results")
    settings = make_settings(output_folder=str(folder), **SMALL)
    attack_record(settings, NAME, dataset)
    score_record(settings, NAME, dataset)
    return folder


@pytest.fixture
def settings(make_settings, finished_folder, tmp_path):
    shutil.copytree(finished_folder, tmp_path, dirs_exist_ok=True)
    return make_settings(output_folder=str(tmp_path), **SMALL)


@pytest.fixture
def measurements(monkeypatch):
    """A spy: every accuracy that is measured from now on."""
    seen, measure = [], results.verdicts_over_gates

    def spy(model, batches):
        seen.append(model)
        return measure(model, batches)

    monkeypatch.setattr(results, "verdicts_over_gates", spy)
    return seen


RECORDS = pytest.mark.parametrize(
    ("make", "kind"), [(attack_record, "attacks"), (score_record, "scores")]
)


@RECORDS
def test_record_is_used_again(settings, dataset, measurements, make, kind):
    on_disk = read_record(record_path(settings, NAME, kind))
    assert make(settings, NAME, dataset) == on_disk
    assert not measurements


@RECORDS
def test_truncated_record_is_set_aside_and_remade(
    settings, dataset, measurements, capsys, make, kind
):
    path = record_path(settings, NAME, kind)
    content = path.read_bytes()
    path.write_bytes(content[:100])
    record = make(settings, NAME, dataset)
    assert measurements and read_record(path)["result"].keys() == record["result"].keys()
    (aside,) = path.parent.glob(f"{path.name}.aside-*")
    assert aside.read_bytes() == content[:100]
    assert f"set aside as {aside}" in capsys.readouterr().err


@RECORDS
def test_record_about_other_weights_is_remade(settings, dataset, measurements, capsys, make, kind):
    path = record_path(settings, NAME, kind)
    before = read_record(path)
    make(settings.model_copy(update={"learning_rate": 0.01}), NAME, dataset)
    assert measurements and read_record(path)["weights"] != before["weights"]
    assert "it is about other weights, data or settings" in capsys.readouterr().err


@RECORDS
def test_record_about_other_data_is_remade(settings, dataset, measurements, make, kind):
    splits = dataset.splits | {"test": dataset.splits["test"].first(20)}
    other = Dataset(**vars(dataset) | {"splits": splits})
    before = read_record(record_path(settings, NAME, kind))
    assert make(settings, NAME, other)["data"] != before["data"]
    assert measurements


@pytest.mark.parametrize("change", [{"steps": 1}, {"attacks": ["fgsm"]}, {"attacked_images": 8}])
def test_attack_record_of_another_question_is_remade(settings, dataset, measurements, change):
    record = attack_record(settings.model_copy(update=change), NAME, dataset)
    assert measurements
    first = record["result"]["attacks"][0]
    assert first["images"] == change.get("attacked_images", 16)


def test_attack_record_holds_what_evaluation_measures(settings, dataset):
    result = attack_record(settings, NAME, dataset)["result"]
    model = trained_model(settings, NAME, dataset)
    for split in ("test", "test-shifted"):
        images = dataset.splits[split].images.float() / 255
        expected = accuracy_over_gates(model, [(images, dataset.splits[split].labels)])
        assert result["clean"][split].items() >= vars(expected).items()
    found = [(entry["attack"], entry["attacked_gate"]) for entry in result["attacks"]]
    assert found == [("fgsm", "trained"), ("pgd", "trained"), ("fgsm", "uniform"),
                     ("pgd", "uniform")]  # fmt: skip
    expected = verdicts_under_attack(
        model, dataset.splits["test"].first(16), "pgd", "uniform",
        eps=8 / 255, step_size=2 / 255, steps=3,
    )  # fmt: skip
    last = result["attacks"][-1]
    assert last["switched"] == pytest.approx(1 - expected.failure.mean().item())
    gates = unpacked(last["per_image"]["gates"])
    assert gates.tolist() == expected.switched.sum(1).tolist() and len(gates) == 16
    assert gates.mean() / last["gates"] == pytest.approx(last["switched"])
    assert unpacked(last["per_image"]["uniform"]).mean() == last["uniform"]


def test_a_stand_alone_network_is_attacked_under_one_gate(settings, dataset):
    name = NAME.model_copy(update={"method": "standalone"})
    attacks = attack_record(settings, name, dataset)["result"]["attacks"]
    assert [entry["attack"] for entry in attacks] == ["fgsm", "pgd"]


def test_record_says_what_it_depends_on(settings):
    for kind in ("attacks", "scores"):
        record = read_record(record_path(settings, NAME, kind))
        weights = read_record(model_folder(settings, NAME) / "record.json")["weights"]
        assert record["kind"] == kind and record["model"] == str(NAME)
        assert record["weights"] == [weights]
        assert record["provenance"]["packages"] and record["provenance"]["library"]


def test_score_record_is_within_its_ranges(settings):
    for split in read_record(record_path(settings, NAME, "scores"))["result"].values():
        assert 0 <= split["mutual_information"] <= np.log(2)
        assert split["independence_score"] >= 0 and split["causality_score"] >= 0
        assert 0 <= split["empty_maps"] <= 1
        for score, line in split["per_image"].items():
            values = unpacked(line)
            assert len(values) == 32
            if score in split:
                assert values.mean() == pytest.approx(split[score], rel=1e-3)
        experts = unpacked(split["per_image"]["experts"])
        assert experts.mean() / 2 == pytest.approx(np.mean(split["expert_accuracy"]))
        for shares in (*split["part_coverage"], split["background_heat"]):
            assert all(0 <= share <= 1 for share in shares)


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
