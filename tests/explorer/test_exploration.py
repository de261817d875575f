"""What the explorer computes: once, truly, and of the models that are there."""

from dataclasses import replace

import pytest
import torch

from immunity_lib import expert_heatmaps
from immunity_lib.data.image_set import ImageSet
from immunity_lib.evaluation import switched_probabilities
from immunity_lib.explorer import Exploration, Subject
from immunity_lib.explorer import exploration as module
from immunity_lib.explorer.cam_methods import CAM_METHODS, OURS, explanation_maps
from immunity_lib.explorer.exploration import ANSWER, PRESET_BUDGET, TRUE_CLASS
from immunity_lib.explorer.moments import moments
from immunity_lib.recipes import ModelName, explored_models


@pytest.fixture
def subject(exploration):
    return exploration.gallery[0]


def test_answers_are_the_model_s_own_at_every_point(exploration, names, subject):
    answers = exploration.answers(names[0], subject, "uniform")
    budgets, points = len(exploration.budgets), exploration.settings.steps + 1
    assert answers.frames.shape == (budgets, points, 3, 32, 32)
    assert torch.equal(answers.frames[:, 0], subject.image.expand(budgets, -1, -1, -1))
    model = exploration.model(names[0])
    with torch.no_grad():
        outputs = model.expert_outputs(answers.frames[2])
    kept = {"rtol": 1e-3, "atol": 1e-4}  # the copy for attacks is folded
    torch.testing.assert_close(answers.experts[2], outputs.log_probs.exp(), **kept)
    torch.testing.assert_close(answers.mixtures[2], switched_probabilities(outputs), **kept)
    torch.testing.assert_close(answers.mixtures.mean(2), answers.ensemble, rtol=1e-4, atol=1e-5)


def test_budgets_bound_the_way_and_the_preset_s_eps_is_among_them(exploration, names, subject):
    assert exploration.budgets[0] == 0
    assert exploration.budgets[PRESET_BUDGET] == exploration.settings.eps
    frames = exploration.answers(names[0], subject, "uniform").frames
    for budget, way in zip(exploration.budgets, frames, strict=True):
        assert (way - subject.image).abs().max() <= float(budget) + 1e-6


def test_maps_are_those_of_eq_3_for_the_class_that_is_asked(exploration, names, subject):
    frames = exploration.answers(names[0], subject, "uniform").frames
    for explained, label in ((TRUE_CLASS, subject.label), (7, 7)):
        maps = exploration.maps(names[0], subject, "uniform", OURS, explained)
        labels = torch.full((frames.shape[1],), label)
        expected = expert_heatmaps(exploration.model(names[0]), frames[3], labels)
        torch.testing.assert_close(maps[3], expected, rtol=1e-3, atol=1e-6)
    answered = exploration.answers(names[0], subject, "uniform").ensemble.argmax(-1)
    maps = exploration.maps(names[0], subject, "uniform", OURS, ANSWER)
    expected = expert_heatmaps(exploration.model(names[0]), frames[3], answered[3])
    torch.testing.assert_close(maps[3], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", CAM_METHODS)
def test_every_method_gives_distributions(model, images, labels, method):
    maps = explanation_maps(model, images[:2], labels[:2], method)
    assert maps.shape == (2, 3, 32, 32) and (maps >= 0).all()
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 3), rtol=0, atol=1e-4)


def test_an_unknown_method_is_named_with_those_that_exist(model, images, labels):
    with pytest.raises(ValueError, match="'Smooth-CAM'.*Score-CAM"):
        explanation_maps(model, images, labels, "Smooth-CAM")


def test_nothing_is_computed_twice(exploration, names, monkeypatch):
    subject = exploration.gallery[1]
    first = exploration.maps(names[0], subject, "uniform")
    monkeypatch.setattr(module, "explanation_maps", None)
    monkeypatch.setattr(module, "attack_path", None)
    assert exploration.maps(names[0], subject, "uniform") is first


def test_what_is_kept_is_bounded_and_models_stay(exploration, names, subject, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 5)
    for method in ("Layer-CAM", "HiRes-CAM", "XGrad-CAM"):
        exploration.maps(names[0], subject, "uniform", method)
    assert len(exploration._kept) <= 5
    assert ("model", names[0]) in exploration._kept


def test_an_own_image_is_led_away_from_what_the_ensemble_answers(exploration, names, subject):
    own = Subject("mine", subject.image, None)
    answers = exploration.answers(names[0], own, "uniform")
    assert answers.asked == answers.ensemble[0, 0].argmax()


def test_the_gallery_stays_small_whatever_the_number_of_classes(exploration):
    """As on CIFAR-100: the first thirty classes, an image of each."""
    many = replace(
        exploration.dataset, class_names=tuple(f"class {k}" for k in range(100)), part_names=(),
        splits={"test": ImageSet(torch.zeros(300, 3, 32, 32, dtype=torch.uint8),
                                 torch.arange(300) % 100)},
    )  # fmt: skip
    gallery = Exploration(exploration.settings, many).gallery
    assert [subject.label for subject in gallery] == list(range(30))


def test_broken_images_are_right_before_and_wrong_after(exploration, names):
    before, after = exploration.verdicts(names[0], "uniform")
    broken = exploration.broken(names[0], "uniform")
    assert len(broken) == len(exploration.gallery)
    assert broken == [b and not a for b, a in zip(before.uniform, after.uniform, strict=True)]


def test_the_scale_is_one_for_all_moments(exploration, names, subject):
    shown = moments(exploration, names, subject, "uniform", budget=2, steps=[0, 3])
    assert len(shown) == 4 and len({moment.top for moment in shown}) == 1
    assert shown[0].moved == 0 and shown[1].moved > 0
    switched = moments(exploration, names, subject, "uniform", budget=2, steps=[0], state=1)[0]
    torch.testing.assert_close(switched.weights, shown[0].weights.flip(0))


def test_models_that_are_missing_are_listed(exploration, names):
    assert set(exploration.models) == set(names)
    every = explored_models(exploration.settings)
    assert set(exploration.missing) == set(every) - set(names)


def test_without_any_model_it_says_how_to_train_one(make_settings, dataset, tmp_path):
    with pytest.raises(ValueError, match="papermill notebooks/02_training.*-p model parts10-moe-"):
        Exploration(make_settings(output_folder=str(tmp_path)), dataset)


def test_the_command_it_gives_names_a_model_that_the_training_notebook_takes(exploration):
    for name in exploration.missing:
        assert ModelName.parse(str(name)) in explored_models(exploration.settings)
