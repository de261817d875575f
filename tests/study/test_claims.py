"""Verdicts on the paper's claims: from frames whose answer is known beforehand."""

import numpy as np
import pandas as pd
import pytest
import yaml
from frames import ADAPTIVE, World
from scipy import stats

from study import catalogue, claims, figures
from study.claims import NOT_TESTABLE, Claim, count_by_luck, estimate, paired_effects, read_claims, verdicts
from study.settings import ROOT, load_preset
from study.store import read_json, record_path, write_json

EDGES = {"immunity": 0.3, "moe-mi": 0.1, "moe": 0.0, "moe-ps": 0.0, "standalone": -0.3}
UNTESTABLE = {"cifar100", "poisoning", "prevailing-losses", "best-network-alone", "best-network-in-immunity"}


@pytest.fixture(scope="module")
def make_world(make_settings, tmp_path_factory):
    """Under attack, Immunity is 30 points above the mixture and 60 above the baselines; on clean images, nowhere."""

    def make(seeds, **changes):
        settings = make_settings(
            output_folder=str(tmp_path_factory.mktemp("world")), seeds=seeds, test_images=300,
            attacked_images=150, adaptive_images=150, baselines=["pdarts", "advrush"], magnitudes=["2/255"],
            controls=["standalone", "standalone-wide", "ensemble"],
            adaptive=["baselines", "standalone-wide", "ensemble", "moe", "immunity"], **changes,
        )  # fmt: skip
        return World(settings, lambda name, attack: 0.8 if attack == "clean" else 0.5 + EDGES.get(name.method, 0))

    return make


@pytest.fixture(scope="module")
def one_training(make_world):
    return make_world([0])


@pytest.fixture(scope="module")
def three_trainings(make_world):
    return make_world([0, 1, 2])


@pytest.fixture(params=["one_training", "three_trainings"])
def world(request):
    return request.getfixturevalue(request.param)


def claim(wanted):
    return next(one for one in read_claims() if one.id == wanted)


def ablated(settings, method):
    return [name for name in catalogue.table3_models(settings) if name.method == method]


def test_verdicts_of_a_world_that_is_known(three_trainings):
    found = verdicts(three_trainings.settings, read_claims()).set_index("claim")
    assert set(found["verdict"]) <= {*figures.VERDICTS, NOT_TESTABLE}
    holding = ["standard-attacked", "adversarial-attacked", "mutual-information-attacked", "magnitudes", "weak-spots",
               "experts-on-parts", "both-losses-adversarial", "adaptive-baselines"]  # fmt: skip
    assert (found.loc[holding, "verdict"] == "holds").all(), found.loc[holding]
    assert (found.loc[holding, "stays"].str.match(r"(\d+) of \1$")).all()
    assert found.loc["noise", "verdict"] == "does not hold"  # it takes 30 points here
    assert found.loc["position-stability-attacked", "verdict"] in ("undecided", "no effect")  # it adds nothing
    untestable = found[found["verdict"] == NOT_TESTABLE]
    assert set(untestable.index) == UNTESTABLE
    assert untestable["effect"].isna().all() and untestable["reason"].notna().all()
    tested = found[found["effect"].notna()]
    assert (tested["trainings"] == 3).all() and set(tested["images"]) == {150, 300}
    assert ((tested["low"] <= tested["effect"]) & (tested["effect"] <= tested["high"])).all()
    held = ((found["verdict"] == "holds") & ~found["check"]).sum()
    assert count_by_luck(found).startswith(f"{held} of {(tested['check'] == False).sum()} claims")  # noqa: E712


def test_what_a_study_has_not_measured_yet_waits_and_the_rest_is_judged(make_world):
    settings = make_world([0, 1, 2], pretrained=False).settings
    whole = verdicts(settings, read_claims()).set_index("claim")
    missing = record_path(settings, ablated(settings, "moe-mi")[1], "attacks")
    missing.unlink()
    found = verdicts(settings, read_claims()).set_index("claim")
    waiting = ["moe-clean", "mutual-information-attacked", "both-losses-attacked"]
    assert list(found.index[found["verdict"] == claims.NOT_MEASURED]) == waiting
    assert found.loc[waiting, ["effect", "stays"]].isna().all(axis=None)
    pd.testing.assert_frame_equal(found.drop(waiting), whole.drop(waiting))
    for kind in ("attacks", "adaptive", "scores"):
        for name in catalogue.measured_models(settings, kind):
            record_path(settings, name, kind).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="make reproduce"):
        verdicts(settings, read_claims())


