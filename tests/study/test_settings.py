"""Settings refuse what they do not know, by name, before anything is computed."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from study.settings import ROOT, load_preset, notebook_settings


def test_eps_can_be_a_fraction_or_a_decimal(make_settings):
    assert make_settings(eps="8/255", step_size="1/510").recipe.eps == Fraction(8, 255)
    assert make_settings(eps=0.5).recipe.eps == Fraction(1, 2)
    assert make_settings(eps=0.031).recipe.eps == Fraction(31, 1000)  # as it was written


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("eps", "9/8", "eps is 9/8; it must be at most 1"), ("eps", "8/0", "eps = '8/0': "),
     ("epochs", 2.5, "epochs = 2.5: .*integer"), ("experts", 1, "experts is 1; a mixture has at least 2"),
     ("beta", math.nan, "beta = nan: .*finite"),
     ("dataset", "mnist", "dataset = 'mnist': .*'parts10', 'cifar10', 'cifar100' or 'images'"),
     ("dataset", "images", "data set images, but data_folder is empty; name the folder"),
     ("expert", "vgg", "expert = 'vgg': Input should be 'resnet18'"),
     ("attacks", ["deepfool"], "attacks.0 = 'deepfool': .*'fgsm'"), ("seeds", [1, 1], r"seeds repeat: \[1, 1\]"),
     ("further_datasets", ["parts10"], r"datasets repeat: \['parts10', 'parts10'\]"),
     ("attacked_images", 1000, "attacked_images is 1000, but test_images only 128"),
     ("auto_attack_images", 99, "auto_attack_images is 99, but adaptive_images only "),
     ("output_folder", "s3://bucket/out", "is an address; name a folder of this machine"),
     ("epohcs", 3, "unknown parameter 'epohcs'; valid names: .*epochs, eps")],
)  # fmt: skip
def test_D16_bad_value_is_named_with_what_would_be_right(field, value, message):
    with pytest.raises(ValueError, match=message):
        load_preset("smoke", **{field: value})


def test_all_problems_are_named_at_once_and_an_unknown_preset_lists_the_valid_ones():
    with pytest.raises(ValueError, match="(?s)width is 0.*epochs is -1.*unknown parameter .bta."):
        load_preset("smoke", epochs=-1, width=0, bta=1)
    with pytest.raises(ValueError, match="(?s)seeds repeat.*experts is 1.*attacked_images is 1000"):
        load_preset("smoke", seeds=[1, 1], experts=1, attacked_images=1000)
    with pytest.raises(ValueError, match="'large'; valid names: .*demo.*smoke.*, or the path"):
        load_preset("large")


@pytest.fixture
def mine(tmp_path):
    """Writes a preset of one's own, of fields or of any text; gives its path."""

    def write(content="", **fields):
        path = tmp_path / "mine.yaml"
        path.write_text(content or yaml.safe_dump({"compared_experts": ["resnet18"]} | fields))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("content", "message"),
    [("epochs: [", "mine.yaml is not YAML"), ("- epochs", "mine.yaml must hold fields like"),
     ("# nothing", "mine.yaml must hold fields like"), ("epochs: 3", "compared_experts is missing: the networks"),
     ("output_folder: gs://bucket", "output_folder = 'gs://bucket' is an address"),
     ("epochs: 3\nseeds: [0]\nepochs: 4", "mine.yaml is not YAML: epochs given twice; give each once")],
)  # fmt: skip
def test_C6_a_preset_that_cannot_be_used_is_named(mine, content, message):
    with pytest.raises(ValueError, match=message):
        load_preset(mine(content))


