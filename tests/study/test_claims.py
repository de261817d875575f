"""Verdicts on the paper's claims: from frames whose answer is known beforehand."""

import numpy as np
import pytest
import yaml
from frames import ADAPTIVE, World
from scipy import stats

from study import catalogue, claims
from study.claims import VERDICTS, Claim, paired_differences, paired_interval, read_claims, verdict_text, verdicts

EDGES = {"immunity": 0.3, "moe-mi": 0.1, "moe": 0.0, "moe-ps": 0.0, "standalone": -0.3}


@pytest.fixture(scope="module", params=[[0], [0, 1, 2]], ids=["one seed", "three seeds"])
def world(request, make_settings, tmp_path_factory):
    """Under attack, Immunity is 30 points above the mixture and 60 above the baselines; on clean images, nowhere."""
    settings = make_settings(
        output_folder=str(tmp_path_factory.mktemp("world")), seeds=request.param, test_images=300,
        attacked_images=150, adaptive_images=150, baselines=["pdarts", "advrush"],
    )  # fmt: skip
    return World(settings, lambda name, attack: 0.8 if attack == "clean" else 0.5 + EDGES.get(name.method, 0))


def claim(wanted):
    return next(one for one in read_claims() if one.id == wanted)


def ablated(settings, method):
    return [name for name in catalogue.table3_models(settings) if name.method == method]


def test_verdicts_of_a_world_that_is_known(world):
    found = verdicts(world.settings, read_claims()).set_index("claim")
    assert set(found["verdict"]) <= set(VERDICTS)
    holding = ["standard-attacked", "adversarial-attacked", "mutual-information-attacked"]
    assert (found.loc[holding, "verdict"] == "holds").all(), found.loc[holding]
    assert found.loc["position-stability-attacked", "verdict"] == "undecided"  # it adds nothing
    assert found.loc["experts-steady", "verdict"] == "undecided"
    untestable = found[found["verdict"] == VERDICTS[-1]]
    assert set(untestable.index) == {"cifar100", "poisoning", "best-network-alone", "best-network-in-immunity"}
    assert untestable["effect"].isna().all() and untestable["reason"].notna().all()
    tested = found[found["effect"].notna()]
    assert (tested["seeds"] == len(world.settings.seeds)).all()
    assert set(tested["images"]) == {150, 300}
    assert ((tested["low"] <= tested["effect"]) & (tested["effect"] <= tested["high"])).all()


def test_an_effect_is_the_difference_of_means_to_the_strongest(world):
    """Oracle: accuracies counted from the verdicts."""
    means = {
        method: np.mean([
            world.accuracy(name, attack, "switch")
            for name in ablated(world.settings, method) for attack in world.settings.attacks
        ])
        for method in ("moe", "moe-mi", "moe-ps")
    }  # fmt: skip
    (line,) = verdicts(world.settings, [claim("mutual-information-attacked")]).to_dict("records")
    best = max("moe", "moe-ps", key=means.get)
    assert line["against"] == {"moe": "MoE", "moe-ps": "MoE+PS"}[best]
    assert line["effect"] == pytest.approx(means["moe-mi"] - means[best])


def test_relative_scores_are_in_shares_of_the_other_s(world):
    found, against = paired_differences(world.settings, claim("experts-differ").measure)
    own, other = (
        [world.scores[name]["mutual_information"] for name in ablated(world.settings, method)]
        for method in ("moe-mi", "moe")
    )
    assert against == "MoE"
    assert found[-1] == pytest.approx((own[-1] - other[-1]).to_numpy() / np.mean(other))


def test_switching_is_held_against_the_plain_ensemble_of_the_same_images(world):
    found, against = paired_differences(world.settings, claim("switching-adversarial").measure)
    mixtures = catalogue.adaptive_models(world.settings)
    name = next(one for one in mixtures if (one.method, one.regime) == ("immunity", "adversarial"))
    attacked = [world.verdicts[name, "adaptive", attack, sees] for attack, _, sees in ADAPTIVE]
    for image in range(5):
        switched = min(gates[image].mean() for gates, _, _ in attacked)
        ensemble = min(float(uniform[image]) for _, uniform, _ in attacked)
        assert found[0, image] == pytest.approx(switched - ensemble)
    assert against == "its plain ensemble"


@pytest.mark.parametrize(
    ("interval", "verdict"), [((2.1, 4), "holds"), ((1, 5), "undecided"), ((0, 1.9), "does not hold")]
)
def test_the_rule(interval, verdict):
    of = {"id": "-", "sentence": "-", "where": "-", "measure": claim("iscore").measure}
    assert Claim(**of, at_least=2).verdict(*interval) == verdict
    low, high = interval
    assert Claim(**of, at_most=-2).verdict(-high, -low) == verdict


def test_a_missing_model_is_no_verdict(world):
    without = world.settings.model_copy(update={"baselines": []})
    with pytest.raises(claims.NotTestable, match="no baselines"):
        paired_differences(without, claim("standard-attacked").measure)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"at_least": None}, "claim standard-clean needs a measure and at_least or at_most"),
     ({"measure": {"kind": "accuracy", "regime": "fast"}}, "measure"),
     ({"measure": {"kind": "speed", "model": "moe", "against": ["moe"]}}, "measure.kind"),
     ({"sentense": "x"}, "sentense")],
)  # fmt: skip
def test_a_faulty_claim_is_named(tmp_path, change, told):
    content = yaml.safe_load(claims.CLAIMS.read_text())
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump([content[0] | change]))
    with pytest.raises(ValueError, match=f"claim 1.*{told}"):
        read_claims(path)
    path.write_text(yaml.safe_dump([content[0], content[0]]))
    with pytest.raises(ValueError, match="its own id"):
        read_claims(path)


def test_with_one_seed_the_interval_is_that_of_a_paired_t_test_and_seeds_that_differ_widen_it():
    generator = np.random.default_rng(0)
    first, second = generator.normal(0.3, 1, 200), generator.normal(0, 1, 200)
    _, *found = paired_interval((first - second)[None])
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert found == pytest.approx(list(expected), abs=2e-3)
    by_image = generator.normal(0, 1, (3, 300))
    effect, low, high = paired_interval(by_image)
    apart, lower, higher = paired_interval(by_image + np.array([[-1.0], [0.0], [1.0]]))
    assert higher - lower > 5 * (high - low) and apart == pytest.approx(effect)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        seeds, images = generator.normal(0, 0.3, (5, 1)), generator.normal(0, 1, (1, 40))
        _, low, high = paired_interval(seeds + images + generator.normal(0, 1, (5, 40)))
        covered += low <= 0 <= high
    assert covered >= 88


def test_equal_differences_are_not_certain():
    _, low, high = paired_interval(np.zeros((1, 100)))
    assert low == -high and 0.02 < high < 0.05


def test_text_has_a_line_for_every_claim_and_a_reason_where_none_was_tested(world):
    every = read_claims()
    text = verdict_text(verdicts(world.settings, every)).set_index("claim")
    assert list(text.index) == [one.id for one in every]
    assert text.loc["poisoning", "verdict"].startswith(f"{VERDICTS[-1]}: the paper shows no")
    one = verdicts(world.settings, every[:1])  # all reasons empty, which pandas takes for numbers
    assert verdict_text(one)["verdict"].item() == one["verdict"].item()
