"""Graph segmentation: kernels against the references, and what must not change a segmentation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pc3d.ops import graph
from pc3d.ops.backend import cpu_kernels, use_backend
from pc3d.ops.graph import (
    Segments,
    connected_components,
    contract_graph,
    edge_weights,
    estimate_normals,
    graph_segments,
    majority,
    merge_graph,
    neighbour_edges,
    renumber,
    segment_graph,
    segment_purity,
)
from pc3d.ops.neighbours import knn


def box_scene(seed: int = 0, count: int = 1500) -> tuple[Tensor, Tensor]:
    """Two clouds: the faces of a box on a floor, with noise; and random points."""
    generator = torch.Generator().manual_seed(seed)
    floor = torch.rand(count, 3, generator=generator) * torch.tensor([2.0, 2.0, 0.0])
    box = torch.rand(count, 3, generator=generator)
    face = torch.arange(count) % 3
    box[torch.arange(count), face] = (box[torch.arange(count), face] > 0.5).float()
    scene = torch.cat([floor, box * 0.5 + torch.tensor([0.5, 0.5, 0.05])])
    scene += torch.randn(scene.shape, generator=generator) * 1e-3
    other = torch.rand(200, 3, generator=generator)
    return torch.cat([scene, other]), torch.tensor([0, len(scene), len(scene), len(scene) + 200])


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    if cpu_kernels() is None:
        pytest.skip("the C++ extension is not built")


def test_kernels_equal_the_references():
    coord, offsets = box_scene()
    rows = knn(coord, offsets, coord, offsets, 16)[0]
    rows[3, 5:] = -1
    fast = [estimate_normals(coord, offsets, rows), neighbour_edges(rows, 10)]
    fast.append(edge_weights(coord, fast[0], fast[1]))
    with use_backend("reference"):
        slow = [estimate_normals(coord, offsets, rows), neighbour_edges(rows, 10)]
        slow.append(edge_weights(coord, fast[0], fast[1]))
    torch.testing.assert_close(fast[0].norm(dim=1), torch.ones(len(coord)))
    assert ((fast[0] * slow[0]).sum(1).abs() > 1 - 1e-5).float().mean() > 0.999
    assert torch.equal(fast[1], slow[1])
    assert torch.equal(fast[2], slow[2])
    kernels = cpu_kernels()
    for isa, count in itertools.product(kernels.neighbour_isas(), [len(fast[1]), 5, 3, 1, 0]):
        some = kernels.edge_weights(coord, fast[0], fast[1][:count].int(), isa)
        assert torch.equal(some, slow[2][:count]), (isa, count)


@pytest.mark.parametrize("k", [1, 10, 40])
def test_edges_of_any_neighbours_equal_the_reference(k):
    generator = torch.Generator().manual_seed(k)
    neighbours = torch.randint(-1, 300, (300, 48), generator=generator)  # repeats, itself, gaps
    neighbours[:, 0] = neighbours[:, 0] % 3  # three rows that very many name
    with use_backend("reference"):
        expected = neighbour_edges(neighbours, k)
    _every_instruction_set_finds(neighbours, k, expected)


def _every_instruction_set_finds(neighbours: torch.Tensor, k: int, expected: torch.Tensor) -> None:
    assert torch.equal(neighbour_edges(neighbours, k), expected)
    kernels = cpu_kernels()
    for isa in kernels.neighbour_isas():
        assert torch.equal(kernels.neighbour_edges(neighbours.int(), k, isa).long(), expected), isa


@pytest.mark.parametrize(("k", "width"), [(10, 16), (10, 11), (7, 8), (7, 9), (1, 16), (15, 16), (20, 16)])
def test_edges_of_full_lists_equal_the_reference(k, width):
    """Each row has itself somewhere and others, as a search finds them; some rows name another twice."""
    generator = torch.Generator().manual_seed(k)
    near = torch.arange(300)[:, None] + torch.randint(1, 40, (300, width), generator=generator).cumsum(1)
    neighbours = near % 300
    neighbours[torch.arange(300), torch.randint(0, min(k + 1, width), (300,), generator=generator)] = torch.arange(300)
    for copies in (0, 50):
        neighbours[:copies, width - 1] = neighbours[:copies, 0]
        neighbours[:copies, 2 % width] = neighbours[:copies, 0]
        with use_backend("reference"):
            expected = neighbour_edges(neighbours, k)
        _every_instruction_set_finds(neighbours, k, expected)


@pytest.mark.parametrize("k", [6, 10, 15, 24])
def test_edges_of_many_lists_equal_the_reference(k):
    """More rows than a thread takes at once, 218 that list one that does not list them, some without larger ones."""
    rows, generator = 9001, torch.Generator().manual_seed(k)
    near = torch.arange(rows)[:, None] + torch.randint(1, 9, (rows, 30), generator=generator).cumsum(1)
    near[:, 0] = torch.arange(rows)
    near[:, 1:3] -= 40  # smaller ones, most of which do not list it
    near[100:220, 3] = near[8192:8290, 3] = 60
    neighbours = near % rows
    neighbours[-20:, 1:] = torch.arange(29)
    with use_backend("reference"):
        expected = neighbour_edges(neighbours, k)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            _every_instruction_set_finds(neighbours, k, expected)
    finally:
        torch.set_num_threads(before)


def test_normals_of_every_instruction_set_are_eigenvectors():
    """Planes, lines, balls, copies, sizes from 1e-6 to 1e6; three neighbours or none; the same bits everywhere."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1e-3, 1e-6], [0, 0, 0], [1, 1e-4, 1e-4]])
    size = 10.0 ** torch.arange(-6, 7).repeat_interleave(len(flat))
    sets = torch.randn(len(size), 19, 3, generator=generator) * flat.repeat(13, 1)[:, None] * size[:, None, None]
    sets = sets @ torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    coord, rows = sets.reshape(-1, 3), torch.arange(sets.shape[0] * 19).view(-1, 19)
    rows = rows.repeat_interleave(19, 0)[:, torch.randperm(19, generator=generator)].contiguous()
    rows[::7, 3:] = -1
    rows[5] = -1
    offsets, kernels, found = torch.tensor([0, len(coord)]), cpu_kernels(), []
    for isa in ["", *kernels.neighbour_isas()]:
        out = torch.empty_like(coord)
        kernels.normals(coord, offsets, rows.int(), coord.mean(0, keepdim=True), out, isa)
        found.append(out)
    assert all(torch.equal(found[0], other) for other in found[1:])
    torch.testing.assert_close(found[0].norm(dim=1), torch.ones(len(coord)))
    near = (rows >= 0).double()[..., None]
    around = (coord.double()[rows.clamp(min=0)] - coord.double()[:, None]) * near
    around = (around - around.sum(1, keepdim=True) / near.sum(1, keepdim=True).clamp(min=1)) * near
    normal = torch.nn.functional.normalize(found[0].double())
    spread = (around * normal[:, None]).sum(2).square().sum(1)
    least = torch.linalg.eigvalsh(around.transpose(1, 2) @ around)
    # In closed form, the difference of two eigenvalues far below the third drowns in rounding.
    error = torch.where(least[:, 1] < 1e-4 * least[:, 2], 3e-8, 1e-12) * least[:, 2]
    assert ((spread - least[:, 0]) <= error).all()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("min_size", [1, 7])
