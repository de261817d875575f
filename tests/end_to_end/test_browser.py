"""Notebooks, the explorer, its page and the site, as a reader meets them: in a real browser."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO

import psutil
import pytest
from build_site import build_site
from graph import free_ports, wait_for
from PIL import Image

from study.explorer.exploration import PRESET_BUDGET, Exploration
from study.explorer.page import explorer_page
from study.settings import ROOT, load_preset
from study.store import load_data, provenance, write_json

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="needs a browser on the PATH: install chromium (Debian: apt-get install chromium)"
    ),
]
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip
TOKEN = "for-this-test-alone"
PATIENCE = 600  # seconds: the machine may have much else to do
FEW = {"test_images": 60, "attacked_images": 30, "adaptive_images": 30}  # the weights serve all
COLOUR = "element => getComputedStyle(element).color"
IDLE = "text=Python 3 (ipykernel) | Idle"
FRAME = 'iframe[title="heat maps under attack"]'


@contextmanager
def server(command, port, state):
    """A server of notebooks, with nothing of the user's own configuration; yields its process."""
    kinds = ("JUPYTERLAB_SETTINGS", "JUPYTER_CONFIG", "JUPYTER_DATA", "JUPYTER_RUNTIME")
    environment = os.environ | {f"{kind}_DIR": str(state / kind) for kind in kinds}
    with open(state / "server.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=state)
        try:
            # No page is asked for: that would cost Voila one of its kernels
            wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, PATIENCE)
            yield process
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def jupyterlab(folder, state):
    """JupyterLab on a folder; yields its address."""
    quiet = state / "JUPYTERLAB_SETTINGS/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    write_json(quiet, {"fetchNews": "false", "checkForUpdates": False})
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "jupyterlab", str(folder), "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}"]
    with server(command, port, state):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def browser_page(width=1300, **options):
    """A page of a fresh browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": width, "height": 1000}, **options)
        page.set_default_timeout(1000 * PATIENCE)
        yield page
        browser.close()


def wait_for_the_end(page, notebook):
    """Save the notebook until every cell has been run, or one has failed; its code cells."""
    deadline, cells = time.monotonic() + 2 * PATIENCE, []
    while True:  # the kernel is idle between two cells as well, so the saved notebook is asked
        page.keyboard.press("Control+s")
        page.wait_for_timeout(2000)
        with suppress(json.JSONDecodeError):  # while it is being saved
            cells = [one for one in json.loads(notebook.read_text())["cells"] if "outputs" in one]
        done = cells and (all(one["execution_count"] for one in cells) or any(map(errors, cells)))
        if time.monotonic() > deadline or (done and page.is_visible(IDLE)):
            return cells


def errors(cell):
    return [output for output in cell["outputs"] if output["output_type"] == "error"]


def written(folder, name, **parameters):
    """A notebook of the project in a folder, with some of its parameters changed."""
    folder.mkdir()
    content = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    cell = next(c for c in content["cells"] if "parameters" in c["metadata"].get("tags", []))
    cell["source"] = [*cell["source"], *(f"\n{parameter} = {value!r}" for parameter, value in parameters.items())]
    notebook = folder / f"{name}.ipynb"
    notebook.write_text(json.dumps(content))
    return notebook


@pytest.fixture
def state(tmp_path):
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


def shown(page, view=FRAME):
    """What a page of the explorer says, and its pictures."""
    from playwright.sync_api import Error

    frame = page.frame_locator(view) if view else page
    while True:
        frame.locator("text=under this gate").first.wait_for()
        try:
            pictures = frame.locator("canvas").evaluate_all("all => all.map(one => one.toDataURL())")
            return frame.locator("#view").inner_text(), pictures
        except Error as error:
            if "detached" not in str(error):
                raise
            page.wait_for_timeout(200)  # a new page takes its place


def changed_by(page, act, *what, view=FRAME):
    """Do something and wait until its words, its pictures, or both, are others."""
    before = after = shown(page, view)
    deadline, again = time.monotonic() + PATIENCE, 0.0
    while any(after[part] == before[part] for part in what):
        assert time.monotonic() < deadline, "nothing has changed"
        if time.monotonic() > again:  # a click on what moves just then is lost
            act()
            again = time.monotonic() + PATIENCE / 4
        page.wait_for_timeout(200)
        after = shown(page, view)
    return before, after


WORDS, PICTURES = 0, 1


def choose(page, name, option):
    """In the drop-down of that name."""
    chooser = page.locator(".widget-dropdown", has=page.locator(f"label:text-is('{name}')"))
    chooser.locator("select").select_option(option)


def give(page, name, content):
    """Upload a file."""
    with page.expect_file_chooser() as chooser:
        page.click("text=own image")
    chooser.value.set_files({"name": name, "mimeType": "", "buffer": content})


def wait_for_the_explorer(page):
    page.frame_locator(FRAME).locator("text=under this gate").first.wait_for()
    page.wait_for_selector("text=/^ready/")
    page.locator(".explorer-gallery").scroll_into_view_if_needed()


def use_the_explorer(page):
    """Everything that moves, and what it has to move."""
    frame = page.frame_locator(FRAME)
    wait_for_the_explorer(page)
    changed_by(page, lambda: page.click(".explorer-image-25"), WORDS, PICTURES)
    changed_by(page, lambda: frame.locator("#step").press("End"), WORDS, PICTURES)
    changed_by(page, lambda: frame.locator("#state").press("End"), WORDS)
    changed_by(page, lambda: frame.locator("#expert").press("ArrowRight"), WORDS)
    changed_by(page, lambda: frame.locator("#overlay").check(), PICTURES)
    changed_by(page, lambda: frame.locator("#parts").check(), PICTURES)
    slider = page.locator(".widget-hslider .noUi-handle")
    changed_by(page, lambda: slider.press("ArrowRight"), WORDS, PICTURES)
    for control, value in (("step", "20"), ("state", "120"), ("expert", "2")):
        assert frame.locator(f"#{control}").input_value() == value, "the new page stands there too"
    changed_by(page, lambda: choose(page, "CAM method", "Layer-CAM"), PICTURES)
    changed_by(page, lambda: choose(page, "compared with", "none"), WORDS)
    frame.locator("#step").press("Home")
    frame.locator("#play").click()
    frame.locator("#step-said", has_text="20").wait_for()
    give(page, "letter.txt", b"no image")
    page.wait_for_selector("text=letter.txt cannot be read as an image")
    # B7: the largest file that is promised to fit through the connection; what is behind a PNG's end is passed over
    Image.effect_noise((300, 200), 60).save(content := BytesIO(), "PNG")
    give(page, "largest.png", content.getvalue().ljust(10_000_000, b"\0"))
    frame.locator("h2", has_text="largest.png: 300x200 pixels, L, made").wait_for()
    page.click("button:has-text('take the session home')")
    page.wait_for_selector("text=/saved .*session.html/")


def photograph(what, path, width, of):
    """A picture for the README, with how it was taken."""
    what.screenshot(path=path)
    taken = {"kind": "screenshot", "of": of, "width": width, "provenance": provenance()}
    write_json(path.with_suffix(".json"), taken)


def show_in_theme(page, theme, width):
    """As JupyterLab's own menu does it; the height has room for the whole explorer."""
    page.set_viewport_size({"width": 1300, "height": 2400})
    page.click('.lm-MenuBar-itemLabel:text-is("Settings")')
    page.click('.lm-Menu-item[data-type="submenu"]:has-text("Theme")')
    page.click(f'.lm-Menu-itemLabel:text-is("JupyterLab {theme}")')
    page.wait_for_selector(f'body[data-jp-theme-name="JupyterLab {theme}"]', state="attached")
    page.set_viewport_size({"width": width, "height": 2400})


