"""The explorer: models on single images, step by step under attack."""

from immunity_lib.explorer.exploration import Exploration, Subject

__all__ = ["Exploration", "Subject"]
