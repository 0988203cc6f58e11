import pytest

from bitscape.policy import Policy
from tests.cli.run import MODEL

pytestmark = pytest.mark.slow

COMPRESS = ("compress", *MODEL, "--data", "digits", "--budget", "4bit")


def test_one_command_writes_checked_files_and_compares(cli, trained, tmp_path):
    files = [tmp_path / name for name in ("net.safetensors", "net.onnx", "policy.json")]
    to = [text for file in files for text in ("--to", file)]
    shown = cli(*COMPRESS, "--weights", trained / "model.safetensors", *to, "--test", "digits").out
    assert all(file.is_file() for file in files)
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.startswith(("float", "quantized", "uniform"))}
    assert rows["float"][1:4] == ["119", "kB", "1.0x"]
    policy = Policy.load(files[2])
    assert rows["quantized"][1:3] == [f"{policy.cost['weight_bytes'] / 1000:.4g}", "kB"]
    evaluated = cli("evaluate", *MODEL, "--data", "digits", "--packed", files[0], "--weights", trained / "model.safetensors").out
    assert evaluated.startswith(f"top-1 {float(rows['quantized'][-1]):.2f} %")
    assert "mixed bits can win at most" in shown and f"written: {files[1]}" in shown


def test_a_drop_is_measured_on_labelled_images_that_are_held_out(cli, trained, tmp_path):
    drop = (*COMPRESS[:-1], "drop=5", "--images", 64)
    shown = cli(*drop, "--weights", trained / "model.safetensors", "--to", tmp_path / "policy.json").out
    title, *lines = shown.splitlines()
    assert title == "Compression, measured on 16 samples held out"
    assert [line.split()[0] for line in lines if line.startswith(("float", "quantized", "uniform"))] == ["float", "quantized"]
    assert Policy.load(tmp_path / "policy.json").provenance["drop"]["metric"] == "top1"


def test_help_tells_of_a_drop_where_it_can_be_asked_for(cli):
    assert "drop=0.5" in cli("compress", "--help").out and "drop=0.5" in cli("search", "--help").out
    assert "drop=0.5" not in cli("solve", "--help").out


@pytest.mark.parametrize(
    ("to", "message"), [("net.pb", "the file is written as .onnx or .xml or"), ("absent/net.onnx", "no folder")]
)
def test_files_that_cannot_be_written_are_refused_at_once(refused, tmp_path, to, message):
    assert message in refused(*COMPRESS, "--to", tmp_path / to)


def test_a_budget_is_needed(refused, tmp_path):
    assert "--budget is missing" in refused("compress", *MODEL, "--data", "digits", "--to", tmp_path / "p.json")
