"""A card beside each weight that comes with the project, in the layout of the Hugging Face hub.

No number in it is typed. They are those of the record beside the weights, and of the tables in figures/<preset>/, where
the records of these were made with the very weights: another training of the same name has other numbers."""

import textwrap
from typing import Any

import pandas as pd
import yaml

from immunity_lib.files import read_json, write_atomically
from study import store
from study.catalogue import ATTACK_TITLES, DATA, METHODS, MIXTURES, NETWORKS, REGIMES, ModelName
from study.settings import Settings
from study.tables import wilson_interval

RECORD = "record.json"
ON_THE_HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
# A table's columns of accuracies, by the kind of record that they come from
TABLES = {"table2": "attacks", "table3": "attacks", "gate_worth": "adaptive"}
WORTH = {"all attacks": "all adaptive attacks", "plain ensemble": "all adaptive attacks, plain ensemble"}


def accuracies(settings: Settings, name: ModelName) -> list[dict[str, Any]]:
    """What was measured of a model's accuracy: "what", "value" in %, "images", "trainings" behind it, and "source"."""
    record, found = read_json(store.pretrained_folder(settings, name) / RECORD), {}
    made_with = [record.get("rounding", {}).get("from", record["weights"])]
    for table, kind in TABLES.items():
        path, known = settings.figures / f"{table}.csv", settings.figures / f"records/{name}.{kind}.json"
        if not (path.exists() and known.exists() and read_json(known)["weights"] == made_with):
            continue
        rows = pd.read_csv(path)
        mine = {"model": MIXTURES[name.method], "training": name.regime, "data": DATA[name.dataset], "unit": "%"}
        if "training" not in rows and name.regime != "standard":  # the ablation has standard training alone
            continue
        for field in mine.keys() & set(rows):
            rows = rows[rows[field] == mine[field]]
        for row in rows.to_dict("records"):
            what = WORTH.get(row["column"]) if kind == "adaptive" else row["column"]
            if what in (*WORTH.values(), "clean", *ATTACK_TITLES.values()):
                count = {"images": int(row["images"]), "trainings": int(row["count"])}
                source = f"figures/{settings.preset}/{table}.csv"
                found.setdefault(what, {"what": what, "value": row["value"], **count, "source": source})
    told = {"accuracy": "held-out, clean", "robust_accuracy": "held-out, its own training's attack"}
    for field in [field for field in told if field in record["log"][-1]]:
        rest = {"images": record["recipe"]["validation_images"], "trainings": 1, "source": RECORD}
        found[told[field]] = {"what": told[field], "value": 100 * record["log"][-1][field], **rest}
    return list(found.values())


