"""Every sample scan opens with its documented number of points, and survives a round trip in its own format."""

import numpy as np
import pytest
import torch
from io_clouds import assert_one_line, assert_same_cloud

from pc3d.io import WRITABLE, can_read, read, read_labels, write, write_labels

COUNTS = {
    "ahn_amsterdam/ahn_2386_9702.laz": 43536,
    "bench_clouds/fragment.pcd": 113662,
    "bench_clouds/kitti_000008.bin": 17238,
    "bench_clouds/lidar_benchmark-pc.npz": 198130,
    "bench_clouds/nuscenes_lidar_top.bin": 34688,
    "bench_clouds/scannet_scene0000_00.bin": 40684,
    "forest_lidR/MixedConifer.laz": 37657,
    "forest_lidR/Topography.laz": 73403,
    "ign_lidarhd/large_tile/las_with_several_extra_byte_bloc.laz": 697721,
    "ign_lidarhd/sparse_1km/test_semis_2021_0382_6565_LA93_IGN69_cropped.laz": 218731,
    "ign_lidarhd/tiles/test_data_77050_627755_LA93_IGN69.laz": 73355,
    "ign_lidarhd/tiles/test_data_77055_627755_LA93_IGN69.laz": 72770,
    "ign_lidarhd/tiles/test_data_77055_627760_LA93_IGN69.laz": 60653,
    "ign_lidarhd/tiles/test_data_77060_627755_LA93_IGN69.laz": 83518,
    "kitti_object/training/velodyne/000001.bin": 120268,
    "kitti_object/training/velodyne/000002.bin": 126891,
    "mosd_rgbd_instances/learn/learn0.pcd": 182292,
    "mosd_rgbd_instances/learn/learn25.pcd": 195021,
    "reader_zoo/1_4_w_evlr.laz": 1000,
    "reader_zoo/extrabytes.las": 1065,
    "reader_zoo/fullwave.laz": 10750,
    "reader_zoo/simple.copc.laz": 1065,
    "reader_zoo/simple.las": 1065,
    "reader_zoo/simple.laz": 1065,
    "reader_zoo/simple1_1.las": 1065,
    "reader_zoo/simple1_3.las": 999,
    "reader_zoo/testWithNormals.e57": 2,
    "reader_zoo/translationWithoutRotation.e57": 4,
    "reader_zoo/unregistered_extra_bytes.las": 4,
    "s3dis_crop/s3dis_crop_superpoints.npz": 41568,
    "semantickitti/sequences/00/velodyne/000000.bin": 124668,
    "semantickitti/sequences/00/velodyne/000001.bin": 124605,
}
CLASSES = {
    "ahn_amsterdam/ahn_2386_9702.laz": {1: 4876, 2: 26668, 6: 11992},
    "forest_lidR/Topography.laz": {1: 61347, 2: 8159, 9: 3897},
    "reader_zoo/extrabytes.las": {1: 789, 2: 276},
    "ign_lidarhd/tiles/test_data_77050_627755_LA93_IGN69.laz": {1: 1344, 2: 13881, 3: 187, 4: 1190, 5: 29514, 6: 27239},
}
LARGE = 100_000


def sample(data_dir, name):
    path = data_dir / name
    if not path.is_file():
        pytest.skip(f"no {name}")
    pytest.importorskip({".laz": "lazrs", ".las": "lazrs", ".e57": "pye57"}.get(path.suffix, "numpy"))
    return path


@pytest.mark.parametrize("name", COUNTS)
def test_opens_with_its_number_of_points(data_dir, name):
    points = read(sample(data_dir, name))
    assert points.num_points == COUNTS[name]
    assert torch.isfinite(points.coord).all()
    if name in CLASSES:
        codes, counts = points.get("classification").unique(return_counts=True)
        assert dict(zip(codes.tolist(), counts.tolist(), strict=True)) == CLASSES[name]