def test_measurements_of_other_test_images_are_not_compared(make_world):
    settings = make_world([0, 1, 2], pretrained=False).settings
    measure = claim("position-stability-attacked").measure
    told = ("on different test images of Parts-10; measure one again", "MoE share no seed, or were measured")
    for seed, name in enumerate(ablated(settings, "moe")):
        path = record_path(settings, name, "attacks")
        write_json(path, read_json(path) | {"data": {"test": "others"}})
        if seed != 1:
            with pytest.raises(ValueError, match=told[seed > 0]):
                paired_effects(settings, measure)


def test_A1_one_training_is_no_verdict_however_large_the_effect(one_training):
    found = verdicts(one_training.settings, read_claims()).set_index("claim")
    assert set(found["verdict"]) == {"one training: no verdict", NOT_TESTABLE}
    assert found.loc["standard-attacked", "low"] > 5 and found["stays"].isna().all()
    assert count_by_luck(found).startswith("0 of 0 claims")


def test_an_effect_is_the_difference_of_means_to_that_against_which_the_claim_does_worst(world):
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


def test_A5_a_score_s_effect_is_the_ratio_of_means_and_so_is_its_interval(world, monkeypatch):
    (line,) = verdicts(world.settings, [claim("experts-differ")]).to_dict("records")
    own, other = (
        [world.scores[name]["mutual_information"].mean() for name in ablated(world.settings, method)]
        for method in ("moe-mi", "moe")
    )
    ratio = np.exp(np.mean(np.log(own) - np.log(other)))
    assert line["effect"] == pytest.approx(100 * (ratio - 1)) and line["unit"] == "%"
    nearly_none = np.log(np.random.default_rng(0).uniform(0.001, 0.3, (3, 50)))  # by which a score falls
    monkeypatch.setattr(claims, "paired_effects", lambda *_: {"MoE": nearly_none})
    (line,) = verdicts(world.settings, [claim("experts-differ")]).to_dict("records")
    assert -100 < line["low"] < line["effect"] < line["high"], "no score falls by more than all of it"


def test_A5_neighbours_a_score_of_zero_has_no_ratio(world, monkeypatch):
    scores = {method: pd.DataFrame(np.full((2, 5), float(method == "moe"))) for method in ("moe", "moe-mi")}
    monkeypatch.setattr(claims, "by_image", lambda *_, method, **__: scores[method])
    (line,) = verdicts(world.settings, [claim("experts-differ")]).to_dict("records")
    assert line["verdict"] == NOT_TESTABLE and "mutual information is 0 on all images" in line["reason"]


@pytest.mark.parametrize("trainings", [1, 3])
@pytest.mark.parametrize("effect", [-1.0, 0.0, 1.0])
def test_A6_C2_neighbours_a_single_image_tells_next_to_nothing(trainings, effect):
    mean, low, high = estimate(np.full((trainings, 1), effect))
    assert mean == effect and low < 0 < high and high - low > 1


def test_switching_is_held_against_other_gates_of_the_same_model_and_images(world):
    models = catalogue.measured_models(world.settings, "adaptive")
    name = next(one for one in models if (one.method, one.regime) == ("immunity", "adversarial"))
    verdicts_of = [world.verdicts[name, "adaptive", attack, sees] for attack, _, sees in ADAPTIVE]
    for which, title in (("switching-adversarial", "its plain ensemble"), ("switching-trained", "its trained gate")):
        (effects,) = (found := paired_effects(world.settings, claim(which).measure)).values()
        assert list(found) == [title]
        for image in range(5):
            switched = min(gates[image].mean() for gates, _, _ in verdicts_of)
            other = min(float(one[1 + (which == "switching-trained")][image]) for one in verdicts_of)
            assert effects[0, image] == pytest.approx(switched - other)


