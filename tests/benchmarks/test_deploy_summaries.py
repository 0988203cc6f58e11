from benchmarks.deploy_summaries import _parity


def run(runtime: str, **extra: int) -> dict:
    return {"settings": {"runtime": runtime}, "extra": extra}


def test_codes_are_counted_for_each_runtime():
    exact = [run("onnxruntime", codes=2_000_000, differing_codes=0, largest_difference=0), run("onnxruntime")]
    rounded = [
        run("openvino", codes=3_000_000, differing_codes=30, largest_difference=1),
        run("openvino", codes=1_000_000, differing_codes=10),
    ]
    text = _parity([*exact, *rounded])
    assert "onnxruntime: 1 files, 2.0 M codes, 0 differ." in text
    assert "openvino: 2 files, 4.0 M codes, 40 differ (1.0e-05), by up to 1." in text
    assert "openvino" not in _parity(exact)
