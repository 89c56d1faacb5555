"""Stage evaluate@<adapter>."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.config.params import AdapterName, Params, load_params
from stages import timed

if TYPE_CHECKING:
    from pipeline.llms.load import LanguageModel
    from pipeline.store.reader import ImageTokens


def evaluate(adapter: Annotated[AdapterName, typer.Argument(help="One of run.adapters.")]) -> None:
    """Measure an adapter: accuracy on the test part of classes, and captions of test pictures.

    The accuracy is the thesis's (the class name appears in the greedy output) and the strict one (the output is the
    class name), beside a linear probe and chance. Captions come from the pre-trained adapter with the frozen LLM and
    from the fine-tuned model. Writes tables and metrics to data/<profile>/evaluate/<adapter>/.
    """
    params = load_params()
    with timed(params, f"evaluate@{adapter}"):
        from pipeline.llms.load import load_llm
        from pipeline.store.reader import ImageTokens
        from pipeline.training.origin import check_results

        base = Path("data") / params.profile
        out = base / "evaluate" / adapter
        out.mkdir(parents=True, exist_ok=True)
        classes, captions = ImageTokens.open(base, "classes"), ImageTokens.open(base, "captions")
        check_results(base, adapter, params.llm)
        llm = load_llm(params.llm, params.runtime.device)  # once: adapters and LoRA are put in and taken out again
        metrics = _classes(params, llm, adapter, classes, out)
        metrics |= _captions(params, llm, adapter, captions, out)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


def _classes(params: Params, llm: LanguageModel, adapter: str, images: ImageTokens, out: Path) -> dict[str, Any]:
    from pipeline.metrics import accuracy as food101
    from pipeline.vlm import tuned

    settings = params.evaluate
    folder = Path("data") / params.profile / "finetune" / f"{adapter}-classes"
    with tuned(llm, folder, "adapter") as model:
        predictions = food101.predict(model, images, settings.class_prompt, settings.class_tokens, settings.batch)
    predictions.to_csv(out / "predictions.csv", index=False)
    food101.per_class(predictions).to_csv(out / "per_class.csv", index=False)
    food101.confusions(predictions).to_csv(out / "confusions.csv", index=False)
    names = food101.class_names(images)
    left_out = len(images.split("test")) - len(predictions)
    if left_out:
        print(f"classes: {left_out} test pictures are left out, whose class name has no words")
    if len(names) == 1:
        print(f"classes: all pictures are of one class, {names[0]!r}: its accuracy says nothing, chance is 100 %")
    return {
        "acc": float(predictions["correct"].mean()),
        "acc_strict": float(predictions["strict"].mean()),
        "valid_name": float(predictions["predicted"].notna().mean()),
        "probe": _probe(Path("data") / params.profile, images),
        "chance": 1 / len(names),
        "test_images": len(predictions),
        "classes": len(names),
    }


def _probe(base: Path, images: ImageTokens) -> float:
    """The linear probe, fitted once: no adapter has a part in it."""
    import sklearn

    from pipeline.metrics import accuracy as food101
    from pipeline.training.checkpoint import Checkpoint

    inputs = [base / "images" / "classes" / "manifest.json", base / "prepare" / "classes.parquet"]
    kept = Checkpoint.of(base, "linear-probe", [sklearn.__version__], inputs, food101.__name__)
    state = kept.load()
    if state is None:
        state = {"accuracy": food101.linear_probe(images)}
        kept.save(state)
    return float(state["accuracy"])


def _captions(params: Params, llm: LanguageModel, adapter: str, images: ImageTokens, out: Path) -> dict[str, Any]:
    from pipeline.metrics import things as c
    from pipeline.vlm import tuned

    base, settings = Path("data") / params.profile, params.evaluate
    positions = c.choose(images, settings.captions, params.seed)
    decoding = {"prefix": settings.pretrained_prefix, "repetition_penalty": settings.pretrained_repetition_penalty}
    texts = {}
    for kind, folder, weights, prompt, extra in (
        ("pretrained", base / "pretrain" / adapter, "last", settings.pretrained_prompt, decoding),
        ("finetuned", base / "finetune" / f"{adapter}-captions", "adapter", settings.finetuned_prompt, {}),
    ):
        with tuned(llm, folder, weights) as model:
            answers = model.answers(images, positions, prompt, settings.caption_tokens, settings.batch, **extra)
        texts[kind] = [answer.split("\n")[0] for answer in answers]  # a caption is one line
    rows = images.rows.iloc[positions]
    references = [list(texts) for texts in rows["captions"]]
    things = c.Things([list(texts) for texts in images.rows["captions"]])
    table = [
        {"id": row_id, "image": image, "references": refs, "pretrained": before, "finetuned": after,
         "right": things.names_one(after, refs)}
        for row_id, image, refs, before, after in zip(
            rows["id"], rows["image"], references, texts["pretrained"], texts["finetuned"], strict=True)
    ]  # fmt: skip
    (out / "captions.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    return {
        "captions_right": things.share(texts["finetuned"], references),
        "captions_right_pretrained": things.share(texts["pretrained"], references),
        # The same captions held against the next picture's references: what saying likely things would get.
        "captions_right_shuffled": things.share(texts["finetuned"], [*references[1:], references[0]]),
        "captioned": len(positions),
    }
