"""The widgets, without a browser: every control changes what is shown, and errors are said."""

import re
import time
from datetime import UTC, datetime
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from immunity_lib.explorer import panel as module
from immunity_lib.explorer.panel import Explorer
from immunity_lib.recipes import ModelName


@pytest.fixture
def explorer(exploration):
    return Explorer(exploration)


def words(explorer):
    """What is said, without the pictures."""
    return re.sub(r"data:image/png;base64,[^']*", "", explorer.view.value + explorer.detail.value)


def pictures(explorer):
    return re.findall(r"data:image/png;base64,[^']*", explorer.view.value + explorer.detail.value)


def test_it_shows_both_models_with_all_experts_and_gates(explorer):
    for title in ("Immunity, standard training", "MoE, standard training"):
        assert title in explorer.view.value
    assert len(pictures(explorer)) == 2 * 3 + 2  # image and two experts, and the one in detail
    assert len(re.findall("of 2 gates answer", words(explorer))) == 2
    assert explorer.status.value.startswith("ready")


@pytest.mark.parametrize(
    ("control", "value", "moves"),
    [
        ("step", 3, "both"), ("state", 2, "words"), ("expert", 2, "both"),
        ("overlay", True, "pictures"), ("parts", True, "pictures"), ("explained", 4, "pictures"),
        ("method", "Layer-CAM", "pictures"), ("other", None, "both"),
    ],
)  # fmt: skip
def test_every_control_changes_what_is_shown(explorer, control, value, moves):
    before = words(explorer), pictures(explorer)
    getattr(explorer, control).value = value
    assert explorer.status.value.startswith("ready")
    if moves in ("words", "both"):
        assert words(explorer) != before[0]
    if moves in ("pictures", "both"):
        assert pictures(explorer) != before[1]


def test_a_smaller_eps_moves_the_image_less(explorer):
    explorer.step.value = explorer.step.max
    moved = {}
    for label, value in explorer.budget.options.items():
        explorer.budget.value = value
        moved[label] = float(re.search(r"moved by ([\d.]+)/255", explorer.view.value)[1])
    for label, distance in moved.items():
        assert distance <= float(label.split("/")[0]) + 0.05
    assert moved["0/255"] == 0 < moved["8/255"]


def test_sliders_answer_at_once(explorer):
    """From what is kept. A generous bound, since the machine may be busy; some 20 ms is usual."""
    explorer.step.value = 1
    started = time.perf_counter()
    for control in (explorer.step, explorer.budget, explorer.state, explorer.expert):
        control.value = 2
    assert (time.perf_counter() - started) / 4 < 0.15


def test_a_thumbnail_shows_its_image(explorer):
    explorer.thumbnails[3].click()
    assert explorer.exploration.gallery[3].title in explorer.view.value
    assert "shown" in explorer.thumbnails[3]._dom_classes
    assert "shown" not in explorer.thumbnails[0]._dom_classes


def test_the_gallery_keeps_to_class_and_to_broken_images(explorer):
    names = explorer.exploration.dataset.class_names
    explorer.of_class.value = names[2]
    assert all(names[2] in child.tooltip for child in explorer.gallery.children)
    explorer.of_class.value = "all"
    explorer.only_broken.value = True
    broken = explorer.exploration.broken(explorer.model.value, "uniform")
    shown = [child for child in explorer.gallery.children if child in explorer.thumbnails]
    assert len(shown) == sum(broken)


def uploaded(content, name):
    return {"name": name, "type": "", "size": len(content), "content": memoryview(content),
            "last_modified": datetime.now(UTC)}  # fmt: skip


def test_an_own_image_is_fitted_with_a_note_and_attacked(explorer):
    content = BytesIO()
    Image.fromarray(np.full((50, 40, 3), 90, np.uint8)).save(content, "PNG")
    explorer.upload.value = (uploaded(content.getvalue(), "<mine>.png"),)
    assert "&lt;mine&gt;.png: the middle square of it is taken" in explorer.view.value
    assert "<mine>" not in explorer.view.value
    explorer.step.value = 3
    assert explorer.status.value.startswith("ready")


def test_a_file_that_is_no_image_is_refused_and_the_view_stays(explorer):
    before = explorer.view.value
    explorer.upload.value = (uploaded(b"no image", "letter.txt"),)
    assert "letter.txt cannot be read as an image" in explorer.status.value
    assert explorer.view.value == before


def test_missing_weights_are_named_with_the_command_that_makes_them(explorer):
    missing = explorer.exploration.missing
    assert missing and all(isinstance(name, ModelName) for name in missing)
    assert f"-p model {missing[0]}" in explorer.status.value
    assert len(explorer.model.options) == 2, "those that are there are offered"


def test_what_goes_wrong_is_said(explorer, monkeypatch):
    monkeypatch.setattr(module, "moments", lambda *_, **__: 1 / 0)
    explorer.step.value = 2
    assert "ZeroDivisionError" in explorer.status.value


def test_a_file_s_name_stays_text_on_the_page_that_is_taken_home(explorer):
    content = BytesIO()
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(content, "PNG")
    explorer.upload.value = (uploaded(content.getvalue(), "<img src=x onerror=alert(1)>.png"),)
    explorer.save.click()
    page = (explorer.exploration.settings.runs / "explorer" / "session.html").read_text()
    assert "&lt;img src=x" in page and "<img src=x" not in page


def test_the_session_is_taken_home_as_one_page(explorer):
    explorer.thumbnails[1].click()
    explorer.save.click()
    path = explorer.exploration.settings.runs / "explorer" / "session.html"
    assert str(path) in explorer.status.value
    page = path.read_text()
    for subject in explorer.exploration.gallery[:2]:
        assert subject.title in page
    assert not re.search(r"(src|href)=[\"']?http", page)