def test_merge_equals_the_reference(seed, min_size):
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(0, 120, (400, 2), generator=generator)
    weights = (torch.rand(400, generator=generator) * 8).round() / 8 - (seed % 2) * 0.5  # many ties, some below 0
    if seed % 3 == 0:
        weights += torch.rand(400, generator=generator) * 1e-5  # almost ties
    labels = merge_graph(edges, weights, 130, k=0.7, min_size=min_size)
    with use_backend("reference"):
        assert torch.equal(labels, merge_graph(edges, weights, 130, k=0.7, min_size=min_size))


@pytest.mark.parametrize("kind", ["wide", "equal", "close", "infinite", "negative", "tiny"])
@pytest.mark.parametrize(("k", "min_size"), [(0.05, 20), (3.0, 5), (0.0, 4), (math.inf, 1)])
def test_merge_of_any_weights_equals_the_reference(kind, k, min_size):
    """Weights far apart and all alike: every edge in a bucket of its own, and all in one."""
    generator = torch.Generator().manual_seed(len(kind))
    a = torch.randint(0, 500, (4000,), generator=generator)
    edges = torch.stack([a, (a + torch.randint(0, 12, (4000,), generator=generator)) % 500], 1)
    random = torch.rand(4000, generator=generator)
    weights = {
        "wide": 10 ** (random * 24 - 18),
        "equal": torch.full((4000,), 0.01),
        "close": 0.02 + random * 1e-6,
        "infinite": torch.where(random < 0.1, math.inf, random * 0.1),
        "negative": -(10 ** (random * 6 - 4)),
        "tiny": random * 1e-42,
    }[kind]
    labels = merge_graph(edges, weights, 520, k, min_size)
    with use_backend("reference"):
        assert torch.equal(labels, merge_graph(edges, weights, 520, k, min_size))


