"""Check every cloud of a data set, write it prepared, and sum up: the work behind ``pc3d prepare``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pc3d.config import instantiate
from pc3d.data.dataset import SPLITS, Split
from pc3d.datasets.scenes import STATS, SUMMARY, Scene, SceneDataset, is_complete, write_prepared
from pc3d.errors import InputError
from pc3d.io.atomic import atomic_write
from pc3d.points import Points


@dataclass
class Preparation:
    """What a run did and found.

    Attributes:
        written, kept: scenes written now, and found complete from an earlier run.
        problems: one line per scene that could not be used, naming its file.
        points, classes: per split, number of points and ``(K,)`` points per class, of all scenes done so far.
        scenes: per split, scenes done and scenes there are.
    """

    class_names: list[str]
    written: int = 0
    kept: int = 0
    problems: list[str] = field(default_factory=list)
    points: dict[str, int] = field(default_factory=dict)
    classes: dict[str, list[int]] = field(default_factory=dict)
    scenes: dict[str, list[int]] = field(default_factory=dict)

    def print(self, console: Console) -> None:
        table = Table("split", "scenes", "points", "labelled", title="Prepared", title_justify="left")
        for split, (done, there) in self.scenes.items():
            points, labelled = self.points[split], sum(self.classes[split])
            table.add_row(split, f"{done} of {there}", f"{points:,}", f"{labelled / max(points, 1):.1%}")
        console.print(table)
        console.print(f"{self.written} written, {self.kept} already there, {len(self.problems)} with problems")


def prepare(dataset: SceneDataset, out: Path, workers: int = 1, shard: tuple[int, int] = (0, 1)) -> Preparation:
    """Read all scenes of a raw data set, check them, and write each as a prepared folder below ``out``.

    A scene that is there already is kept, so an interrupted run goes on, and ends with the same bytes. The raw files
    are only read. A data set that is read as it is (SemanticKITTI) is checked and summed up only. Writes
    ``summary.json`` and, with matplotlib, ``summary.png`` when every scene is done.

    Args:
        dataset: with its root in the raw layout.
        out: folder of the prepared scenes; not the raw root.
        workers: processes.
        shard: (i, n): only every n-th scene, from the i-th on.

    Raises:
        InputError: if ``out`` lies in the raw root, or the root is not in the raw layout.
    """
    assert dataset.root is not None
    if out.resolve() == dataset.root.resolve() or dataset.root.resolve() in out.resolve().parents:
        raise InputError(f"{out}: lies in the raw folder {dataset.root}, which is never written to")
    jobs = [(split, i) for split in SPLITS for i in range(dataset.size(split))]
    unique = {
        dataset.scenes(split)[i].place: (split, i) for split, i in reversed(jobs)
    }  # S3DIS tests where it validates
    if not unique:
        raise InputError(f"{dataset.root}: holds no scene of {type(dataset).__name__}; expected {dataset.layouts}")
    if any(scene.raw is None for split, i in unique.values() for scene in (dataset.scenes(split)[i],)):
        raise InputError(f"{dataset.root}: is prepared already")
    for left in out.glob(f".{Path(SUMMARY).stem}.*"):  # by a run that was killed
        left.unlink(missing_ok=True)
    places = sorted(unique)[shard[0] :: shard[1]]
    result = Preparation(dataset.class_names)
    todo = [place for place in places if not is_complete(out / place, dataset.writes)]
    result.kept = len(places) - len(todo)
    config = dataset.to_config()
    results = _run([(config, *unique[place], str(out / place)) for place in todo], workers)
    for problem in track(results, description="Preparing", total=len(todo), console=Console(stderr=True)):
        if problem is None:
            result.written += 1
        else:
            result.problems.append(problem)
    result.problems.sort()
    _sum_up(dataset, out, unique, result)
    return result


Job = tuple[dict[str, Any], Split, int, str]


def _run(jobs: list[Job], workers: int) -> Iterator[str | None]:
    """The problem of every job, or None, as they finish."""
    if workers <= 1:
        yield from map(_prepare_scene, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting: set[Future[str | None]] = set()
        for job in jobs:
            waiting.add(pool.submit(_prepare_scene, job))
            if len(waiting) >= 4 * workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in wait(waiting).done)


_DATASETS: dict[str, SceneDataset] = {}  # of this process


def _prepare_scene(job: Job) -> str | None:
    config, split, index, target = job
    key = json.dumps(config, sort_keys=True, default=str)
    if key not in _DATASETS:
        torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
        _DATASETS[key] = instantiate(config)
    dataset = _DATASETS[key]
    scene = dataset.scenes(split)[index]
    try:
        points = dataset.load_raw(scene)
        stats = check_scene(dataset, scene, points)
        write_prepared(Path(target), points if dataset.writes else None, stats)
    except InputError as error:
        return str(error)
    return None


def check_scene(dataset: SceneDataset, scene: Scene, points: Points) -> dict[str, object]:
    """Counts of a raw scene.

    Raises:
        InputError: if it is empty, a coordinate is not finite, or a label is out of range.
    """
    where = str(scene.raw)
    if points.num_points == 0:
        raise InputError(f"{where}: holds no points")
    for name in ("coord", "normal", "color", "strength"):
        if name in points and not bool(points.get(name).isfinite().all()):
            raise InputError(f"{where}: field '{name}' has values that are not finite")
    labels = points.get(dataset.label) if dataset.label in points else torch.full((points.num_points,), -1)
    wrong = labels[(labels < -1) | (labels >= dataset.num_classes)]
    if len(wrong):
        raise InputError(
            f"{where}: field '{dataset.label}' holds {int(wrong[0])}, classes are 0..{dataset.num_classes - 1}"
        )
    counts = torch.bincount(labels[labels >= 0], minlength=dataset.num_classes)
    return {"points": points.num_points, "classes": counts.tolist()}


def _sum_up(dataset: SceneDataset, out: Path, unique: dict[str, tuple[Split, int]], result: Preparation) -> None:
    for split in SPLITS:
        places = [place for place, (owner, _) in unique.items() if owner == split]
        if not places:
            continue
        done = [place for place in sorted(places) if is_complete(out / place, dataset.writes)]
        stats = [json.loads((out / place / STATS).read_text()) for place in done]
        result.points[split] = sum(entry["points"] for entry in stats)
        columns = zip(*(entry["classes"] for entry in stats), strict=True)
        result.classes[split] = [sum(column) for column in columns] or [0] * dataset.num_classes
        result.scenes[split] = [len(stats), len(places)]
    if any(done < there for done, there in result.scenes.values()):
        return
    dataset.finish(out)
    content = {"class_names": result.class_names, **{k: getattr(result, k) for k in ("scenes", "points", "classes")}}
    with atomic_write(out / SUMMARY) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    try:
        from pc3d.viz.figures import save_class_histogram

        save_class_histogram((out / SUMMARY).with_suffix(".png"), result.classes, result.class_names)
    except InputError as error:
        Console(stderr=True).print(f"no picture: {error}", markup=False)
