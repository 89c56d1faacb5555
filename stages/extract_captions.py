"""Stage extract_captions@<data>."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.config.params import Dataset, Params, load_params
from stages import timed

if TYPE_CHECKING:
    from pipeline.store.shards import Manifest


def extract_captions(data: Annotated[Dataset, typer.Argument(help="captions or classes.")]) -> None:
    """Tokenise all captions and keep the LLM's input embeddings of the tokens that occur in data/store.

    Writes data/<profile>/text/<data>/manifest.json, which names the shards and the table of embeddings.
    """
    params = load_params()
    with timed(params, f"extract_captions@{data}"):
        from pipeline.store.shards import in_use, manifest_path

        with in_use():
            make(params, data).write(manifest_path(Path("data") / params.profile, "text", data))


def make(params: Params, data: Dataset, repair: Manifest | None = None) -> Manifest:
    """The features of a data set, in the store; `repair`: the manifest whose missing shards to make."""
    from pipeline.extraction.extract import check_prompts, extract_captions
    from pipeline.llms.load import context_length, load_embedding, load_tokenizer
    from pipeline.progress import progress_bar
    from pipeline.store.reader import usable_rows

    tokenizer, context = load_tokenizer(params.llm), context_length(params.llm)
    check_prompts(params, tokenizer, context)
    embedding = load_embedding(params.llm)
    rows = usable_rows(Path("data") / params.profile, data)
    with progress_bar(f"captions of {data}", len(rows), "images") as advance:
        return extract_captions(params, data, tokenizer, embedding, advance, repair, context)