def front_matter(name: ModelName, measured: list[dict[str, Any]]) -> str:
    """What the hub reads of a card."""
    where, split = ON_THE_HUB.get(name.dataset, name.dataset), "test"
    shown = [one for one in measured if one["source"] != RECORD]
    if not shown:
        shown, split = measured, "validation"
    metrics = [
        {"type": "accuracy", "name": f"accuracy in %, {one['what']}", "value": round(one["value"], 1)} for one in shown
    ]
    task, dataset = {"type": "image-classification"}, {"name": DATA[name.dataset], "type": where, "split": split}
    head = {
        "license": "mit", "library_name": "immunity", "pipeline_tag": "image-classification",
        "tags": ["adversarial-robustness", "mixture-of-experts", "grad-cam", "arxiv:2402.18787"],
        "datasets": [where], "metrics": ["accuracy"],
        "model-index": [{"name": str(name), "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}],
    }  # fmt: skip
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def accuracy_table(measured: list[dict[str, Any]]) -> str:
    """Accuracies with their intervals, in Markdown."""
    lines = ["| images | accuracy (%) | interval | rests on |", "|:--|:--|:--|:--|"]
    for one in measured:
        low, high = wilson_interval(one["value"], one["images"])
        several = f", mean of {one['trainings']} trainings" * (one["trainings"] > 1)
        rests = f"{one['images']} images{several}, {one['source']}"
        lines.append(f"| {one['what']} | {one['value']:.1f} | {low:.1f} to {high:.1f} | {rests} |")
    return "\n".join(lines)


def card(settings: Settings, name: ModelName) -> str:
    """The card of a model that comes with the project."""
    record, measured = read_json(store.pretrained_folder(settings, name) / RECORD), accuracies(settings, name)
    recipe, data, left = record["recipe"], DATA[name.dataset], {one["what"]: one["value"] for one in measured}
    attacked, rounded, known = "No table of this project has this model: it was not tested. ", "", ""
    if any(one["source"] != RECORD for one in measured):
        asked = read_json(settings.figures / f"records/{name}.attacks.json")["asked"]
        attacked = f"The attacks are in l_inf with eps = {asked['eps']}, iterated ones take {asked['steps']} steps. "
    if told := record.get("rounding"):
        rounded = f"""They are in {told["to"]}, rounded from those that were measured, and
            {100 * told["expert_answers_kept"]:.2f} % of the experts' answers on test images stayed."""
    if (worst := left.get(WORTH["all attacks"])) is not None:
        known = f"""Attacks that know the gate leave {worst:.1f} %, and {left[WORTH["plain ensemble"]]:.1f} % of the
            plain ensemble of the same experts."""
    texts = {
        "What it is": f"""A mixture of {recipe["experts"]} {NETWORKS[name.expert]} experts with {recipe["width"]:g} of
            the channels and a {recipe["gate_network"]} gate, whose weights are permuted at random at every evaluation:
            {MIXTURES[name.method]}, {METHODS[name.method]}, trained {REGIMES[name.regime]}. It has
            {record["parameters"]:,} parameters and takes {record["multiply_accumulates"] / 1e6:.1f} million
            multiply-adds an image. It comes with an independent reproduction of "Enhancing the 'Immunity' of
            Mixture-of-Experts Networks for Adversarial Defense" (arXiv 2402.18787), of its preset {settings.preset}.
            The weights are those after the last epoch. {rounded}""",
        "Data": f"""{record["data"]["images"]:,} training images of {data} ({record["data"]["source"]}),
            {recipe["epochs"]} epochs, seed {recipe["seed"]}. {recipe["validation_images"]} further ones were held out
            for the training's log. The test images selected nothing.""",
        "Accuracy": f"""{attacked}Accuracies are expected over the switched gate, but of held-out images under the
            trained one. The interval, of 95 % (Wilson), is what other images would change; it says nothing of another
            training.""",
        "Limits": f"""This is a thing to study, and no defence to rely on. {known} It is one training: another seed, or
            another processor, gives other numbers. It takes 32x32 images of the classes of {data}. Of other
            perturbations than those of l_inf nothing is known.""",
        "How to load it": "In a checkout of the project, with images (B, 3, 32, 32) in [0, 1]:",
    }
    load = f"""```python
from study.store import shipped_model

model = shipped_model("{settings.preset}/{name}")
log_probabilities = model(images)  # under a random switch; gate="uniform" for the plain ensemble
```"""
    below, body = {"Accuracy": accuracy_table(measured), "How to load it": load}, [f"# {name}"]
    for title, text in texts.items():
        filled = textwrap.fill(" ".join(text.split()), 110, break_on_hyphens=False, break_long_words=False)
        body += [f"## {title}", filled, *[below[title] for _ in below.keys() & {title}]]
    return "\n\n".join([front_matter(name, measured), *body]) + "\n"


def write_cards(settings: Settings) -> None:
    """Write README.md beside all weights of a preset that come with the project."""
    for path in sorted((store.PRETRAINED / settings.preset).glob(f"*/{store.WEIGHTS}")):
        write_atomically(path.with_name("README.md"), card(settings, ModelName.parse(path.parent.name)))
