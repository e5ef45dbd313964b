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

from fastproto.errors import require
from fastproto.op.layout import new_maps, pixel_stride, pixels_are_one_dim
from fastproto.op.triton import backward, forward, support
from fastproto.op.triton.configs import Config, Plan, choose, stats_config

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


def needs_running_max(dtype: torch.dtype, temperature: float | Tensor) -> bool:
    """Whether weights below the bound |c| <= 1 could leave the range of their type."""
    if dtype == torch.float16 or isinstance(temperature, Tensor):
        return True
    return temperature < SMALLEST_BOUNDED_TEMPERATURE


def check_size(feat: Tensor, protos: Tensor) -> None:
    """Raise ArgumentError if a map or all bags are too large for the kernels' 32-bit offsets."""
    _, _, dim, height, width = feat.shape
    require(
        2 * dim * height * width <= MAX_INT32,
        "feat",
        found=lambda: f"{dim} x {height} x {width} values per image",
        allowed=f"at most {MAX_INT32 // 2} with backend 'triton'",
    )
    total = protos.shape[0]
    # A symbolic size is not asked: the answer would be a condition of the compiled graph.
    require(
        not isinstance(total, int) or total * dim <= MAX_INT32,
        "protos",
        found=lambda: f"{total} x {dim} values",
        allowed=f"at most {MAX_INT32} with backend 'triton'",
    )


def float32_precision() -> str:
    """The kernels' form of PyTorch's setting for float32 matrix products.

    "ieee" or unset (the default, "highest") is three TF32 products per product: their sum has the
    digits of float32, at tensor core speed. "tf32" ("high", "medium") is one.
    """
    if torch.version.hip is not None:
        return "ieee"  # Triton has no other for AMD
    setting = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if setting == "tf32" else "tf32x3"


def plan_for(feat: Tensor) -> Plan:
    """The row of the table for these features."""
    # Under torch.compile with dynamic shapes the channels become a constant of the graph.
    return choose(feat.dtype, int(feat.shape[2]), support.INTERPRETED)


def _strides(prefix: str, maps: Tensor, leading: str = "") -> dict[str, int]:
    """Strides of maps [..., C, H, W] by parameter: leading dimensions, channels, pixels."""
    named = {f"{prefix}_{name}": maps.stride(i) for i, name in enumerate(leading)}
    return named | {f"{prefix}_d": maps.stride(-3), f"{prefix}_hw": pixel_stride(maps)}


