# SPDX-License-Identifier: Apache-2.0
"""From tensors to kernel launches: strides, outputs, grids. Nothing here reads a tensor's values.

Every function takes ``run``, which carries out one :class:`Launch`: at once, through torch.compile,
or, to compile for a GPU that is not there, not at all. Sizes may be symbolic (torch.compile); the
configuration never depends on the number of prototypes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from fastproto.errors import ArgumentError
from fastproto.op.layout import new_maps, pixel_stride, pixels_are_one_dim
from fastproto.op.triton import backward, forward
from fastproto.op.triton.configs import Config, Plan, stats_config

MAX_INT32 = 2**31 - 1
# Below this temperature exp2((c - 1) log2(e) / t) may leave the normal numbers of float32.
SMALLEST_BOUNDED_TEMPERATURE = 2 / 60


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: A ``triton.jit`` function.
        programs: Size of the one-dimensional grid.
        arguments: Tensors, numbers and None, by parameter.
        constants: Compile-time constants, by parameter.
        config: Its tile sizes, warps and stages.
    """

    kernel: Any
    programs: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    config: Config

    @property
    def options(self) -> dict[str, Any]:
        """Everything but grid and arguments, as the launch takes it."""
        return self.constants | {"num_warps": self.config.warps, "num_stages": self.config.stages}


Run = Callable[[Launch], None]


def run_now(launch: Launch) -> None:
    """Launch on the current device and stream."""
    launch.kernel[(launch.programs,)](**launch.arguments, **launch.options)


def walkable(maps: Tensor) -> Tensor:
    """``maps`` [..., C, H, W] itself if the kernels can address it, else an NCHW copy.

    Its pixels must run as one dimension, and one image must lie within 32-bit offsets.
    """
    channels, pixels = maps.shape[-3], maps.shape[-2] * maps.shape[-1]
    reach = (channels - 1) * maps.stride(-3) + (pixels - 1) * pixel_stride(maps)
    return maps if pixels_are_one_dim(maps) and reach <= MAX_INT32 else maps.contiguous()


def temperature_argument(
    feat: Tensor, temperature: float | Tensor
) -> tuple[float | Tensor, dict[str, bool]]:
    """The kernels' ``temperature`` and its constant; a number would pass as float32."""
    if not isinstance(temperature, Tensor) and feat.dtype == torch.float64:
        temperature = feat.new_full([1], temperature)
    return temperature, {"TEMPERATURE_IS_TENSOR": isinstance(temperature, Tensor)}


def needs_running_max(dtype: torch.dtype, temperature: float | Tensor) -> bool:
    """Whether weights below the bound |c| <= 1 could leave the range of their type."""
    if dtype == torch.float16 or isinstance(temperature, Tensor):
        return True
    return temperature < SMALLEST_BOUNDED_TEMPERATURE


def check_size(feat: Tensor, protos: Tensor) -> None:
    """Raise ArgumentError if a map or all bags are too large for the kernels' 32-bit offsets."""
    _, _, dim, height, width = feat.shape
    if 2 * dim * height * width > MAX_INT32:
        raise ArgumentError(
            "feat",
            found=f"{dim} x {height} x {width} values per image",
            allowed=f"at most {MAX_INT32 // 2} with backend 'triton'",
        )
    total = protos.shape[0]
    # A symbolic size is not asked: the answer would be a condition of the compiled graph.
    if isinstance(total, int) and total * dim > MAX_INT32:
        raise ArgumentError(
            "protos",
            found=f"{total} x {dim} values",
            allowed=f"at most {MAX_INT32} with backend 'triton'",
        )


def _shared_constants(feat: Tensor, eps: float, precision: str) -> dict[str, Any]:
    return {
        "D": feat.shape[2],
        "EPS": eps,
        "CENTRED": feat.dtype in (torch.float32, torch.float64),
        "PRECISION": precision if feat.dtype == torch.float32 else "ieee",
    }


def proto_stats(run: Run, protos: Tensor, eps: float) -> Tensor:
    """Mean and reciprocal norm of every row of ``protos`` [N_total, D]: [2, N_total]."""
    acc = torch.float64 if protos.dtype == torch.float64 else torch.float32
    total, dim = protos.shape
    config = stats_config(dim)
    stats = protos.new_empty([2, total], dtype=acc)
    if total > 0:
        run(
            Launch(
                forward.proto_stats_kernel,
                triton.cdiv(total, config.block_n),
                {"protos": protos, "proto_stats": stats, "n_total": total},
                {"D": dim, "EPS": eps, "BLOCK_N": config.block_n, "CHUNK": config.chunk},
                config,
            )
        )
    return stats


