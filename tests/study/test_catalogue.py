"""Names of models and what they stand for."""

from dataclasses import fields, replace
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immunity_lib.data import DATASETS
from immunity_lib.experts import BASELINES, EXPERT_NAMES
from immunity_lib.recipe import Recipe
from study import catalogue
from study.catalogue import METHODS, REGIMES, ModelName, members, recipe_of, table2_models, table3_models

CHOICES = {"dataset": DATASETS, "method": METHODS, "expert": EXPERT_NAMES, "regime": REGIMES}
NAMES = {field: st.sampled_from(list(names)) for field, names in CHOICES.items()}


def named(method="moe", expert="resnet18", regime="standard", dataset="parts10", seed=0):
    return ModelName(dataset=dataset, method=method, expert=expert, regime=regime, seed=seed)


@given(st.builds(ModelName, seed=st.integers(0, 10**6), **NAMES))
def test_A3_a_name_says_everything(name):
    assert ModelName.parse(str(name)) == name


@pytest.mark.parametrize(
    ("method", "weights", "of_maps"),
    [("standalone", (1, 0, 0, 0), (0.1, 1)), ("moe", (2, 0.5, 0, 0), (0.1, 1)), ("moe-mi", (2, 0.5, 3, 0), (0.2, 2)),
     ("moe-ps", (2, 0.5, 0, 4), (0.2, 2)), ("immunity", (2, 0.5, 3, 4), (0.2, 2)),
     ("immunity-literal", (2, 0.5, 3, 4), (0, 0))],
)  # fmt: skip
def test_methods_are_configurations_of_one_model(make_recipe, method, weights, of_maps):
    found = make_recipe(method, alpha=0.5, beta=3, gamma=4, floor=0.2, warmup_epochs=2)
    assert (found.experts, found.alpha, found.beta, found.gamma) == weights
    assert (found.floor, found.warmup_epochs) == of_maps


EVALUATION = {
    "attacks": ["fgsm"], "steps": 50, "test_images": 20, "attacked_images": 3, "interactive": False,
    "attack_gates": ["trained"], "seeds": [0, 1],
}  # fmt: skip
OF_EVERY_MODEL = {"rotation": 3.0, "precision": "bfloat16", "decayed": "convolutions and classifier"}
OF_ADVERSARIES = {"adversary": "ffgsm", "eps": Fraction(4, 255), "step_size": Fraction(1, 255), "adversary_steps": 3}
OF_MAPS = {"floor": 0.5, "warmup_epochs": 3}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("method", ["moe", "immunity"])
def test_D12_a_recipe_has_of_the_preset_what_its_model_uses_and_no_more(make_settings, make_recipe, method, regime):
    """Attacking with another eps, say, must not train a standard model anew. Its seed is the study's to set."""
    assert "seed" not in type(make_settings()).model_fields
    used = OF_EVERY_MODEL | (OF_ADVERSARIES if regime != "standard" else {}) | (OF_MAPS if method == "immunity" else {})
    found = make_recipe(method, regime, **EVALUATION, **OF_EVERY_MODEL, **OF_ADVERSARIES, **OF_MAPS)
    assert found == replace(make_recipe(method, regime), **used)


@pytest.mark.parametrize("expert", ["resnet18", "pdarts"])
def test_the_wide_network_is_as_large_as_the_mixture(make_settings, expert):
    settings = make_settings(expert=expert, experts=4, width=0.25, baseline_width=0.5, baseline_layers=8)
    wide, single = (recipe_of(settings, named(method, expert)) for method in ("standalone-wide", "standalone"))
    assert wide.width == 2 * single.width


def test_ensembles_have_members_of_their_own(make_settings):
    settings = make_settings(experts=3, seeds=[0, 1])
    seeds = [[one.seed for one in members(settings, named("ensemble", seed=seed))] for seed in (0, 1)]
    assert seeds == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="is not trained; its members are"):
        recipe_of(settings, named("ensemble"))