def _common(
    feat: Tensor,
    protos: Tensor,
    offsets: Tensor,
    temperature: float | Tensor,
    eps: float,
    concat: bool,
    precision: str | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants of the kernels of both passes."""
    episodes, queries, dim, height, width = feat.shape
    if not isinstance(temperature, Tensor) and feat.dtype == torch.float64:
        temperature = feat.new_full([1], temperature)  # a number would pass as float32
    arguments = {
        "feat": feat,
        "protos": protos.contiguous(),
        "offsets": offsets.contiguous(),
        "temperature": temperature,
        "n_total": protos.shape[0],
        "queries": queries,
        "ways": (offsets.shape[0] - 1) // episodes,
        "pixels": height * width,
        **_strides("feat", feat, "eq"),
    }
    constants = {
        "D": dim,
        "EPS": eps,
        "CONCAT": concat,
        "TEMPERATURE_IS_TENSOR": isinstance(temperature, Tensor),
        "CENTRED": feat.dtype in (torch.float32, torch.float64),
        "PRECISION": "ieee" if feat.dtype != torch.float32 else precision or float32_precision(),
    }
    return arguments, constants


def proto_stats(run: Run, protos: Tensor, eps: float) -> Tensor:
    """Mean and reciprocal norm of every row of ``protos`` [N_total, D]: [2, N_total]."""
    total, dim = protos.shape
    config = stats_config(dim)
    stats = protos.new_empty([2, total], dtype=torch.promote_types(protos.dtype, torch.float32))
    if total > 0:
        arguments = {"protos": protos, "proto_stats": stats, "n_total": total}
        constants = {"D": dim, "EPS": eps, "BLOCK_N": config.block_n, "CHUNK": config.chunk}
        programs = triton.cdiv(total, config.block_n)
        run(Launch(forward.proto_stats_kernel, programs, arguments, constants, config))
    return stats


def run_forward(
    run: Run,
    feat: Tensor,
    protos: Tensor,
    offsets: Tensor,
    temperature_tensor: Tensor | None,
    temperature: float,
    eps: float,
    concat: bool,
    save: bool,
    plan: Plan | None = None,
    precision: str | None = None,
) -> Any:
    """(out, agg, lse, query_stats, proto_stats); all but the first empty unless ``save``."""
    check_size(feat, protos)
    feat, t = walkable(feat), temperature if temperature_tensor is None else temperature_tensor
    arguments, constants = _common(feat, protos, offsets, t, eps, concat, precision)
    episodes, queries, dim, height, width = feat.shape
    pixels, leading = height * width, [episodes, queries, arguments["ways"]]
    acc = torch.promote_types(feat.dtype, torch.float32)
    config = (plan or plan_for(feat)).forward

    out = new_maps(feat, leading, 2 * dim if concat else dim)
    stats = proto_stats(run, arguments["protos"], eps)
    saved: dict[str, Any] = {"agg": None, "lse": None, "query_stats": None}
    if save:
        saved["agg"] = new_maps(feat, leading, dim)
        saved["lse"] = feat.new_empty([*leading, pixels], dtype=acc)
        saved["query_stats"] = feat.new_empty([episodes, queries, 2, pixels], dtype=acc)
    arguments |= {"proto_stats": stats, "out": out, **saved, **_strides("out", out)}
    arguments |= _strides("agg", saved["agg"]) if save else {"agg_d": 0, "agg_hw": 0}
    constants |= {"SAVE": save, "ONLINE_MAX": needs_running_max(feat.dtype, t), **config.constants}
    maps = episodes * queries * arguments["ways"]
    programs = maps * triton.cdiv(pixels, config.block_m) * config.slices(dim)
    if programs > 0:
        run(Launch(forward.forward_kernel, programs, arguments, constants, config))
    if not save:
        return (out, *(feat.new_empty([0], dtype=kind) for kind in (feat.dtype, acc, acc, acc)))
    return (out, *saved.values(), stats)


def run_backward(
    run: Run,
    grad_out: Tensor,
    feat: Tensor,
    protos: Tensor,
    offsets: Tensor,
    temperature_tensor: Tensor | None,
    agg: Tensor,
    lse: Tensor,
    query_stats: Tensor,
    proto_stats: Tensor,
    temperature: float,
    eps: float,
    concat: bool,
    needs_protos: bool,
    needs_temperature: bool,
    plan: Plan | None = None,
    precision: str | None = None,
) -> Any:
    """(grad_feat, grad_protos, grad_temperature); the latter two empty where not needed."""
    feat, grad_out = walkable(feat), walkable(grad_out)
    t = temperature if temperature_tensor is None else temperature_tensor
    arguments, constants = _common(feat, protos, offsets, t, eps, concat, precision)
    episodes, queries, dim, height, width = feat.shape
    plan = plan or plan_for(feat)
    config = plan.backward_query
    programs = episodes * queries * triton.cdiv(height * width, config.block_m)
    terms = lse.new_empty([programs])
    grad_feat = new_maps(agg, [episodes, queries], dim)  # where feat was copied: NCHW
    arguments |= {"grad_out": grad_out, **_strides("grad", grad_out, "eqk")}
    arguments |= {"proto_stats": proto_stats, "lse": lse, "query_stats": query_stats}
    arguments["delta"] = torch.empty_like(lse)
    if programs > 0:
        own = {"agg": agg, "grad_feat": grad_feat, "temperature_terms": terms}
        own |= arguments | _strides("agg", agg)
        programs *= config.slices(dim)
        own_constants = constants | config.constants
        run(Launch(backward.backward_query_kernel, programs, own, own_constants, config))

    grad_protos = protos.new_empty(protos.shape if needs_protos else [0])
    if needs_protos and protos.shape[0] > 0:
        bags, config = offsets.shape[0] - 1, plan.backward_protos
        owned = protos.shape[0] // config.block_n + bags + 1  # see find_bag
        own = arguments | {"bags": bags, "grad_protos": grad_protos}
        own_constants = constants | config.constants | {"SEARCH": search_block(bags)}
        programs = owned * config.slices(dim)
        run(Launch(backward.backward_protos_kernel, programs, own, own_constants, config))
    if not needs_temperature:
        return grad_feat, grad_protos, lse.new_empty([0])
    divisor = lse.new_full([1], temperature) if temperature_tensor is None else temperature_tensor
    grad_temperature = -terms.sum() / divisor.to(terms.dtype)
    return grad_feat, grad_protos, grad_temperature.reshape(1).to(divisor.dtype)


def search_block(bags: int) -> int:
    """How many offsets find_bag reads at a time."""
    return min(1024, triton.next_power_of_2(bags + 1))
