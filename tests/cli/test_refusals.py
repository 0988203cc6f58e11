"""What can be known from the command line is refused before a network is built."""

import pytest

from bitscape.policy import LayerBits, uniform_policy

BUILT = """
def network():
    raise AssertionError("the network was built")
"""
DIGITS = ("--data", "digits")
W4 = ("--budget", "weight_bytes=w4")
REFUSED = {
    "budget": (("search", *DIGITS, "--budget", "bitops=much"), "bitops='much'"),
    "kind of cost": (("search", *DIGITS, "--budget", "bitop=w4a4"), "'bitop' is unknown"),
    "cap without its table": (("search", *DIGITS, "--budget", "latency_ms=2"), "no latency table"),
    "method": (("search", *DIGITS, *W4, "--method", "unifrom"), "uniform"),
    "setting": (("search", *DIGITS, *W4, "--set", "imags=3"), "images"),
    "candidates": (("search", *DIGITS, *W4, "--candidates", "2,x"), "--candidates '2,x'"),
    "candidates of the target": (("search", *DIGITS, *W4, "--candidates", "5", "--target", "cpu-int8"), "5/5"),
    "pin": (("search", *DIGITS, *W4, "--pin", "head"), "--pin 'head'"),
    "device": (("search", *DIGITS, *W4, "--device", "abacus"), "--device 'abacus'"),
    "source": (("search", "--data", "nowhere.npz", "--normalize", "unit", *W4), "nowhere.npz"),
    "kind of source": (("search", "--data", "net.py", "--normalize", "unit", *W4), "suffix '.py'"),
    "normalization": (("search", *DIGITS, *W4, "--normalize", "unti"), "unit"),
    "drop": (("search", *DIGITS, "--budget", "drop=-1"), "drop='-1'"),
    "drop without scores": (("search", *DIGITS, "--budget", "drop=1", "--method", "uniform"), "has no scores"),
    "folder": (("search", *DIGITS, *W4, "--folder", "run"), "does not train"),
    "scores": (("search", *DIGITS, *W4, "--method", "uniform", "--scores", "s.json"), "has no scores"),
    "output": (("search", *DIGITS, *W4, "--out", "nowhere/policy.json"), "no folder 'nowhere'"),
    "compress, budget": (("compress", *DIGITS, "--budget", "bitops=much", "--to", "p.json"), "bitops='much'"),
    "compress, test": (("compress", *DIGITS, *W4, "--test", "nowhere.npz", "--normalize", "unit", "--to", "p.json"), "nowhere.npz"),
    "compress, target": (("compress", *DIGITS, *W4, "--candidates", "5", "--target", "cpu-int8", "--to", "p.json"), "5/5"),
    "evaluate, decisions": (("evaluate", *DIGITS, "--decisions", "per-image"), "--decisions per-image"),
    "evaluate, checkpoint": (("evaluate", *DIGITS, "--checkpoint", "."), "no model.safetensors"),
    "evaluate, packed": (("evaluate", *DIGITS, "--packed", "net.py"), "net.py"),
    "train, step": (("train", *DIGITS, "--step", "smooth", "--out", "run"), "--step 'smooth'"),
    "train, label smoothing": (("train", *DIGITS, "--label-smoothing", "1", "--out", "run"), "--label-smoothing"),
    "train, distill": (("train", *DIGITS, "--weights", "net.py", "--distill", "2", "--out", "run"), "--distill"),
    "train, ema": (("train", *DIGITS, "--ema", "1", "--out", "run"), "--ema"),
    "train, budget": (
        ("train", *DIGITS, "--policy", "policy.json", "--dynamic", "2-8", "--budget", "weight_bytes=w4", "--out", "run"),
        "held to BitOps alone",
    ),
    "tiers": (("tiers", *DIGITS, "--checkpoint", ".", "--out", "tiers"), "no model.safetensors"),
    "export, calibration": (("export", "qonnx", "--checkpoint", ".", "--out", "x.onnx"), "--calibration is missing"),
    "export, packed": (("export", "qonnx", "--packed", "net.py", "--out", "x.onnx"), "--packed needs --calibration"),
    "export, checkpoint": (("export", "packed", "--checkpoint", ".", "--out", "x.safetensors"), "no model.safetensors"),
    "policy": (("policy", "show", "policy.json"), "--input-shape is missing"),
}


@pytest.mark.parametrize(("args", "said"), REFUSED.values(), ids=REFUSED)
def test_is_refused_before_the_network_is_built(args, said, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(BUILT)
    uniform_policy(["conv1"], LayerBits(4, 8)).save(tmp_path / "policy.json")
    assert said in refused(*args, "--model", "net.py:network")


def test_a_front_along_an_unknown_cost_is_refused_before_the_network_is_built(refused, trained, tmp_path):
    (tmp_path / "net.py").write_text(BUILT)
    solve = ("solve", "--scores", trained / "scores.json", "--model", f"{tmp_path}/net.py:network", "--input-shape", "1x8x8", "--front", 3)
    assert "'bitop' is unknown" in refused(*solve, "--along", "bitop")
    assert "no latency table" in refused(*solve, "--along", "latency_ms")
