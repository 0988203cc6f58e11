from typing import Any

from benchmarks.npu_summaries import ethos_u, fpga, tflite


def run_of(variant: str, ms: float, flash: int, value: float, predicted_ms: float) -> dict[str, Any]:
    compiled = {"latency_ms": ms, "flash_bytes": flash, "sram_bytes": 64_000, "on_cpu": ["PAD", "PAD"]}
    about = {"network": "net", "metric": "top1", "test_images": 744, "float_value": 90.0}
    extra = {"compiled": compiled, "predicted": {"latency_ms": predicted_ms, "flash_bytes": flash}}
    return {**about, "variant": variant, "settings": {"accelerator": "ethos-u55-128"}, "value": value, "extra": extra}


def test_figures_stand_beside_those_of_8_bits() -> None:
    text = ethos_u([run_of("w8", 2.0, 400_000, 89.5, 2.0), run_of("flash", 1.5, 200_000, 89.0, 1.53)])
    head, table = text.split("\n\n")
    assert head.startswith("**net on ethos-u55-128**, top1 on 744 images, float 90.00") and "not measured on silicon" in head
    assert table.splitlines()[2:] == [
        "| w8 | 2.000 | 100 % | 400 kB | 100 % | 64 kB | 89.50 | +0.0 % | +0.0 % | PAD |",
        "| flash | 1.500 | 75 % | 200 kB | 50 % | 64 kB | 89.00 | +2.0 % | +0.0 % | PAD |",
    ]


def test_files_stand_with_their_codes_and_their_metric() -> None:
    fixed = {"layers": 2, "codes": 1000, "differing": 3}
    extra = {"bytes": 12_000, "differing": 0, "codes": 2_000_000, "fixed_point": fixed, "cpu_ms": 1.25}
    run = {"network": "net", "variant": "int4", "float_value": 90.0, "value": 89.0, "extra": {**extra, "simulated": 89.5}}
    refused = {"network": "other", "variant": "int8", "extra": {"refused": "why"}}
    assert tflite([run, refused]).splitlines()[2:] == [
        "| net | int4 | 12 kB | 0 of 2 M | 2 layers | 0.3 % | 90.00 | 89.50 | 89.00 | 1.25 |",
        "| other | int8 | refused | - | - | - | - | - | - | - |",
    ]


def test_a_prediction_is_shown_where_there_is_one() -> None:
    other = run_of("w8", 2.0, 400_000, 89.5, 2.0)
    del other["extra"]["predicted"]
    assert ethos_u([other]).splitlines()[-1] == "| w8 | 2.000 | 100 % | 400 kB | 100 % | 64 kB | 89.50 | - | - | PAD |"


def test_hardware_stands_with_its_bits_and_the_images_that_differ() -> None:
    about = {"network": "net", "variant": "w4a4, fisher", "policy": {"a": [3, 4], "b": [5, 6]}, "test_images": 60}
    values = {"float_value": 96.0, "value": 95.0, "extra": {"simulated": 95.5, "differing_images": 2}}
    row = "| net | w4a4, fisher | 3/4, 5/6 | 2 of 60 | 96.00 | 95.50 | 95.00 |"
    assert fpga([{**about, **values}]).splitlines()[-1] == row
