# SPDX-License-Identifier: Apache-2.0
"""3x3 convolutions on a CPU with up to four times fewer multiplications.

Winograd's minimal filtering: m x m results of a 3x3 filter cost (m+2)^2 multiplications, not 9 m^2.
With g the filter and d the (m+2) x (m+2) inputs of a tile::

    Y = A^T [ (G g G^T) * (B^T d B) ] A

A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016. Over all
channels and tiles the product in the middle is (m+2)^2 matrix products, so nearly all work is done
by the BLAS. The rows and columns of a dilated convolution fall apart into convolutions without
dilation, one for each remainder modulo the dilation. ``docs/math.md`` has the bound of the error.
"""

from __future__ import annotations

import math
import threading
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

_LEAST_CHANNELS = 64  # with fewer, moving the data costs more than the products save
_LEAST_TILES = 48  # with fewer, so does transforming the filter
_KEPT = 16 << 20  # numbers in a buffer that is kept, at most: a filter of 512 x 512 has 9
_PART = 5 << 20  # bytes of the transformed input at once, to stay in the cache


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d`` of a 3x3 filter that keeps its input's size at stride 1.

    Where it pays, `winograd_conv3x3` computes it.
    """

    def __init__(self, inputs: int, outputs: int, *, dilation: int = 1, **options: Any):
        super().__init__(inputs, outputs, 3, padding=dilation, dilation=dilation, **options)

    def forward(self, input: Tensor) -> Tensor:
        if self.stride != (1, 1):
            return super().forward(input)
        return conv3x3(input, self.weight, self.bias, self.dilation[0])


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)``, the faster way."""
    if _pays(x, weight, dilation):
        return winograd_conv3x3(x, weight, bias, dilation)
    return F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)


def winograd_conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1
) -> Tensor:
    """The same with gradients, for ``x`` ``[N, C, H, W]`` float32 on the CPU; channels_last."""
    y: Tensor = _Winograd.apply(x, weight, dilation)
    return y if bias is None else y.add_(bias[:, None, None])


def _pays(x: Tensor, weight: Tensor, dilation: int) -> bool:
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    if type(x) is not Tensor or x.ndim != 4 or torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    grid = _Grid(x.shape, dilation)
    return min(weight.shape[:2]) >= _LEAST_CHANNELS and grid.images * grid.tiles >= _LEAST_TILES


class _Matrices(NamedTuple):
    """The transforms of both axes at once, as products of Kronecker."""

    b: Tensor  # [(m+2)^2, (m+2)^2], of the input
    g: Tensor  # [(m+2)^2, 9], of the filter
    a: Tensor  # [m^2, (m+2)^2], of the result


def _matrices(*rows: list[list[float]]) -> _Matrices:
    each = (torch.tensor(one, dtype=torch.float64, device="cpu") for one in rows)
    return _Matrices(*(torch.kron(matrix, matrix).float() for matrix in each))


# For m = 2 and 4, from the points 0, 1, -1 (2, -2) and infinity.
MATRICES = {
    2: _matrices(
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
    ),
    4: _matrices(
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    ),
}


