"""Captions of pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.config.base import AboveZero, Positive, Prompt, Section
from pipeline.errors import UserError
from pipeline.runs import remedy, require
from pipeline.tasks.base import Models, Task

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.store.reader import ImageTokens
    from pipeline.vlm import VLM


class CaptioningSettings(Section):
    caption_tokens: Positive = 40
    captions: Positive = Field(48, description="test pictures to caption")
    pretrained_prompt: Prompt
    pretrained_prefix: str = Field("", description="first words of a caption before fine-tuning; the LLM goes on")
    pretrained_repetition_penalty: AboveZero = Field(1.0, ge=1, description="1: none")
    finetuned_prompt: Prompt
    finetuned_beams: Positive = Field(1, description="captions that decoding follows at once; 1: greedy")
    finetuned_no_repeat: int = Field(0, ge=0, description="a run of so many tokens stands once; 0: no limit")
    finetuned_once: float = Field(0.0, ge=0, le=1, description="words of this share of pictures or fewer stand once")

    @property
    def before_finetuning(self) -> dict[str, Any]:
        """What the frozen LLM is asked, and how: of what `VLM.generate` takes."""
        return {
            "prompt": self.pretrained_prompt,
            "prefix": self.pretrained_prefix,
            "repetition_penalty": self.pretrained_repetition_penalty,
        }


class Captioning(Task):
    """What is to be seen in a picture, in a sentence."""

    Settings = CaptioningSettings
    settings: CaptioningSettings

    @property
    def prompt(self) -> str:
        return self.settings.finetuned_prompt

    @property
    def prompts(self) -> list[str]:
        return [self.settings.pretrained_prompt, self.prompt]

    @property
    def max_tokens(self) -> int:
        return self.settings.caption_tokens

    def decoding(self, model: VLM, captions: Sequence[Sequence[str]]) -> dict[str, Any]:
        own = self.settings
        once = {"may_repeat": common_tokens(captions, model, own.finetuned_once)} if own.finetuned_once else {}
        return {"beams": own.finetuned_beams, "no_repeat": own.finetuned_no_repeat, **once}

    def answers(self, rows: pd.DataFrame) -> list[list[str]]:
        return [list(texts) for texts in rows["captions"]]

    def predict(self, models: Models, images: ImageTokens, batch: int, seed: int) -> pd.DataFrame:
        """A seeded choice of test pictures: id, image, references, and the captions pretrained and finetuned."""
        from pipeline.store.reader import COUNTED, evenly

        settings = self.settings
        positions = choose(images, settings.captions, seed)
        table = images.rows.iloc[positions][["id", "image"]].reset_index(drop=True)
        table["references"] = [list(texts) for texts in images.rows["captions"].iloc[positions]]
        with models.pretrained() as model:
            asked = settings.before_finetuning
            before = model.answers(images, positions, max_new_tokens=self.max_tokens, batch=batch, **asked)
        with models.finetuned() as model:
            known = images.rows["captions"].iloc[evenly(images.split("train"), COUNTED)]
            decoding = self.decoding(model, known.tolist())
            after = model.answers(images, positions, self.prompt, self.max_tokens, batch, **decoding)
        for column, answers in (("pretrained", before), ("finetuned", after)):
            table[column] = [answer.split("\n")[0] for answer in answers]  # a caption is one line
        return table

    def write(self, predictions: pd.DataFrame, folder: Path) -> None:
        records = predictions.to_dict("records")
        text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
        (folder / "captions.json").write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> pd.DataFrame:
        import pandas as pd

        path = require(folder / "captions.json")
        try:
            table = pd.DataFrame(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            raise UserError(path, "not valid JSON", remedy(folder, force=True)) from None
        missing = [key for key in ("id", "image", "references", "pretrained", "finetuned") if key not in table]
        if missing:
            raise UserError(path, f"no {', '.join(missing)} in it", remedy(folder, force=True))
        return table


def common_tokens(captions: Sequence[Sequence[str]], model: VLM, share: float) -> set[int]:
    """Tokens in the captions of more than a share of training pictures: what a caption may say twice."""
    ids = iter(model.texts.ids([text for texts in captions for text in texts]))  # at once: a fifth of the time
    counts = Counter(token for texts in captions for token in {t for _ in texts for t in next(ids)})
    return {token for token, count in counts.items() if count > share * len(captions)}


def choose(images: ImageTokens, count: int, seed: int) -> list[int]:
    """Positions of a seeded choice of test pictures."""
    import torch

    test = images.split("test")
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(test[i] for i in order[:count])
