"""Synthetic measurements, of which tests know every verdict: no training, no attack."""

import math
from itertools import product

import numpy as np
import pandas as pd

from study import catalogue
from study.store import own_folder, question_of, record_path, write_atomically, write_json

PROVENANCE = {"commit": "abc", "finished": "2024-01-01T00:00:00+00:00"}
ADAPTIVE = [
    ("fgsm", "paper", "switch"), ("pgd", "paper", "switch"), ("pgd-trained", "frozen", "trained"),
    ("eotpgd-1", "sampled", "switch"), ("eotpgd-5", "sampled", "switch"),
    ("exact-expected", "exact", "all gates"), ("autoattack-uniform", "judges", "uniform"),
    ("noise", "black box", "all gates"), ("pgd-expert-1", "transfer", "expert 1 alone"),
]  # fmt: skip
SCORES = ("independence_score", "independence_of_peaks", "causality_score", "mutual_information", "empty_maps")


class World:
    """Verdicts by (model, kind, attack, sees), each an array (B, G) under all gates and two (B,) under the plain
    ensemble and the trained gate; written as `measure` would have measured them.

    share(name, attack): how many verdicts are right, 0 .. 1."""

    def __init__(self, settings, share=lambda name, attack: 0.5):
        self.settings, self.share, self.generator = settings, share, np.random.default_rng(0)
        self.verdicts, self.scores, self.summaries = {}, {}, {}
        attacked, experts = settings.attacked_images, settings.recipe.experts
        for name in catalogue.trained_models(settings):
            self.write_training(name)
        for name in catalogue.measured_models(settings, "attacks"):
            gates = settings.attack_gates[: 1 if name.method in catalogue.SINGLE else None]
            rows = [self.rows(name, "attacks", settings.test_images)]
            rows.append(self.rows(name, "attacks", 7, split="test-shifted"))
            for gate, attack in product(gates, settings.attacks):
                rows.append(self.rows(name, "attacks", attacked, attack, "paper", gate))
            for eps in settings.magnitudes:
                rows.append(self.rows(name, "attacks", attacked, f"pgd at {eps}", "magnitude", gates[0]))
            self.write(name, "attacks", rows, {"seconds": {}})
        for name in dict.fromkeys(catalogue.table1_models(settings) + catalogue.table3_models(settings)):
            rows = self.rows(name, "scores", settings.test_images)
            found = self.generator.random((len(rows), len(SCORES)))
            self.scores[name] = pd.DataFrame(found, columns=SCORES)
            alone = self.generator.random(experts).tolist()
            coverage = self.generator.random((experts, 4)).tolist()
            test = {"expert_accuracy": alone, "part_coverage": coverage, "background_heat": alone}
            background = {"background": 0.8, "background_heat": 0.5}
            self.write(name, "scores", [rows.assign(**self.scores[name], **background)], {"test": test})
        told = [{"attack": a, "family": f, "sees": s, "seconds": 2.0} for a, f, s in ADAPTIVE]
        for name in catalogue.measured_models(settings, "adaptive"):
            rows = [self.rows(name, "adaptive", settings.adaptive_count)]
            for attack in ADAPTIVE:
                few = settings.auto_attack_images if attack[1] in ("judges", "black box") else None
                rows.append(self.rows(name, "adaptive", few or settings.adaptive_count, *attack))
            check = {"check": "a check", "passed": name.method == "moe", "evidence": "so much"}
            self.write(name, "adaptive", rows, {
                "agreement": {"unanimous": 0.75, "pairs": 0.8}, "attacks": told,
                "by_budget": [[0.0, 0.9], [0.5, 0.1 * name.seed]], "checks": [check | {"why": "why", "source": "who"}],
            })  # fmt: skip

    def rows(self, name, kind, images, attack="clean", family="clean", sees="", split="test"):
        experts = 1 if name.method in catalogue.SINGLE else self.settings.recipe.experts
        gates = math.factorial(experts)
        right = self.generator.random((images, gates + 2)) < self.share(name, attack)
        right[0] = True  # an image that every gate gets right
        right = right[:, :-2], right[:, -2], right[:, -1]
        if split == "test":
            self.verdicts[name, kind, attack, sees] = right
        return pd.DataFrame({
            "split": split, "image": np.arange(images), "label": 0, "attack": attack, "family": family, "sees": sees,
            "gates": [row.tobytes() for row in np.packbits(right[0], axis=1)], "switched": right[0].mean(1),
            "uniform": right[1], "trained": right[2],
            "experts": [row.tobytes() for row in np.packbits(self.right_experts(attack, images, experts), axis=1)],
        })  # fmt: skip

    def right_experts(self, attack, images, experts):
        """All but the one that was attacked."""
        right = np.ones((images, experts), bool)
        if attack.startswith("pgd-expert-"):
            right[:, int(attack[-1]) - 1] = False
        return right

    def write_training(self, name):
        folder = own_folder(self.settings, name)
        folder.mkdir(parents=True, exist_ok=True)  # one that is a member of an ensemble, too
        known = {"kind": "training", "model": str(name), "provenance": PROVENANCE, "weights": str(name)}
        known |= {"recipe": catalogue.recipe_of(self.settings, name).as_json()}
        write_json(folder / "record.json", known | {"parameters": 2_000_000, "multiply_accumulates": 3_000_000})

    def write(self, name, kind, rows, summary):
        path = record_path(self.settings, name, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path.with_suffix(".parquet"), pd.concat(rows, ignore_index=True).to_parquet(index=False))
        known = {"kind": kind, "model": str(name), "summary": summary, "provenance": PROVENANCE}
        weights = [str(one) for one in catalogue.single(self.settings, [name])]
        write_json(path, known | {"asked": question_of(self.settings, kind), "weights": weights})
        self.summaries[name, kind] = summary

    def accuracy(self, name, attack="clean", sees="", kind="attacks", defence="switched"):
        """In %, counted from the verdicts one by one."""
        gates, uniform, trained = self.verdicts[name, kind, attack, sees]
        by_gate = [sum(map(bool, column)) / len(gates) for column in gates.T]
        shares = {
            "switched": sum(by_gate) / len(by_gate), "best": max(by_gate), "worst": min(by_gate),
            "every": sum(all(row) for row in gates) / len(gates), "uniform": sum(map(bool, uniform)) / len(gates),
            "trained": sum(map(bool, trained)) / len(gates),
        }  # fmt: skip
        return 100 * shares[defence]
