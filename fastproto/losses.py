# SPDX-License-Identifier: Apache-2.0
"""The three losses of an episode: segmentation, prototype alignment and cyclic consistency.

Alignment and cycle turn the episode round: the query's prediction, argmax without gradient, takes
the place of the annotation, and the support is segmented from it. They differ in how:

* alignment (PANet, Wang et al., ICCV 2019) by prototype scores alone, without the decoder, which
  shapes the encoder's features;
* cycle by the full network, decoder included.

Neither encodes an image again. A pixel of the support whose class the prediction does not contain
has nothing it could be recognised by and is ignored; a loss without any pixel is 0. Pixels labelled
``IGNORE`` count nowhere, in support and query.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fastproto.defaults import IGNORE
from fastproto.errors import ArgumentError, require
from fastproto.nn.base import Features, FewShotModel, check_labels
from fastproto.nn.baseline import upsample_scores
from fastproto.nn.prototypes import Prototypes, prototype_scores

PARTS = ("ce", "align", "cycle")
MeanWeight = Callable[[Tensor], Tensor]


class EpisodeLike(Protocol):
    """What :class:`EpisodeLoss` reads of an episode."""

    support_images: Tensor  # [E, S, 3, H, W]
    support_masks: Tensor  # [E, S, H, W]
    query_images: Tensor  # [E, Q, 3, H, W]
    query_masks: Tensor  # [E, Q, H, W]
    num_classes: int


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    class_weights: Sequence[float] | Tensor | None = None,
    mean_weight: MeanWeight | None = None,
) -> Tensor:
    """Cross entropy of ``logits`` ``[E, Q, K, H, W]``, weighted by the class of each pixel.

    ``sum(w[y] * -log softmax(logits)[y]) / sum(w[y])`` over the pixels of ``target``
    ``[E, Q, H, W]`` that are not ``IGNORE``; 0, with a zero gradient, if there are none. The K
    ``class_weights`` are at least 0; None weighs all classes the same. Where a batch is spread over
    processes, ``mean_weight`` puts the mean of their denominators in place of this one's: the mean
    of their losses is then that of the whole batch.

    Raises:
        ArgumentError: Shapes that do not fit, or another number of weights.
    """
    classes = logits.shape[2] if logits.ndim == 5 else 0
    require(
        classes and target.shape == (*logits.shape[:2], *logits.shape[3:]),
        "target",
        found=lambda: f"shape {list(target.shape)} with logits of {list(logits.shape)}",
        allowed="[E, Q, H, W] with logits of [E, Q, K, H, W]",
    )
    if class_weights is None:
        weights = logits.new_ones(classes, dtype=torch.float32)
    else:
        weights = torch.as_tensor(class_weights, dtype=torch.float32, device=logits.device)
    if weights.shape != (classes,):
        found, allowed = f"shape {list(weights.shape)}", f"{classes} weights"
        raise ArgumentError("class_weights", found=found, allowed=allowed)
    target = target.long()
    counted = target != IGNORE
    weight = weights[target.clamp(min=0)] * counted  # [E, Q, H, W]
    nll = F.cross_entropy(
        logits.flatten(0, 1), target.flatten(0, 1), ignore_index=IGNORE, reduction="none"
    ).view_as(weight)
    total = weight.sum() if mean_weight is None else mean_weight(weight.sum())
    return (nll * weight).sum() / total.clamp(min=torch.finfo(weight.dtype).tiny)


def alignment_loss(
    model: FewShotModel,
    support: Features,
    support_masks: Tensor,
    query_prototypes: Prototypes,
    class_weights: Sequence[float] | Tensor | None = None,
    mean_weight: MeanWeight | None = None,
) -> Tensor:
    """The encoded support, segmented by scores of the query's prototypes, against its true masks.

    ``support_masks`` are integer labels ``[E, S, H, W]``, ``query_prototypes`` those of
    :func:`predicted_prototypes`, the other two as in :func:`segmentation_loss`.
    """
    scores = prototype_scores(support.bottleneck, query_prototypes, temperature=model.temperature)
    logits = upsample_scores(scores, model.encoder.output_stride, support.size)
    known = _known(support_masks, query_prototypes)
    return segmentation_loss(logits, known, class_weights, mean_weight)


def cycle_loss(
    model: FewShotModel,
    support: Features,
    support_masks: Tensor,
    query_prototypes: Prototypes,
    class_weights: Sequence[float] | Tensor | None = None,
    mean_weight: MeanWeight | None = None,
) -> Tensor:
    """As :func:`alignment_loss`, but segmented by the full network."""
    logits = model.decode(support, query_prototypes)
    known = _known(support_masks, query_prototypes)
    return segmentation_loss(logits, known, class_weights, mean_weight)


def predicted_prototypes(
    model: FewShotModel, query: Features, logits: Tensor, ignored: Tensor | None = None
) -> Prototypes:
    """Prototypes of the query with its own prediction as the annotation.

    The argmax of ``logits`` ``[E, Q, K, H, W]`` carries no gradient; the query's features do.
    Pixels where ``ignored`` ``[E, Q, H, W]`` is true give no prototype.
    """
    predicted = logits.detach().argmax(dim=2)
    if ignored is not None:
        predicted = predicted.masked_fill(ignored, IGNORE)
    return model.extract(query, predicted, logits.shape[2])


@dataclasses.dataclass(frozen=True)
class EpisodeLoss:
    """``total = ce * CE + align * alignment + cycle * cycle`` of one batch of episodes.

    CE is the cross entropy of the query. A weight of 0 leaves a loss out, and its work with it. All
    three take ``class_weights`` and ``mean_weight`` as :func:`segmentation_loss` does.

    Raises:
        ArgumentError: A weight below 0, or none above it.
    """

    ce: float = 1.0
    align: float = 1.0
    cycle: float = 1.0
    class_weights: Sequence[float] | Tensor | None = None
    mean_weight: MeanWeight | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in PARTS}
        allowed = "numbers of at least 0, one above 0"
        fits = min(weights.values()) >= 0 and max(weights.values()) > 0
        require(fits, "loss weights", found=str(weights), allowed=allowed)

    def __call__(
        self, model: FewShotModel, episode: EpisodeLike
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Run the network and its losses.

        Returns:
            The total; the single losses without weights and without gradient (0 for one that is
            left out); the query's logits ``[E, Q, K, H, W]``.

        Raises:
            ArgumentError: An episode that does not fit together.
        """
        support, query = model.encode_episode(episode.support_images, episode.query_images)
        masks, classes = episode.support_masks, episode.num_classes
        query_shape = (*query.bottleneck.shape[:2], *query.size)
        check_labels(episode.query_masks, query_shape, classes, name="query_masks")
        logits = model.decode(query, model.extract(support, masks, classes))

        losses, weighing = {}, (self.class_weights, self.mean_weight)
        if self.ce:
            losses["ce"] = segmentation_loss(logits, episode.query_masks, *weighing)
        if self.align or self.cycle:
            ignored = episode.query_masks == IGNORE
            turned = model, support, masks, predicted_prototypes(model, query, logits, ignored)
            if self.align:
                losses["align"] = alignment_loss(*turned, *weighing)
            if self.cycle:
                losses["cycle"] = cycle_loss(*turned, *weighing)
        total = torch.stack([getattr(self, name) * loss for name, loss in losses.items()]).sum()
        zero = total.new_zeros(())
        return total, {name: losses.get(name, zero).detach() for name in PARTS}, logits


def _known(masks: Tensor, prototypes: Prototypes) -> Tensor:
    """``masks`` with ``IGNORE`` where the class of the pixel has no prototype, too."""
    masks = masks.long()
    present = prototypes.present().gather(1, masks.clamp(min=0).flatten(1)).view_as(masks)
    return masks.masked_fill(~present, IGNORE)
