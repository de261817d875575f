"""Settings refuse what they do not know, by name, before anything is computed."""

import math
from fractions import Fraction

import pytest
import yaml

from immunity_lib.recipes import ModelName, trained_models
from immunity_lib.settings import ROOT, Settings, load_preset, notebook_settings, preset_names


def test_every_preset_loads_under_its_own_name():
    assert {"smoke", "demo", "cifar10-small"} <= set(preset_names())
    for name in preset_names():
        settings = load_preset(name)
        assert settings.preset == name
        assert trained_models(settings)


def test_eps_can_be_a_fraction(make_settings):
    assert make_settings(eps="8/255", step_size="1/510").eps == Fraction(8, 255)
    assert make_settings(step_size="1/510").step_size == Fraction(1, 510)
    assert make_settings(eps=0.5).eps == Fraction(1, 2)


def test_unknown_field_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'epohcs'; valid names: .*epochs, batch_size"):
        load_preset("smoke", epohcs=3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("eps", "9/8", "eps = '9/8': .*less than or equal to 1"),
        ("eps", 8, "eps = 8: .*less than or equal to 1"),
        ("eps", "0", "eps = '0': .*greater than 0"),
        ("eps", "8/0", "eps = '8/0': "),
        ("eps", "eight", "eps = 'eight': "),
        ("epochs", -1, "epochs = -1: .*greater than 0"),
        ("epochs", 2.5, "epochs = 2.5: .*integer"),
        ("epochs", "many", "epochs = 'many': .*integer"),
        ("epochs", None, "epochs = None: .*integer"),
        ("experts", 0, "experts = 0: .*greater than or equal to 2"),
        ("width", 0, "width = 0: .*greater than 0"),
        ("beta", -0.1, "beta = -0.1: .*greater than or equal to 0"),
        ("beta", math.nan, "beta = nan: "),
        ("learning_rate", math.inf, "learning_rate = inf: "),
        ("momentum", 1, "momentum = 1: .*less than 1"),
        ("batch_size", 1, "batch_size = 1: .*greater than or equal to 2"),
        ("dataset", "mnist", "dataset = 'mnist': .*'parts10', 'cifar10', 'cifar100' or 'images'"),
        ("dataset", "images", "data set images, but data_folder is empty; name the folder"),
        ("further_datasets", ["images"], "data set images, but data_folder is empty"),
        ("expert", "vgg", "expert = 'vgg': .*'resnet18'"),
        ("compared_experts", ["vgg"], r"compared_experts.0 = 'vgg': .*'resnet18'"),
        ("compared_experts", [], r"compared_experts = \[\]: .*at least 1"),
        ("attacks", ["deepfool"], "attacks.0 = 'deepfool': .*'fgsm'"),
        ("attack_gates", ["random"], "attack_gates.0 = 'random': .*'switch'"),
        ("seeds", [1, 1], r"seeds repeat: \[1, 1\]"),
        ("baselines", ["pdarts", "pdarts"], r"baselines repeat: .*give each once"),
        ("further_datasets", ["parts10"], r"data sets repeat: \['parts10', 'parts10'\]"),
        ("baselines", ["resnet18"], "baselines.0 = 'resnet18': .*'pdarts'"),
        ("baseline_layers", 2, "baseline_layers = 2: .*greater than or equal to 3"),
        ("regimes", ["free"], "regimes.0 = 'free': .*'trades'"),
        ("seeds", [-1], "seeds.0 = -1: .*greater than or equal to 0"),
        ("attacked_images", 1000, "attacked_images is 1000, but test_images only 128"),
        ("train_images", 0, "train_images = 0: .*greater than 0"),
    ],
)
def test_bad_value_is_named_with_what_would_be_right(field, value, message):
    with pytest.raises(ValueError, match=message):
        load_preset("smoke", **{field: value})


def test_own_images_are_named_by_their_folder(make_settings):
    settings = make_settings(dataset="images", data_folder="flowers")
    assert {name.dataset for name in trained_models(settings)} == {"images"}
    assert all(ModelName.parse(str(name)) == name for name in trained_models(settings))


def test_a_preset_finds_its_folder_from_where_it_lies(tmp_path):
    path = tmp_path / "mine.yaml"
    content = {"dataset": "images", "data_folder": "flowers", "compared_experts": ["resnet18"]}
    path.write_text(yaml.safe_dump(content))
    for unsaid in ({}, {"data_folder": ""}):
        assert load_preset(str(path), **unsaid).data_folder == str(tmp_path / "flowers")
    assert load_preset(str(path), data_folder="elsewhere").data_folder == "elsewhere"


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match="(?s)epochs = -1.*unknown parameter 'bta'"):
        load_preset("smoke", epochs=-1, bta=1)


def test_unknown_preset_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'large'; valid names: .*demo.*smoke.*, or the path"):
        load_preset("large")


def test_preset_can_be_a_file_of_one_s_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"dataset": "parts10", "compared_experts": ["resnet18"]}))
    assert load_preset(str(path)).preset == "mine"
    assert load_preset(str(path), epochs=7).epochs == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epochs: [", "mine.yaml is not YAML"),
        ("- epochs", "mine.yaml must hold fields like"),
        ("", "mine.yaml must hold fields like"),
        ("epochs: 3", "dataset.*missing"),
    ],
)
def test_damaged_preset_is_named(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_preset(str(tmp_path / "mine.yaml"))


def test_settings_cannot_be_changed_afterwards(make_settings):
    with pytest.raises(ValueError, match="frozen"):
        make_settings().epochs = 3


def test_results_lie_under_the_preset_s_name(make_settings, tmp_path):
    settings = make_settings(output_folder=str(tmp_path))
    assert settings.runs == tmp_path / "runs" / "tiny"
    assert settings.figures == tmp_path / "figures" / "tiny"
    assert make_settings().runs == ROOT / "runs" / "tiny"


def notebook(**parameters):
    """What `globals()` holds in a notebook whose parameters cell has run."""
    imported = {"__name__": "__main__", "_ih": [], "In": [], "Out": {}, "math": math}
    return imported | {"Settings": Settings, "open": open} | parameters


def test_notebook_s_parameters_go_on_top_of_its_preset():
    settings = notebook_settings(notebook(preset="smoke", epochs=9))
    assert settings == load_preset("smoke", epochs=9)
    assert notebook_settings(notebook()) == load_preset("demo")


def test_notebook_s_unknown_parameter_is_refused():
    """papermill passes it on with no more than a warning."""
    with pytest.raises(ValueError, match="unknown parameter 'epohcs'"):
        notebook_settings(notebook(preset="smoke", epohcs=9))


def test_notebook_s_cell_can_be_run_again():
    namespace = notebook(preset="smoke", epochs=9)
    namespace["settings"] = notebook_settings(namespace)
    namespace |= {"model_names": ["a"], "epochs": 10}
    assert notebook_settings(namespace) == load_preset("smoke", epochs=10)