def test_the_explorer_moves_in_jupyterlab(tmp_path, state, pytestconfig):
    """From opening the notebook to moved maps, nothing trained: the weights come with it. In either theme."""
    pictures = pytestconfig.getoption("screenshots") or tmp_path
    folder = tmp_path / "notebooks"
    notebook = written(folder, "05_heatmaps", output_folder=str(tmp_path), **FEW)
    with jupyterlab(folder, state) as address, browser_page() as page:
        started = time.monotonic()
        page.goto(f"{address}/lab/tree/{notebook.name}?token={TOKEN}")
        page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell")
        page.wait_for_selector(IDLE)  # the notebook's own indicator says so before the kernel is connected
        page.click("text=Run")
        page.click('.lm-Menu-item[data-command="runmenu:run-all"]')
        page.wait_for_selector(".jp-OutputArea img")
        print(f"first picture after {time.monotonic() - started:.1f} s")
        page.wait_for_selector(FRAME, state="attached")
        print(f"explorer after {time.monotonic() - started:.1f} s")
        assert not any(map(errors, wait_for_the_end(page, notebook)))
        use_the_explorer(page)
        frame = page.frame_locator(FRAME)
        page.keyboard.press("Control+b")  # fold the side bar
        choose(page, "CAM method", "Grad-CAM, eq (3)")
        changed_by(page, lambda: choose(page, "compared with", "MoE, standard training"), WORDS)
        frame.locator("#overlay").uncheck()
        page.locator(".widget-hslider .noUi-handle").press("ArrowLeft")
        colours = []
        for theme, width in (("Dark", 800), ("Light", 1300)):
            show_in_theme(page, theme, width)
            for number in (25, 8):
                page.wait_for_selector("text=/^ready/")
                page.wait_for_timeout(2000)  # the page that is ready takes its place
                changed_by(page, partial(page.click, f".explorer-image-{number}"), WORDS, PICTURES)
            colours.append(page.locator(FRAME).evaluate(COLOUR))
            assert frame.locator("body").evaluate(COLOUR) == colours[-1], "words are in the theme's colour"
            page.wait_for_timeout(5000)
            explorer = page.locator(".widget-vbox", has=page.locator(".explorer-gallery")).first
            photograph(explorer, pictures / f"explorer-{theme.lower()}.png", width, "05_heatmaps")
        assert len(set(colours)) == 2
        print(f"explorer used after {time.monotonic() - started:.1f} s")


