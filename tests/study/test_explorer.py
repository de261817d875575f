"""The explorer: computed once and truly, shown as it was computed, with what readers bring."""

import base64
import html
import json
import re
import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from io import BytesIO

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from immunity_lib import expert_heatmaps
from immunity_lib.data import ImageSet
from immunity_lib.moe import GateVerdicts, switched_probabilities
from study.catalogue import ModelName, explored_models
from study.explorer import exploration as module
from study.explorer import panel as widgets
from study.explorer.exploration import ANSWER, PRESET_BUDGET, TRUE_CLASS, Exploration, Subject, own_subject
from study.explorer.page import attack_figure, explorer_page
from study.explorer.panel import Explorer
from study.settings import PRESETS, load_preset
from study.store import trained_model

IMMUNITY, MOE = NAMES = [ModelName.parse(f"parts10-{method}-resnet18-standard-seed0") for method in ("immunity", "moe")]
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def exploration(make_settings, dataset, tmp_path_factory):
    """Two tiny mixtures, trained for an epoch, which is too little to know anything."""
    settings = make_settings(output_folder=str(tmp_path_factory.mktemp("explored")), epochs=1)
    for name in NAMES:
        trained_model(settings, name, dataset)
    return Exploration(settings, dataset)


@pytest.fixture
def subject(exploration):
    return exploration.gallery[0]


def content_of(page):
    """The data in a page."""
    return json.loads(re.search(r'type="application/json">(.*?)</script>', page)[1])


def pixels_of(address):
    return np.asarray(Image.open(BytesIO(base64.b64decode(address.partition(",")[2]))))


# What is computed


def test_answers_are_the_model_s_own_at_every_point_within_the_budgets(exploration, subject):
    answers, budgets = exploration.answers(IMMUNITY, subject, "uniform"), exploration.budgets
    assert budgets[0] == 0 and budgets[PRESET_BUDGET] == exploration.settings.recipe.eps
    assert answers.frames.shape == (len(budgets), exploration.settings.steps + 1, 3, 32, 32)
    assert torch.equal(answers.frames[:, 0], subject.image.expand(len(budgets), -1, -1, -1))
    for budget, way in zip(budgets, answers.frames, strict=True):
        assert (way - subject.image).abs().max() <= float(budget) + 1e-6
    with torch.no_grad():
        outputs = exploration.model(IMMUNITY).expert_outputs(answers.frames[2])
    kept = {"rtol": 1e-3, "atol": 1e-4}  # the copy for attacks is folded
    torch.testing.assert_close(answers.experts[2], outputs.log_probs.exp(), **kept)
    torch.testing.assert_close(answers.mixtures[2], switched_probabilities(outputs), **kept)
    assert answers.asked == subject.label


def test_maps_are_those_of_eq_3_for_the_class_that_is_asked(exploration, subject):
    answers = exploration.answers(IMMUNITY, subject, "uniform")
    answered = answers.experts[3].mean(1).argmax(-1)
    true = torch.full_like(answered, subject.label)
    for explained, labels in ((TRUE_CLASS, true), (7, torch.full_like(answered, 7)), (ANSWER, answered)):
        maps = exploration.maps(IMMUNITY, subject, "uniform", 3, module.OURS, explained)
        expected = expert_heatmaps(exploration.model(IMMUNITY), answers.frames[3], labels)
        torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", module.CAM_METHODS)
def test_every_method_gives_distributions(model, images, labels, method):
    maps = module.explanation_maps(model, images[:2], labels[:2], method)
    assert maps.shape == (2, 3, 32, 32) and (maps >= 0).all()
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 3), rtol=0, atol=1e-4)


def test_nothing_is_computed_twice(exploration, monkeypatch):
    first = exploration.maps(IMMUNITY, exploration.gallery[1], "uniform")
    for function in ("explanation_maps", "ascent_path", "trained_model"):
        monkeypatch.setattr(module, function, None)
    assert exploration.maps(IMMUNITY, exploration.gallery[1], "uniform") is first


def test_the_gallery_s_verdicts_are_those_after_the_attack_that_is_shown(exploration):
    (_, after), subject = exploration.verdicts(IMMUNITY, "uniform"), exploration.gallery[4]
    last = exploration.answers(IMMUNITY, subject, "uniform").mixtures[PRESET_BUDGET, -1]
    assert (after.switched[4] == (last.argmax(-1) == subject.label)).all()


