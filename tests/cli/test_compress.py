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


@pytest.mark.parametrize(
    ("to", "message"), [("net.tflite", "the file is written as .onnx or .xml or"), ("absent/net.onnx", "no folder")]
)
def test_files_that_cannot_be_written_are_refused_at_once(refused, tmp_path, to, message):
    assert message in refused(*COMPRESS, "--to", tmp_path / to)


def test_a_budget_is_needed(refused, tmp_path):
    assert "--budget is missing" in refused("compress", *MODEL, "--data", "digits", "--to", tmp_path / "p.json")
