# SPDX-License-Identifier: Apache-2.0
"""The op as a module, for those who build their own network around it."""

from __future__ import annotations

from torch import Tensor, nn

from fastproto import defaults
from fastproto.functional import proto_attention
from fastproto.nn.prototypes import Prototypes


class ProtoAttention(nn.Module):
    """``Y = [F ; G*F]``, for every class: ``fastproto.proto_attention`` with its options fixed.

    Args:
        temperature: t, above 0; the smaller, the closer G comes to the most similar prototype.
        eps: Lower bound of the norms in the cosine.
        concat: Whether F precedes ``G*F`` in the result.
        backend: Name of a backend, or None for the best one that can run.

    Example:
        >>> feat = torch.randn(1, 4, 512, 16, 16)
        >>> offsets = torch.tensor([0, 6, 9], dtype=torch.int32)
        >>> prototypes = Prototypes(torch.randn(9, 512), offsets, num_classes=2)
        >>> ProtoAttention()(feat, prototypes).shape
        torch.Size([1, 4, 2, 1024, 16, 16])
    """

    def __init__(
        self,
        temperature: float = defaults.TEMPERATURE,
        *,
        eps: float = defaults.EPS,
        concat: bool = True,
        backend: str | None = None,
    ):
        super().__init__()
        self.temperature = temperature
        self.eps = eps
        self.concat = concat
        self.backend = backend

    def forward(self, feat: Tensor, prototypes: Prototypes) -> Tensor:
        """``[E, Q, D, h, w]`` -> ``[E, Q, K, 2D, h, w]``, or D channels without ``concat``."""
        return proto_attention(
            feat,
            prototypes.protos,
            prototypes.offsets,
            temperature=self.temperature,
            eps=self.eps,
            concat=self.concat,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, concat={self.concat}, backend={self.backend}"
