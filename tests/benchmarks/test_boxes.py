import numpy as np
import pytest

from benchmarks.boxes import average_precision, hmean, iou, text_boxes, yolox_boxes

A, B = [0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 15.0, 10.0]


def test_iou_of_equal_half_and_disjoint_boxes():
    overlap = iou(np.array([A]), np.array([A, B, [20.0, 0.0, 30.0, 10.0]]))
    assert overlap[0] == pytest.approx([1.0, 1 / 3, 0.0])


def test_a_shrunk_line_grows_back_to_its_box():
    # A line of 60 x 20 shrinks by d = A (1 - 0.4^2) / L = 6.3 on every side; 1.5 A' / L' of the rest is 4.7.
    probabilities = np.zeros((64, 96), dtype=np.float32)
    probabilities[26:34, 26:74] = 0.9
    probabilities[50:60, 2:4] = 0.4  # too unsure
    assert text_boxes(probabilities) == pytest.approx(np.array([[26 - 5.14, 26 - 5.14, 74 + 5.14, 34 + 5.14]]), abs=0.01)


def test_hmean_counts_each_true_box_once():
    assert hmean([np.array([A, A])], [np.array([A])]) == pytest.approx(100 * 2 / 3)
    assert hmean([np.zeros((0, 4))], [np.array([A])]) == 0.0
    assert hmean([np.array([B])], [np.array([A])]) == 0.0


def test_yolox_boxes_are_decoded_from_their_cells_and_suppressed():
    output = np.zeros((3549, 85), dtype=np.float32)
    output[52 + 2, :5] = [0.5, 0.5, np.log(2), np.log(4), 1.0]  # second row, third column of stride 8
    output[52 + 3, :5] = [-0.5, 0.5, np.log(2), np.log(4), 0.9]  # the same box from the next cell
    output[52 + 2, 5 + 7], output[52 + 3, 5 + 7] = 0.8, 0.8
    boxes, scores, classes = yolox_boxes(output, 0.3)
    assert boxes == pytest.approx(np.array([[12.0, -4.0, 28.0, 28.0]]))
    assert scores == pytest.approx([0.8]) and classes.tolist() == [7]


def test_average_precision_of_perfect_wrong_and_half_found_boxes():
    true = [(np.array([A, [50.0, 50.0, 60.0, 60.0]]), np.array([1, 1]))]
    both = (true[0][0], np.array([0.9, 0.8]), np.array([1, 1]))
    assert average_precision([both], true) == pytest.approx(100.0)
    assert average_precision([(both[0], both[1], np.array([2, 2]))], true) == 0.0
    one = (both[0][:1], both[1][:1], np.array([1]))
    assert average_precision([one], true) == pytest.approx(100 * 51 / 101)
