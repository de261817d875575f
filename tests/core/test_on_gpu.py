"""What a borrowed GPU is asked (benchmarks/on_gpu.py) begins only where it can end, and says why it does not; its
findings are whole after each of them, and one that fails keeps no other from being made."""

import json
import time

import pytest

from benchmarks import on_gpu


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "part1, part2, part3"), (["part4"], "part4"), (["part1", "--minutes", "0"], "--minutes is 0.0"),
        (["part2", "--width", "nan"], "--width is nan"), (["part2", "--images", "nowhere"], "nowhere"),
        (["part3", "--tiny", "--out", "nowhere"], "moe.safetensors"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, named, capsys):
    with pytest.raises(SystemExit) as ended:
        on_gpu.main(arguments)
    assert ended.value.code == 2 and named in capsys.readouterr().err


@pytest.mark.skipif(on_gpu.PLACE.type == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert on_gpu.main(["part1", "--out", str(tmp_path)]) == 2
    assert "no GPU; --tiny" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_findings_are_kept_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(on_gpu, "STARTED", time.monotonic())
    findings = on_gpu.Findings(tmp_path / "part.json", 1.0, {})

    def known():
        return json.loads((tmp_path / "part.json").read_text())["findings"]

    assert findings.find("fails", lambda: 1 / 0) is None
    assert known()["fails"]["error"] == "ZeroDivisionError: division by zero"
    assert findings.find("lasts", lambda: time.sleep(20), most=1.5) is None
    assert known()["lasts"]["error"] == "not done after 2 s"
    assert findings.find("found", lambda: {"a": 1}) == {"a": 1} and known()["found"]["a"] == 1
    findings.end = time.monotonic()
    assert findings.find("late", lambda: {"a": 1}) is None and "no time" in known()["late"]["error"]
    findings.close()
    assert json.loads((tmp_path / "part.json").read_text())["finished"]


def test_recipes_come_back_from_json_and_differ_in_their_losses_alone():
    moe, immunity = (on_gpu.make_recipe(method, "bfloat16") for method in on_gpu.METHODS)
    assert on_gpu.read_recipe(json.loads(json.dumps(immunity.as_json()))) == immunity
    differ = {name for name in vars(moe) if getattr(moe, name) != getattr(immunity, name)}
    assert differ == {"beta", "gamma"} and moe.precision == "bfloat16"
    assert not on_gpu.torch.backends.cudnn.allow_tf32