def test_every_model_of_every_table_is_trained_once(make_settings):
    settings = make_settings(seeds=[0, 2], compared_experts=["resnet18", "densenet121"], expert="googlenet")
    attacked = {*table2_models(settings), *table3_models(settings)}
    needed = attacked | {catalogue.first_model(settings, "immunity-literal")}
    for name in catalogue.table1_models(settings):
        needed |= set(members(settings, name) if name.method == "ensemble" else [name])
    trained = catalogue.trained_models(settings)
    assert set(trained) == needed and len(trained) == len(needed)
    assert set(catalogue.measured_models(settings, "attacks")) == attacked


def test_table_2_crosses_data_sets_regimes_and_what_is_compared(make_settings):
    networks = ["pdarts", "robnet-free", "advrush"]
    regimes = ["standard", "trades"]
    settings = make_settings(baselines=networks, further_datasets=["cifar10"], regimes=regimes, seeds=[0, 2])
    compared = [("standalone", one) for one in networks]
    compared += [(one, "resnet18") for one in ("standalone", "moe", "immunity")]
    crossed = product(("parts10", "cifar10"), ("standard", "trades"), compared, (0, 2))
    assert table2_models(settings) == [named(*of, regime, data, seed) for data, regime, of, seed in crossed]
    for name in table2_models(settings):
        assert recipe_of(settings, name).dataset == name.dataset


def test_a_notebook_is_of_all_models_or_of_the_one_that_is_asked_for(make_settings):
    names = catalogue.measured_models(settings := make_settings(), "adaptive")
    assert catalogue.asked_models(settings, "adaptive") == names
    assert catalogue.asked_models(make_settings(model=str(names[1])), "adaptive") == [names[1]]
    with pytest.raises(ValueError, match=f"none of preset tiny's models here; those are:\n{names[0]}\n"):
        catalogue.asked_models(make_settings(model="cifar10-moe"), "adaptive")


def test_who_meets_adaptive_attacks_and_through_whom(make_settings):
    settings = make_settings()
    assert len(catalogue.measured_models(settings, "adaptive")) == 4
    through = {named("immunity"): ["moe", "moe-mi", "moe-ps"], named("moe", regime="adversarial"): ["immunity"]}
    for attacked, methods in through.items():
        assert [one.method for one in catalogue.surrogates(settings, attacked)] == methods


@pytest.mark.parametrize("network", BASELINES)
@pytest.mark.parametrize("regime", REGIMES)
def test_published_recipes_are_whole_and_make_a_recipe(make_settings, network, regime):
    name, settings = named("standalone", network, regime), make_settings(baseline_layers=5)
    published, own = catalogue.own_recipe(settings, name), recipe_of(settings, name)
    assert published["source"] and published["gaps"]
    assert published["fields"].keys() <= {field.name for field in fields(Recipe)}
    for field in published["fields"].keys() - {"adversary", "adversary_steps", "eps", "step_size"}:
        assert getattr(own, field) == published["fields"][field]
    assert (own.adversary is None) == (regime == "standard")
    assert (own.layers, own.experts, own.pairing_weight > 0) == (5, 1, regime in ("trades", "alp"))


def test_baselines_can_be_trained_like_everything_else(make_settings):
    settings = make_settings(baseline_layers=4)
    alike = recipe_of(make_settings(baseline_recipes="preset", baseline_layers=4), named("standalone", "pdarts"))
    assert alike == replace(recipe_of(settings, named("standalone")), expert="pdarts", layers=4)
    assert recipe_of(settings, named("standalone", "pdarts")).auxiliary_weight == 0.4
    # As an expert of a mixture it is trained as the mixture is
    assert recipe_of(settings, named("immunity", "pdarts")).epochs == settings.recipe.epochs


@pytest.mark.parametrize("regimes", [["adversarial"], ["trades", "standard"]])
def test_the_mixtures_of_figure_2_can_be_explored_whatever_regimes_there_are(make_settings, regimes):
    settings = make_settings(regimes=regimes)
    assert set(table3_models(settings)) <= set(catalogue.explored_models(settings))
