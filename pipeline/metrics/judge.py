"""A language model as the judge of captions (Zheng et al. 2023), and whether its judgement is worth anything."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import SerializeAsAny

from pipeline.config.schema import LLM, MetricSettings, part
from pipeline.metrics.base import DRAWS, Figure, Metric, Tested, mean_of, redrawn
from pipeline.metrics.caption_scores import cider, rouge_l, tokenised
from pipeline.metrics.things import Things

if TYPE_CHECKING:
    import numpy as np

BEFORE = "These captions describe one picture:"
QUESTION = "Does the other caption describe the same picture? Answer Yes or No."
ANSWERS = ("Yes", "No")


class JudgeSettings(MetricSettings):
    # Of the same keys as the section llm; left out: that one, which evaluation has loaded anyway.
    llm: Annotated[SerializeAsAny[LLM] | None, part(LLM)] = None


class Judge(Metric):
    """How probable an LLM holds it that a caption is of the picture that the references describe: Yes against No.

    judge and judge_shuffled: of the model's captions, against their own picture's references and the next picture's;
    judge_references: of a reference, against the others of its picture; judge_auc: how often that is above the same
    against the next picture's; judge_agreement, judge_agreement_cider and judge_agreement_rouge_l: with F1 of things,
    CIDEr-D and ROUGE-L. Intervals are those of drawing the pictures anew.
    """

    tasks, Settings = ("caption",), JudgeSettings
    settings: JudgeSettings

    def figures(self, tested: Tested) -> list[Figure]:
        import numpy as np

        rows = tested.predictions
        captions, references = list(rows["finetuned"]), [list(texts) for texts in rows["references"]]
        several = [texts for texts in references if len(texts) > 1]
        if alone := len(references) - len(several):
            found = f"{alone} of {len(references)} test pictures have no second caption"
            print(f"{tested.data}: {found}, and the judge is not checked with them", file=sys.stderr)
        left, others = [texts[0] for texts in several], [texts[1:] for texts in several]
        pairs: list[tuple[Sequence[str], Sequence[Sequence[str]]]]
        pairs = [(captions, references), (captions, shifted(references)), (left, others), (left, shifted(others))]
        asked = [question(text, texts) for some, of in pairs for text, texts in zip(some, of, strict=True)]
        scores = np.array(tested.chooser(self.settings.llm).shares(BEFORE, asked, QUESTION, ANSWERS))
        ends = np.cumsum([len(some) for some, _ in pairs])[:-1]
        own, shuffled, matched, unmatched = np.split(scores, ends)
        check = auc(matched, unmatched) if len(several) > 1 else None
        figures = [
            mean_of("judge", own, verdict(tested.data, check), kind="share"),
            mean_of("judge_shuffled", shuffled, "judge, against another picture's references", kind="share"),
        ]
        if check:
            figures += [
                mean_of("judge_references", matched, "judge of people's captions", "share", baseline=True),
                check,
            ]
        known = [list(texts) for texts in tested.images.rows["captions"]]
        return figures + agreements(tested.data, own, measured(captions, references, known))


def question(text: str, references: Sequence[str]) -> str:
    """What the judge reads of one caption; each on a line."""
    lines = [f"- {' '.join(reference.split())}" for reference in references]
    return "\n".join([*lines, "The other caption:", f"- {' '.join(text.split())}"])


def shifted(values: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Each picture gets the next one's, the last the first's."""
    return [*values[1:], *values[:1]]


def verdict(data: str, check: Figure | None) -> str:
    """How the judge is called, by its judge_auc; on stderr, too, where it says nothing."""
    if check is None:
        found = "not checked here: no two pictures have two captions"
    elif check.interval is None or check.interval[0] <= 0.5:
        found = "useless here: does not tell captions from shuffled ones"
    else:
        return "judge: caption fits the references"
    print(f"{data}: judge ({found})", file=sys.stderr)
    return f"judge ({found})"


def auc(matched: np.ndarray, unmatched: np.ndarray) -> Figure:
    """How probably a score of the first is above one of the second, of the same or another picture; a tie is half.

    The area under the ROC curve. Both of a picture are drawn together.
    """
    import numpy as np

    above = (np.sign(matched[:, None] - unmatched[None]) + 1) / 2  # [pictures, pictures]
    samples = redrawn(len(matched)) / len(matched)
    low, high = np.quantile(((samples @ above) * samples).sum(1), (0.025, 0.975))
    label = "judge tells people's captions from shuffled ones, AUC"
    return Figure("judge_auc", float(above.mean()), label, (float(low), float(high)), "number", baseline=True)


def measured(
    captions: Sequence[str], references: Sequence[Sequence[str]], known: Sequence[Sequence[str]]
) -> dict[str, tuple[str, np.ndarray]]:
    """What the other measures say of each caption, [n]: by the key of their agreement, with their names.

    `known` are the captions of all pictures, which say what a thing is.
    """
    import numpy as np

    things = Things(known)
    judged = [things.judge(text, texts) for text, texts in zip(captions, references, strict=True)]
    f1 = [2 * row.right / max(1, 2 * row.right + row.wrong + row.missed) for row in judged]
    (said,), held = tokenised([captions]), tokenised(references)
    return {
        "judge_agreement": ("F1 of things", np.array(f1)),
        "judge_agreement_cider": ("CIDEr-D", cider(said, held)),
        "judge_agreement_rouge_l": ("ROUGE-L", rouge_l(said, held)),
    }


def agreements(data: str, scores: np.ndarray, others: dict[str, tuple[str, np.ndarray]]) -> list[Figure]:
    """The agreement with each other measure; with one that is the same for all captions there is none."""
    import numpy as np

    found = []
    for key, (name, values) in others.items():
        if np.ptp(scores) and np.ptp(values):
            found.append(agreement(key, name, scores, values))
        else:
            print(f"{data}: judge or {name} is the same for all captions: no correlation", file=sys.stderr)
    return found


def agreement(key: str, name: str, scores: np.ndarray, others: np.ndarray) -> Figure:
    """Spearman's rank correlation of the judge's scores with another measure; neither may be the same everywhere."""
    import numpy as np
    from scipy.stats import rankdata

    some = np.random.default_rng(0).integers(len(scores), size=(DRAWS, len(scores)))
    a, b = (rankdata(values[np.vstack([np.arange(len(scores)), some])], axis=1) for values in (scores, others))
    a, b = (ranks - ranks.mean(1, keepdims=True) for ranks in (a, b))
    with np.errstate(invalid="ignore"):  # a draw of one picture alone has no correlation
        found = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    low, high = np.nanquantile(found[1:], (0.025, 0.975))
    label = f"judge and {name}, rank correlation over pictures"
    return Figure(key, float(found[0]), label, (float(low), float(high)), "number")
