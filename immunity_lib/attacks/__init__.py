"""Attacks on a mixture whose gate is chosen explicitly."""

from immunity_lib.attacks.paper import ATTACKS, attack_images, check_budget

__all__ = ["ATTACKS", "attack_images", "check_budget"]
