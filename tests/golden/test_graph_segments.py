"""Graph segmentation and pooling against their golden files."""

from __future__ import annotations

import pytest
import torch
from harness import Golden, golden_files

from pc3d.ops.backend import use_backend
from pc3d.ops.graph import Segments, merge_graph, segment_graph


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("golden", golden_files("segment-fusion-graphseg"))
def test_segments_and_pooling(golden: Golden, backend) -> None:
    out, points = golden.group("out"), len(golden.tensor("in/xyz"))
    edges, weights = golden.tensor("in/edges").long(), golden.tensor("in/weights")
    with use_backend(backend):
        labels = merge_graph(edges, weights, points, golden.meta["k"], golden.meta["min_size"])
        assert torch.equal(labels, out["labels"].long())
        raw = merge_graph(edges, weights, points, golden.meta["k"], min_size=1)
        assert torch.equal(raw, out["labels_no_min"].long())
        segments = Segments.of(labels, torch.tensor([0, points]))
        feat = golden.tensor("in/feat")
        torch.testing.assert_close(segments.mean(feat), out["pool_mean"], rtol=0, atol=1e-5)
        torch.testing.assert_close(segments.max(feat), out["pool_max"], rtol=0, atol=0)
    pairs, counts, _ = segment_graph(labels, edges)
    assert torch.equal(pairs, out["segment_edges"].long())
    assert torch.equal(counts, out["segment_edge_count"].long())
