"""Settings refuse what they do not know, by name, before anything is computed."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from study.catalogue import ModelName, trained_models
from study.settings import ROOT, load_preset, notebook_settings, preset_names


def test_every_preset_loads_under_its_own_name():
    assert {"smoke", "demo", "cifar10-small"} <= set(preset_names())
    for name in preset_names():
        settings = load_preset(name)
        assert settings.preset == name
        assert trained_models(settings)


def test_eps_can_be_a_fraction_or_a_decimal(make_settings):
    assert make_settings(eps="8/255", step_size="1/510").recipe.eps == Fraction(8, 255)
    assert make_settings(eps=0.5).recipe.eps == Fraction(1, 2)
    assert make_settings(eps=0.031).recipe.eps == Fraction(31, 1000)  # as it was written


def test_unknown_field_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'epohcs'; valid names: .*epochs, eps"):
        load_preset("smoke", epohcs=3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("eps", "9/8", "eps is 9/8; it must be at most 1"),
        ("eps", 8, "eps is 8; it must be at most 1"),
        ("eps", "0", "eps is 0; it must be above 0"),
        ("eps", "8/0", "eps = '8/0': "),
        ("eps", "eight", "eps = 'eight': "),
        ("epochs", -1, "epochs is -1; it must be at least 1"),
        ("epochs", 2.5, "epochs = 2.5: .*integer"),
        ("epochs", "many", "epochs = 'many': .*integer"),
        ("epochs", None, "epochs = None: .*integer"),
        ("experts", 0, "experts is 0"),
        ("experts", 1, "experts is 1; a mixture has at least 2"),
        ("width", 0, "width is 0.*must be above 0"),
        ("width", 5, "width is 5.*must be at most 4"),
        ("beta", -0.1, "beta is -0.1; it must be at least 0"),
        ("beta", math.nan, "beta = nan: .*finite"),
        ("learning_rate", math.inf, "learning_rate = inf: .*finite"),
        ("momentum", 1, "momentum is 1.*must be below 1"),
        ("batch_size", 1, "batch_size is 1; it must be at least 2"),
        ("train_images", 1, "train_images is 1; it must be at least 2"),
        ("dataset", "mnist", "dataset = 'mnist': .*'parts10', 'cifar10', 'cifar100' or 'images'"),
        ("dataset", "images", "data set images, but data_folder is empty; name the folder"),
        ("further_datasets", ["images"], "data set images, but data_folder is empty"),
        ("expert", "vgg", "expert is 'vgg'; valid names: resnet18"),
        ("compared_experts", ["vgg"], r"compared_experts.0 = 'vgg': .*'resnet18'"),
        ("compared_experts", [], r"compared_experts = \[\]: .*at least 1"),
        ("attacks", ["deepfool"], "attacks.0 = 'deepfool': .*'fgsm'"),
        ("attacks", [], r"attacks = \[\]: .*at least 1"),
        ("attack_gates", ["random"], "attack_gates.0 = 'random': .*'switch'"),
        ("seeds", [1, 1], r"seeds repeat: \[1, 1\]"),
        ("baselines", ["pdarts", "pdarts"], r"baselines repeat: .*give each once"),
        ("further_datasets", ["parts10"], r"datasets repeat: \['parts10', 'parts10'\]"),
        ("baselines", ["resnet18"], "baselines.0 = 'resnet18': .*'pdarts'"),
        ("baseline_layers", 2, "baseline_layers = 2: .*greater than or equal to 3"),
        ("regimes", ["free"], "regimes.0 = 'free': .*'trades'"),
        ("seeds", [-1], "seeds.0 = -1: .*greater than or equal to 0"),
        ("seeds", [2**64], "seeds.0 = 18446744073709551616: .*less than"),
        ("attacked_images", 1000, "attacked_images is 1000, but test_images only 128"),
        ("data_folder", 5, "data_folder = 5: .*string"),
        ("output_folder", "s3://bucket/out", "is an address; name a folder of this machine"),
    ],
)
def test_D16_bad_value_is_named_with_what_would_be_right(field, value, message):
    with pytest.raises(ValueError, match=message):
        load_preset("smoke", **{field: value})


def test_C6_an_address_in_a_preset_is_refused_too(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("compared_experts: [resnet18]\noutput_folder: gs://bucket\n")
    with pytest.raises(ValueError, match="output_folder = 'gs://bucket' is an address"):
        load_preset(str(path))


@pytest.mark.parametrize("where", ["preset", "change"])
def test_C5_the_home_folder_is_found(tmp_path, where):
    path = tmp_path / "mine.yaml"
    path.write_text("compared_experts: [resnet18]\n" + "data_folder: ~/x\n" * (where == "preset"))
    changes = {"data_folder": "~/x"} if where == "change" else {}
    assert load_preset(str(path), **changes).data_folder == str(Path.home() / "x")


def test_a_preset_finds_its_folder_from_where_it_lies(tmp_path):
    path = tmp_path / "mine.yaml"
    content = {"dataset": "images", "data_folder": "flowers", "compared_experts": ["resnet18"]}
    path.write_text(yaml.safe_dump(content))
    for unsaid in ({}, {"data_folder": ""}):
        assert load_preset(str(path), **unsaid).data_folder == str(tmp_path / "flowers")
    settings = load_preset(str(path), data_folder="elsewhere")
    assert settings.data_folder == "elsewhere"
    assert all(ModelName.parse(str(name)) == name for name in trained_models(settings))


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match="(?s)epochs is -1.*unknown parameter .bta."):
        load_preset("smoke", epochs=-1, bta=1)


def test_unknown_preset_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'large'; valid names: .*demo.*smoke.*, or the path"):
        load_preset("large")


def test_preset_can_be_a_file_of_one_s_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"dataset": "parts10", "compared_experts": ["resnet18"]}))
    assert load_preset(str(path)).preset == "mine"
    assert load_preset(str(path), epochs=7).recipe.epochs == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epochs: [", "mine.yaml is not YAML"),
        ("- epochs", "mine.yaml must hold fields like"),
        ("", "mine.yaml must hold fields like"),
        ("epochs: 3", "compared_experts is missing: the networks"),
    ],
)
def test_damaged_preset_is_named(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_preset(str(tmp_path / "mine.yaml"))


def test_settings_cannot_be_changed_afterwards(make_settings):
    with pytest.raises(ValueError, match="frozen"):
        make_settings().steps = 3


def test_results_lie_under_the_preset_s_name(make_settings, tmp_path):
    settings = make_settings(output_folder=str(tmp_path))
    assert settings.runs == tmp_path / "runs" / "tiny"
    assert settings.figures == tmp_path / "figures" / "tiny"
    assert make_settings().runs == ROOT / "runs" / "tiny"


OWN = '# Parameters: papermill sets them\npreset = "smoke"\nmodel = ""\n'


def notebook(*cells):
    """What `globals()` holds in a notebook whose cells have run, beside names of other origin."""
    namespace = {
        "__name__": "__main__",
        "math": math,
        "pi": math.pi,
        "exit": exit,
        "In": ["", *cells],
    }
    for cell in cells:
        exec(cell, namespace)
    return namespace


def test_notebook_s_parameters_go_on_top_of_its_preset():
    assert notebook_settings(notebook(OWN)) == load_preset("smoke")
    injected = "# Parameters\nepochs = 9\n"
    assert notebook_settings(notebook(OWN, injected)) == load_preset("smoke", epochs=9)
    assert notebook_settings({"epochs": 9}) == load_preset("demo")


def test_notebook_s_unknown_parameter_is_refused():
    """papermill passes it on with no more than a warning."""
    with pytest.raises(ValueError, match="unknown parameter 'epohcs'"):
        notebook_settings(notebook(OWN, "# Parameters\nepohcs = 9\n"))
    with pytest.raises(ValueError, match="unknown parameter 'epohcs'"):
        notebook_settings(notebook(OWN + "epohcs: int = 9\n"))


def test_B1_B2_only_cells_of_parameters_count():
    """Not what start-up files bring, nor what the notebook has computed before it runs again."""
    started = "from math import pi as tau\n"
    again = notebook(started, OWN, "width = 3\nsettings = None\nepochs = 'many'\n", OWN)
    assert notebook_settings(again) == load_preset("smoke")
    changed = notebook(OWN, "x = 1\n", OWN.replace("smoke", "demo"))
    assert notebook_settings(changed) == load_preset("demo")
    forgotten = notebook(OWN, "# Parameters\nepochs = 9\n", OWN)  # the cell runs again by hand
    assert notebook_settings(forgotten) == load_preset("smoke")
