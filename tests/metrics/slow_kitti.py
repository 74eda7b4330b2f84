"""KITTI's evaluation written rule by rule, one object at a time, without numpy's or torch's help."""

from __future__ import annotations

import math
from typing import Any

from pc3d.io.kitti_object import KittiObjects

MIN_HEIGHT, MAX_OCCLUDED, MAX_TRUNCATED = (40, 25, 25), (0, 1, 2), (0.15, 0.3, 0.5)
NEIGHBOURS = {("car", "van"), ("pedestrian", "person_sitting")}
Box = dict[str, Any]


def listed(objects: KittiObjects) -> list[Box]:
    names = ("truncated", "occluded", "alpha", "bbox", "dimensions", "location", "rotation_y", "scores")
    columns = {name: value.tolist() for name in names if (value := getattr(objects, name)) is not None}
    return [{"name": kind, **{k: v[i] for k, v in columns.items()}} for i, kind in enumerate(objects.names)]


def corners(box: Box) -> list[tuple[float, float]]:
    """On the ground (x, z), turning about y."""
    length, _, width = box["dimensions"]
    x, _, z = box["location"]
    c, s = math.cos(box["rotation_y"]), math.sin(box["rotation_y"])
    return [(x + c * u * length + s * v * width, z - s * u * length + c * v * width)
            for u, v in ((0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5))]  # fmt: skip


def area(polygon: list[tuple[float, float]]) -> float:
    following = [*polygon[1:], *polygon[:1]]
    return sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(polygon, following, strict=True)) / 2


def clipped(subject: list[tuple[float, float]], window: list[tuple[float, float]]) -> float:
    """Area of a convex polygon inside another (Sutherland and Hodgman)."""
    if area(window) < 0:
        window = window[::-1]
    for a, b in zip(window, [*window[1:], window[0]], strict=True):
        side = [(b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]) for p in subject]
        kept = []
        for i, point in enumerate(subject):
            before, was = subject[i - 1], side[i - 1]
            if (side[i] >= 0) != (was >= 0):
                t = was / (was - side[i])
                kept.append((before[0] + t * (point[0] - before[0]), before[1] + t * (point[1] - before[1])))
            if side[i] >= 0:
                kept.append(point)
        subject = kept
        if not subject:
            return 0.0
    return abs(area(subject))


def image_shared(a: Box, b: Box) -> float:
    width = min(a["bbox"][2], b["bbox"][2]) - max(a["bbox"][0], b["bbox"][0])
    height = min(a["bbox"][3], b["bbox"][3]) - max(a["bbox"][1], b["bbox"][1])
    return width * height if width > 0 and height > 0 else 0.0


def image_area(a: Box) -> float:
    return (a["bbox"][2] - a["bbox"][0]) * (a["bbox"][3] - a["bbox"][1])


def overlap(metric: str, found: Box, true: Box) -> float:
    if metric == "bbox":
        shared = image_shared(found, true)
        return shared / (image_area(found) + image_area(true) - shared) if shared else 0.0
    shared = clipped(corners(found), corners(true))
    sizes = [box["dimensions"][0] * box["dimensions"][2] for box in (found, true)]
    if metric == "3d":  # y points down; a location is the middle of the bottom
        top = max(box["location"][1] - box["dimensions"][1] for box in (found, true))
        shared *= max(min(found["location"][1], true["location"][1]) - top, 0)
        sizes = [size * box["dimensions"][1] for size, box in zip(sizes, (found, true), strict=True)]
    return shared / (sum(sizes) - shared) if shared else 0.0


def true_flag(box: Box, name: str, level: int) -> int:
    kind = box["name"].lower()
    height = box["bbox"][3] - box["bbox"][1]
    if kind != name and (name, kind) not in NEIGHBOURS:
        return -1
    easy_enough = (
        height > MIN_HEIGHT[level]
        and box["occluded"] <= MAX_OCCLUDED[level]
        and box["truncated"] <= MAX_TRUNCATED[level]
    )
    return 0 if kind == name and easy_enough else 1


def found_flag(box: Box, name: str, level: int) -> int:
    if abs(box["bbox"][3] - box["bbox"][1]) < MIN_HEIGHT[level]:
        return 1
    return 0 if box["name"].lower() == name else -1


