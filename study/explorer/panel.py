"""The explorer's widgets: what the kernel must compute is chosen here, and the page below, whose sliders (step, gate,
expert) need no kernel, moves by itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape

import ipywidgets as widgets

from immunity_lib.files import write_atomically
from study.explorer.exploration import ANSWER, CAM_METHODS, PRESET_BUDGET, TRUE_CLASS, Exploration, Subject, own_subject
from study.explorer.page import ATTACKED_GATES, colours, data_address, explorer_page
from study.settings import budget_text

GALLERY_STYLE = """
.explorer-gallery { flex-flow: row wrap; max-height: 132px; overflow: auto; }
.explorer-gallery .jupyter-button { width: 46px; height: 60px; margin: 1px; padding: 44px 0 0; line-height: 14px;
  font-size: 11px; image-rendering: pixelated; color: var(--jp-ui-font-color1, #000);
  background: 4px 4px / 36px 36px no-repeat var(--jp-layout-color2, #eee); }
.explorer-gallery .jupyter-button.shown { outline: 3px solid var(--jp-brand-color1, #2a7ab0); }
"""
# tornado, Jupyter's web server, closes the connection on a message of more than 10 MiB
UPLOAD_LIMIT = "PNG, JPEG, WebP, GIF, BMP or TIFF, at most 10 MB (Jupyter's limit)"
FRAME = """<iframe title="heat maps under attack" scrolling="no"
 style="width: 100%; height: 700px; border: 0" srcdoc="{}"></iframe>"""


class Explorer(widgets.VBox):
    """Choose an image and one or two models, the attack and the explanation; then move them."""

    def __init__(self, exploration: Exploration, subject: Subject | None = None):
        """subject: the image to begin with, by default the gallery's first."""
        self.exploration = exploration
        regime = exploration.settings.regimes[0]
        names = {name.title: name for name in exploration.models}
        alike = [name for name in exploration.models if name.regime == regime] or exploration.models
        explained = {one: one for one in (TRUE_CLASS, ANSWER)}
        explained |= {name: k for k, name in enumerate(exploration.dataset.class_names) if name not in explained}
        budgets = {budget_text(eps): k for k, eps in enumerate(exploration.budgets)}
        self.subject = subject or exploration.gallery[0]
        self.seen: list[Subject] = []

        self.upload = widgets.FileUpload(accept="image/*", description="own image")
        self.model = _chooser("model", names, alike[-1])
        self.other = _chooser("compared with", {"none": None} | names, alike[0] if len(alike) > 1 else None)
        self.attacked_gate = _chooser("attack sees", {title: gate for gate, title in ATTACKED_GATES.items()}, "uniform")
        self.method = _chooser("CAM method", CAM_METHODS, CAM_METHODS[0])
        self.explained = _chooser("map is for", explained, TRUE_CLASS)
        self.budget = _chooser("eps", budgets, PRESET_BUDGET, widgets.SelectionSlider)
        shown = {"description": "take the session home", "icon": "download", "layout": {"width": "auto"}}
        told = "write the images looked at, with their maps under attack, as one HTML file"
        self.save = widgets.Button(tooltip=told, **shown)
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
        of_models = [self.model, self.other, self.attacked_gate]
        of_maps = [self.method, self.explained, self.budget]
        upload = _line(self.upload, widgets.HTML(UPLOAD_LIMIT))
        lines = [upload, gallery, _line(*of_models), _line(*of_maps, self.save)]
        super().__init__([widgets.HTML(f"<style>{style}</style>"), *lines, self.status, self.view])
        for control in of_models + of_maps:
            control.observe(lambda _: self._look_at(self.subject), "value")
        self.upload.observe(lambda _: self._take_own_images(), "value")
        self.save.on_click(lambda _: self._save())
        self._look_at(self.subject)

    def _look_at(self, subject: Subject) -> None:
        with self._status("attacking the image and computing its maps; they are kept"):
            self._show(subject)

    def _show(self, subject: Subject) -> None:
        self.view.value = FRAME.format(escape(self._page([subject])))
        self.subject = subject
        self.seen = [*(one for one in self.seen if one is not subject), subject]
        for thumbnail, one in zip(self.thumbnails, self.exploration.gallery, strict=True):
            (thumbnail.add_class if one is subject else thumbnail.remove_class)("shown")

    def _page(self, subjects: Sequence[Subject]) -> str:
        names = list(dict.fromkeys(filter(None, (self.model.value, self.other.value))))
        controls = (self.attacked_gate, self.budget, self.method, self.explained)
        return explorer_page(self.exploration, names, subjects, *(control.value for control in controls))

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
            return
        said = ["ready", *filter(None, [escape(done)])]
        if missing := ", ".join(name.title for name in self.exploration.missing):
            command = f"<code>{escape(self.exploration.training_command())}</code>"
            said.append(f"not trained yet: {missing}; the first is trained by {command}")
        self.status.value = "; ".join(said)


def _chooser(description: str, options, value, kind=widgets.Dropdown) -> widgets.Widget:
    style = {"style": {"description_width": "100px"}, "layout": {"width": "340px"}}
    return kind(options=options, value=value, description=description, **style)


def _line(*controls: widgets.Widget) -> widgets.HBox:
    return widgets.HBox(controls, layout={"flex_flow": "row wrap", "align_items": "center"})
