"""The paper's claims, and what our records say of each.

They and the rule of the verdicts are data, in claims.yaml. A claim is about a difference between two models on the
same images, or between two sides of one. The unit of evidence is a training: what one shows, another may take back."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError, model_validator
from scipy import stats

from study import catalogue
from study.catalogue import DATA, METHODS, NETWORKS, ModelName
from study.settings import Settings
from study.tables import SCORES, read_rows, right_experts

CLAIMS = Path(__file__).with_name("claims.yaml")
NOT_TESTABLE = "not testable"  # the verdict on what a preset cannot say anything about
NOT_MEASURED = "not measured yet"  # and on what it does not yet, of a study that takes days
FEWEST_TRAININGS = 3  # of each side, for a verdict
FEWEST_IMAGES = 30  # likewise; of fewer, chance shows too little of itself to be reckoned with
MARGIN = 1.0  # points, or %: what lies within is no effect
HALVES = 20  # of the images, drawn to see whether a verdict stays
# Of an effect under attack, in points, from training to training and from image to image: as the demo showed them
DEVIATIONS = 6.0, 40.0
PAPER = Settings.model_fields["attacks"].default  # its attacks; a preset may have others beside them
KINDS = {  # of measures: the frame, which of its rows, by a column and what that matches, and the column that is read
    "clean": ("attacks", "family", "clean", "switched"),
    "attacks": ("attacks", "attack", "|".join(PAPER), "switched"),
    "magnitudes": ("attacks", "family", "magnitude", "switched"),
    "worst-case": ("adaptive", "family", "(?!clean).*", "switched"),
    "unattacked": ("adaptive", "family", "clean", "switched"),
    "noise": ("adaptive", "attack", "noise", "switched"),
    "weak spots": ("adaptive", "attack", "pgd-expert-.*", "other_experts"),
    "network": ("scores", "family", "clean", "switched"),
    **{score: ("scores", "family", "clean", score) for score in (*SCORES, "background_heat")},
}
OWN_SIDES = {  # what a model can be held against of its own
    "its plain ensemble": {"column": "uniform"},
    "its trained gate": {"column": "trained"},
    "a random expert of its own": {"column": "experts"},
    "the expert under attack": {"column": "attacked_expert"},
    "the background's share of pixels": {"column": "background"},
    "the same images clean": {"kind": "unattacked"},
    "standard training": {"regime": "standard"},
}


class NotTestable(Exception):
    """Why a preset cannot say anything about a claim."""


class Measure(BaseModel, extra="forbid", frozen=True):
    """A model minus what it is held against; claims.yaml lists the kinds."""

    kind: Literal[*KINDS]
    model: Literal[*METHODS]
    against: Literal["baselines", "other networks", *OWN_SIDES] | list[Literal[*METHODS]]
    data: str = ""  # another data set than the preset's first
    regime: Literal["standard", "adversarial"] = "standard"
    network: str = ""  # of Table 1; empty: the preset's

    @property
    def unit(self) -> str:
        return "%" if self.kind in SCORES else "points"  # a ratio, or a difference


class Claim(BaseModel, extra="forbid", frozen=True):
    """A sentence of the paper and what it predicts; see claims.yaml for the rule."""

    id: str
    title: str
    sentence: str
    where: str
    check: bool = False  # of what the losses are trained for, beside the paper's claims
    measure: Measure | None = None
    at_least: float | None = None
    at_most: float | None = None
    reading: str = ""
    untestable: str = ""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        bounds, testable = (self.at_least, self.at_most), self.measure is not None
        if testable == bool(self.untestable) or testable == (bounds.count(None) != 1):
            raise ValueError(f"claim {self.id} needs a measure and at_least or at_most, or only why it is untestable")
        return self

    @property
    def prediction(self) -> str:
        if self.measure is None:
            return ""
        bound = f"at least {self.at_least:+g}" if self.at_most is None else f"at most {self.at_most:+g}"
        return f"{bound} {self.measure.unit}"

    def verdict(self, low: float, high: float) -> str:
        """By the rule in claims.yaml, for an interval in the units of the prediction."""
        low, high, bound = (low, high, self.at_least) if self.at_most is None else (-high, -low, -self.at_most)
        if low >= bound:
            return "holds"
        if high < bound:
            return "does not hold"
        return "no effect" if max(-low, high) <= MARGIN else "undecided"


def read_claims(path: Path = CLAIMS) -> list[Claim]:
    """The claims of the file; raises ValueError that names what is wrong in which claim."""
    try:
        claims = TypeAdapter(list[Claim]).validate_python(yaml.safe_load(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        number, *field = first["loc"] or [None]
        place = "" if number is None else f", claim {number + 1}, {'.'.join(map(str, field))}"
        raise ValueError(f"{path}{place}: {first['msg']}") from None
    ids = [claim.id for claim in claims]
    if repeated := {one for one in ids if ids.count(one) > 1}:
        raise ValueError(f"{path}: several claims are called {', '.join(sorted(repeated))}; give each its own id")
    return claims


def verdicts(settings: Settings, claims: Sequence[Claim]) -> pd.DataFrame:
    """One line a claim, by its id; "low" and "high" are the ends of the 95 % interval of the effect, "against" what it
    was held against, "stays" in how many parts of the evidence ("23 of 23"), "reason" why there is no verdict.
    A claim is judged once all is measured that the preset holds against it. Raises FileNotFoundError, with the command
    that measures, where none can be judged yet."""
    columns = "claim title sentence where check predicted reading effect low high unit against trainings images stays"
    lines, missing = [], None
    for claim in claims:
        line = claim.model_dump(include={"title", "sentence", "where", "check", "reading"})
        line |= {"claim": claim.id, "predicted": claim.prediction}
        try:
            if claim.measure is None:
                raise NotTestable(claim.untestable)
            line |= {"unit": claim.measure.unit} | _judge(claim, paired_effects(settings, claim.measure))
        except NotTestable as reason:
            line |= {"verdict": NOT_TESTABLE, "reason": str(reason)}
        except FileNotFoundError as error:
            line, missing = line | {"verdict": NOT_MEASURED}, missing or error
        lines.append(line)
    if missing and not any("effect" in line for line in lines):
        raise missing
    return pd.DataFrame(lines).reindex(columns=[*columns.split(), "verdict", "reason"])


def _judge(claim: Claim, effects: dict[str, np.ndarray]) -> dict:
    """The verdict by the rule, and what is shown of it: the comparison in which the claim does worst, of those that
    decide the verdict."""

    def in_units(*values: float) -> list[float]:
        return [100 * (np.expm1(one) if claim.measure.unit == "%" else one) for one in values]

    def verdict_of(one: np.ndarray, outside: float = 0.05) -> str:
        return claim.verdict(*in_units(*estimate(one, outside)[1:]))

    sign, strict = 1 if claim.at_most is None else -1, 0.05 / len(effects)
    failed = [other for other, one in effects.items() if verdict_of(one, strict) == "does not hold"]
    worst = min(failed or effects, key=lambda other: sign * effects[other].mean())
    trainings, images = effects[worst].shape
    effect, low, high = in_units(*estimate(effects[worst]))
    line = {"effect": effect, "low": low, "high": high, "against": worst, "trainings": trainings, "images": images}
    if trainings < FEWEST_TRAININGS:
        return line | {"verdict": f"{['one training', 'two trainings'][trainings - 1]}: no verdict"}
    if images < FEWEST_IMAGES:
        return line | {"verdict": "too few images: no verdict"}
    each = set(map(verdict_of, effects.values()))
    verdict = "holds" if each == {"holds"} else "does not hold" if failed else "no effect"
    if verdict == "no effect" and not each <= {"holds", "no effect"}:
        return line | {"verdict": "undecided"}
    tried = effects.values() if verdict == "holds" else [effects[worst]]
    found = [in_units(part.mean())[0] for one in tried for part in parts(one)]
    stays = [abs(one) <= MARGIN if verdict == "no effect" else claim.verdict(one, one) == verdict for one in found]
    return line | {"stays": f"{sum(stays)} of {len(stays)}", "verdict": verdict if all(stays) else "undecided"}


def verdict_text(found: pd.DataFrame) -> pd.DataFrame:
    text = found.astype(object).where(found.notna(), "")
    formats = {
        "effect [95 % interval]": "{effect:+.1f} [{low:+.1f}, {high:+.1f}] {unit}", "trainings": "{trainings:.0f}",
    }  # fmt: skip
    for column, form in formats.items():
        text[column] = ["" if one["effect"] == "" else form.format(**one) for one in text.to_dict("records")]
    text["verdict"] += text["reason"].where(text["reason"] == "", ": " + text["reason"])
    return text[["title", "where", "predicted", *formats, "against", "stays", "verdict"]]


def count_by_luck(found: pd.DataFrame) -> str:
    """How many of the verdicts chance alone could give."""
    enough = found["trainings"].ge(FEWEST_TRAININGS) & found["images"].ge(FEWEST_IMAGES)
    judged = found[~found["check"] & enough]
    holding = (judged["verdict"] == "holds").sum()
    chance = f"were every effect just at its bound, {0.025 * len(judged):.1f} of them would by chance"
    return f"{holding} of {len(judged)} claims that could be judged hold; {chance}"


def paired_effects(settings: Settings, measure: Measure) -> dict[str, np.ndarray]:
    """By the title of what a model is held against: differences (S, B) of S pairs of trainings on B images, in shares
    of 1; of scores, whose mean over images is the logarithm of the ratio of means.
    Raises NotTestable where the preset has no such models."""
    *_, column = KINDS[measure.kind]
    if (measure.kind, measure.model) == ("network", "ensemble"):
        column = "experts"  # each of the networks alone
    own = {"kind": measure.kind, "column": column, "method": measure.model, "regime": measure.regime}
    own |= {"dataset": measure.data or settings.recipe.dataset, "expert": measure.network or settings.recipe.expert}
    _names(settings, **own)  # what a preset cannot say is told whether or not the rest is measured yet
    others = _others(settings, measure, own)
    for other in others.values():
        _names(settings, **other)
    mine, effects = by_image(settings, **own), {}
    for title, other in others.items():
        # Seed by seed, from the same start, in the same order of images; and on the images that both sides met
        pair = mine.align(by_image(settings, **other), join="inner")
        if pair[0].empty:
            told = f"{measure.model} and {title} share no seed, or were measured on different test images"
            raise ValueError(f"{told}; measure one of them again")
        ours, theirs = (one.to_numpy(float) for one in pair)
        if measure.unit == "%":
            mean, their_mean = (one.mean(1, keepdims=True) for one in (ours, theirs))
            if not (mean.all() and their_mean.all()):  # as when all maps are empty
                raise NotTestable(f"a model's {measure.kind.replace('_', ' ')} is 0 on all images, which has no ratio")
            effects[title] = np.log(mean / their_mean) + ours / mean - theirs / their_mean
        else:
            effects[title] = ours - theirs
    return effects


def _others(settings: Settings, measure: Measure, own: dict[str, str]) -> dict[str, dict[str, str]]:
    """What a measure's model is held against, by title; raises NotTestable where there is nothing."""
    if isinstance(measure.against, list):
        return {catalogue.method_title(one, own["expert"]): own | {"method": one} for one in measure.against}
    if measure.against in OWN_SIDES:
        return {measure.against: own | OWN_SIDES[measure.against]}
    if measure.against == "baselines":
        others = {NETWORKS[one]: own | {"method": "standalone", "expert": one} for one in settings.baselines}
    else:
        compared = settings.compared_experts * (own["expert"] in settings.compared_experts)
        others = {NETWORKS[one]: own | {"expert": one} for one in compared if one != own["expert"]}
    if not others:
        raise NotTestable(f"the preset has no {measure.against}")
    return others