@pytest.mark.parametrize(
    "coord",
    [
        torch.zeros(30, 3),
        torch.arange(30.0)[:, None] * torch.tensor([[1.0, 2.0, 0.0]]),
        torch.tensor([[1.0, 2.0, 3.0]]),
        torch.zeros(0, 3),
        torch.rand(40, 3) * 1e-6 + 5000,
    ],
    ids=["one place", "a line", "one point", "no point", "far away"],
)
def test_degenerate_clouds(coord):
    offsets = torch.tensor([0, len(coord)])
    normal = estimate_normals(coord, offsets)
    assert normal.isfinite().all()
    torch.testing.assert_close(normal.norm(dim=1), torch.ones(len(coord)))
    labels = graph_segments(coord, offsets)
    assert labels.shape == coord.shape[:1]
    segments = Segments.of(labels, offsets)
    assert segments.spread(coord).isfinite().all()
    assert segments.sizes.sum() == len(coord)


def test_a_line_has_normals_across_it():
    along = torch.tensor([1.0, 2.0, 0.5])
    normal = estimate_normals(torch.arange(30.0)[:, None] * along, torch.tensor([0, 30]))
    assert (normal @ along).abs().max() < 1e-5


def test_segments_follow_faces_and_never_cross_clouds():
    coord, offsets = box_scene()
    labels = graph_segments(coord, offsets, k=0.2)
    assert labels[: offsets[1]].max() < labels[offsets[2] :].min()
    floor_label = labels[:1500].bincount().argmax()
    assert (labels[:1500] == floor_label).float().mean() > 0.9
    assert (labels[1500:3000] == floor_label).float().mean() < 0.1


def test_order_of_points_and_threads_do_not_matter():
    coord, _ = box_scene()
    coord = torch.cat([(coord * 40).round() / 40, coord[:200]])  # equal distances and weights everywhere
    coord = coord.unique(dim=0)
    offsets = torch.tensor([0, len(coord)])
    color = coord * 100
    labels = graph_segments(coord, offsets, color=color, color_weight=0.1)
    shuffle = torch.randperm(len(coord), generator=torch.Generator().manual_seed(1))
    again = graph_segments(coord[shuffle], offsets, color=color[shuffle], color_weight=0.1)
    assert torch.equal(renumber(labels[shuffle]), again)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(graph_segments(coord, offsets, color=color, color_weight=0.1), labels)
    finally:
        torch.set_num_threads(threads)


def test_mesh_edges_in_any_order_and_direction():
    coord, offsets = box_scene()
    rows = knn(coord, offsets, coord, offsets, 9)[0]
    edges = neighbour_edges(rows, 8)
    labels = graph_segments(coord, offsets, edges=edges)
    shuffled = edges[torch.randperm(len(edges))].flip(1)
    assert torch.equal(labels, graph_segments(coord, offsets, edges=torch.cat([shuffled, shuffled[:50]])))


@pytest.mark.parametrize(("neighbours", "normal_neighbours"), [(10, 16), (7, 16), (4, 16), (10, 6), (16, 16), (1, 3)])
def test_what_is_given_does_not_change_the_rest(neighbours, normal_neighbours):
    """One search serves normals and edges; the graph is that of a search for each."""
    coord, offsets = box_scene()
    built = graph.PointGraph.of(coord, offsets, None, None, neighbours, normal_neighbours)
    given = graph.PointGraph.of(coord, offsets, built.normal, None, neighbours)
    assert torch.equal(given.edges, built.edges)
    assert torch.equal(given.weights, built.weights)
    order = built.place.long().argsort()
    edges = graph.PointGraph.of(coord, offsets, None, order[built.edges.long()], 10, normal_neighbours)
    assert torch.equal(edges.edges, built.edges)
    torch.testing.assert_close(edges.normals, built.normals, rtol=0, atol=1e-6)
    ordered = coord[order]
    rows = knn(ordered, offsets, ordered, offsets, neighbours + 1)[0]
    assert torch.equal(built.edges.long(), neighbour_edges(rows, neighbours))