def test_C5_a_preset_of_one_s_own_finds_its_folder_from_where_it_lies_and_from_home(mine, tmp_path):
    home = str(Path.home() / "x")
    assert load_preset(mine(data_folder="~/x")).data_folder == home
    assert load_preset(mine(), data_folder="~/x").data_folder == home
    path = mine(dataset="images", data_folder="flowers")
    for unsaid in ({}, {"data_folder": ""}):
        assert load_preset(path, **unsaid).data_folder == str(tmp_path / "flowers")
    settings = load_preset(path, data_folder="elsewhere", epochs=7)
    given = "mine", str(Path("elsewhere").absolute()), 7
    assert (settings.preset, settings.data_folder, settings.recipe.epochs) == given


OWN = '# Parameters: papermill sets them\npreset = "smoke"\nmodel = ""\n'
INJECTED = "# Parameters\nepochs = 9\n"


def settings_of(*cells, failed=""):
    """What a notebook gets from its `globals()` once its cells have run, beside names of other origin. failed: a cell
    before them that set nothing."""
    namespace = {"__name__": "__main__", "math": math, "pi": math.pi, "exit": exit, "In": ["", failed, *cells]}
    for cell in cells:
        exec(cell, namespace)
    return notebook_settings(namespace)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([OWN], load_preset("smoke")),
        ([OWN, INJECTED], load_preset("smoke", epochs=9)),
        # Not what start-up files bring, nor what the notebook has computed before it runs again
        (["from math import pi as tau\n", OWN, "width = 3\nsettings = None\nepochs = 'many'\n", OWN],
         load_preset("smoke")),
        ([OWN, "x = 1\n", OWN.replace("smoke", "demo")], load_preset("demo")),
        # By hand, the notebook's own cell begins anew
        ([OWN, INJECTED, OWN], load_preset("smoke")),
    ],
)  # fmt: skip
def test_B1_B2_only_cells_of_parameters_count_on_top_of_the_preset(cells, expected):
    assert settings_of(*cells) == expected


def test_B1_neighbours_a_changed_first_line_is_not_passed_over():
    with pytest.raises(ValueError, match="no cell of parameters has run: its first line is '# Parameters'"):
        settings_of("# my run\n" + OWN)


def test_a_cell_of_parameters_that_failed_is_passed_over_once_mended_and_to_be_run_again_before():
    assert settings_of(OWN, failed=OWN.replace('""', '"')) == load_preset("smoke")
    with pytest.raises(ValueError, match="has not set width: run it again to its end"):
        settings_of(INJECTED, failed="# Parameters: mine\nwidth = one / 4\n")


@pytest.mark.parametrize("cells", [[OWN, "# Parameters\nepohcs = 9\n"], [OWN + "epohcs: int = 9\n"]])
def test_notebook_s_unknown_parameter_is_refused(cells):
    """papermill passes it on with no more than a warning."""
    with pytest.raises(ValueError, match="unknown parameter 'epohcs'"):
        settings_of(*cells)


def test_a_copy_of_a_preset_does_not_write_over_the_projects_results(tmp_path):
    copied = tmp_path / "mine.yaml"
    content = (ROOT / "presets/demo.yaml").read_text()
    copied.write_text(content)
    with pytest.raises(ValueError, match="says preset: demo.*; give it a name of its own, or an output_folder"):
        load_preset(str(copied))
    assert load_preset(str(copied), output_folder=str(tmp_path)).preset == "demo"
    copied.write_text(content.replace("preset: demo", "preset: mine"))
    assert load_preset(str(copied)).figures == ROOT / "figures/mine"


def test_a_model_is_asked_only_of_a_notebook_that_has_one():
    with pytest.raises(ValueError, match="model is 'nonsense', but this notebook is of all models; leave it out"):
        settings_of(OWN.replace('model = ""\n', ""), "# Parameters\nmodel = 'nonsense'\n")
    assert settings_of(OWN, "# Parameters\nmodel = 'one'\n").model == "one"


def test_what_is_to_be_a_list_is_told_with_papermill_s_way_to_give_one():
    with pytest.raises(ValueError, match=r"seeds = '\[0, 1\]': .*list.* -y 'seeds: \[\.\.\.\]'"):
        load_preset("smoke", seeds="[0, 1]")