def _names(settings: Settings, kind: str, column: str, **model: str) -> list[ModelName]:
    """The models of a side of a measure, by the parts of their names; raises NotTestable where there are none."""
    data = model["dataset"]
    if data not in settings.datasets:
        raise NotTestable(f"the preset has no {DATA[data]}")
    frame, *_ = KINDS[kind]
    lacking = {
        "attacks": not {*PAPER} & {*settings.attacks},
        "magnitudes": not settings.magnitudes,
        "background_heat": data != "parts10",  # which alone knows its background
    }
    if lacking.get(kind):
        raise NotTestable(f"the preset measures no {kind.replace('_', ' ')} of {DATA[data]}")
    names = [name for name in catalogue.measured_models(settings, frame) if model.items() <= name.model_dump().items()]
    if not names:
        raise NotTestable(f"the preset has no {catalogue.method_title(model['method'], model['expert'])} for it")
    return names


def by_image(settings: Settings, kind: str, column: str, **model: str) -> pd.DataFrame:
    """A column of the long frame, by seed and image, of a model by the parts of its name: the mean over the rows of a
    kind, or the worst case of those adaptive attacks that an image met."""
    frame, chosen_by, wanted_rows, _ = KINDS[kind]
    rows = read_rows(settings, _names(settings, kind, column, **model), frame)
    rows = rows[rows[chosen_by].str.fullmatch(wanted_rows)]
    if frame == "attacks":
        rows = rows[rows["sees"].isin(["", settings.attack_gates[0]])]
    if "expert" in column:
        rows = rows.assign(**right_experts(rows, settings.recipe.experts))
    if column not in rows or rows[column].isna().all():  # as what only heat maps have, asked of attacks
        raise NotTestable(f"the preset measures no {kind} of {DATA[model['dataset']]}")
    groups = rows.groupby(["seed", "images_of", "image"])[column]
    return (groups.min() if kind == "worst-case" else groups.mean()).unstack(["images_of", "image"])