def test_semantic_term_splits_a_plane():
    coord = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1.0, 0.0])
    offsets = torch.tensor([0, 2000])
    share = torch.nn.functional.one_hot((coord[:, 0] > 0.5).long(), 2).float()
    assert graph_segments(coord, offsets).max() == 0
    labels = graph_segments(coord, offsets, probabilities=share, semantic_weight=1.0)
    assert segment_purity(labels, share.argmax(1)) == 1
    with pytest.raises(ValueError, match="semantic_weight"):
        graph_segments(coord, offsets, semantic_weight=1.0)


@pytest.mark.parametrize(
    ("edges", "weights", "message"),
    [
        ([[0, 5]], [0.0], "outside"),
        ([[0, 1]], [float("nan")], "NaN"),
        ([[0, 1]], [0.0, 1.0], "must be"),
    ],
)
def test_wrong_graphs_are_refused(edges, weights, message):
    with pytest.raises(ValueError, match=message):
        merge_graph(torch.tensor(edges), torch.tensor(weights), 3)


def test_pooling_equals_a_dense_one():
    generator = torch.Generator().manual_seed(0)
    labels = renumber(torch.randint(0, 9, (60,), generator=generator))
    labels = torch.cat([labels, torch.tensor([9, 9, 11])])  # number 10 is left out
    segments = Segments.of(labels, torch.tensor([0, 60, 63]))
    values = torch.randn(63, 4, generator=generator, requires_grad=True)
    dense = torch.nn.functional.one_hot(labels, 12).T.float()
    mean = dense @ values / dense.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(segments.mean(values), mean)
    upstream = torch.randn(12, 4, generator=generator)
    torch.testing.assert_close(
        *(torch.autograd.grad(pooled, values, upstream)[0] for pooled in (segments.mean(values), mean))
    )
    assert torch.equal(segments.max(values)[11], values[62])
    assert segments.offsets.tolist() == [0, 9, 12]
    assert not segments.max(values)[10].any()
    assert Segments.of(labels[:0], torch.tensor([0, 0])).mean(values[:0]).shape == (0, 4)
    with pytest.raises(ValueError, match="two"):
        Segments.of(labels, torch.tensor([0, 10, 63]))


def test_spread_tells_lines_planes_and_clouds():
    generator = torch.Generator().manual_seed(0)
    cube = torch.rand(900, 3, generator=generator)
    cube[:300, 1:] = 0
    cube[300:600, 2] = 0
    labels = torch.arange(900) // 300
    shares = Segments.of(labels, torch.tensor([0, 900])).spread(cube)
    assert shares.argmax(1).tolist() == [0, 1, 2]


def test_segment_graph_counts_crossings():
    labels = torch.tensor([0, 0, 1, 1, 2])
    edges = torch.tensor([[0, 1], [1, 2], [3, 0], [3, 4], [2, 3]])
    pairs, counts, pair = segment_graph(labels, edges)
    assert pairs.tolist() == [[0, 1], [1, 2]]
    assert counts.tolist() == [2, 1]
    assert pair.tolist() == [-1, 0, 0, 1, -1]
    empty = segment_graph(labels[:0], edges[:0])
    assert [len(part) for part in empty] == [0, 0, 0]


def test_votes_and_purity():
    labels, truth = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 2, 1, 0, -1])
    assert [part.tolist() for part in majority(labels, truth, 3)] == [[2, 0, -1], [2, 1, 0]]
    assert majority(torch.tensor([0, 0]), torch.tensor([3, 1]), 1)[0].tolist() == [1]
    assert [part.tolist() for part in majority(labels[:0], truth[:0], 2)] == [[-1, -1], [0, 0]]
    assert segment_purity(labels, truth) == 0.75
    assert segment_purity(labels, torch.full_like(truth, -1)) == 1.0


def test_connected_components():
    pairs = torch.tensor([[5, 3], [1, 2], [3, 0]])
    assert connected_components(pairs, 6).tolist() == [0, 1, 1, 0, 2, 0]
    assert connected_components(pairs[:0], 2).tolist() == [0, 1]


def test_canonical_order_and_edges_equal_the_reference() -> None:
    """Ties of one and two axes, equal points, -0, several clouds, loops, both directions, repeated edges."""
    generator = torch.Generator().manual_seed(0)
    coord = torch.randint(-2, 3, (400, 3), generator=generator).float() * torch.tensor([1.0, -1.0, 0.5])
    offsets = torch.tensor([0, 0, 150, 151, 400])
    edges = torch.randint(0, 400, (3000, 2), generator=generator)
    place = torch.randperm(400, generator=generator)
    ordered, found = graph._in_canonical_order(coord, offsets), graph._distinct_edges(edges, place)
    assert torch.equal(ordered[0], coord[ordered[1]])
    assert torch.equal(ordered[1][ordered[2].long()], torch.arange(400))
    with use_backend("reference"):
        assert all(map(torch.equal, ordered[:2], graph._in_canonical_order(coord, offsets)[:2]))
        assert torch.equal(found.long(), graph._distinct_edges(edges, place))
    with pytest.raises(ValueError, match=r"outside 0\.\.399"):
        graph._distinct_edges(torch.tensor([[0, 400]]), place)
    assert graph._distinct_edges(edges[:0], place[:0]).shape == (0, 2)