def test_what_is_compared_is_one_seed_on_one_image_where_a_side_has_fewer_of_either(make_world):
    """As preset cifar10 has it: AutoAttack and noise on some of the images, baselines of some of the seeds."""
    world = make_world([2, 0, 1], baseline_seeds=1, auto_attack_images=60)

    def met(measure, method, seed, *attack, expert="resnet18"):
        """Shares of gates that are right, on the images that met the attack."""
        name = f"parts10-{method}-{expert}-{measure.regime}-seed{seed}"
        return world.verdicts[catalogue.ModelName.parse(name), "adaptive", *attack][0].mean(1)

    def worst_case(*of, **expert):
        found = [met(*of, attack, sees, **expert) for attack, _, sees in ADAPTIVE]
        return np.array([min(right[image] for right in found if image < len(right)) for image in range(150)])

    measure = claim("adaptive-baselines").measure
    of_seed_2 = worst_case(measure, "immunity", 2) - worst_case(measure, "standalone", 2, expert="pdarts")
    np.testing.assert_allclose(paired_effects(world.settings, measure)["P-DARTS"], [of_seed_2])
    measure = claim("noise").measure
    (found,) = paired_effects(world.settings, measure).values()
    for effects, seed in zip(found, (0, 1, 2), strict=True):
        noisy, clean = (met(measure, "moe", seed, *of) for of in (("noise", "all gates"), ("clean", "")))
        np.testing.assert_allclose(effects, noisy - clean[:60])


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((2.1, 4), "holds"), ((1, 5), "undecided"), ((0, 1.9), "does not hold"), ((-50, -40), "does not hold")],
)
def test_the_rule(interval, verdict):
    of = {"id": "-", "title": "-", "sentence": "-", "where": "-", "measure": claim("iscore").measure}
    assert Claim(**of, at_least=2).verdict(*interval) == verdict
    low, high = interval
    assert Claim(**of, at_most=-2).verdict(-high, -low) == verdict


def world_of(monkeypatch, effects):
    """The verdict on a claim of at least 0 points, of effects (S, B) against each of several others."""
    monkeypatch.setattr(claims, "paired_effects", lambda *_: {f"other {k}": one for k, one in enumerate(effects)})
    (line,) = verdicts(None, [claim("both-losses-attacked")]).to_dict("records")
    return line


def noise(trainings, images, mean, spread=0.0):
    generator = np.random.default_rng(0)
    effects = generator.normal(0, 0.05, (trainings, images)) + spread * np.linspace(-1, 1, trainings)[:, None]
    return effects - effects.mean() + mean


FAR, NEAR, BELOW = (noise(5, 400, mean) for mean in (0.3, 0.05, -0.05))
UNSURE = noise(5, 400, -0.1, spread=0.5)  # its mean is lower, but too little is known of it for a claim to fail


@pytest.mark.parametrize(
    ("effects", "verdict"),
    [
        ([FAR, NEAR], "holds"), ([FAR, BELOW], "does not hold"), ([UNSURE, BELOW], "does not hold"),
        ([UNSURE], "undecided"), ([noise(5, 100, 0.0, spread=0.1)], "undecided"),
        ([noise(5, 4000, 0.0)], "no effect"),  # within a point of zero
        ([noise(5, 4000, 0.0), noise(5, 400, 0.01, spread=0.5)], "undecided"),  # against each
        ([noise(2, 4000, 0.3)], "two trainings: no verdict"),
        *(([noise(3, few, 0.3)], "too few images: no verdict") for few in (1, 29)),
    ],
)  # fmt: skip
def test_a_claim_must_hold_against_each_and_fails_where_it_surely_does(monkeypatch, effects, verdict):
    """What is shown of one that fails is against one that it fails against."""
    line = world_of(monkeypatch, effects)
    assert line["verdict"] == verdict
    if verdict == "does not hold":
        assert line["against"] == "other 1" and line["high"] < 0 and line["stays"] == "25 of 25"