def estimate(effects: np.ndarray, outside: float = 0.05) -> tuple[float, float, float]:
    """Mean of effects (S, B), S trainings by B images, and the ends of its confidence interval, which misses the truth
    with the probability `outside`.

    Trainings and images are crossed random effects, as readers and cases are in studies of diagnoses: variances by
    mean squares, and Student's t with the degrees of freedom of Hillis (2007, Statistics in Medicine 26:596), fit for
    as few as three readers; or the plain t interval over the effects of trainings, where it is the wider one. So that
    rare differences are not taken for certainty, each training is given two more images, on which only the one model
    is right, and only the other (Bonett & Price 2012, Journal of Educational and Behavioral Statistics 37:479). Of
    one training, the interval tells what other images would do, and not what another training would."""
    trainings, images = effects.shape
    mean, more = float(effects.mean()), np.ones((trainings, 1))
    values, count = np.hstack((effects, more, -more)), images + 2
    of_training, of_image = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    between_images = trainings * of_image.var(ddof=1)

    def reach(variance: float, freedom: float) -> float:
        return stats.t.ppf(1 - outside / 2, freedom) * np.sqrt(variance / (trainings * count))

    if trainings == 1:
        half = reach(between_images, max(images - 1, 1))
        return mean, mean - half, mean + half
    between_trainings = count * of_training.var(ddof=1)
    rest = values - of_training - of_image + values.mean()
    residual = np.square(rest).sum() / ((trainings - 1) * (count - 1))
    both = between_trainings + max(between_images - residual, 0)
    freedom = (trainings - 1) / max(between_trainings / both, 1e-6) ** 2
    plain = stats.t.ppf(1 - outside / 2, trainings - 1) * stats.sem(effects.mean(1))  # without the images given
    half = max(reach(both, freedom), plain)
    return mean, mean - half, mean + half


def parts(effects: np.ndarray) -> Iterator[np.ndarray]:
    """Effects (S, B) without each of the trainings, and on random halves of the images."""
    for one in range(len(effects)):
        yield np.delete(effects, one, axis=0)
    generator = np.random.default_rng(0)
    for _ in range(HALVES):
        yield effects[:, generator.permutation(effects.shape[1])[: (effects.shape[1] + 1) // 2]]


def trainings_text(settings: Settings) -> str:
    """How many trainings of each model a preset has, in words."""
    count, of_baselines = len(settings.seeds), len(settings.seeds[: settings.baseline_seeds])
    text = f"{'one training' if count == 1 else f'{count} trainings'} of each model"
    return text + f", {of_baselines} of each baseline" * (bool(settings.baselines) and of_baselines < count)


def smallest_visible(trainings: int, images: int) -> float:
    """The effect under attack, in points, that so many trainings a side would show in 80 % of cases, by DEVIATIONS."""
    of_training, of_image = DEVIATIONS[0] * trainings**-0.5, DEVIATIONS[1] * images**-0.5
    return float(np.hypot(of_training, of_image) * stats.t.ppf([0.975, 0.8], trainings - 1).sum())