@pytest.mark.parametrize(
    "name", [name for name, count in COUNTS.items() if count < LARGE and not name.endswith(".e57")]
)
def test_round_trip_in_its_own_format(data_dir, tmp_path, name):
    path = sample(data_dir, name)
    points = read(path)
    again = read(write(tmp_path / f"again{path.suffix}", points))
    assert_same_cloud(points, again)


def test_every_other_file_opens_or_fails_with_one_line(data_dir):
    for path in sorted(data_dir.rglob("*")):
        if not path.is_file() or str(path.relative_to(data_dir)) in COUNTS or not can_read(path):
            continue
        points = assert_one_line(lambda path=path: read(path))
        if points is not None:
            assert path.suffix == ".txt"
            assert {"normal", "column_6"} == set(points.attrs)


@pytest.mark.parametrize("suffix", [suffix for suffix in WRITABLE if suffix not in (".bin", ".pts", ".asc", ".xyz")])
def test_scaled_coordinates_reach_every_format_to_a_tenth_of_a_millimetre(data_dir, tmp_path, suffix):
    points = read(sample(data_dir, "ahn_amsterdam/ahn_2386_9702.laz"))
    again = read(write(tmp_path / f"out{suffix}", points))
    before = points.coord.double().numpy() + points.meta[0]["origin"]
    after = again.coord.double().numpy() + again.meta[0]["origin"]
    assert np.abs(before - after).max() < 1e-4
    assert again.get("classification").tolist() == points.get("classification").tolist()
    assert torch.equal(again.get("gps_time"), points.get("gps_time"))


@pytest.mark.parametrize(
    "name",
    [
        "forest_lidR/MixedConifer.laz",
        "reader_zoo/fullwave.laz",
        "reader_zoo/simple.copc.laz",
        "reader_zoo/simple1_3.las",
        "reader_zoo/extrabytes.las",
        "reader_zoo/1_4_w_evlr.laz",
    ],
)
def test_labels_into_a_copy_of_the_original(data_dir, tmp_path, name):
    laspy = pytest.importorskip("laspy")
    path = sample(data_dir, name)
    points = read(path)
    labels = torch.arange(points.num_points) % 9
    out = write(
        tmp_path / f"out{path.suffix}", points.with_attrs(classification=labels, score=labels / 9), template=path
    )
    before, after = laspy.read(path), laspy.read(out)
    for dimension in before.point_format.dimension_names:
        if dimension != "classification":
            assert np.array_equal(before[dimension], after[dimension], equal_nan=True), dimension
    assert np.array_equal(after.classification, labels)
    assert np.array_equal(after.header.scales, before.header.scales)
    assert np.array_equal(after.header.offsets, before.header.offsets)
    assert not [record for record in after.header.vlrs if record.user_id == "copc"]
    crs = [record.record_data_bytes() for record in before.header.vlrs if record.user_id == "LASF_Projection"]
    assert [record.record_data_bytes() for record in after.header.vlrs if record.user_id == "LASF_Projection"] == crs


def test_organised_scene_keeps_its_pixels(data_dir, tmp_path):
    path = sample(data_dir, "mosd_rgbd_instances/learn/learn0.pcd")
    points = read(path)
    codes, counts = points.get("label").unique(return_counts=True)
    assert dict(zip(codes.tolist(), counts.tolist(), strict=True)) == {1: 153323, 20: 20792, 30: 8177}
    out = write(tmp_path / "out.pcd", points.with_attrs(prediction=points.get("label") // 10), template=path)
    again = read(out)
    assert torch.equal(again.meta[0]["valid_rows"], points.meta[0]["valid_rows"])
    assert torch.equal(again.get("color"), points.get("color"))
    assert torch.equal(again.get("prediction"), points.get("label") // 10)


def test_semantic_kitti_labels(data_dir, tmp_path):
    path = sample(data_dir, "semantickitti/sequences/00/labels/000000.label")
    semantic, instance = read_labels(path, count=124668)
    assert int((semantic == 10).sum()) == 4234
    assert len((instance * 65536 + semantic)[instance > 0].unique()) == 14
    assert write_labels(tmp_path / "a.label", semantic, instance).read_bytes() == path.read_bytes()
