"""Image-text retrieval as the field reports it (CLIP Table 13, ALBEF and BLIP tables): any-hit@K, in both directions.
It is no recall (a picture has five captions, one suffices). Ties are pessimistic: every tied wrong item ranks ahead.
Legend: I images, T texts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from shared.metrics.names import metric_name

_CELLS = 16_000_000  # scores ranked at once: 64 MB in fp32, where COCO's whole 5k x 25k takes 500 MB


def retrieval_hits(
    scores: Tensor, text_to_image: Tensor, ks: Sequence[int] = (1, 5, 10), protocol: str = "hit-pessimistic"
) -> dict[str, float]:
    """Any-hit@K of a score matrix (I, T), where text t belongs to the image in row `text_to_image[t]` (T,).

    Returns shares in 0..1 named `retrieval/i2t_r1@<protocol>`, `retrieval/t2i_r1@<protocol>`, ...
    """
    images, texts = scores.shape
    owner = _check(text_to_image, images, texts).to(scores.device)
    return _hits(lambda i: scores[i], lambda t: scores[:, t].T, images, owner, ks, protocol)


def retrieval_hits_from_features(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    protocol: str = "hit-pessimistic",
) -> dict[str, float]:
    """The same from unit features (I, D) and (T, D), without ever holding the (I, T) matrix."""
    owner = _check(text_to_image, len(image_features), len(text_features)).to(image_features.device)
    return _hits(
        lambda i: image_features[i] @ text_features.T,
        lambda t: text_features[t] @ image_features.T,
        len(image_features),
        owner,
        ks,
        protocol,
    )


class RetrievalHits(Metric):
    """Any-hit@K gathered over batches and ranks. Ids tell what belongs together and drop what a sampler repeats.

    `update(image_features (B, D), image_ids (B,), text_features (T, D), text_ids (T,), text_image_ids (T,))`, where
    features are unit vectors and ids integers; `compute()` -> the names of `retrieval_hits`, as 0-d tensors.
    """

    higher_is_better = True
    full_state_update = False
    image_features: list[Tensor]
    image_ids: list[Tensor]
    text_features: list[Tensor]
    text_ids: list[Tensor]
    text_image_ids: list[Tensor]

    def __init__(self, ks: Sequence[int] = (1, 5, 10), protocol: str = "hit-pessimistic") -> None:
        super().__init__()
        self.ks, self.protocol = tuple(ks), protocol
        for name in ("image_features", "image_ids", "text_features", "text_ids", "text_image_ids"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self, image_features: Tensor, image_ids: Tensor, text_features: Tensor, text_ids: Tensor, text_image_ids: Tensor
    ) -> None:
        if len(image_features) != len(image_ids) or not len(text_features) == len(text_ids) == len(text_image_ids):
            raise ValueError(
                f"{len(image_features)} images with {len(image_ids)} ids, {len(text_features)} texts with "
                f"{len(text_ids)} ids and {len(text_image_ids)} image ids: expected as many ids as features"
            )
        self.image_features.append(image_features)
        self.image_ids.append(image_ids)
        self.text_features.append(text_features)
        self.text_ids.append(text_ids)
        self.text_image_ids.append(text_image_ids)

    def compute(self) -> dict[str, Tensor]:
        image_ids, images = _first_of_each(dim_zero_cat(self.image_ids))
        _, texts = _first_of_each(dim_zero_cat(self.text_ids))
        wanted = dim_zero_cat(self.text_image_ids)[texts]
        owner = torch.searchsorted(image_ids, wanted).clamp(max=len(image_ids) - 1)
        if (lost := image_ids[owner] != wanted).any():
            raise ValueError(
                f"{int(lost.sum())} texts name an image that was never added, first: {int(wanted[lost][0])}"
            )
        hits = retrieval_hits_from_features(
            dim_zero_cat(self.image_features)[images],
            dim_zero_cat(self.text_features)[texts],
            owner,
            self.ks,
            self.protocol,
        )
        return {name: torch.tensor(value, dtype=torch.double) for name, value in hits.items()}


def _hits(
    rows: Callable[[slice], Tensor],
    columns: Callable[[slice], Tensor],
    images: int,
    owner: Tensor,
    ks: Sequence[int],
    protocol: str,
) -> dict[str, float]:
    """`rows(slice)` gives scores (chunk, T) of images, `columns(slice)` scores (chunk, I) of texts."""
    texts = len(owner)
    from_image, from_text = [], []
    for i in _chunks(images, texts):
        block = rows(i)  # (chunk, T)
        right = owner == torch.arange(i.start, i.stop, device=owner.device)[:, None]
        best = block.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        # `not <` counts a tie, and a NaN, as ahead; a sibling caption is no rival
        from_image.append((~(block < best) & ~right).sum(dim=1))
    for t in _chunks(texts, images):
        block = columns(t)  # (chunk, I)
        true = block.gather(1, owner[t, None])
        from_text.append((~(block < true)).sum(dim=1) - 1)
    ahead = {"i2t": torch.cat(from_image), "t2i": torch.cat(from_text)}
    return {
        metric_name("retrieval", f"{way}_r{k}", protocol): (count < k).double().mean().item()
        for way, count in ahead.items()
        for k in ks
    }


def _chunks(length: int, width: int) -> list[slice]:
    step = max(1, _CELLS // width)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _check(text_to_image: Tensor, images: int, texts: int) -> Tensor:
    if text_to_image.shape != (texts,) or texts == 0:
        raise ValueError(
            f"text_to_image has shape {tuple(text_to_image.shape)}, expected one image row for {texts} texts"
        )
    if text_to_image.min() < 0 or text_to_image.max() >= images:
        raise ValueError(
            f"text_to_image runs {text_to_image.min()}..{text_to_image.max()}, but there are {images} images"
        )
    if bare := images - len(text_to_image.unique()):
        raise ValueError(f"{bare} of {images} images have no text: image-to-text retrieval is undefined for them")
    return text_to_image


def _first_of_each(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted unique ids, and where each first stands."""
    unique, inverse = ids.unique(return_inverse=True)
    place = torch.arange(len(ids), device=ids.device)
    first = torch.full_like(unique, len(ids)).scatter_reduce(0, inverse, place.to(unique.dtype), "amin")
    return unique, first
