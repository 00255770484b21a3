"""A catalogue of texts through the lower layers of a language model, into the table that BAHE trains over.

    python -m experiments bahe-encode --model SmolLM2-135M --data ml-1m               # the titles of a dataset's items
    python -m experiments bahe-encode --model model.gguf --texts behaviors.txt        # a text a line

It goes on where it was stopped or killed: texts that are in the table are not encoded again. Several processes share
the work with --process-index and --process-count, into one LMDB or Redis store or each into a part of one array. A
million texts of 23 tokens took 32 seconds of one H100 and 16 processors, compilation included, at 1.1 M tokens a second
behind the first group; `bahe-cost` measures the speed without tokenizer and table (2.0 M).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax

import bahe_jax
from bahe_jax import encode, language_model
from bahe_jax.encode import Progress
from bahe_jax.table import open_table
from experiments import progress, results
from experiments.datasets import Data, load
from experiments.results import Row
from rec_core.data.schema import DataError
from rec_core.sharding import make_mesh


@dataclass(frozen=True)
class BaheEncode:
    """Settings.

    Attributes:
      model: folder or .gguf file of a language model, with its tokenizer.
      texts: file of UTF-8 texts, one a line; bytes that are no UTF-8 are read as U+FFFD. Without it, the items' texts
        of `data`.
      table: "array:FOLDER", a folder for LMDB, or redis://...
      form: "ba" keeps one vector a text, "abe" the states of its tokens.
      split: lower layers; by default half.
      pooling: "mean" or "last".
      limit: most tokens of a text.
      dtype: of the stored numbers. precision: of the computation.
      rows: of a batch. row_length: tokens of each. group: texts that are stored at a time.
      process_index: this process. process_count: processes that share the work.
      out: folder for result.json.
    """

    model: Path
    texts: Path | None = None
    data: Data = field(default_factory=Data)
    table: str = "array:runs/bahe_encode/table"
    form: Literal["ba", "abe"] = "ba"
    split: int | None = None
    pooling: Literal["mean", "last"] = "mean"
    limit: int = 32
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    rows: int = 64
    row_length: int = 512
    group: int = 16_384
    process_index: int = 0
    process_count: int = 1
    out: Path = Path("runs/bahe_encode")


def run(config: BaheEncode) -> results.Result:
    """Encodes what is missing, prints the table of it, writes the result."""
    started = results.begin()
    texts = read_texts(config)
    mesh = make_mesh(jax.local_device_count()) if jax.local_device_count() > 1 else None
    params, model = bahe_jax.read(config.model, dtype=config.precision, mesh=mesh)
    tokenizer = bahe_jax.read_tokenizer(config.model, model)
    settings, lower = lower_part(config, params, model)
    version = encode.version(lower, settings, tokenizer, config.limit)
    kept = config.limit if config.form == "abe" else 0
    seen: list[Progress] = []
    with open_table(
        config.table,
        version=version,
        width=model.width,
        tokens=kept,
        dtype=config.dtype,
        part=config.process_index,
    ) as table:

        def report(now: Progress) -> None:
            seen.append(now)
            print(f"{now.done:,} of {now.total:,} texts, {now.tokens_per_s:,.0f} tokens/s", flush=True)

        now = encode.encode(
            texts,
            tokenizer,
            lower,
            settings,
            table,
            limit=config.limit,
            rows=config.rows,
            row_length=config.row_length,
            group=config.group,
            process_index=config.process_index,
            process_count=config.process_count,
            mesh=mesh,
            on_progress=report,
        )
        held = len(table)
    row: Row = {"texts": now.total, "encoded": now.encoded, "tokens": now.tokens, "seconds": now.seconds}
    row |= {"tokens_per_s": now.tokens_per_s, "in_table": held, "version": version}
    found: dict[str, float] = {"encoded_texts": now.encoded, "encoded_tokens": now.tokens}
    if len(seen) > 1:  # behind the first group, which compiled
        found["tokens_per_s"] = (now.tokens - seen[0].tokens) / (now.seconds - seen[0].seconds)
    outcome = results.record("bahe_encode", started=started, seeds=[0], rows=[row], figures=found)
    results.write(config.out / "result.json", outcome)
    print(progress.table([row]))
    return outcome


def read_texts(config: BaheEncode) -> list[str]:
    """The texts of the file or the dataset.

    Raises:
      DataError: there are none.
    """
    if config.texts is not None:
        try:
            found = config.texts.read_bytes().decode(errors="replace").removesuffix("\n").split("\n")
        except OSError as error:
            raise DataError(f"{config.texts}: cannot be read: {error}") from error
        place = str(config.texts)
    else:
        text, place = load(config.data).item_table.text, f"data={config.data.data!r}"
        found = [] if text is None else list(text)
    if not any(found):
        raise DataError(f"{place}: has no texts: give a file with one a line, or data whose items have a text")
    return found


def lower_part(
    config: BaheEncode, params: dict, model: language_model.Config
) -> tuple[bahe_jax.Config, dict]:  # fmt: skip
    """Settings and parameters of the lower layers."""
    settings = bahe_jax.Config(
        model, sequences=1, split=config.split, setting=config.form, lower="frozen", pooling=config.pooling
    )
    lower = language_model.cut(params, 0, settings.lower_layers)["decoder"]["layers"]
    return settings, {"tables": {"token": params["tables"]["token"]}, "net": {"lower": lower}}
