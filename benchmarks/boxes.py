"""Boxes from the outputs of detectors, and how well they match: hmean for text, average precision for objects."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Boxes = NDArray[np.float64]
"""(k, 4): x0, y0, x1, y1 in pixels."""
Scored = tuple[Boxes, NDArray[np.float64], NDArray[np.int64]]
"""Boxes, their scores (k,) and classes (k,)."""
Labelled = tuple[Boxes, NDArray[np.int64]]
"""Boxes and classes (k,)."""
TEXT_THRESHOLD, TEXT_SCORE, UNCLIP = 0.3, 0.6, 1.5
"""Of a text pixel, of a box's mean probability, and how far a shrunk box grows back (PaddleOCR's defaults)."""
IOUS = np.arange(0.5, 1.0, 0.05)
YOLOX_SIDE, YOLOX_STRIDES = 416, (8, 16, 32)
NMS_IOU = 0.65
"""YOLOX's own setting for the evaluation on COCO."""


def iou(left: Boxes, right: Boxes) -> NDArray[np.float64]:
    """Intersection over union of every pair, (k, 4) and (m, 4) -> (k, m)."""
    low = np.maximum(left[:, None, :2], right[None, :, :2])
    high = np.minimum(left[:, None, 2:], right[None, :, 2:])
    shared = (high - low).clip(min=0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (left, right)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def text_boxes(probabilities: NDArray[np.float32]) -> Boxes:
    """Upright boxes of lines from a map (h, w) of a DB detector: pixels above the threshold, joined, kept if sure, grown back.

    The detector learns shrunk lines. A box of area A and perimeter L grows by UNCLIP * A / L on every side (Liao et al.,
    arXiv 1911.08947, section 3.5).
    """
    labels, _ = ndimage.label(probabilities > TEXT_THRESHOLD, structure=np.ones((3, 3)))
    boxes = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[rows, columns] == number
        height, width = inside.shape
        if min(height, width) < 3 or probabilities[rows, columns][inside].mean() < TEXT_SCORE:
            continue
        grown = UNCLIP * height * width / (2 * (height + width))
        limits = probabilities.shape
        boxes.append(
            [
                max(columns.start - grown, 0),
                max(rows.start - grown, 0),
                min(columns.stop + grown, limits[1]),
                min(rows.stop + grown, limits[0]),
            ]
        )
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def hmean(predicted: Sequence[Boxes], true: Sequence[Boxes], least_iou: float = 0.5) -> float:
    """Percent: the harmonic mean of precision and recall over all images; each true box is matched once, best pairs first."""
    matched = sum(_matches(iou(p, t), least_iou) for p, t in zip(predicted, true, strict=True))
    total = sum(map(len, predicted)) + sum(map(len, true))
    return 100 * 2 * matched / total if total else 100.0


def _matches(overlap: NDArray[np.float64], least_iou: float) -> int:
    overlap, count = overlap.copy(), 0
    while overlap.size and overlap.max() >= least_iou:
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[row, :] = overlap[:, column] = -1
        count += 1
    return count


def yolox_boxes(output: NDArray[np.float32], least_score: float) -> Scored:
    """Boxes, scores and classes of one image from YOLOX's output (3549, 85), after suppression within each class.

    A row holds a centre and a size relative to its cell, whether there is an object, and the 80 classes.
    """
    centres, strides = _cells()
    centre = (output[:, :2] + centres) * strides
    size = np.exp(output[:, 2:4]) * strides
    scores = output[:, 4:5] * output[:, 5:]
    rows, classes = np.nonzero(scores > least_score)
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1).astype(np.float64)[rows]
    kept = _suppressed(boxes + 1e4 * classes[:, None], scores[rows, classes])  # classes lie apart
    return boxes[kept], scores[rows, classes][kept].astype(np.float64), classes[kept]


def _cells() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    centres, strides = [], []
    for stride in YOLOX_STRIDES:
        side = np.arange(YOLOX_SIDE // stride)
        x, y = np.meshgrid(side, side)
        centres.append(np.stack([x.ravel(), y.ravel()], axis=1))
        strides.append(np.full((side.size**2, 1), stride))
    return np.concatenate(centres).astype(np.float64), np.concatenate(strides).astype(np.float64)


def _suppressed(boxes: Boxes, scores: NDArray[np.float64]) -> list[int]:
    order, kept = np.argsort(-scores, kind="stable"), []
    while len(order):
        best, order = int(order[0]), order[1:]
        kept.append(best)
        order = order[iou(boxes[best : best + 1], boxes[order])[0] <= NMS_IOU]
    return kept


def average_precision(predicted: Sequence[Scored], true: Sequence[Labelled]) -> float:
    """Percent: the mean over IoU 0.50 to 0.95 of the average precision at 101 recalls, all classes pooled.

    Pooled, since a few hundred images hold too few objects of most classes for a figure of each.
    """
    return 100 * float(np.mean([_precision(predicted, true, least) for least in IOUS]))


def _precision(predicted: Sequence[Scored], true: Sequence[Labelled], least_iou: float) -> float:
    scores, hits = [], []
    for (boxes, sure, classes), (true_boxes, true_classes) in zip(predicted, true, strict=True):
        overlap = np.where(classes[:, None] == true_classes[None, :], iou(boxes, true_boxes), 0.0)
        free = np.ones(len(true_boxes), dtype=bool)
        for row in np.argsort(-sure, kind="stable"):
            candidates = np.where(free, overlap[row], 0.0) if len(free) else np.zeros(1)
            best = int(candidates.argmax())
            hit = bool(candidates[best] >= least_iou)
            if hit:
                free[best] = False
            scores.append(sure[row])
            hits.append(hit)
    total = sum(len(boxes) for boxes, _ in true)
    if not total or not hits:
        return 0.0
    order = np.argsort(-np.array(scores), kind="stable")
    right = np.cumsum(np.array(hits)[order])
    recall, precision = right / total, right / np.arange(1, len(order) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    return float(np.mean([precision[at] if at < len(precision) else 0.0 for at in reached]))
