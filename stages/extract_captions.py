"""Stage extract_captions@<data>."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.config import Params, load_params
from pipeline.runs import Run
from stages import DATA, timed

if TYPE_CHECKING:
    from pipeline.store.shards import Manifest


def extract_captions(data: Annotated[str, typer.Argument(help=DATA)]) -> None:
    """Tokenise all captions and keep the LLM's input embeddings of the tokens that occur in data/store.

    Writes data/<profile>/text/<data>/manifest.json, which names the shards and the table of embeddings.
    """
    params = load_params()
    with timed(params, f"extract_captions@{data}"):
        from pipeline.store.shards import in_use

        with in_use():
            make(params, data).write(Run.of(params).features("text", data))


def make(params: Params, data: str, repair: Manifest | None = None) -> Manifest:
    """The features of a data set, in the store; `repair`: the manifest whose missing shards to make."""
    from pipeline.doctor.prompts import check_prompts
    from pipeline.extraction.captions import extract_captions
    from pipeline.llms.load import context_length, load_embedding, load_tokenizer
    from pipeline.progress import progress_bar
    from pipeline.store.reader import usable_rows

    tokenizer, context = load_tokenizer(params.llm), context_length(params.llm)
    check_prompts(params, tokenizer, context)
    embedding = load_embedding(params.llm)
    rows = usable_rows(Run.of(params), data)
    with progress_bar(f"words of {data}", len(rows), "images") as advance:
        return extract_captions(params, data, tokenizer, embedding, advance, repair, context)
