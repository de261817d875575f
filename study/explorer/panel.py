"""The explorer's widgets: what the kernel must compute is chosen here, and the page below moves by
itself.

Everything shown is computed by an `Exploration`, once: a new image, model, method, class or budget
when it is chosen. The page's own sliders (step, gate, expert) then answer at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape

import ipywidgets as widgets

from immunity_lib.files import write_atomically
from study.explorer.cam_methods import CAM_METHODS
from study.explorer.exploration import (
    ANSWER,
    PRESET_BUDGET,
    TRUE_CLASS,
    Exploration,
    Subject,
    budget_label,
    label_of,
    own_subject,
)
from study.explorer.page import ATTACKED_GATES, colours, data_address, explorer_page

GALLERY_STYLE = """
.explorer-gallery { flex-flow: row wrap; max-height: 132px; overflow: auto; }
.explorer-gallery .jupyter-button { width: 46px; height: 60px; margin: 1px; padding: 44px 0 0;
  line-height: 14px; font-size: 11px; background: 4px 4px / 36px 36px no-repeat
  var(--jp-layout-color2, #eee); color: var(--jp-ui-font-color1, #000);
  image-rendering: pixelated; }
.explorer-gallery .jupyter-button.shown { outline: 3px solid var(--jp-brand-color1, #2a7ab0); }
"""
# tornado, Jupyter's web server, closes the connection on a message of more than 10 MiB
UPLOAD_LIMIT = "PNG, JPEG, WebP, GIF, BMP or TIFF, at most 10 MB (Jupyter's limit)"


class Explorer(widgets.VBox):
    """Choose an image and one or two models, the attack and the explanation; then move them."""

    def __init__(self, exploration: Exploration, subject: Subject | None = None):
        """subject: the image to begin with, by default the gallery's first."""
        self.exploration, dataset = exploration, exploration.dataset
        regime = exploration.settings.regimes[0]
        names = {label_of(name): name for name in exploration.models}
        alike = [name for name in exploration.models if name.regime == regime] or exploration.models
        classes = {name: label for label, name in enumerate(dataset.class_names)}
        budgets = {budget_label(eps): k for k, eps in enumerate(exploration.budgets)}
        self.subject = subject or exploration.gallery[0]
        self.seen: list[Subject] = []

        self.upload = widgets.FileUpload(accept="image/*", description="own image")
        self.model = _chooser("model", names, alike[-1])
        self.other = _chooser(
            "compared with", {"none": None} | names, alike[0] if len(alike) > 1 else None
        )
        self.attacked_gate = _chooser(
            "attack sees", {title: gate for gate, title in ATTACKED_GATES.items()}, "uniform"
        )
        self.method = _chooser("CAM method", CAM_METHODS, CAM_METHODS[0])
        self.explained = _chooser(
            "map is for", {one: one for one in (TRUE_CLASS, ANSWER)} | classes, TRUE_CLASS
        )
        self.budget = _chooser(
            "eps", budgets, min(PRESET_BUDGET, len(budgets) - 1), widgets.SelectionSlider
        )
        self.save = widgets.Button(
            description="take the session home", icon="download", layout={"width": "auto"},
            tooltip="write the images looked at, with their maps under attack, as one HTML file",
        )  # fmt: skip
        self.status, self.view = widgets.HTML(), widgets.HTML()
        self.thumbnails, style = [], GALLERY_STYLE
        for number, one in enumerate(exploration.gallery):
            button = widgets.Button(description=str(number + 1), tooltip=one.title)
            button.add_class(f"explorer-image-{number}")
            button.on_click(lambda _, one=one: self._look_at(one))
            self.thumbnails.append(button)
            picture = f"url({data_address(colours(one.image))}) !important"
            style += f".explorer-image-{number} {{ background-image: {picture}; }}\n"
        gallery = widgets.HBox(self.thumbnails)
        gallery.add_class("explorer-gallery")
        super().__init__(
            [
                widgets.HTML(f"<style>{style}</style>"),
                _line(self.upload, widgets.HTML(UPLOAD_LIMIT)),
                gallery,
                _line(self.model, self.other, self.attacked_gate),
                _line(self.method, self.explained, self.budget, self.save),
                self.status,
                self.view,
            ]
        )
        for control in (
            self.model, self.other, self.attacked_gate, self.method, self.explained, self.budget,
        ):  # fmt: skip
            control.observe(lambda _: self._look_at(self.subject), "value")
        self.upload.observe(lambda _: self._take_own_images(), "value")
        self.save.on_click(lambda _: self._save())
        self._look_at(self.subject)

    def _look_at(self, subject: Subject) -> None:
        with self._status("attacking the image and computing its maps; they are kept"):
            self._show(subject)

    def _show(self, subject: Subject) -> None:
        """Show an image as the controls say."""
        page = escape(self._page([subject]))
        self.subject = subject
        self.seen = [*(one for one in self.seen if one is not subject), subject]
        self.view.value = (
            '<iframe title="heat maps under attack" scrolling="no" '
            f'style="width: 100%; height: 700px; border: 0" srcdoc="{page}"></iframe>'
        )
        for thumbnail, one in zip(self.thumbnails, self.exploration.gallery, strict=True):
            (thumbnail.add_class if one is subject else thumbnail.remove_class)("shown")

    def _page(self, subjects: Sequence[Subject]) -> str:
        names = dict.fromkeys(filter(None, (self.model.value, self.other.value)))
        return explorer_page(
            self.exploration, list(names), subjects, self.attacked_gate.value, self.budget.value,
            self.method.value, self.explained.value,
        )  # fmt: skip

    def _take_own_images(self) -> None:
        for file in self.upload.value:
            with self._status(f"reading {file['name']}"):
                self._show(own_subject(bytes(file["content"]), file["name"]))

    def _save(self) -> None:
        """Write the images that were looked at, as the controls say, as a page of its own."""
        path = self.exploration.settings.runs / "explorer" / "session.html"
        with self._status("writing the page", f"saved {path}"):
            write_atomically(path, self._page(self.seen))

    @contextmanager
    def _status(self, doing: str, done: str = "") -> Iterator[None]:
        """The status says what is going on, and afterwards what went wrong, if anything did."""
        self.status.value = f"<i>{escape(doing)} ...</i>"
        try:
            yield
        except Exception as error:  # a traceback in a widget's callback would not be seen
            self.status.value = f"<b>{type(error).__name__}:</b> {escape(str(error))}"
        else:
            self.status.value = "; ".join(filter(None, ("ready", escape(done), self._missing())))

    def _missing(self) -> str:
        missing = self.exploration.missing
        if not missing:
            return ""
        titles, command = ", ".join(map(label_of, missing)), self.exploration.training_command()
        return f"not trained yet: {titles}; the first is trained by <code>{escape(command)}</code>"


def _chooser(description: str, options, value, kind=widgets.Dropdown) -> widgets.Widget:
    return kind(
        options=options, value=value, description=description,
        style={"description_width": "100px"}, layout={"width": "340px"},
    )  # fmt: skip


def _line(*controls: widgets.Widget) -> widgets.HBox:
    return widgets.HBox(controls, layout={"flex_flow": "row wrap", "align_items": "center"})