def kernels(process):
    """Those that a server has started and not ended."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # one that is just ending
            found += [child] * ("ipykernel" in " ".join(child.cmdline()))
    return found


def test_B8_the_explorer_moves_on_voila_s_page_and_its_kernels_end(tmp_path, state):
    """As `make explorer` serves it, but that kernels end sooner after their page is closed."""
    notebook = written(tmp_path / "notebooks", "05_heatmaps", output_folder=str(tmp_path), **FEW)
    (port,) = free_ports(1)
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    recipe = re.search(r"voila notebooks/05_heatmaps.ipynb (.*)", makefile)
    options, changed = re.subn(r"(cull_(?:idle_timeout|interval)=\d+)0", r"\1", recipe[1])
    assert changed == 2, "a tenth of its ten minutes, looked at every six seconds"
    command = [sys.executable, "-m", "voila", str(notebook), *shlex.split(options), "--no-browser"]
    with server([*command, f"--port={port}"], port, state) as process:
        with browser_page() as page:
            page.goto(f"http://127.0.0.1:{port}")
            wait_for_the_explorer(page)
            changed_by(page, lambda: page.click(".explorer-image-25"), WORDS, PICTURES)
            page.wait_for_timeout(75_000)
            assert len(kernels(process)) == 1, "that of an open page stays"
        wait_for(lambda: not kernels(process), PATIENCE)


def test_the_page_says_what_was_computed(tmp_path):
    """Its script and Python agree on every answer, in several states of the gate."""
    settings = load_preset("demo")
    exploration = Exploration(settings, load_data(settings))
    name, subject = exploration.models[0], exploration.gallery[8]
    answers = exploration.answers(name, subject, "uniform")
    (tmp_path / "page.html").write_text(explorer_page(exploration, [name], [subject], "uniform", PRESET_BUDGET))
    with browser_page() as page:
        page.goto((tmp_path / "page.html").as_uri())
        for step, state in ((0, 0), (7, 30), (20, 119)):
            page.locator("#step").fill(str(step))
            page.locator("#state").fill(str(state + 1))
            page.wait_for_timeout(1000)
            mixtures = answers.mixtures[PRESET_BUDGET, step]
            answered, (words, _) = mixtures.argmax(-1), shown(page, None)
            class_name = exploration.dataset.class_names[answered[state]]
            sign = "\u2713" if answered[state] == subject.label else "\u2717"
            share = int(re.search(rf": {class_name} (\d+)% {sign} under this gate", words)[1])
            assert abs(share - 100 * mixtures[state].max()) < 0.6
            assert f"{int((answered == subject.label).sum())} of 120 gates answer" in words


STEPPER = 'iframe[title="Heat maps under attack, step by step"]'


def test_the_site_works_on_a_phone_from_a_file_without_a_network(tmp_path, pytestconfig):
    """With what the demo made. Keys walk the stepper from step to step and from image to image."""
    settings = load_preset("demo", output_folder=str(tmp_path))
    shutil.copytree(ROOT / "figures" / "demo", settings.figures)
    index, problems = build_site(settings), []
    pictures = pytestconfig.getoption("screenshots") or tmp_path
    with browser_page(color_scheme="light") as page:
        page.goto(index.as_uri() + "#explorer")
        frame = page.frame_locator(STEPPER)
        changed_by(page, lambda: frame.locator("#step").press("End"), WORDS, PICTURES, view=STEPPER)
        page.locator("#explorer").evaluate("element => element.scrollIntoView()")
        photograph(page, pictures / "site-light.png", 1300, "site/index.html")
    with browser_page(width=390, color_scheme="dark") as page:
        page.context.set_offline(True)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(request.url))
        page.goto(index.as_uri())
        photograph(page, pictures / "site-dark.png", 390, "site/index.html")
        page.locator(STEPPER).scroll_into_view_if_needed()
        frame = page.frame_locator(STEPPER)
        changed_by(page, lambda: frame.locator("#next").press("ArrowRight"), WORDS, PICTURES, view=STEPPER)
        assert frame.locator("#step-said").inner_text() == "1"
        frame.locator("#step").press("End")
        frame.locator("#next").press("ArrowRight")
        frame.locator("#step-said", has_text=re.compile("^0$")).wait_for()
        assert frame.locator("#subject").input_value() == "1"
        assert page.locator(STEPPER).bounding_box()["height"] > 1500, "as high as what it shows"
        page.goto((index.parent / "demo/stepper.html").as_uri())
        before, after = changed_by(page, lambda: page.press("#state", "End"), WORDS, view=None)
        assert before[PICTURES] == after[PICTURES], "maps are of experts, whatever their weights"
        page.press("#next", "PageDown")
        page.locator("#step-said", has_text="20").wait_for()
        page.goto(index.as_uri())
        page.click("text=Start here: the paper in one page")
        assert page.locator(".equation math").first.bounding_box()["height"] > 10, "an equation is drawn"
        for path in set(index.parent.rglob("*.html")) - {index.parent / "api/index.html"}:  # which leads to another
            page.goto(path.as_uri())
            page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path.name
    assert not problems


def test_without_scripts_the_stepper_says_so_and_shows_a_still_picture():
    with browser_page(width=800, java_script_enabled=False) as page:
        page.goto((ROOT / "figures/demo/stepper.html").as_uri())
        assert "Stepping needs scripts" in page.locator("main").inner_text()
        assert page.locator(".still").bounding_box()["height"] > 300
        assert not page.locator("#step").is_visible()
