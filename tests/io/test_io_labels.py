import numpy as np
import pytest
import torch

from pc3d import InputError
from pc3d.io import read_labels, write_labels


def test_halves_of_the_word(tmp_path):
    path = tmp_path / "000000.label"
    np.array([10, 40 | 3 << 16, 65535 | 65535 << 16], "<u4").tofile(path)
    semantic, instance = read_labels(path, count=3)
    assert semantic.tolist() == [10, 40, 65535]
    assert instance.tolist() == [0, 3, 65535]
    assert semantic.dtype == instance.dtype == torch.int64
    again = write_labels(tmp_path / "predictions" / "000000.label", semantic, instance)
    assert again.read_bytes() == path.read_bytes()
    assert read_labels(write_labels(path, semantic))[1].tolist() == [0, 0, 0]


def test_errors_name_file_and_value(tmp_path):
    path = tmp_path / "a.label"
    with pytest.raises(InputError, match=r"a\.label: cannot be read"):
        read_labels(path)
    path.write_bytes(bytes(7))
    with pytest.raises(InputError, match="7 bytes are not a whole number"):
        read_labels(path)
    path.write_bytes(bytes(8))
    with pytest.raises(InputError, match="holds 2 labels for a scan of 3 points"):
        read_labels(path, count=3)
    with pytest.raises(InputError, match="semantic id -1 does not fit"):
        write_labels(path, torch.tensor([3, -1]))
    with pytest.raises(InputError, match="instance id 65536 does not fit"):
        write_labels(path, torch.tensor([3]), torch.tensor([65536]))
    with pytest.raises(InputError, match="2 instance ids for 1 semantic"):
        write_labels(path, torch.tensor([3]), torch.tensor([1, 2]))
    assert path.read_bytes() == bytes(8)