@pytest.mark.parametrize("rows", [1, 40, 9000])
def test_distinct_edges_of_every_instruction_set_equal_the_reference(rows: int) -> None:
    """From no edge of a point to hundreds, each up to many times, in both directions."""
    kernels = cpu_kernels()
    if kernels is None:
        pytest.skip("the C++ extension is not built")
    generator = torch.Generator().manual_seed(rows)
    near = torch.randint(0, rows, (3 * rows, 1), generator=generator)
    near = torch.cat([near, (near + torch.randint(-9, 10, near.shape, generator=generator)).clamp(0, rows - 1)], 1)
    hub = torch.stack([torch.full((500,), rows // 2), torch.randint(0, rows, (500,), generator=generator)], 1)
    edges = torch.cat([near, hub, near.flip(1), near[: rows // 2]])
    place = torch.randperm(rows, generator=generator)
    with use_backend("reference"):
        expected = graph._distinct_edges(edges, place)
    for isa in kernels.neighbour_isas():
        assert torch.equal(kernels.distinct_edges(edges.int(), place.int(), isa).long(), expected), isa
    for wrong, message in ((edges + rows, "an edge names a point"), (edges, "a place is outside")):
        with pytest.raises(ValueError, match=message):
            kernels.distinct_edges(wrong.int(), place.int() + (wrong is edges))


def test_canonical_order_of_points_that_are_close_beside_one_that_is_far() -> None:
    """Cells of the curve that differ only in their last bits, with points that share them."""
    generator = torch.Generator().manual_seed(0)
    close = torch.randint(0, 16, (1000, 3), generator=generator) + 0.5 * torch.rand(1000, 3, generator=generator)
    coord = torch.cat([close, torch.tensor([[0.0, 0.0, 0.0], [16383.0, 0.0, 0.0]])])
    offsets = torch.tensor([0, len(coord)])
    ordered = graph._in_canonical_order(coord, offsets)
    with use_backend("reference"):
        assert all(map(torch.equal, ordered[:2], graph._in_canonical_order(coord, offsets)[:2]))


def test_coordinates_that_are_not_finite_are_refused() -> None:
    coord = torch.tensor([[0.0, 0, 0], [math.nan, 0, 0]])
    with pytest.raises(ValueError, match="coordinates that are not finite"):
        graph_segments(coord, torch.tensor([0, 2]), normal=torch.zeros(2, 3), edges=torch.tensor([[0, 1]]))


def test_contraction_sums_what_becomes_parallel():
    pairs = torch.tensor([[0, 1], [1, 2], [0, 2], [3, 2]])
    assert contract_graph(pairs, torch.tensor([5.0, 1.0, -2.0, -1.0]), 5).tolist() == [0, 0, 1, 2, 3]
    assert contract_graph(pairs, torch.tensor([5.0, 3.0, -2.0, -1.0]), 5).tolist() == [0, 0, 0, 1, 2]
    assert contract_graph(pairs, torch.tensor([5.0, 1.0, -2.0, 4.0]), 4).tolist() == [0, 0, 1, 1]
    assert contract_graph(pairs[:0], torch.zeros(0), 2).tolist() == [0, 1]


def test_contraction_equals_the_definition():
    """Against all edges between parts summed anew after every step."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        pairs = torch.randint(0, 14, (40, 2), generator=generator)
        weights = torch.randn(40, generator=generator, dtype=torch.float64)
        part = torch.arange(14)
        while True:
            sums = torch.zeros(14, 14, dtype=torch.float64)
            a, b = part[pairs].unbind(1)
            apart = a != b
            sums.index_put_((torch.minimum(a, b)[apart], torch.maximum(a, b)[apart]), weights[apart], accumulate=True)
            if sums.max() <= 0:
                break
            first, second = divmod(int(sums.argmax()), 14)
            part = torch.where(part == second, first, part)
        assert torch.equal(contract_graph(pairs, weights, 14), renumber(part))
