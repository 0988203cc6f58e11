import json

import pytest

from bitscape.cost.latency import LatencyTable
from bitscape.models.digits import digits_net
from bitscape.models.layers import layer_shapes
from bitscape.policy import LayerBits, Policy, fingerprint, uniform_policy
from tests.cli.run import MIXED, MODEL


def test_shows_bits_cost_and_origin_without_the_network(cli, trained):
    shown = cli("policy", "show", trained / "mixed.json").out
    assert "block1.conv1" in shown
    assert "as saved" in shown
    assert "provenance" in shown
    assert "fisher" in shown


def test_shows_costs_of_each_layer_with_the_network(cli, trained):
    shown = cli("policy", "show", trained / "mixed.json", *MODEL).out
    assert "147.5 k" in shown  # MACs of block1.conv1, at the input shape that the policy tells
    assert "of 8 bit" in shown


def test_a_policy_by_hand_needs_the_input_shape(cli, refused, trained, tmp_path):
    hand = tmp_path / "hand.json"
    Policy(MIXED.layers).save(hand)
    assert "--input-shape is missing" in refused("policy", "show", hand, *MODEL)
    assert "147.5 k" in cli("policy", "show", hand, *MODEL, "--input-shape", "1x8x8").out


def test_predicted_times_are_shown_layer_by_layer(cli, refused, trained, tmp_path):
    layers = MIXED.layers
    times = {name: {str(bits): 3.0 if name == "down.0" else 0.5, "8/8": 1.0} for name, bits in layers.items()}
    shapes = layer_shapes(digits_net())
    about = {"runtime": "r 1", "machine": "m", "threads": 1, "batch_size": 4, "input_shape": (1, 8, 8), "fingerprint": fingerprint(shapes)}
    LatencyTable(**about, network_ms=16.0, float_ms=9.0, layers=times).save(tmp_path / "table.json")
    given = ("policy", "show", trained / "mixed.json")
    shown = cli(*given, *MODEL, "--latency", tmp_path / "table.json").out
    # 8 layers of 1 ms take 16 together: every time counts twice. The policy takes 2 * (2 + 5 * 0.5 + 3), with the ends at 8/8.
    rows = [line.split() for line in shown.splitlines()]
    assert next(row for row in rows if row[:1] == ["down.0"])[-3:] == ["6", "40.0", "%"]
    assert next(row for row in rows if row[:1] == ["latency_ms"])[1:3] == ["15", "ms"]
    assert "latency_ms: r 1, m, threads: 1, batch: 4" in shown
    assert "--latency needs --model" in refused(*given, "--latency", tmp_path / "table.json")


def test_differences_are_listed(cli, tmp_path):
    uniform_policy(["a", "b"], LayerBits(4, 4)).save(tmp_path / "1.json")
    uniform_policy(["a", "b"], LayerBits(4, 4), {"b": LayerBits(8, 8)}).save(tmp_path / "2.json")
    shown = cli("policy", "diff", tmp_path / "1.json", tmp_path / "2.json").out
    assert "1 of 2 layers differ" in shown
    assert shown.splitlines()[1].split() == ["b", "4/4", "8/8"]
    assert "0 of 2 layers differ" in cli("policy", "diff", tmp_path / "1.json", tmp_path / "1.json").out


def test_a_policy_is_checked_against_a_network(cli, refused, trained, tmp_path):
    assert "8 layers, names and shapes agree" in cli("policy", "check", trained / "mixed.json", *MODEL).out
    uniform_policy(["block1.conv"], LayerBits(4, 4)).save(tmp_path / "other.json")
    assert "no layer 'block1.conv'; nearest: block1.conv" in refused("policy", "check", tmp_path / "other.json", *MODEL)


@pytest.mark.parametrize(("text", "message"), [('{"format": 1,', "is the file complete"), ("[]", "not a policy file")])
def test_damaged_files_are_named(refused, tmp_path, text, message):
    (tmp_path / "broken.json").write_text(text)
    line = refused("policy", "show", tmp_path / "broken.json")
    assert message in line
    assert "broken.json" in line


def test_a_missing_file_is_named(refused):
    assert "nothing.json" in refused("policy", "show", "nothing.json")


def test_a_policy_is_converted(cli, refused, trained, tmp_path):
    arm = tmp_path / "arm.json"
    given = ("policy", "convert", trained / "mixed.json", "--to", "executorch-arm", "--out", arm)
    assert "has no 3/4 weight/activation bits" in refused(*given)
    shown = cli(*given, "--rounding", "up")
    assert "8 layers for executorch-arm" in shown.out
    assert "6 of 8 layers get wider bits" in shown.err
    assert json.loads(arm.read_text())["a8"]["block1.conv1"] == {"weight_qmin": -3, "weight_qmax": 3}
    assert "--to executorch-arm takes no --model, only --rounding" in refused(*given, *MODEL)


def test_the_graph_of_a_converted_policy_is_written_beside(cli, trained, tmp_path):
    bits, program = tmp_path / "bits.json", tmp_path / "net.pt2"
    shape = ("--input-shape", "1x8x8", "--program", program)
    cli("policy", "convert", trained / "mixed.json", "--to", "model-explorer", *MODEL, *shape, "--out", bits)
    assert json.loads(bits.read_text())["results"]["conv2d"] == {"value": 8}
    assert program.stat().st_size > 0


def test_names_of_another_tool_are_read_from_a_file(cli, refused, tmp_path):
    policy, names, script = (tmp_path / name for name in ("policy.json", "names.json", "net.alls"))
    uniform_policy(["a", "b"], LayerBits(4, 8)).save(policy)
    given = ("policy", "convert", policy, "--to", "hailo", "--out", script)
    assert "--to hailo needs --names" in refused(*given)
    names.write_text('{"a": 1}')
    assert "it must be a JSON object of texts" in refused(*given, "--names", names)
    names.write_text('{"a": "net/conv1", "b": "net/fc1"}')
    cli(*given, "--names", names)
    assert script.read_text() == "quantization_param([net/conv1, net/fc1], precision_mode=a8_w4)\n"