def test_the_story_takes_each_image_once_and_by_the_rule_that_its_caption_states(exploration, monkeypatch):
    """Of verdicts that are made up: what is broken, saved and kept is known of each image."""
    gallery = exploration.gallery
    before = GateVerdicts(*(torch.ones(len(gallery), *more, dtype=torch.bool) for more in ((), (), (4,), (2,))))
    after = GateVerdicts(*(one.clone() for one in (before.trained, before.uniform, before.switched, before.experts)))
    after.switched[:, 0] = False
    after.uniform[3:6] = False
    after.switched[3] = after.switched[8] = False
    after.switched[5, 2:] = False
    after.switched[11:13] = True
    monkeypatch.setattr(Exploration, "verdicts", lambda *_: (before, after))
    story = exploration.story(IMMUNITY, "uniform")
    by_rule = {rule.partition(":")[0]: gallery.index(subject) for subject, rule in story.items()}
    assert len(story) == 5
    assert by_rule["Switching saves it, at times"] == 4, "broken, and three gates of four are right"
    moved = {by_rule["The maps move most"]}
    assert by_rule["All gates lose it"] == min({3, 8} - moved) and by_rule["No gate loses it"] == min({11, 12} - moved)
    after.switched[:] = after.uniform[:] = True
    assert not any(rule.startswith(("Switching", "All")) for rule in exploration.story(IMMUNITY, "uniform").values())
    page = explorer_page(exploration, NAMES, story, "uniform", 2)
    assert [one["caption"] for one in content_of(page)["subjects"]] == list(map(html.escape, story.values()))
    still = page.partition("<noscript><p>")[2].partition("</noscript>")[0]
    assert pixels_of(re.search('src="(data:.*?)"', still)[1]).shape == (5 * 32, 4 * 32, 3)


def test_the_gallery_stays_small_whatever_the_number_of_classes(exploration):
    """As on CIFAR-100: the first thirty classes, an image of each."""
    images = ImageSet(torch.zeros(300, 3, 32, 32, dtype=torch.uint8), torch.arange(300) % 100)
    names = tuple(map(str, range(100)))
    many = replace(exploration.dataset, class_names=names, part_names=(), splits={"test": images})
    assert [subject.label for subject in Exploration(exploration.settings, many).gallery] == list(range(30))


