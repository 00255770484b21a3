"""Sizes and settings of LUM. No source gives layers, width, heads or temperature; these are ours."""

import dataclasses
from typing import Literal

from rec_core.embedding import Feature
from rec_core.transformer import TransformerConfig

# name -> (layers, width, head width). The name is the transformer's parameter count without embedding tables, the P of
# the scaling law: 12 * layers * width**2, since four square attention projections and a SwiGLU of hidden width 8/3 of
# the width (rounded up to a multiple of 32) make 12 * width**2 a layer.
SIZES: dict[str, tuple[int, int, int]] = {
    "6k": (2, 16, 8),
    "25k": (2, 32, 16),
    "100k": (2, 64, 32),
    "400k": (2, 128, 32),
    "1m": (5, 128, 32),
    "5m": (6, 256, 64),
    "19m": (6, 512, 64),
    "50m": (10, 640, 64),
    "100m": (14, 768, 64),
    "300m": (24, 1024, 64),
    "1b": (20, 2048, 128),
    "3b": (38, 2560, 128),
    "7b": (35, 4096, 128),
    "14b": (45, 5120, 128),
}


def encoder(size: str, **changes) -> TransformerConfig:
    """The user encoder named by its parameter count, e.g. ``encoder("19m", dtype="bfloat16", remat="full")``."""
    if size not in SIZES:
        raise ValueError(f"encoder: unknown size {size!r}; choose from {', '.join(SIZES)}")
    layers, width, head_width = SIZES[size]
    multiple = 32 if width >= 128 else 1
    hidden = -(-8 * width // (3 * multiple)) * multiple
    heads = width // head_width
    return TransformerConfig(
        **{
            "width": width,
            "layers": layers,
            "heads": heads,
            "kv_heads": heads,
            "head_width": head_width,
            "hidden": hidden,
            **changes,
        }
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the large user model.

    Attributes:
      item: features of an item token; the one named `target` holds the item id by which a negative that is the positive
        is recognised.
      condition: features of a condition token. Several features are several conditions at once. Ignored where
        `condition_tokens` is false.
      transformer: the user encoder; its width is the width of tokens and answers.
      item_content: width of a float content vector that is joined to every item token, 0 for none.
      condition_tokens: False is the ablation: item tokens alone, the output at an item finds the next one.
      similarity: "cosine" or "dot", the sim of the InfoNCE loss.
      temperature: tau of the InfoNCE loss; the starting value where `learn_temperature`.
      negatives: "batch" takes items of the whole global batch, "given" those that the batch brings.
      negative_count: K, how many of the global batch's items serve as negatives; None is all of them.
      own_items: whether items of the query's own user serve as negatives.
      popularity_correction: subtract the log of the sampling probability (`Batch.log_q`) from each similarity.
      chunk: queries whose similarities are held at a time.
    """

    item: tuple[Feature, ...]
    condition: tuple[Feature, ...]
    transformer: TransformerConfig
    target: str = "item"
    item_content: int = 0
    condition_tokens: bool = True
    similarity: Literal["cosine", "dot"] = "cosine"
    temperature: float = 0.05
    learn_temperature: bool = False
    negatives: Literal["batch", "given"] = "batch"
    negative_count: int | None = None
    own_items: bool = True
    popularity_correction: bool = False
    chunk: int = 1024

    def __post_init__(self):
        if self.target not in (f.name for f in self.item):
            raise ValueError(
                f"lum_jax.Config: target={self.target!r} must name one of the item features "
                f"({', '.join(f.name for f in self.item) or 'none given'})"
            )
        if self.condition_tokens and not self.condition:
            raise ValueError("lum_jax.Config: condition=() with condition_tokens=True; give features or turn them off")
        if not self.temperature > 0:
            raise ValueError(f"lum_jax.Config: temperature={self.temperature} must be above 0")
        if self.negative_count is not None and self.negative_count < 1:
            raise ValueError(
                f"lum_jax.Config: negative_count={self.negative_count} must be at least 1, or None for all"
            )
        if self.similarity not in ("cosine", "dot"):
            raise ValueError(f"lum_jax.Config: similarity={self.similarity!r} must be 'cosine' or 'dot'")
        if self.negatives not in ("batch", "given"):
            raise ValueError(f"lum_jax.Config: negatives={self.negatives!r} must be 'batch' or 'given'")
        if self.item_content < 0 or self.chunk < 1:
            raise ValueError(
                f"lum_jax.Config: item_content={self.item_content} must be at least 0, chunk={self.chunk} at least 1"
            )

    @property
    def width(self) -> int:
        """Width of tokens and of the answers o."""
        return self.transformer.width

    @property
    def stride(self) -> int:
        """Tokens an event."""
        return 2 if self.condition_tokens else 1
