"""BLEU, ROUGE-L and CIDEr-D of captions, and what captions get that see no picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.metrics import base as metrics
from pipeline.metrics import caption_scores, ptb
from pipeline.metrics.base import Figure, mean_of, read_figures, read_pictures, share_of, write_figures
from pipeline.metrics.caption_scores import CaptionScores, best_constant, mean_cider, most_typical, nearest
from pipeline.metrics.things import FEWEST, NamedThings, Things, unseen
from pipeline.runs import Run
from pipeline.store.reader import ImageTokens

DEMO = Path(__file__).parents[1] / "profiles/demo.yaml"
# What PTBTokenizer of Stanford CoreNLP 3.4.1 gives with -preserveLines -lowerCase, less pycocoevalcap's PUNCTUATIONS.
JAVA = {
    "I don't know.": "i do n't know",
    "A dog's ball, the dogs' bowls": "a dog 's ball the dogs bowls",
    "We can't, won't and shouldn't go!": "we ca n't wo n't and should n't go",
    "they've said we'll cannot gonna": "they 've said we 'll can not gon na",
    "The U.S. flag in the U.S.": "the u.s. flag in the u.s.",
    "Mr. Smith at 10:30 p.m.": "mr. smith at 10:30 p.m.",
    "It costs $10.5 or 1,000 dollars.": "it costs $ 10.5 or 1,000 dollars",
    "10.5.": "10.5",
    "3/4 of a pizza, 50% off #1": "3/4 of a pizza 50 % off # 1",
    "A man (in a red hat) waves.": "a man -lrb- in a red hat -rrb- waves",
    'She says "hello there" to him.': "she says hello there to him",
    'a sign that says "No Parking."': "a sign that says no parking",
    "A 'quoted' word.": "a quoted word",
    "a dog’s “bone”": "a dog 's bone",
    "A dog. A cat; and a bird: two...": "a dog a cat and a bird two",
    "a tri-colored dog -- running": "a tri-colored dog running",
    "9-year-old's T-shirt, AT&T, SUV/van": "9-year-old 's t-shirt at&t suv/van",
    "café — naïve": "café naïve",
    "rock 'n' roll at 5 o'clock in the '90s": "rock 'n' roll at 5 o'clock in the '90s",
    "really ?!": "really ?!",
    "": "",
}


@pytest.mark.parametrize("text", JAVA)
def test_tokens_are_those_of_the_java_tokenizer(text: str) -> None:
    assert ptb.tokens(text) == JAVA[text]


WORDS = ["a", "the", "dog", "cat", "runs", "sits", "red", "on", "grass", "ball"]


def sentences(count: int, seed: int) -> list[str]:
    """Captions of 0 to 9 of WORDS, as their tokens are."""
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=draw.integers(0, 10))) for _ in range(count)]


def pictures(splits: dict[str, list[list[str]]], means: list[list[float]] | None = None) -> ImageTokens:
    """A data set of some captions by split; tokens whose mean over each picture is given."""
    captions = [own for part in splits.values() for own in part]
    names = [name for name, part in splits.items() for _ in part]
    rows = pd.DataFrame({"id": [f"{i:03}" for i in range(len(names))], "captions": captions, "split": names})
    middle = torch.tensor(means if means else [[1.0, 0.0]] * len(names))
    tokens = torch.stack([middle - 3, middle + 3], 1).numpy()
    return ImageTokens(rows, tokens.shape[1:], "float32", lambda some: {"tokens": tokens[some]})


def no_llm(wanted: object) -> None:
    pytest.fail("no LLM is needed for this")


def answered(images: ImageTokens, captions: list[str], pretrained: str = "") -> metrics.Tested:
    """Captions of the test pictures, in a project folder with the files that decide what is kept."""
    params = load_params(DEMO)
    run, rows = Run.of(params), images.rows.iloc[images.split("test")].reset_index(drop=True)
    for path in (run.features("images", "scenes"), run.manifest("scenes")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(list(map(list, images.rows["captions"]))))
    table = {"id": rows["id"], "references": rows["captions"], "finetuned": captions, "pretrained": pretrained}
    return metrics.Tested(params, "scenes", images, pd.DataFrame(table), no_llm)


def figures(of: metrics.Tested) -> dict[str, Figure]:
    return {figure.key: figure for figure in CaptionScores(None).figures(of)}


TEST = [
    ["A dog runs.", "The dog is running on grass."],
    ["Two cats sit on a red sofa.", "Cats on a sofa.", "The cats are asleep."],
    ["A man's bicycle isn't locked."],
    ["People (many) eat at a long table.", "a table full of people eating"],
]
BY_HAND = [
    ["a dog runs", "the dog is running on grass"],
    ["two cats sit on a red sofa", "cats on a sofa", "the cats are asleep"],
    ["a man 's bicycle is n't locked"],
    ["people -lrb- many -rrb- eat at a long table", "a table full of people eating"],
]
SAID = {
    "A dog is running.": "a dog is running", "two cats on a sofa": "two cats on a sofa",
    "A bicycle.": "a bicycle", "a dog's table": "a dog 's table",
}  # fmt: skip


def scenes(train: list[list[str]] | None = None, test: list[list[str]] = TEST) -> ImageTokens:
    """The training pictures look in directions apart, the test pictures as the first of them."""
    train = train or [["a dog", "a brown dog"], ["a cat sits"], ["a table with people", "people"]]
    means = [[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [1.0, 1.0], *[[1.0, 0.1]] * len(test)]
    return pictures({"train": train, "val": [["a dog", "the dog runs"]], "test": test}, means)


def test_scores_are_the_librarys_of_captions_tokenised_by_hand(project: object) -> None:
    found = figures(answered(scenes(), list(SAID), "a cat"))
    references = dict(enumerate(BY_HAND))
    said = {i: [text] for i, text in enumerate(SAID.values())}
    bleu, _ = Bleu(4).compute_score(references, said, verbose=0)
    assert [found[f"bleu_{n}"].value for n in range(1, 5)] == pytest.approx(bleu) and bleu[0] > 0.3
    assert found["rouge_l"].value == pytest.approx(Rouge().compute_score(references, said)[0])
    mean, own = Cider().compute_score(references, said)
    assert found["cider"].value == pytest.approx(mean) and mean > 0.5
    before, _ = Cider().compute_score(references, {i: ["a cat"] for i in range(4)})
    assert found["cider_pretrained"].value == pytest.approx(before)
    turned = {0: BY_HAND[1], 1: BY_HAND[2], 2: BY_HAND[3], 3: BY_HAND[0]}
    shuffled, others = Cider().compute_score(turned, said)
    assert found["cider_shuffled"].value == pytest.approx(shuffled)
    over = found["cider_over_shuffled"]
    assert over.value == pytest.approx(np.mean(own - others))
    assert over.interval and over.interval[0] < over.value < over.interval[1]
    lines = {key for key, figure in found.items() if figure.baseline}
    assert lines == {"cider_constant", "cider_nearest"} and {figure.kind for figure in found.values()} == {"number"}
    near, _ = Cider().compute_score(references, {i: ["a dog"] for i in range(4)})  # the first training picture's
    assert found["cider_nearest"].value == pytest.approx(near)


def test_an_interval_holds_0_only_where_captions_are_no_better() -> None:
    draw = np.random.default_rng(1)
    low, high = mean_of("gain", draw.normal(1, 0.5, 60), "gain").interval or (0, 0)
    assert 0 < low < 1 < high < 1.3
    low, high = mean_of("none", draw.normal(0, 1, 60), "none").interval or (1, 1)
    assert low < 0 < high
    values = draw.normal(0.3, 1, 400)  # against the normal approximation of the same interval
    low, high = mean_of("gain", values, "gain").interval or (0, 0)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.05)


def test_what_a_figure_is_the_mean_of_is_kept_by_picture(tmp_path: Path) -> None:
    ids = ["NA", "7", 'a, "b"', "ü"]
    whole, part = mean_of("cider", np.array([0.1, 0.2, 0.3, 1.4]), "CIDEr-D"), share_of("some", [True, False], "some")
    write_figures(tmp_path, "photos", [whole, share_of("acc", [1, 0, 0, 0], "accuracy"), part], ids)
    assert read_figures(tmp_path, "photos")[0] == whole and len(read_figures(tmp_path, "photos")) == 3
    kept = read_pictures(tmp_path, "photos")
    assert list(kept.index) == ids and list(kept) == ["cider", "acc"]  # `some` is not of all pictures
    assert kept["cider"].tolist() == [0.1, 0.2, 0.3, 1.4] and kept["acc"].mean() == 0.25
    assert read_pictures(tmp_path, "others").empty
    (tmp_path / "photos/pictures.csv").write_text("id,cider\na,high\n")
    with pytest.raises(UserError, match="no table of pictures"):
        read_pictures(tmp_path, "photos")


def test_captions_that_see_are_above_the_blind_ones_and_those_that_do_not_see_are_not(project: object) -> None:
    things = ["dog", "cat", "table", "bus", "train", "kite", "bird", "tree"]
    test = [[f"a {thing} in the field", f"one {thing} stands there"] for thing in things]
    images = scenes(test=test)
    found = figures(answered(images, [f"a {thing} stands there" for thing in things]))
    for blind in ("shuffled", "constant", "nearest"):
        low, _ = found[f"cider_over_{blind}"].interval or (0, 0)
        assert low > 0, blind
    same = figures(answered(images, ["a dog"] * len(things)))
    assert same["cider_over_nearest"].value == 0 and same["cider_over_nearest"].interval == (0, 0)
    low, high = same["cider_over_shuffled"].interval or (1, 1)
    assert low <= 0 <= high


# Captions that no adapter has a part in


def test_mean_cider_is_that_of_the_library() -> None:
    references = [sentences(1 + i % 3, i) for i in range(12)]
    captions = [*sentences(15, 99), "zebra zebra dog dog dog", "", "a"]
    library = [Cider().compute_score(dict(enumerate(references)), {i: [one] for i in range(12)})[0] for one in captions]
    assert mean_cider(captions, references) == pytest.approx(np.array(library), abs=1e-12) and max(library) > 0.1
    short = [["a dog"], ["a cat", "the cat"]]  # no run of three words
    library = [Cider().compute_score(dict(enumerate(short)), {0: ["a cat"], 1: ["a cat"]})[0]]
    assert mean_cider(["a cat"], short) == pytest.approx(np.array(library))


def test_the_best_constant_is_a_training_caption_that_validation_pictures_choose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = [["a red bus"], ["a dog on grass", "some dog"], ["people at a table"], ["one boat at sea"]]
    val = [["a dog on grass", "a dog"], ["the dog on grass"], ["people at a desk"]]
    test = [["one boat at sea"], ["a boat at sea"], ["that boat at sea"]]
    assert best_constant(pictures({"train": train, "val": val, "test": test})) == "a dog on grass"
    assert (
        best_constant(pictures({"train": train, "val": val, "test": [["people at a table"]] * 9})) == "a dog on grass"
    )
    sea = [["a boat at sea"], ["one boat at sea"]]
    assert best_constant(pictures({"train": [*train, *sea], "test": val})) == "one boat at sea"  # twice in training
    monkeypatch.setattr(caption_scores, "POOL", 1)
    assert best_constant(pictures({"train": train, "val": val, "test": test})) in {
        text for own in train for text in own
    }


def test_nearest_is_the_training_picture_with_the_most_alike_mean_token() -> None:
    train = [["up"], ["right", "to the right"], ["left"]]
    splits = {"train": train, "val": [["val"]], "test": [["x"], ["y"], ["z"]]}
    means = [[0.0, 9.0], [0.1, 0.01], [-5.0, 0.2], [1.0, 1.0], [30.0, 2.0], [0.1, 0.8], [-1.0, -0.3]]
    assert nearest(pictures(splits, means), [4, 5, 6]) == ["right", "up", "left"]  # by angle: the longest is up


def test_of_a_pictures_captions_the_most_typical_is_taken() -> None:
    several = ["Something else.", "A dog on the grass.", "a dog on grass"]
    assert most_typical([several, ["One."], ["a b c d", "a b c d", "z"]]) == ["A dog on the grass.", "One.", "a b c d"]
    assert most_typical([["one"]]) == ["one"]


def test_baselines_are_found_once_for_the_same_pictures(project: object, monkeypatch: pytest.MonkeyPatch) -> None:
    images = scenes()
    first = figures(answered(images, list(SAID)))

    def never(*_: object) -> None:
        raise AssertionError("found again")

    monkeypatch.setattr(caption_scores, "nearest", never)
    again = figures(answered(images, ["a dog"] * 4))
    assert again["cider_nearest"] == first["cider_nearest"] and again["cider"] != first["cider"]
    with pytest.raises(AssertionError, match="found again"):
        figures(answered(scenes(test=TEST[:3]), ["a dog"] * 3))


# Things that no training caption names


def test_things_never_captioned_in_training_are_measured_apart() -> None:
    train = [["a dog on grass"] * 3, ["a cat on grass"] * 3] + [
        [f"a {letter * 3} on grass"] * 3 for letter in "bcdefgh"
    ]
    test = [["a zebra on grass", "a zebra"], ["a dog and a giraffe"] * 2, ["a dog"] * 2, ["a yak and a gnu"] * 2]
    things = Things([*train, *test, *[["x on grass"]] * 11])
    said = ["a zebra", "a dog", "a cat", "the yaks and a cat"]
    found = {figure.key: figure for figure in unseen(things, train, test, said)}
    assert found["captioned_unseen"].value == 3 and found["captioned_unseen"].kind == "count"
    assert found["recall_unseen"].value == 2 / 4  # zebra and yak, of these and giraffe and gnu
    # named rightly: zebra, dog, yak; wrongly: cat; not at all: giraffe, gnu and what `and` is
    right, wrong, missed = np.sum([things.judge(said[i], test[i])[:3] for i in (0, 1, 3)], axis=0)
    assert found["f1_unseen"].value == pytest.approx(2 * right / (2 * right + wrong + missed)) and wrong == 1
    assert unseen(things, [*train, *test], test, said) == []
    assert unseen(things, train, test[2:3], said[2:3]) == []


def test_things_of_too_few_pictures_are_one_line(project: object) -> None:
    """Not rows of 0 %: as many as are needed have a thing, all named; then one less."""
    things = [f"{letter * 3}" for letter in "bcdefghijk"]
    test, said = [[f"a {thing} on grass"] for thing in things], [f"the {thing}" for thing in things]
    enough = pictures({"train": [["a dog on grass"], ["a cat on grass"]], "test": test})
    assert len(things) == FEWEST
    found = {figure.key: figure for figure in NamedThings(None).figures(answered(enough, said))}
    assert found["f1"].value == found["recall_unseen"].value == 1 and "things" not in found
    few = pictures({"train": [["a dog on grass"]] * 9, "test": [*test[1:], ["grass"]]})
    found = {figure.key: figure for figure in NamedThings(None).figures(answered(few, [*said[1:], "grass"]))}
    assert found["things"].value == FEWEST - 1 and found["things"].kind == "count" and found["things"].baseline
    assert {*found} == {"things", "repeats", "repeats_pretrained", "repeats_references", "captioned"}
