"""The published measures of captions, BLEU, ROUGE-L and CIDEr-D, beside what captions get that see no picture.

Computed by pycocoevalcap (COCO's caption evaluation, Chen et al. 2015) from the tokens of `pipeline/metrics/ptb.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.metrics.base import Figure, Metric, Tested, mean_of
from pipeline.metrics.probe import pooled
from pipeline.metrics.ptb import tokens

if TYPE_CHECKING:
    import numpy as np

    from pipeline.store.reader import ImageTokens

POOL, JUDGES = 5000, 500
"""The best constant caption is the best of so many training captions for so many validation pictures."""


class CaptionScores(Metric):
    """bleu_1 to bleu_4 (of the corpus; Papineni et al. 2002), rouge_l (Lin 2004) and cider: CIDEr-D (Vedantam et al.
    2015) with the library's factor of 10, whose document frequencies are those of the evaluated pictures' references.

    Beside them the CIDEr-D of captions that see nothing of these pictures, or only whom they resemble: cider_shuffled,
    the same captions held against the next picture's references; cider_constant and cider_nearest, see `Baselines`.
    cider_over_* are the differences, picture by picture; intervals are of pictures drawn anew, at the same frequencies.
    """

    tasks = ("caption",)

    def figures(self, tested: Tested) -> list[Figure]:
        rows, blind = tested.predictions, Baselines.of(tested)
        references = tokenised(rows["references"])
        after, before, nearest = tokenised((rows["finetuned"], rows["pretrained"], blind.nearest))
        own = cider(after, references)
        shuffled = cider(after, [*references[1:], references[0]])
        constant, near = cider([tokens(blind.constant)] * len(rows), references), cider(nearest, references)
        return [
            *by_overlap(after, references),
            mean_of("cider", own, "CIDEr-D"),
            mean_of("cider_pretrained", cider(before, references), "CIDEr-D before fine-tuning"),
            mean_of("cider_shuffled", shuffled, "CIDEr-D against another picture"),
            mean_of("cider_constant", constant, "CIDEr-D of the best constant caption", baseline=True),
            mean_of("cider_nearest", near, "CIDEr-D of the nearest training picture's caption", baseline=True),
            mean_of("cider_over_shuffled", own - shuffled, "CIDEr-D over another picture"),
            mean_of("cider_over_constant", own - constant, "CIDEr-D over the best constant"),
            mean_of("cider_over_nearest", own - near, "CIDEr-D over the nearest picture's"),
        ]


def tokenised(captions: Sequence[Sequence[str]]) -> list[list[str]]:
    """Lists of captions as the library takes them."""
    return [[tokens(text) for text in texts] for texts in captions]


def by_number(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Tokenised references and captions as the library takes them: in lists, by picture."""
    return {i: list(texts) for i, texts in enumerate(references)}, {i: [text] for i, text in enumerate(captions)}


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of each tokenised caption: float64 [n]."""
    from pycocoevalcap.cider.cider import Cider

    return Cider().compute_score(*by_number(captions, references))[1]


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """ROUGE-L of each tokenised caption: float64 [n]."""
    from pycocoevalcap.rouge.rouge import Rouge

    return Rouge().compute_score(*by_number(captions, references))[1]


def by_overlap(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Figure]:
    """BLEU-1 to BLEU-4 and ROUGE-L of tokenised captions."""
    from pycocoevalcap.bleu.bleu import Bleu

    found = by_number(captions, references)
    bleu = enumerate(Bleu(4).compute_score(*found, verbose=0)[0], start=1)
    scores = [Figure(f"bleu_{n}", float(score), f"BLEU-{n}", kind="number") for n, score in bleu]
    return [*scores, mean_of("rouge_l", rouge_l(captions, references), "ROUGE-L")]


class Baselines(NamedTuple):
    """Captions that no adapter has a part in.

    constant: the training caption that gets the highest mean CIDEr-D on validation pictures (on training pictures where
    there are none). nearest: of each test picture, a caption of the training picture with the nearest mean token.
    """

    constant: str
    nearest: list[str]

    @classmethod
    def of(cls, tested: Tested) -> Baselines:
        """Found once for all adapters, and kept like the linear probe."""
        import sklearn

        from pipeline.training.checkpoint import Checkpoint

        run, data, images = tested.run, tested.data, tested.images
        ids = list(tested.predictions["id"])
        inputs = [run.features("images", data), run.manifest(data)]
        kept = Checkpoint.of(run, f"caption-baselines-{data}", [sklearn.__version__, *ids], inputs, __name__)
        state = kept.load()
        if state is None:
            place = {row_id: i for i, row_id in enumerate(images.ids)}
            state = {"constant": best_constant(images), "nearest": nearest(images, [place[row_id] for row_id in ids])}
            kept.save(state)
        return cls(state["constant"], state["nearest"])


def best_constant(images: ImageTokens) -> str:
    """A training caption; no test picture has a say in it."""
    import numpy as np

    draw = np.random.default_rng(0).permutation
    captions = images.rows["captions"]
    pool = [text for i in images.split("train") for text in captions.iloc[i]]
    pool = [pool[i] for i in draw(len(pool))[:POOL]]
    judges = draw(images.split("val") or images.split("train"))[:JUDGES]
    return pool[int(mean_cider([tokens(text) for text in pool], tokenised(captions.iloc[judges])).argmax())]


def mean_cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """The mean over all pictures of the CIDEr-D of each tokenised caption: float64 [captions].

    The library's `cider([caption] * len(references), references).mean()` a thousand times faster, by matrices of
    counts: the clipped product min(h, r) r of two counts is the sum over k = 1, 2, ... of [h >= k] [r >= k] r.
    """
    import numpy as np
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import CountVectorizer

    texts = [text for own in references for text in own]
    each = np.array([len(own) for own in references])
    count = CountVectorizer(ngram_range=(1, 4), token_pattern=r"\S+", lowercase=False).fit([*captions, *texts])
    said, held = (csr_array(count.transform(some), dtype=float) for some in (captions, texts))  # [captions or texts, V]
    size = np.array([name.count(" ") + 1 for name in count.get_feature_names_out()])
    pictures = np.repeat(np.arange(len(each)), each)
    found = csr_array((np.ones(len(texts)), (pictures, np.arange(len(texts))))) @ held
    weight = np.log(len(each) / np.maximum(1, (found > 0).sum(0))) ** 2  # of an n-gram, squared, [V]
    alike = np.zeros((len(captions), len(texts)))
    for n in range(1, 5):
        h, r, w = said[:, size == n], held[:, size == n], weight[size == n]
        norms = np.sqrt(np.outer(h.power(2) @ w, r.power(2) @ w))
        both = sum(((h >= k).astype(float) @ ((r >= k) * r * w).T).toarray() for k in range(1, int(held.max()) + 1))
        alike += both / np.where(norms > 0, norms, 1)
    lengths = [some[:, size == 2].sum(1) for some in (said, held)]  # in the library the pairs of words are the length
    alike *= np.exp(-(np.subtract.outer(*lengths) ** 2) / (2 * 6.0**2))
    return 10 / 4 * alike @ (1 / each / len(each))[pictures]


def nearest(images: ImageTokens, positions: Sequence[int]) -> list[str]:
    """Of each picture, the most typical caption of the training picture whose mean token has the highest cosine to its.

    That is nearest neighbour captioning (Devlin et al. 2015, arXiv:1505.04467) with one neighbour.
    """
    from sklearn.preprocessing import normalize

    train = images.split("train")
    known, asked = (normalize(pooled(images, list(some))) for some in (train, positions))
    parts = (asked[i : i + 256] @ known.T for i in range(0, len(asked), 256))
    found = [train[i] for part in parts for i in part.argmax(1)]
    neighbours = list(dict.fromkeys(found))
    typical = dict(zip(neighbours, most_typical(images.rows["captions"].iloc[neighbours]), strict=True))
    return [typical[i] for i in found]


def most_typical(pictures: Sequence[Sequence[str]]) -> list[str]:
    """Of each picture's captions the one with the highest CIDEr-D against the others; the first where there is one."""
    several = [texts for texts in tokenised(pictures) if len(texts) > 1]
    held = [(text, [*texts[:i], *texts[i + 1 :]]) for texts in several for i, text in enumerate(texts)]
    scores = iter(cider(*zip(*held, strict=True)) if held else ())
    each = [[next(scores) for _ in texts] if len(texts) > 1 else [0.0] for texts in pictures]
    return [texts[own.index(max(own))] for texts, own in zip(pictures, each, strict=True)]
