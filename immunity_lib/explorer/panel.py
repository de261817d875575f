"""The explorer's widgets: controls above, and below them what they show.

Everything shown is computed by an `Exploration`, once. A slider only looks it up, so that it
answers at once; a new image, model, method or class is computed when it is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape

import ipywidgets as widgets

from immunity_lib.evaluation import permutations
from immunity_lib.explorer import page
from immunity_lib.explorer.cam_methods import CAM_METHODS
from immunity_lib.explorer.drawing import colours, data_address
from immunity_lib.explorer.exploration import (
    ANSWER,
    GALLERY,
    PRESET_BUDGET,
    TRUE_CLASS,
    Exploration,
    Subject,
    training_command,
)
from immunity_lib.explorer.moments import Moment, label_of, moments
from immunity_lib.explorer.own_images import own_image
from immunity_lib.explorer.stepper import stepper
from immunity_lib.recipes import ModelName
from immunity_lib.records import write_atomically

ATTACKED_GATES = {
    "all gates alike (the plain ensemble)": "uniform",
    "the gate as trained": "trained",
}
NOBODY = "none"

GALLERY_STYLE = """<style>
.explorer-gallery { flex-flow: row wrap; max-height: 132px; overflow: auto; }
.explorer-gallery .jupyter-button { width: 46px; height: 60px; margin: 1px; padding: 44px 0 0;
  line-height: 14px; font-size: 11px; background: 4px 4px / 36px 36px no-repeat
  var(--jp-layout-color2, #eee); color: var(--jp-ui-font-color1, #000);
  image-rendering: pixelated; }
.explorer-gallery .jupyter-button.shown { outline: 3px solid var(--jp-brand-color1, #2a7ab0); }
%s
</style>"""


class Explorer(widgets.VBox):
    """Choose an image and one or two models; move the attack, the gate and the explanation."""

    def __init__(self, exploration: Exploration, subject: Subject | None = None):
        """subject: the image to begin with, by default the gallery's first."""
        self.exploration = exploration
        settings, dataset = exploration.settings, exploration.dataset
        names = {label_of(name): name for name in exploration.models}
        standard = [name for name in exploration.models if name.regime == settings.regimes[0]]
        first, second = standard[-1], standard[0]
        self.subject = subject or exploration.gallery[0]
        self.seen = [self.subject]
        narrow = {"indent": False, "layout": {"width": "auto", "margin": "2px 16px 2px 8px"}}
        wide = {"style": {"description_width": "100px"}, "layout": {"width": "340px"}}

        self.of_class = widgets.Dropdown(
            options=["all", *dataset.class_names[:GALLERY]], description="class", **wide
        )
        self.only_broken = widgets.Checkbox(
            description="only those that the attack breaks", **narrow
        )
        self.upload = widgets.FileUpload(accept="image/*", description="own image")
        self.model = widgets.Dropdown(options=names, value=first, description="model", **wide)
        self.other = widgets.Dropdown(
            options={NOBODY: None} | names, value=second if second != first else None,
            description="compared with", **wide,
        )  # fmt: skip
        self.attacked_gate = widgets.Dropdown(
            options=ATTACKED_GATES, description="attack sees", **wide
        )
        self.method = widgets.Dropdown(options=CAM_METHODS, description="CAM method", **wide)
        classes = {name: label for label, name in enumerate(dataset.class_names)}
        self.explained = widgets.Dropdown(
            options={TRUE_CLASS: TRUE_CLASS, ANSWER: ANSWER} | classes,
            description="map is for", **wide,
        )  # fmt: skip
        budgets = {page.budget_label(eps): k for k, eps in enumerate(exploration.budgets)}
        self.budget = widgets.SelectionSlider(
            options=budgets, value=min(PRESET_BUDGET, len(budgets) - 1), description="eps", **wide
        )
        self.step = widgets.IntSlider(max=settings.steps, description="step", **wide)
        self.play = widgets.Play(max=settings.steps, interval=300, description="play the attack")
        widgets.jslink((self.play, "value"), (self.step, "value"))
        self.state = widgets.IntSlider(
            value=1, min=1, max=len(permutations(settings.experts)), description="gate", **wide
        )
        self.expert = widgets.IntSlider(
            value=1, min=1, max=settings.experts, description="expert", **wide
        )
        self.save = widgets.Button(
            description="take the session home", icon="download",
            tooltip="write the images looked at, with their maps under attack, as one HTML file",
            layout={"width": "auto"},
        )  # fmt: skip
        self.overlay = widgets.Checkbox(description="maps over the image", **narrow)
        self.parts = widgets.Checkbox(description="outline the true parts", **narrow)
        self.status = widgets.HTML()
        self.view, self.detail = widgets.HTML(), widgets.HTML()
        self.gallery = widgets.HBox()
        self.gallery.add_class("explorer-gallery")
        self.thumbnails = [self._thumbnail(k) for k in range(len(exploration.gallery))]

        super().__init__(
            [
                widgets.HTML(page.STYLE + self._gallery_style()),
                _line(self.of_class, self.only_broken, self.upload),
                self.gallery,
                _line(self.model, self.other, self.attacked_gate),
                _line(self.method, self.explained, self.overlay, self.parts),
                _line(self.budget, self.step, self.play),
                _line(self.state, self.expert, self.save),
                self.status,
                self.view,
                self.detail,
            ]
        )
        if not dataset.part_names:
            self.parts.layout.display = "none"
        for control in (self.of_class, self.only_broken, self.model, self.attacked_gate):
            control.observe(lambda change: self._choose_images(), "value")
        for control in (
            self.model, self.other, self.attacked_gate, self.method, self.explained, self.budget,
            self.step, self.state, self.expert, self.overlay, self.parts,
        ):  # fmt: skip
            control.observe(lambda change: self.draw(), "value")
        self.upload.observe(lambda change: self._take_own_image(), "value")
        self.save.on_click(lambda button: self._save())
        self._choose_images()
        self._clicked(self.subject)

    def draw(self) -> None:
        """Show what the controls say."""
        with self._reported("computing maps; they are kept"):
            self._draw()

    def _draw(self) -> None:
        dataset, chosen = self.exploration.dataset, self.expert.value - 1
        masks = self.subject.part_masks if self.parts.value else None
        shown = self._moments()
        rows = [
            page.model_row(moment, dataset.class_names, chosen, masks, self.overlay.value)
            for moment in shown
        ]
        heading = f"<h4>{escape(self.subject.title)}</h4>"
        scale = page.legend(shown[0].top, dataset.part_names if masks is not None else ())
        self.view.value = f"<div class='explorer'>{heading}{scale}{''.join(rows)}</div>"
        detail = page.expert_detail(
            shown, dataset.class_names, dataset.part_names, self.subject, chosen
        )
        self.detail.value = f"<div class='explorer'>{detail}</div>"

    def _moments(self) -> list[Moment]:
        return moments(
            self.exploration, self._names(), self.subject, self.attacked_gate.value,
            budget=self.budget.value, steps=[self.step.value], state=self.state.value - 1,
            method=self.method.value, explained=self.explained.value,
        )  # fmt: skip

    def _names(self) -> list[ModelName]:
        """The models on show: one, or two."""
        return list(dict.fromkeys(filter(None, (self.model.value, self.other.value))))

    def _choose_images(self) -> None:
        """Show the thumbnails that the class and the check box leave."""
        with self._reported("attacking the gallery"):
            broken = [True] * len(self.thumbnails)
            if self.only_broken.value:
                broken = self.exploration.broken(self.model.value, self.attacked_gate.value)
            names = self.exploration.dataset.class_names
            chosen = [
                thumbnail
                for thumbnail, subject, fits in zip(
                    self.thumbnails, self.exploration.gallery, broken, strict=True
                )
                if fits and self.of_class.value in ("all", names[subject.label])
            ]
            self.gallery.children = chosen or [widgets.HTML("no such image in the gallery")]

    def _thumbnail(self, number: int) -> widgets.Button:
        subject = self.exploration.gallery[number]
        button = widgets.Button(description=str(number + 1), tooltip=subject.title)
        button.add_class(f"explorer-image-{number}")
        button.on_click(lambda button: self._clicked(subject))
        return button

    def _clicked(self, subject: Subject) -> None:
        with self._reported("attacking the image"):
            self._look_at(subject)

    def _gallery_style(self) -> str:
        pictures = "\n".join(
            f".explorer-image-{k} {{ background-image: url({data_address(colours(one.image))}) "
            "!important; }"
            for k, one in enumerate(self.exploration.gallery)
        )
        return GALLERY_STYLE % pictures

    def _look_at(self, subject: Subject) -> None:
        self.subject = subject
        self.seen = [*(one for one in self.seen if one is not subject), subject]
        for thumbnail, one in zip(self.thumbnails, self.exploration.gallery, strict=True):
            (thumbnail.add_class if one is subject else thumbnail.remove_class)("shown")
        self._draw()

    def _take_own_image(self) -> None:
        for file in self.upload.value:
            with self._reported(f"reading {file['name']}"):
                image, notes = own_image(bytes(file["content"]), file["name"])
                title = f"{file['name']}{': ' if notes else ''}{', '.join(notes)}"
                self._look_at(Subject(title, image, None))

    def _save(self) -> None:
        """Write the images that were looked at, under both models, as a page of its own."""
        path = self.exploration.settings.runs / "explorer" / "session.html"
        said = [f"saved {path}"]
        with self._reported("writing the page", said):
            content = stepper(
                self.exploration, self._names(), self.seen, self.budget.value,
                self.attacked_gate.value,
            )  # fmt: skip
            write_atomically(path, content)

    @contextmanager
    def _reported(self, doing: str, done: Sequence[str] = ()) -> Iterator[None]:
        """The status says what is going on, and afterwards what went wrong, if anything did."""
        self.status.value = f"<i>{escape(doing)} ...</i>"
        try:
            yield
        except Exception as error:  # a traceback in a widget's callback would not be seen
            self.status.value = f"<b>{type(error).__name__}:</b> {escape(str(error))}"
        else:
            self.status.value = "; ".join(["ready", *map(escape, done), *self._missing()])

    def _missing(self) -> list[str]:
        missing = self.exploration.missing
        if not missing:
            return []
        command = training_command(self.exploration.settings, missing[0])
        return [
            f"not trained yet: {', '.join(map(label_of, missing))}; the first of them is trained "
            f"by <code>{escape(command)}</code>"
        ]


def _line(*controls: widgets.Widget) -> widgets.HBox:
    return widgets.HBox(controls, layout={"flex_flow": "row wrap", "align_items": "center"})