def test_a_verdict_that_hangs_on_few_images_does_not_stay(monkeypatch):
    """The interval is clear of zero, and some half of the images says the opposite."""
    effects = np.full((5, 400), -0.01)
    effects[:, :6] = 0.9
    monkeypatch.setattr(claims, "estimate", lambda effects, outside=0.05: (effects.mean(), 0.001, 0.03))
    line = world_of(monkeypatch, [effects])
    assert line["verdict"] == "undecided" and line["stays"] != "25 of 25"


def test_parts_are_all_trainings_but_one_and_halves_of_the_images():
    effects = np.arange(12.0).reshape(3, 4)
    without, halves = (found := list(claims.parts(effects)))[:3], found[3:]
    for gone, part in enumerate(without):
        np.testing.assert_array_equal(part, effects[[one for one in range(3) if one != gone]])
    assert len(halves) == claims.HALVES and {half.shape for half in halves} == {(3, 2)}


@pytest.mark.parametrize(
    ("wanted", "told"),
    [("standard-clean", "no baselines"), ("magnitudes", "no magnitudes"), ("cifar100", "no CIFAR-100"),
     ("experts-on-parts", "no background heat of CIFAR-10"), ("both-losses-attacked", "no attacks of CIFAR-10")],
)  # fmt: skip
def test_what_a_preset_cannot_say_is_told_before_anything_is_measured(make_settings, tmp_path, wanted, told):
    changes = {"dataset": "cifar10", "baselines": [], "magnitudes": [], "attacks": ["cw"]}
    settings = make_settings(output_folder=str(tmp_path), **changes)
    with pytest.raises(claims.NotTestable, match=told):
        paired_effects(settings, claim(wanted).measure)


@pytest.mark.parametrize("against", ["the background's share of pixels", "the expert under attack"])
def test_a_kind_that_lacks_what_it_is_held_against_is_no_verdict(one_training, against):
    (line,) = verdicts(one_training.settings, [Claim(
        id="-", title="-", sentence="-", where="-", at_least=0,
        measure={"kind": "clean", "model": "immunity", "against": against},
    )]).to_dict("records")  # fmt: skip
    assert (line["verdict"], line["reason"]) == (NOT_TESTABLE, "the preset measures no clean of Parts-10")


