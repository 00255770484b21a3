"""Settings of the BAHE model; its four forms are the rows of the paper's ablation."""

from dataclasses import dataclass, field

from bahe_jax import language_model

SETTINGS = ("llm_ctr", "fp", "abe", "ba")
POOLINGS = ("mean", "last", "attention")
LOWER = ("table", "frozen", "lora", "full")
UPPER = ("frozen", "lora", "full")
PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclass(frozen=True)
class Lora:
    """Low-rank additions to weight matrices (arXiv 2106.09685): `W x + alpha / rank B A x`.

    Attributes:
      rank: r, width between A and B.
      alpha: their factor, times `rank`.
      projections: which matrices of each layer, of `PROJECTIONS`.
    """

    rank: int = 8
    alpha: float = 16.0
    projections: tuple[str, ...] = ("query", "value")

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"Lora: rank={self.rank}, alpha={self.alpha}: rank must be at least 1, alpha above 0")
        unknown = set(self.projections) - set(PROJECTIONS)
        if unknown or not self.projections:
            raise ValueError(f"Lora: projections={self.projections}: must be one or more of {PROJECTIONS}")


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the paper's BAHE over a table of frozen lower layers.

    Attributes:
      language_model: the decoder that is cut; its `dtype`, `remat` and `attention` are those of the computation.
      sequences: N, kinds of behaviour.
      split: lower layers, 0 to all; None for half.
      setting: "llm_ctr" (one text of all sequences and the item), "fp" (each sequence and the item apart), "abe" (the
        lower layers see one behaviour alone, the upper all tokens of a sequence) or "ba" (the upper layers see one
        vector a behaviour).
      lower: "table" (vectors come with the batch; parameters hold no lower layers), or from tokens in the step with
        the lower layers "frozen", "lora" or "full" (trained, and the token table with them).
      upper: "frozen", "lora" or "full"; with "full" the final norm is trained too.
      pooling: F_p, of a behaviour's tokens and of a sequence: "mean", "last" or "attention" (a learned query, which
        begins as the mean).
      reduced: d^, the width that F_d makes of d.
      lora: what "lora" adds.
      slots: tokens of the longest text that the layers see a sample, item included ("llm_ctr", "fp", "abe"); 0 for as
        many as the batch has places, padding included.
      chunk: distinct behaviours that are encoded at a time in the step. Fastest a little above what batches have; fewer
        take less memory, and what is beyond the first chunk is computed twice.
      row: slots of the rows that they are packed into there.
      hidden, dense, dense_width, dropout: of the click head, as in `rec_core.ranking.ctr.Head`.
    """

    language_model: language_model.Config
    sequences: int
    split: int | None = None
    setting: str = "ba"
    lower: str = "table"
    upper: str = "full"
    pooling: str = "mean"
    reduced: int = 64
    lora: Lora = field(default_factory=Lora)
    slots: int = 0
    chunk: int = 1024
    row: int = 512
    hidden: tuple[int, ...] = (200, 80)
    dense: int = 0
    dense_width: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"bahe_jax.Config: {name} is {getattr(self, name)!r}, {rule}")

        for name, allowed in (("setting", SETTINGS), ("lower", LOWER), ("upper", UPPER), ("pooling", POOLINGS)):
            need(getattr(self, name) in allowed, name, f"must be one of {allowed}")
        need(
            self.lower != "table" or self.by_behavior,
            "lower",
            f'needs setting "abe" or "ba": in {self.setting!r} the lower layers see more than one behaviour; '
            'set lower to "frozen"',
        )
        layers = self.language_model.transformer.layers
        need(0 <= self.lower_layers <= layers, "split", f"must be from 0 to the model's {layers} layers")
        need(not self.slots or self.setting != "ba", "slots", 'must be 0 with "ba", whose upper layers see no tokens')
        for name in ("sequences", "reduced", "chunk", "row", "dense_width"):
            need(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("slots", "dense"):
            need(getattr(self, name) >= 0, name, "must be at least 0")
        need(bool(self.hidden) and min(self.hidden) >= 1, "hidden", "must be widths of at least one layer")
        need(0 <= self.dropout < 1, "dropout", "must be in [0, 1)")

    @property
    def lower_layers(self) -> int:
        """L_low."""
        return self.language_model.transformer.layers // 2 if self.split is None else self.split

    @property
    def by_behavior(self) -> bool:
        """Whether the lower layers see each behaviour alone."""
        return self.setting in ("abe", "ba")

    @property
    def parts(self) -> int:
        """Texts of a sample that are pooled apart, the item's last: N + 1, or for "llm_ctr" the user's and the item's.

        `Q_u` has `(parts - 1) reduced` numbers.
        """
        return 2 if self.setting == "llm_ctr" else self.sequences + 1

    @property
    def dtype(self) -> str:
        """Of the computation; parameters and logits are float32."""
        return self.language_model.transformer.dtype
