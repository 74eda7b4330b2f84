"""How other libraries store sparse convolution kernels, and conversion to and from ``(K, Cin, Cout)``.

Here the kernel offsets are row-major, x slowest and z fastest. Formulas checked against the engines: see
:class:`KernelLayout`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Literal

from torch import Tensor

from pc3d.errors import InputError
from pc3d.sparse import SparseConv3d, SparseConvolution, SparseConvTranspose3d, SubMConv3d

# Spatial columns of the coordinate rows that a foreign network was trained on.
Columns = Literal["xyz", "zyx"]


class KernelLayout(Enum):
    """Axes of a stored kernel, from slowest to fastest. Axes of size k are in the order of the coordinate columns.

    ``KRSC``: spconv 2.2 and later, ``(Cout, kx, ky, kz, Cin)``. ``RSCK``: spconv 1.x, ``(kx, ky, kz, Cin, Cout)``.
    ``RSKC``: some spconv 2.0 and 2.1, ``(kx, ky, kz, Cout, Cin)``. ``MINKOWSKI``: ``(K, Cin, Cout)`` with x fastest.
    ``TORCHSPARSE``: the same for an odd kernel volume, z fastest for an even one.
    ``FVDB``: ``(Cout, Cin, kx, ky, kz)``.

    Where coordinate rows were ``[batch, z, y, x]`` (``columns="zyx"``, spconv in OpenPCDet and MMDetection3D), the
    first kernel axis of the stored tensor is z: x and z change places.
    """

    KRSC = "KRSC"
    RSCK = "RSCK"
    RSKC = "RSKC"
    MINKOWSKI = "MinkowskiEngine"
    TORCHSPARSE = "TorchSparse"
    FVDB = "fVDB"


# Axes of (kx, ky, kz, Cin, Cout) in the stored order.
_AXES = {
    KernelLayout.KRSC: (4, 0, 1, 2, 3),
    KernelLayout.RSCK: (0, 1, 2, 3, 4),
    KernelLayout.RSKC: (0, 1, 2, 4, 3),
    KernelLayout.MINKOWSKI: (2, 1, 0, 3, 4),
    KernelLayout.FVDB: (4, 3, 0, 1, 2),
}
_FLAT = (KernelLayout.MINKOWSKI, KernelLayout.TORCHSPARSE)
_SPCONV = (KernelLayout.KRSC, KernelLayout.RSCK, KernelLayout.RSKC)


def check_semantics(name: str, conv: SparseConvolution, layout: KernelLayout) -> None:
    """Refuse weights whose layer visits other voxels there than here, although their shape fits.

    The layers of spconv are the ones of this package. The others centre odd strided kernels on the corner of a coarse
    cell, make other output voxels, or let even stride-1 kernels reach up only.

    Raises:
        InputError: names the layer and what it would need.
    """
    if layout in _SPCONV or (conv.kernel_size == (1, 1, 1) and isinstance(conv, SubMConv3d)):
        return
    sizes = set(conv.kernel_size)
    if isinstance(conv, SubMConv3d):
        fits, needed = all(size % 2 for size in sizes), "odd kernels at stride 1"
    elif layout is KernelLayout.FVDB:
        fits, needed = sizes <= {1, 2}, "strided kernels of size 2"
    else:
        fits, needed = all(size == 1 or size % 2 == 0 for size in sizes), "strided kernels of even size"
    if isinstance(conv, (SparseConv3d, SparseConvTranspose3d)):
        window = conv.window
        fits = fits and window.stride == conv.kernel_size
        fits = fits and window.padding == (0, 0, 0) and window.dilation == (1, 1, 1)
        needed += " equal to the stride, without padding and dilation"
    if not fits:
        raise InputError(
            f"checkpoint: layer '{name}' ({conv}): {layout.value} applies this kernel to other voxels, so its weights "
            f"cannot be converted; only {needed} can"
        )


def stored_shape(conv: SparseConvolution, layout: KernelLayout, columns: Columns = "xyz") -> tuple[int, ...]:
    """Shape of this layer's kernel in another library."""
    volume, sizes = len(conv.weight), (*conv.kernel_size, conv.in_channels, conv.out_channels)
    if layout in _FLAT:
        return sizes[3:] if volume == 1 else (volume, *sizes[3:])
    return tuple(sizes[axis] for axis in _axes(conv, layout, columns))


def read_kernel(stored: Tensor, conv: SparseConvolution, layout: KernelLayout, columns: Columns = "xyz") -> Tensor:
    """``(K, Cin, Cout)`` from a kernel of :func:`stored_shape`.

    Pointwise layers of spconv are the exception: it multiplies by the raw buffer seen as ``(Cin, Cout)``, whatever the
    declared axes, so their memory is read in that order and nothing is transposed.
    """
    if _is_raw_matrix(conv, layout):
        return stored.reshape(conv.weight.shape)
    axes = _axes(conv, layout, columns)
    sizes = (*conv.kernel_size, conv.in_channels, conv.out_channels)
    order = sorted(range(5), key=axes.__getitem__)
    return stored.reshape([sizes[axis] for axis in axes]).permute(order).reshape(conv.weight.shape)


def write_kernel(weight: Tensor, conv: SparseConvolution, layout: KernelLayout, columns: Columns = "xyz") -> Tensor:
    """The exact inverse of :func:`read_kernel`."""
    shape = stored_shape(conv, layout, columns)
    if _is_raw_matrix(conv, layout):
        return weight.reshape(shape)
    full = weight.reshape(*conv.kernel_size, conv.in_channels, conv.out_channels)
    return full.permute(_axes(conv, layout, columns)).reshape(shape)


def detect_layout(
    stored: Mapping[str, Tensor], convs: Mapping[str, SparseConvolution], columns: Columns = "xyz"
) -> KernelLayout:
    """The layout that fits the shapes of all kernels, or most of them when none fits all.

    Args:
        stored: kernels by name.
        convs: the layers they are meant for, by the same names.
        columns: order of the coordinate rows there.

    Raises:
        InputError: if the shapes leave a choice, e.g. because every layer has as many input as output channels.
    """
    fits = {
        layout: sum(tuple(stored[name].shape) == stored_shape(conv, layout, columns) for name, conv in convs.items())
        for layout in KernelLayout
    }
    best = [layout for layout, count in fits.items() if count == max(fits.values())]
    if len(best) > 1 and max(fits.values()):
        names = ", ".join(layout.value for layout in best)
        raise InputError(f"checkpoint: the kernel shapes fit several layouts ({names}); say which with layout=")
    return best[0]


def _is_raw_matrix(conv: SparseConvolution, layout: KernelLayout) -> bool:
    """A pointwise layer of spconv."""
    if layout is KernelLayout.FVDB or conv.kernel_size != (1, 1, 1):
        return False
    return isinstance(conv, SubMConv3d) or (isinstance(conv, SparseConv3d) and conv.window.stride == (1, 1, 1))


def _axes(conv: SparseConvolution, layout: KernelLayout, columns: Columns) -> tuple[int, ...]:
    if layout is KernelLayout.TORCHSPARSE:
        layout = KernelLayout.MINKOWSKI if len(conv.weight) % 2 else KernelLayout.RSCK
    axes = _AXES[layout]
    return axes if columns == "xyz" else tuple({0: 2, 2: 0}.get(axis, axis) for axis in axes)