@pytest.mark.parametrize(
    ("change", "told"),
    [({"at_least": None}, "claim standard-clean needs a measure and at_least or at_most"),
     ({"at_most": 3}, "claim standard-clean needs a measure and at_least or at_most"),
     ({"measure": {"kind": "clean", "regime": "fast"}}, "measure"),
     ({"measure": {"kind": "speed", "model": "moe", "against": ["moe"]}}, "measure.kind"),
     ({"measure": {"kind": "clean", "model": "moe", "against": "nobody"}}, "measure.against"),
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
    for not_claims in ("", "claims: 1", "text"):
        path.write_text(not_claims)
        with pytest.raises(ValueError, match="claims.yaml: .*list"):
            read_claims(path)


def test_with_one_training_the_interval_is_that_of_a_paired_t_test_and_trainings_that_differ_widen_it():
    generator = np.random.default_rng(0)
    first, second = generator.normal(0.3, 1, 2000), generator.normal(0, 1, 2000)
    _, *found = estimate((first - second)[None])
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert found == pytest.approx(list(expected), abs=2e-3)
    by_image = generator.normal(0, 1, (3, 300))
    effect, low, high = estimate(by_image)
    apart, lower, higher = estimate(by_image + np.array([[-1.0], [0.0], [1.0]]))
    assert higher - lower > 5 * (high - low) and apart == pytest.approx(effect)


def test_where_trainings_are_all_the_chance_there_is_the_interval_is_their_t_interval():
    of_training = np.array([0.1, 0.25, 0.16])
    _, *found = estimate(np.repeat(of_training[:, None], 10_000, axis=1))
    assert found == pytest.approx(list(stats.ttest_1samp(of_training, 0).confidence_interval(0.95)), rel=0.01)


@pytest.mark.parametrize("images", [1, 30, 200])
def test_the_interval_is_never_narrower_than_the_t_interval_of_the_trainings(images):
    """However few the images, beside which the two that are given to each training would count."""
    effects = np.random.default_rng(0).normal(0, 0.1, (3, images)) + np.array([[0.1], [0.25], [0.16]])
    _, low, high = estimate(effects)
    plain = stats.ttest_1samp(effects.mean(1), 0).confidence_interval(0.95)
    assert high - low >= (plain.high - plain.low) * (1 - 1e-9)


def covered(truth, draw):
    """How often intervals of drawn effects have the truth in them."""
    intervals = (estimate(draw())[1:] for _ in range(400))
    return np.mean([low <= truth <= high for low, high in intervals])


@pytest.mark.parametrize("trainings", [3, 5, 10])
@pytest.mark.parametrize(
    "deviations",
    [(0.06, 0.3, 0.3), (0.005, 0.4, 0.3), (0.03, 0.3, 0.4), (0.0, 0.3, 0.3)],
    ids=["of trainings", "of images", "of both", "of images alone"],
)
def test_the_interval_covers_the_truth_as_often_as_it_says(trainings, deviations):
    """Effects deviate from training to training, from image to image, and in each pair of them."""
    generator, shapes = np.random.default_rng(0), [(trainings, 1), (1, 200), (trainings, 200)]
    assert covered(0, lambda: sum(map(generator.normal, (0, 0, 0), deviations, shapes))) > 0.92


@pytest.mark.parametrize("trainings", [1, 3, 5])
@pytest.mark.parametrize("shares", [(0.01, 0.0), (0.05, 0.01), (0.002, 0.0)])
def test_A6_rare_differences_are_not_taken_for_certainty(trainings, shares):
    """Only one of the models is right on so few images, the same in all trainings."""
    generator, values = np.random.default_rng(0), (1.0, -1.0, 0.0)

    def draw():
        return np.repeat(generator.choice(values, (1, 200), p=[*shares, 1 - sum(shares)]), trainings, axis=0)

    assert covered(shares[0] - shares[1], draw) > 0.94
    _, low, high = estimate(np.zeros((trainings, 100)))
    assert low == -high and 0.02 < high < 0.05


def test_the_smallest_visible_effect_is_seen_four_times_in_five():
    generator, effect = np.random.default_rng(0), claims.smallest_visible(5, 500) / 100
    of_training, of_image = (deviation / 100 for deviation in claims.DEVIATIONS)
    draws = (generator.normal(effect, of_training, (5, 1)) + generator.normal(0, of_image, 500) for _ in range(400))
    assert 0.7 < np.mean([estimate(effects)[1] > 0 for effects in draws]) < 0.95
    assert claims.smallest_visible(3, 500) > claims.smallest_visible(5, 500) > claims.smallest_visible(5, 5000)


def test_what_verdicts_rest_on_says_where_baselines_have_fewer_trainings(make_settings):
    baselines = {"baselines": ["pdarts"], "seeds": [0, 1, 2]}
    assert claims.trainings_text(make_settings(**baselines)) == "3 trainings of each model"
    assert claims.trainings_text(make_settings(baseline_seeds=1)) == "one training of each model"
    fewer = claims.trainings_text(make_settings(**baselines, baseline_seeds=1))
    assert fewer == "3 trainings of each model, 1 of each baseline"


def test_text_has_a_line_for_every_claim_and_a_reason_where_none_was_tested(one_training):
    every = read_claims()
    text = claims.verdict_text(verdicts(one_training.settings, every))
    assert list(text["title"]) == [one.title for one in every]
    assert text["verdict"].iloc[-1].startswith(f"{NOT_TESTABLE}: the paper shows no")
    one = verdicts(one_training.settings, every[:1])  # all reasons empty, which pandas takes for numbers
    assert claims.verdict_text(one)["verdict"].item() == one["verdict"].item()


def test_the_verdicts_that_are_committed_are_those_of_the_frames_that_are(tmp_path):
    settings = load_preset("parts10", output_folder=str(tmp_path))
    found = verdicts(settings, read_claims())
    committed = pd.read_csv(ROOT / "figures/parts10/claims.csv")
    columns = ["claim", "effect", "low", "high", "trainings", "images", "stays", "verdict"]
    pd.testing.assert_frame_equal(found[columns], committed[columns], check_dtype=False)
    assert (committed["trainings"].dropna() == len(settings.seeds)).all()
    assert {"holds", "does not hold"} <= set(committed["verdict"])
