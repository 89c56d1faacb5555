"""Stage extract_captions@<data>."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.params import Dataset, load_params
from stages import timed


def extract_captions(data: Annotated[Dataset, typer.Argument(help="captions or classes.")]) -> None:
    """Tokenise all captions and keep the LLM's input embeddings of the tokens that occur in data/store.

    Writes data/<profile>/text/<data>/manifest.json, which names the shards and the table of embeddings.
    """
    params = load_params()
    with timed(params, f"extract_captions@{data}"):
        from pipeline.backbones.llm import load_embedding, load_tokenizer
        from pipeline.extract import extract_captions
        from pipeline.progress import progress_bar
        from pipeline.store.reader import usable_rows

        base = Path("data") / params.profile
        tokenizer, embedding = load_tokenizer(params.llm), load_embedding(params.llm)
        with progress_bar(f"captions of {data}", len(usable_rows(base, data)), "images") as advance:
            manifest = extract_captions(params, data, tokenizer, embedding, advance)
        manifest.write(base / "text" / data / "manifest.json")
