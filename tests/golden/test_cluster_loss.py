"""The clustering loss against its golden file: centres and memory given, every labelled point an anchor."""

from __future__ import annotations

import pytest
import torch
from harness import Golden, golden_files

from pc3d.losses import ClusterContrast
from pc3d.losses.cluster_contrast import select_anchors


def build(golden: Golden) -> ClusterContrast:
    meta, state = golden.meta, golden.group("state")
    loss = ClusterContrast(
        clusters=meta["K"],
        class_clusters=dict.fromkeys(meta["reduced_classes"], meta["K_reduced"]),
        projection=(),
        memory=meta["memory_per_subclass"],
        temperature=meta["temperature"],
        momentum=meta["ema"],
        exponent=meta["lambda_sinkhorn"],
        as_released=True,
        ignore_index=meta["ignore_label"],
    )
    loss.build(meta["dim"], len(state["cluster_center"]))
    loss.centers.copy_(state["cluster_center"])
    loss.memory.copy_(state["point_queue"])
    return loss


@pytest.mark.parametrize("golden", golden_files("cluster"))
def test_matches_published_implementation(golden: Golden) -> None:
    loss, out = build(golden), golden.group("out")
    feats = golden.tensor("in/feats").requires_grad_()
    target, prediction = golden.tensor("in/labels"), golden.tensor("in/pred")
    rows = select_anchors(target, prediction, 100, len(loss.centers), loss.ignore_index)
    anchors = torch.nn.functional.normalize(feats[0].T[rows], dim=1)
    torch.testing.assert_close(anchors, out["anchor_features"])
    subclass = loss.assign(anchors, target[rows])
    assert torch.equal(subclass, out["anchor_sub_labels"])
    terms = loss.terms(anchors, subclass)
    for name in ("memory", "point", "center"):
        torch.testing.assert_close(terms[name], out[f"loss_point_{name}"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.batch_centers(anchors, subclass), out["new_centers"], rtol=0, atol=1e-6)
    total = loss(feats[0].T, target, prediction)
    torch.testing.assert_close(total, out["loss_total"], rtol=1e-5, atol=1e-6)
    total.backward()
    torch.testing.assert_close(feats.grad, out["grad_feats"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.centers, out["centers_after_ema"], rtol=0, atol=1e-6)