Frame = tuple[list[tuple[Box, int]], list[tuple[Box, int]], list[Box]]


def frames_of(truth: list[KittiObjects], found: list[KittiObjects], name: str, level: int) -> list[Frame]:
    result = []
    for gt, dt in zip(truth, found, strict=True):
        true = [(box, true_flag(box, name, level)) for box in listed(gt)]
        detections = [(box, found_flag(box, name, level)) for box in listed(dt)]
        result.append((true, detections, [box for box in listed(gt) if box["name"] == "DontCare"]))
    return result


def recorded_scores(frames: list[Frame], metric: str, limit: float) -> list[float]:
    scores = []
    for true, found, _ in frames:
        taken: set[int] = set()
        for box, flag in true:
            if flag == -1:
                continue
            best = None
            for d, (other, kind) in enumerate(found):
                if d in taken or kind == -1 or overlap(metric, other, box) <= limit:
                    continue
                if best is None or other["scores"] > found[best][0]["scores"]:
                    best = d
            if best is not None:
                taken.add(best)
                if flag == 0 and found[best][1] == 0:
                    scores.append(found[best][0]["scores"])
    return scores


def thresholds_of(scores: list[float], count: int) -> list[float]:
    kept, current = [], 0.0
    ordered = sorted(scores, reverse=True)
    for i, score in enumerate(ordered):
        last = i == len(ordered) - 1
        left = (i + 1) / count
        right = left if last else (i + 2) / count
        if not last and right - current < current - left:
            continue
        kept.append(score)
        current += 1 / 40
    return kept


def counts_at(frame: Frame, metric: str, limit: float, threshold: float) -> tuple[int, int, float]:
    """Right ones, false alarms and orientation similarity of a frame."""
    true, found, stuff = frame
    alive = [d for d, (box, kind) in enumerate(found) if kind != -1 and box["scores"] >= threshold]
    taken: set[int] = set()
    hits, similarity = 0, 0.0
    for box, flag in true:
        if flag == -1:
            continue
        chosen, best = None, 0.0
        for d in alive:
            value = overlap(metric, found[d][0], box)
            if d in taken or value <= limit:
                continue
            if found[d][1] == 0 and (chosen is None or found[chosen][1] == 1 or value > best):
                chosen, best = d, value
            elif found[d][1] == 1 and chosen is None:
                chosen = d
        if chosen is None:
            continue
        taken.add(chosen)
        if flag == 0 and found[chosen][1] == 0:
            hits += 1
            similarity += (1 + math.cos(box["alpha"] - found[chosen][0]["alpha"])) / 2
    wrong = 0
    for d in alive:
        if found[d][1] == 0 and d not in taken:
            area = image_area(found[d][0])
            forgiven = any(image_shared(found[d][0], region) / area > limit for region in stuff)
            wrong += not (metric == "bbox" and forgiven)
    return hits, wrong, similarity


def slow_ap(
    truth: list[KittiObjects], found: list[KittiObjects], name: str, level: int, metric: str, limit: float
) -> dict[str, float]:
    """``r40``, ``r11`` and, of orientation, ``aos40`` in percent."""
    frames = frames_of(truth, found, name.lower(), level)
    count = sum(flag == 0 for true, _, _ in frames for _, flag in true)
    precision, oriented = [0.0] * 41, [0.0] * 41
    for i, threshold in enumerate(thresholds_of(recorded_scores(frames, metric, limit), count)):
        each = [counts_at(frame, metric, limit, threshold) for frame in frames]
        hits, wrong, similarity = (sum(column) for column in zip(*each, strict=True))
        precision[i], oriented[i] = (hits / (hits + wrong), similarity / (hits + wrong)) if hits + wrong else (0.0, 0.0)
    precision = [max(precision[i:]) for i in range(41)]
    oriented = [max(oriented[i:]) for i in range(41)]
    return {
        "r40": 100 * sum(precision[1:]) / 40,
        "r11": 100 * sum(precision[::4]) / 11,
        "aos40": 100 * sum(oriented[1:]) / 40,
    }