def run_forward(
    run: Run,
    plan: Plan,
    feat: Tensor,
    protos: Tensor,
    offsets: Tensor,
    temperature: float | Tensor,
    eps: float,
    concat: bool,
    save: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    """(out, agg, lse, query_stats, proto_stats); all but the first empty unless ``save``."""
    check_size(feat, protos)
    feat, protos, offsets = walkable(feat), protos.contiguous(), offsets.contiguous()
    episodes, queries, dim, height, width = feat.shape
    pixels = height * width
    ways = (offsets.shape[0] - 1) // episodes
    leading = [episodes, queries, ways]
    acc = torch.float64 if feat.dtype == torch.float64 else torch.float32
    config = plan.forward

    out = new_maps(feat, leading, 2 * dim if concat else dim)
    stats = proto_stats(run, protos, eps)
    agg = lse = query_stats = None
    if save:
        agg = new_maps(feat, leading, dim)
        lse = feat.new_empty([*leading, pixels], dtype=acc)
        query_stats = feat.new_empty([episodes, queries, 2, pixels], dtype=acc)

    argument, constant = temperature_argument(feat, temperature)
    programs = episodes * queries * ways * triton.cdiv(pixels, config.block_m) * config.slices(dim)
    if programs > 0:
        run(
            Launch(
                forward.forward_kernel,
                programs,
                {
                    "feat": feat,
                    "protos": protos,
                    "offsets": offsets,
                    "temperature": argument,
                    "proto_stats": stats,
                    "out": out,
                    "agg": agg,
                    "lse": lse,
                    "query_stats": query_stats,
                    "n_total": protos.shape[0],
                    "queries": queries,
                    "ways": ways,
                    "pixels": pixels,
                    "feat_e": feat.stride(0),
                    "feat_q": feat.stride(1),
                    "feat_d": feat.stride(2),
                    "feat_hw": pixel_stride(feat),
                    "out_d": out.stride(3),
                    "out_hw": pixel_stride(out),
                    "agg_d": agg.stride(3) if agg is not None else 0,
                    "agg_hw": pixel_stride(agg) if agg is not None else 0,
                },
                _shared_constants(feat, eps, precision)
                | constant
                | {
                    "CONCAT": concat,
                    "SAVE": save,
                    "ONLINE_MAX": needs_running_max(feat.dtype, temperature),
                }
                | config.constants,
                config,
            )
        )
    if not save:
        nothing = [feat.new_empty([0], dtype=t) for t in (feat.dtype, acc, acc, acc)]
        return (out, *nothing)
    assert agg is not None
    assert lse is not None
    assert query_stats is not None
    return out, agg, lse, query_stats, stats


def run_backward(
    run: Run,
    plan: Plan,
    grad_out: Tensor,
    feat: Tensor,
    protos: Tensor,
    offsets: Tensor,
    temperature: float | Tensor,
    agg: Tensor,
    lse: Tensor,
    query_stats: Tensor,
    proto_stats: Tensor,
    eps: float,
    concat: bool,
    needs_protos: bool,
    needs_temperature: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_feat, grad_protos, grad_temperature); the latter two empty where not needed."""
    feat, protos, offsets = walkable(feat), protos.contiguous(), offsets.contiguous()
    grad_out = walkable(grad_out)
    episodes, queries, dim, height, width = feat.shape
    pixels = height * width
    bags = offsets.shape[0] - 1
    ways = bags // episodes
    grad_feat = new_maps(agg, [episodes, queries], dim)  # where feat was copied: NCHW
    config = plan.backward_query
    tiles = triton.cdiv(pixels, config.block_m)
    delta = torch.empty_like(lse)
    terms = lse.new_empty([episodes * queries * tiles])
    argument, constant = temperature_argument(feat, temperature)
    shared = {
        "grad_out": grad_out,
        "feat": feat,
        "protos": protos,
        "offsets": offsets,
        "temperature": argument,
        "proto_stats": proto_stats,
        "lse": lse,
        "query_stats": query_stats,
        "delta": delta,
        "n_total": protos.shape[0],
        "queries": queries,
        "ways": ways,
        "pixels": pixels,
        "feat_e": feat.stride(0),
        "feat_q": feat.stride(1),
        "feat_d": feat.stride(2),
        "feat_hw": pixel_stride(feat),
        "grad_e": grad_out.stride(0),
        "grad_q": grad_out.stride(1),
        "grad_k": grad_out.stride(2),
        "grad_d": grad_out.stride(3),
        "grad_hw": pixel_stride(grad_out),
    }
    constants = _shared_constants(feat, eps, precision) | constant | {"CONCAT": concat}
    programs = episodes * queries * tiles * config.slices(dim)
    if programs > 0:
        run(
            Launch(
                backward.backward_query_kernel,
                programs,
                shared
                | {
                    "agg": agg,
                    "grad_feat": grad_feat,
                    "temperature_terms": terms,
                    "agg_d": agg.stride(3),
                    "agg_hw": pixel_stride(agg),
                },
                constants | config.constants,
                config,
            )
        )

    grad_protos = protos.new_empty(protos.shape if needs_protos else [0])
    config = plan.backward_protos
    if needs_protos and protos.shape[0] > 0:
        owned = protos.shape[0] // config.block_n + bags + 1  # see find_bag
        run(
            Launch(
                backward.backward_protos_kernel,
                owned * config.slices(dim),
                shared | {"bags": bags, "grad_protos": grad_protos},
                constants | config.constants | {"SEARCH": search_block(bags)},
                config,
            )
        )
    if not needs_temperature:
        return grad_feat, grad_protos, lse.new_empty([0])
    t = temperature if isinstance(temperature, Tensor) else lse.new_full([1], temperature)
    grad_temperature = (-terms.sum() / t.to(terms.dtype)).reshape(1).to(t.dtype)
    return grad_feat, grad_protos, grad_temperature


def search_block(bags: int) -> int:
    """How many offsets find_bag reads at a time."""
    return min(1024, triton.next_power_of_2(bags + 1))