class _Grid:
    """How the rows and columns of images fall into tiles.

    Row ``(i*m + k) * d + r`` is number k of tile i of the rows with remainder r modulo the dilation
    d; columns likewise.
    """

    def __init__(self, shape: torch.Size, dilation: int):
        self.images, _, self.height, self.width = shape
        self.dilation = dilation
        sides = self.height, self.width
        counts = {m: [-(-side // (m * dilation)) for side in sides] for m in MATRICES}
        # of fewest multiplications
        self.m = min(counts, key=lambda m: (m + 2) ** 2 * math.prod(counts[m]))
        self.points = (self.m + 2) ** 2
        self.rows, self.columns = counts[self.m]
        self.tiles = self.rows * self.columns * dilation**2  # of an image

    def parts(self, channels: int) -> list[slice]:
        """Images that are done at once."""
        count = max(1, _PART // (4 * self.points * self.tiles * channels))
        return [slice(i, min(i + count, self.images)) for i in range(0, self.images, count)]

    def transform(self, x: Tensor, name: str, *, gradient: bool = False) -> Tensor:
        """``[n, H, W, C]`` -> the transformed inputs ``[(m+2)^2, n*tiles, C]``.

        With ``gradient`` it makes that of the products from that of the result.
        """
        if gradient:
            matrix, pieces = MATRICES[self.m].a.t(), self._cut(x, self.m, 0)
        else:
            matrix, pieces = MATRICES[self.m].b, self._cut(x, self.m + 2, self.dilation)
        columns = _scratch("pieces", pieces.shape).copy_(pieces).view(matrix.shape[1], -1)
        out = _scratch(name, (self.points, columns.shape[1]))
        return torch.mm(matrix, columns, out=out).view(self.points, -1, x.shape[3])

    def _cut(self, x: Tensor, size: int, border: int) -> Tensor:
        """Pieces ``[size, size, n, rows, d, columns, d, C]`` of images, zero beyond them."""
        d, step = self.dilation, self.m * self.dilation
        below = self.rows * step - self.height + border
        right = self.columns * step - self.width + border
        if border or below or right:
            x = F.pad(x, (0, 0, border, right, border, below))
        image, row, column, channel = x.stride()
        return x.as_strided(
            (size, size, len(x), self.rows, d, self.columns, d, x.shape[3]),
            (d * row, d * column, image, step * row, row, step * column, column, channel),
        )

    def put(self, products: Tensor, out: Tensor) -> None:
        """The result ``out`` [n, H, W, O] from the products ``[(m+2)^2, n*tiles, O]``."""
        m, d, (images, channels) = self.m, self.dilation, (len(out), out.shape[3])
        flat = products.view(self.points, -1)
        pieces = torch.mm(MATRICES[m].a, flat, out=_scratch("pieces", (m * m, flat.shape[1])))
        # [n, rows, m, d, columns, m, d, O]
        result = pieces.view(m, m, images, self.rows, d, self.columns, d, channels).permute(
            2, 3, 0, 4, 5, 1, 6, 7
        )
        if (self.height, self.width) == (self.rows * m * d, self.columns * m * d):
            out.view(result.shape).copy_(result)
        else:
            whole = result.reshape(images, self.rows * m * d, self.columns * m * d, channels)
            out.copy_(whole[:, : self.height, : self.width])


class _Winograd(torch.autograd.Function):
    """Keeps its input and filter for the backward pass, as a direct convolution does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return _convolve(x, weight, dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            sides = [ctx.dilation] * 2
            mask = [*ctx.needs_input_grad[:2], False]
            grads = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [1, 1], sides, sides, False, [0, 0], 1, mask
            )
            return grads[0], grads[1], None
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            # of a convolution that keeps the size: one with the filter turned around
            grad_x = _convolve(grad, weight.flip(2, 3).transpose(0, 1), ctx.dilation)
        if ctx.needs_input_grad[1]:
            grad_weight = _filter_gradient(x, grad, ctx.dilation).to(
                memory_format=torch.channels_last
                if weight.is_contiguous(memory_format=torch.channels_last)
                else torch.contiguous_format
            )
        return grad_x, grad_weight, None


def _convolve(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    grid = _Grid(x.shape, dilation)
    outputs, channels = weight.shape[:2]
    filters = _filters(weight, grid.m)
    rows = x.permute(0, 2, 3, 1).contiguous()
    shape = (len(x), outputs, *x.shape[2:])
    out = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
    pixels = out.permute(0, 2, 3, 1)
    for part in grid.parts(max(channels, outputs)):
        inputs = grid.transform(rows[part], "inputs")
        products = _scratch("products", (*inputs.shape[:2], outputs))
        grid.put(torch.bmm(inputs, filters, out=products), pixels[part])
    return out


_kept_filters: MutableMapping[Tensor, dict[int, Tensor]] = WeakTensorKeyDictionary()  # by m


def keep_filters(module: nn.Module) -> None:
    """From now on transform the filters of its 3x3 convolutions once: they will not change."""
    for each in module.modules():
        if isinstance(each, Conv3x3):
            _kept_filters[each.weight] = {}


def _filters(weight: Tensor, m: int) -> Tensor:
    """The transformed filters ``[(m+2)^2, C, O]``."""
    outputs, channels = weight.shape[:2]
    kept = _kept_filters.get(weight)
    if kept is not None and m in kept:
        return kept[m]
    taps = weight.permute(2, 3, 1, 0).reshape(9, -1)
    shape = ((m + 2) ** 2, taps.shape[1])
    out = None if kept is not None else _scratch("filters", shape)
    filters = torch.mm(MATRICES[m].g, taps, out=out).view(-1, channels, outputs)
    if kept is not None:
        kept[m] = filters
    return filters


def _filter_gradient(x: Tensor, grad: Tensor, dilation: int) -> Tensor:
    """``[O, C, 3, 3]``."""
    grid = _Grid(x.shape, dilation)
    channels, outputs = x.shape[1], grad.shape[1]
    rows, grads = (each.permute(0, 2, 3, 1).contiguous() for each in (x, grad))
    total = _scratch("filters", (grid.points, outputs, channels)).zero_()
    for part in grid.parts(max(channels, outputs)):
        inputs = grid.transform(rows[part], "inputs")
        products = grid.transform(grads[part], "products", gradient=True)
        torch.baddbmm(total, products.transpose(1, 2), inputs, out=total)
    taps = torch.mm(MATRICES[grid.m].g.t(), total.view(grid.points, -1))
    return taps.view(3, 3, outputs, channels).permute(2, 3, 0, 1)


_kept = threading.local()


def _scratch(name: str, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised buffer of this thread, kept between calls.

    Fresh memory would cost as much as the products: the system clears every page of it.
    """
    size = torch.Size(shape).numel()
    buffer: Tensor | None = getattr(_kept, name, None)
    if buffer is None or len(buffer) < size:
        with torch.inference_mode(False):  # so that it serves outside of that mode too
            buffer = torch.empty(size, dtype=torch.float32, device="cpu")
        if size <= _KEPT:
            setattr(_kept, name, buffer)
    return buffer[:size].view(shape)
