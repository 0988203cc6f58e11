from benchmarks.tasks_summaries import tasks

ABOUT = {"network": "net", "task": "classes", "metric": "top1", "float_value": 90.0, "variant": "4bit"}
FILE = {"bytes": 1234, "parity": {"codes": 2_000_000, "differing": 0.0}, "relative_error": {"a": 0.001, "b": 0.02}}


def test_values_stand_beside_their_controls_and_files_beside_their_parity():
    runs = [
        {**ABOUT, "variant": None, "method": "float", "value": 90.0},
        {**ABOUT, "method": "fisher", "value": 89.5},
        *({**ABOUT, "method": "random", "value": value} for value in (80.0, 88.0, 84.0)),
        {**ABOUT, "method": "files", "extra": {"net.safetensors": {"bytes": 999}, "net.onnx": FILE, "net.xml": {"refused": "why"}}},
    ]
    values, files = (part.splitlines() for part in tasks(runs).split("\n\n"))
    assert values[2] == "| net | classes | top1 | 4bit | 90.00 | 89.50 | - | 88.00, 84.00, 80.00 (n=3) |"
    assert files[2] == "| net | 0.999 kB | 1.234 kB | 0 of 2 M | 2.0e-02 | refused | - | - |"


def test_the_best_of_errors_is_the_smallest():
    runs = [{**ABOUT, "metric": "mean_absolute_degrees", "method": "random", "value": value} for value in (5.0, 4.0)]
    assert "| 4.00, 4.50, 5.00 (n=2) |" in tasks(runs)