def test_B9_a_command_that_trains_is_told_for_a_preset_where_a_shell_would_stumble(dataset, tmp_path, monkeypatch):
    folder = tmp_path / "it's $HOME; mine"
    folder.mkdir()
    content = yaml.safe_load((PRESETS / "smoke.yaml").read_text()) | {"preset": "mine", "output_folder": str(folder)}
    (folder / "my preset.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(folder)
    settings = load_preset("my preset.yaml")
    with pytest.raises(ValueError, match="no mixture of preset mine is trained yet") as refused:
        Exploration(settings, dataset, "my preset.yaml")
    program, *words = shlex.split(str(refused.value).partition("this trains one: ")[2])
    assert [program, *words[:3]] == [sys.executable, "-m", "study.graph.job", "02_training"]
    given = {"preset": folder / "my preset.yaml", "output": folder, "model": explored_models(settings)[0]}
    assert {f"--{option}={value}" for option, value in given.items()} <= set(words)


# What is shown


def test_the_page_holds_what_was_computed_on_one_scale_and_gives_every_mixture_by_eq_1(exploration, subject):
    """As its script puts it together: expert i gets the weight gates[state][i]."""
    page = content_of(explorer_page(exploration, NAMES, [subject], "uniform", 2))
    (shown,) = page["subjects"]
    for name, of_model in zip(NAMES, shown["models"], strict=True):
        maps = exploration.maps(name, subject, "uniform", 2).permute(0, 2, 1, 3)
        answers = exploration.answers(name, subject, "uniform")
        heat = (pixels_of(of_model["heat"]) / 255.0) ** 2 * shown["top"]
        expected = (maps.reshape(heat.shape) * 1024).clamp(max=shown["top"]).numpy()
        assert np.abs(np.sqrt(heat) - np.sqrt(expected)).max() < 0.01 * shown["top"]
        frames = answers.frames[2].permute(0, 2, 3, 1).reshape(-1, 32, 3) * 255
        assert np.array_equal(pixels_of(of_model["images"]), frames.round().byte().numpy())
        moved = (answers.frames[2] - subject.image).abs().amax((1, 2, 3)) * 255
        assert of_model["moved"] == pytest.approx(moved.tolist(), abs=1e-3)
        weights = np.array(of_model["weights"])[:, np.array(page["gates"])]  # (S + 1, G, N)
        mixtures = np.einsum("sgn,snc->sgc", weights, np.array(of_model["experts"]))
        assert np.abs(mixtures - answers.mixtures[2].numpy()).max() < 1e-3
        assert of_model["answers"] == answers.mixtures[2].argmax(-1).tolist()
    for part, mask in zip(shown["parts"], subject.part_masks, strict=True):
        assert part == mask.flatten().nonzero().flatten().tolist()


def test_own_images_are_led_away_from_what_each_model_answers(exploration, subject, monkeypatch):
    """Of models that answer one class whatever they see: 3 and 7. No gradient, no map."""

    def stubborn(settings, name, dataset):
        model = trained_model(settings, name, dataset)
        for expert in model.experts:
            *_, last = (one for one in expert.modules() if isinstance(one, nn.Linear))
            nn.init.zeros_(last.weight)
            last.bias.data = 9.0 * nn.functional.one_hot(torch.tensor(3 + 4 * (name == MOE)), 10)
        return model

    monkeypatch.setattr(module, "trained_model", stubborn)
    fresh, own = Exploration(exploration.settings, exploration.dataset), Subject("mine", subject.image, None)
    (shown,) = content_of(explorer_page(fresh, NAMES, [own], "uniform", 2))["subjects"]
    assert [of_model["asked"] for of_model in shown["models"]] == [3, 7]
    assert all(np.all(of_model["empty"]) for of_model in shown["models"])


def test_C7_class_names_of_any_folder_stay_text(exploration, closing_figures):
    names = (HOSTILE, "US$ and A$", "</script>", TRUE_CLASS, *exploration.dataset.class_names[4:])
    hostile = Exploration(exploration.settings, replace(exploration.dataset, class_names=names))
    page = explorer_page(hostile, NAMES, hostile.gallery[:8], "uniform", 2, module.OURS, 0)
    assert HOSTILE not in page and "</script>" not in content_of(page)["classes"]
    assert html.unescape(content_of(page)["classes"][0]) == HOSTILE
    assert f"for {html.escape(HOSTILE)}" in page
    assert Explorer(hostile).explained.value == TRUE_CLASS, "of a class of that name, too"
    subject = next(one for one in hostile.gallery if one.label == 1)
    figure = attack_figure(hostile, NAMES, subject, "uniform", 0, [0])
    figure.canvas.draw()
    drawn = "|".join(re.escape(name.replace("$", r"\$")) for name in names)
    said = [text for panel in figure.axes if (text := panel.get_xlabel())]
    assert said and all(re.fullmatch(f"({drawn}) \\d+%( x)?", text) for text in said)


def test_the_still_figure_tells_the_answer_of_the_gate_as_trained(exploration, subject, monkeypatch, closing_figures):
    """Of more than six experts it is not among the states that are drawn."""
    answers = exploration.answers(IMMUNITY, subject, "uniform")
    experts = torch.zeros_like(answers.experts)
    experts[..., 0, 3] = experts[..., 1, 4] = 1
    gate = torch.tensor([0.25, 0.75]).expand_as(answers.gate)
    said = replace(answers, experts=experts, gate=gate, mixtures=torch.zeros_like(answers.mixtures))
    monkeypatch.setattr(exploration, "answers", lambda *_: said)
    mixture, *_ = attack_figure(exploration, [IMMUNITY], subject, "uniform", 0, [0]).axes
    assert mixture.get_xlabel().startswith(f"{exploration.dataset.class_names[4]} 75%")


# The widgets


@pytest.fixture
def explorer(exploration):
    return Explorer(exploration)


def shown_by(explorer):
    page = html.unescape(re.search('srcdoc="(.*?)"', explorer.view.value, re.DOTALL)[1])
    return page, content_of(page)


def upload(explorer, content, name):
    file = {"name": name, "type": "", "size": len(content), "last_modified": datetime.now(UTC)}
    explorer.upload.value = (file | {"content": memoryview(content)},)


def encoded(picture):
    picture.save(content := BytesIO(), "PNG")
    return content.getvalue()


def test_it_shows_both_models_with_all_experts_and_names_those_that_are_missing(explorer):
    _, content = shown_by(explorer)
    assert [of_model["title"] for of_model in content["subjects"][0]["models"]] == [name.title for name in NAMES]
    assert sorted(content["gates"]) == [[0, 1], [1, 0]]
    missing, every = explorer.exploration.missing, explored_models(explorer.exploration.settings)
    assert missing == [name for name in every if name not in NAMES]
    said = html.unescape(explorer.status.value)
    assert said.startswith("ready") and f"--model={missing[0]}" in said
    assert len(explorer.model.options) == 2, "those that are there are offered"


@pytest.mark.parametrize(
    ("control", "value"),
    [("model", MOE), ("other", None), ("attacked_gate", "trained"), ("budget", 1), ("method", "Layer-CAM"),
     ("explained", 4)],
)  # fmt: skip
def test_every_control_changes_what_is_shown(explorer, control, value):
    before = shown_by(explorer)
    getattr(explorer, control).value = value
    assert explorer.status.value.startswith("ready")
    after = shown_by(explorer)
    assert after != before and (after[1] != before[1] or control == "attacked_gate")


def test_what_goes_wrong_is_said_and_the_view_stays(explorer, monkeypatch):
    before = explorer.view.value
    upload(explorer, b"no image", "letter.txt")
    assert "letter.txt cannot be read as an image" in explorer.status.value
    monkeypatch.setattr(widgets, "explorer_page", lambda *_: 1 / 0)
    explorer.thumbnails[2].click()
    assert "ZeroDivisionError" in explorer.status.value
    assert explorer.view.value == before


def test_B7_the_limit_of_an_upload_is_said_beside_its_button(explorer):
    """tornado's own, and what a message has beside the file; the browser tests meet it."""
    from tornado.websocket import _default_max_message_size

    (line,) = [box for box in explorer.children if explorer.upload in getattr(box, "children", ())]
    words = " ".join(one.value for one in line.children if hasattr(one, "value") and one.value)
    limit = int(re.search(r"at most (\d+) MB", words)[1]) * 1_000_000
    assert 0.9 * _default_max_message_size < limit < _default_max_message_size - 100_000


def test_what_was_looked_at_own_images_too_is_taken_home_as_one_page(explorer):
    first, second = (one.title for one in explorer.exploration.gallery[:2])
    explorer.thumbnails[1].click()
    assert shown_by(explorer)[1]["subjects"][0]["title"] == second
    assert ["shown" in thumbnail._dom_classes for thumbnail in explorer.thumbnails[:3]] == [False, True, False]
    upload(explorer, encoded(Image.new("RGB", (50, 40), "teal")), f"{HOSTILE}.png")
    (shown,) = shown_by(explorer)[1]["subjects"]
    assert shown["title"].startswith(f"{html.escape(HOSTILE)}.png: 50x40 pixels, RGB, made to fit")
    assert shown["models"][0]["asked"] == np.mean(shown["models"][0]["experts"][0], axis=0).argmax()
    explorer.save.click()
    path = explorer.exploration.settings.runs / "explorer" / "session.html"
    assert explorer.status.value.startswith("ready") and str(path) in explorer.status.value
    page = path.read_text()
    titles = [html.unescape(one["title"]) for one in content_of(page)["subjects"]]
    assert titles == [first, second, html.unescape(shown["title"])]
    assert HOSTILE not in page and not re.search(r"(src|href)=[\"']?http", page)


NOISE = np.random.RandomState(0).randint(0, 256, (48, 64, 4), np.uint8)


@pytest.mark.parametrize(
    ("picture", "note"),
    [(NOISE[:32, :32, :3], ""), (NOISE[..., :3], "64x48 pixels, RGB"), (NOISE[:32, :32], "32x32 pixels, RGBA"),
     (NOISE[:5, :5, 0], "5x5 pixels, L")],
)  # fmt: skip
def test_a_fitting_image_is_taken_as_it_is_and_any_other_is_made_to_fit_with_a_note(picture, note):
    own = own_subject(encoded(Image.fromarray(picture)), "mine")
    assert own.title.startswith(f"mine: {note}, made to fit") if note else own.title == "mine"
    assert own.image.shape == (3, 32, 32) and 0 <= own.image.min() and own.image.max() <= 1 and own.label is None
    assert note or np.array_equal((own.image * 255).round().permute(1, 2, 0), picture)
