"""The whole chain through the command line, on rendered pictures, real encoders and a two-layer Mistral."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from pipeline import Features, Model
from pipeline.adapters.module import load_adapter
from pipeline.metrics.accuracy import shuffled_accuracy
from pipeline.metrics.things import Judged, Things, f_score
from pipeline.naming.namer import Namer
from pipeline.runs import Run
from pipeline.store.reader import ImageTokens
from pipeline.tasks.naming import confusions, find_class, per_class
from stages.cli import app

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"open_clip", "timm", "PIL", "transformers", "peft", "bitsandbytes", "torchvision"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from stages.pretrain import pretrain
pretrain("query")
"""

SCRIPT = """
from pipeline import Model
model = Model.load("data/tiny")
print(model.caption(PHOTO))
"""


def terraalign(*arguments, code=0):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, f"{arguments}: {result.output}\n{result.exception!r}"
    return result


def test_every_stage_of_the_graph(tiny_params, tiny_mistral):
    values = yaml.safe_load(Path("params.yaml").read_text())
    values["adapters"]["mlp"]["architecture"]["positions"] = 9
    options = {"space": "whitened", "start": "constant_set", "contrast": 0.1, "temperature": 1.0, "unmatched": 0.2}
    values["adapters"]["mlp"]["pretrain"] = {"objective": options}
    for name in ("self_attention", "query"):
        values["adapters"][name]["pretrain"] = {}  # as few epochs as the first
    values["pretrain"]["batch"] = 8  # some steps an epoch, of so few pictures
    values["llm"]["dtype"] = "float32"  # in bfloat16 a random model's answers of one by one and of a batch may be two
    values["finetune"]["recipes"]["classes"]["hints"] = 2
    values["evaluate"] |= {
        "class_names": "ranked",
        "metrics": ["accuracy", "probe", "things", "caption_scores", "judge"],
    }
    Path("params.yaml").write_text(yaml.safe_dump(values))
    for data in ("captions", "classes"):
        terraalign("prepare", data)
        terraalign("extract-images", data)
        terraalign("extract-captions", data)
    terraalign("inputs")
    terraalign("pretrain", "mlp")
    base = Path("data/tiny")
    history = pd.read_csv(base / "pretrain/mlp/history.csv")
    assert list(history["epoch"]) == [0, 1, 2]
    assert history["val"].iloc[-1] < history["val"].iloc[0]
    metrics = json.loads((base / "pretrain/mlp/metrics.json").read_text())
    assert metrics["image_gain"] == pytest.approx(metrics["shuffled"] - metrics["val"], abs=1e-5)
    assert metrics["const_set"] <= metrics["const_token"]
    assert metrics["plain_gain"] == pytest.approx(metrics["plain_shuffled"] - metrics["plain_val"], abs=1e-5)
    assert {"r5_raw", "r5_debiased", "nearest_in_caption", "nearest_in_shuffled"} <= metrics.keys()
    assert not list((base / "checkpoints").glob("pretrain*"))

    # Pre-training needs cached tensors alone: no encoder, no LLM, no pictures.
    hidden = [(Path("data/raw"), Path("data/hidden")), (tiny_mistral, tiny_mistral.with_name("hidden"))]
    for here, there in hidden:
        here.rename(there)
    try:
        subprocess.run([sys.executable, "-c", BLOCKED], check=True, env=_environment())
    finally:
        for here, there in hidden:
            there.rename(here)
    # As many tokens as the query adapter's, so the same constant set, which is not fitted again.
    fitted = {file.name: file.stat().st_mtime_ns for file in (base / "checkpoints").glob("constant-set-9*")}
    terraalign("pretrain", "self_attention")
    assert {file.name: file.stat().st_mtime_ns for file in (base / "checkpoints").glob("constant-set-9*")} == fitted
    assert len(fitted) == 2  # and beside it the mlp's, whose objective is another
    blind = [json.loads((base / f"pretrain/{name}/metrics.json").read_text()) for name in ("query", "self_attention")]
    assert blind[0]["const_set"] == blind[1]["const_set"]

    photo = next(Path("data/raw").glob("openmoji_food*/images/*/*"))
    [early] = answers("classify", "--json", photo)  # before stage `name`
    assert early["rule"] == "emd" and len(early["names"]) == 5 and early["adapter"] == "mlp"
    assert next(iter(early["names"])) == early["answer"] and early["probability"] == early["names"][early["answer"]]
    for name in ("mlp", "self_attention", "query"):
        terraalign("name", name)
        for data in ("captions", "classes"):
            terraalign("finetune", name, data)
            terraalign("evaluate", name, data)
        terraalign("pca", name)
    terraalign("finetune-scratch", "mlp", "captions")
    terraalign("report")
    assert "<html" in (base / "report/index.html").read_text()
    figures = json.loads((base / "metrics.json").read_text())
    assert {"emd/mlp/val", "retrieval/query/r1_debiased", "classes/mlp/classes/acc", "classes/probe", "classes/chance",
            "classes/mlp/classes/acc_strict", "captions/things", "captions/mlp/captions/repeats",
            "captions/mlp/captions/judge", "captions/judge_auc",
            "captions/mlp/captions/bleu_4", "captions/mlp/captions/cider_over_nearest", "captions/cider_constant",
            "classes/discriminant", "classes/mlp/acc/emd", "classes/mlp/ece/namer", "classes/mlp/classes/acc/combined",
            "classes/mlp/classes/acc/state",
            "captions/mlp/captions/val_loss", "captions/mlp/captions/scratch_val_loss", "pca/mlp/epoch1/k80",
            "pca/mlp/finetuned/k80", "seconds/pretrain@mlp"} <= figures.keys()  # fmt: skip
    _check_answers()
    _check_names_of_another_objective(values)


def test_the_thesis_set_up_runs_through_the_same_code(tiny_params):
    """CoCa's real architecture, the plain objective and NF4, as profiles/thesis.yaml has them; weights are random."""
    thesis = yaml.safe_load((Path(__file__).parent.parent / "profiles/thesis.yaml").read_text())
    values = yaml.safe_load(Path("params.yaml").read_text())
    values["vision"] = {**thesis["vision"], "pretrained": "random", "batch": 8}
    values["llm"]["quantization"] = thesis["llm"]["quantization"]
    values["adapters"] = thesis["adapters"]
    values["pretrain"] |= {key: thesis["pretrain"][key] for key in ("data", "objective")}
    values["pretrain"] |= {"max_steps": 2, "batch": 8}
    values["data"]["captions"]["count"] = 24
    Path("params.yaml").write_text(yaml.safe_dump(values))
    for command in ("prepare", "extract-images", "extract-captions"):
        terraalign(command, "captions")
    terraalign("pretrain", "query")
    terraalign("finetune", "query", "captions")
    base = Path("data/tiny")
    assert ImageTokens.open(Run("tiny"), "captions").shape == (255, 512)
    assert load_adapter(base / "finetune/query-captions", "adapter").body.queries.shape == (128, 512)
    photo = next(Path("data/raw").glob("openmoji_scenes*/images/*"))
    assert f"{photo}: " in terraalign("caption", photo).output


def answers(*arguments, code=0):
    """The JSON lines of a command."""
    return [json.loads(line) for line in terraalign(*arguments, code=code).output.splitlines() if line.startswith("{")]


def _check_answers():
    photos = sorted(Path("data/raw").glob("openmoji_food*/images/*/*"))[:3]
    broken = Path("broken.jpg")
    broken.write_bytes(b"no picture")
    assert [row["photo"] for row in answers("caption", "--json", *photos)] == [str(photo) for photo in photos]
    folder = photos[0].parent
    assert [row["photo"] for row in answers("caption", "--json", folder)] == sorted(map(str, folder.iterdir()))
    names = {folder.name.replace("_", " ") for folder in photos[0].parent.parent.iterdir()}
    for how, key in ((), "probability"), (("--llm",), "recipe"):
        result = terraalign("classify", "--json", *how, photos[0], broken, code=1)
        [row] = [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]
        assert row["photo"] == str(photos[0]) and key in row
        assert "broken.jpg: not a readable picture" in result.output
        if not how:  # without the LLM no answer but the name of a class
            assert row["answer"] in names and len(row["names"]) == 5 and 0 < row["probability"] <= 1
    assert "no such file" in terraalign("caption", "nowhere.jpg", code=2).output
    _check_the_model_in_python(photos, broken)
    _check_snippets(photos)


def _check_the_model_in_python(photos, broken):
    """From another folder, and with the profile no longer the active one."""
    project = Path.cwd()
    model = Model.load(project / "data/tiny")
    [row] = answers("classify", "--json", photos[0])
    with contextlib.chdir("/"):
        there = [project / photo for photo in photos]
        named = model.classify(there[0])
        assert named.text == row["answer"] and named.names == pytest.approx(row["names"], abs=1e-4)
        assert sum(model.classify(there[0], top=100).names.values()) == pytest.approx(1, abs=1e-5)
        by_llm = model.classify(there[0], llm=True, top=100)
        assert sum(by_llm.names.values()) == pytest.approx(1, abs=1e-5) and by_llm.recipe == "classes"
        alone = [model.caption(photo) for photo in there]
        found = dict(model.each([there[0], project / broken, *there[1:]], model.captions(), batch=2))
        assert [found[photo].text for photo in there] == [answer.text for answer in alone]
        assert isinstance(found[project / broken], ValueError)
        with Image.open(there[0]) as opened:  # as bytes, open, and as a file: the same picture
            assert model.classify(opened.convert("RGBA")) == model.classify(there[0].read_bytes()) == named
        so_far: list[str] = []
        said = model.ask(there[0], "What is that?", so_far.append)
        assert so_far and so_far[-1] == said.text and said.recipe == "captions"
        assert model.captions(trained=False)(model.encode(there))[0].recipe is None
        with pytest.raises(ValueError, match="no picture by its content"):
            model.caption(project / broken)
    parts = ImageTokens.open(Run("tiny"), "classes").rows.set_index("image")["split"]
    everything = [Path(name) for name in parts.index]
    with contextlib.chdir("/"):
        assert [model.trained_on(project / photo) for photo in everything] == [part == "train" for part in parts]
        assert not model.trained_on(Image.open(project / everything[0]))
    said = answers("classify", "--json", *everything)
    assert [row["trained_on"] for row in said] == [part == "train" for part in parts]
    script = SCRIPT.replace("PHOTO", repr(str(photos[0])))  # a process that ends while the adapter is in the LLM
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=_environment(), timeout=120)
    assert done.returncode == 0 and done.stdout.decode().strip() == alone[0].text
    assert b"Warning" not in done.stderr  # of libraries
    asked = answers("ask", photos[0], photos[1], "What is that?", "--json")
    assert [row["photo"] for row in asked] == [*map(str, photos[:2])]

    images = Features("data/tiny", "classes", "test")
    batch = next(iter(DataLoader(images, batch_size=4, collate_fn=list)))
    stored = ImageTokens.open(Run("tiny"), "classes")
    assert all(torch.equal(item["tokens"], stored.tokens([stored.ids.index(item["id"])])[0]) for item in batch)
    assert {item["split"] for item in batch} == {"test"} and all(item["label"] for item in batch)
    assert all(item["captions"] for item in Features(project / "data/tiny", "captions").__getitems__([0, 1]))


def _check_snippets(photos):
    """The Python of README.md and docs/python.md as it stands there, but for the profile's name."""
    for name, photo in zip(("photo.jpg", "a.jpg", "b.jpg"), photos, strict=True):
        shutil.copy(photo, name)
    for page, snippets in ("README.md", 2), ("docs/python.md", 2):
        found = re.findall(
            r"^```python\n(.*?)^```", (Path(__file__).parents[1] / page).read_text(encoding="utf-8"), re.M | re.S
        )
        assert len(found) == snippets
        for snippet in found:
            assert page != "README.md" or len(snippet.splitlines()) <= 10
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(snippet.replace("data/demo", "data/tiny"), {})
            assert said.getvalue().strip()


def _check_names_of_another_objective(values):
    """By plain EMD, where the adapter's objective is none."""
    folder = Path("data/tiny/name/mlp/classes")
    assert Namer.load(folder, 1).nearest.into_space is not None
    values["adapters"]["mlp"]["pretrain"] = {"objective": {"name": "qformer", "width": 64}}
    Path("params.yaml").write_text(yaml.safe_dump(values))
    terraalign("pretrain", "mlp")
    terraalign("name", "mlp")
    plain = Namer.load(folder, 1).nearest
    assert (plain.cost, plain.unmatched, plain.into_space) == ("euclidean", 0, None) and (plain.weights == 1).all()


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("hot dog", "hot dog"),
        ("This is a Hot Dog.", "hot dog"),
        ("dog", "dog"),
        ("hotdogs", None),
        ("an apple pie and an apple", "apple pie"),
        ("pineapple", None),
        ("", None),
    ],
)
def test_class_rule(output, name):
    assert find_class(output, ["dog", "hot dog", "apple", "apple pie"]) == name


def test_tables_of_predictions():
    table = pd.DataFrame({"label": ["a", "a", "b", "b"], "predicted": ["a", "b", None, "a"]})
    table["correct"] = table["predicted"] == table["label"]
    assert per_class(table).to_dict("list") == {
        "label": ["a", "b"], "images": [2, 2], "correct": [1, 0], "accuracy": [0.5, 0.0],
    }  # fmt: skip
    pairs = [(said, own) for i, said in enumerate(table["predicted"]) for j, own in enumerate(table["label"]) if i != j]
    assert shuffled_accuracy(table) == pytest.approx(sum(said == own for said, own in pairs) / len(pairs))
    assert confusions(table)["count"].sum() == 3 and "" in set(confusions(table)["predicted"])


def test_things_are_the_pictures_own():
    captions = [["a red dog on blue", "the dog runs", "a dog"]] + [["a cat on blue", "cats", "a cat"]] * 1
    captions += [[f"a {letter * 3} on blue"] * 3 for letter in "bcdefghijklmnopqrstu"]
    things = Things(captions)
    assert things.of(captions[0]) == {"dog"}
    assert things.judge("Two dogs run.", captions[0]) == (1, 0, 0, False)  # what some reference names is not wrong
    assert things.judge("a cat, a ddd and a unicorn", captions[0]) == (0, 2, 1, False)


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("A dog and a dog.", True),
        ("The dog sees a dog", True),
        ("a dog dog", True),
        ("a dog and a red dog", True),
        ("a picture of a picture of a picture", True),
        ("a dog and a hot dog", False),
        ("A red apple and a green apple.", False),
        ("A red apple and a red apple.", True),
        ("The dog is at the top and the apple is at the bottom.", False),
        ("", False),
    ],
)
def test_captions_that_repeat_themselves(text, repeats):
    captions = [["a dog"], ["an apple"], ["a hot dog"], *([f"a red {letter * 3}"] for letter in "bcdefghijklmnopqrstu")]
    assert Things(captions).repeats(text) is repeats


def test_scores_of_all_pictures_together():
    judged = [Judged(2, 0, 0, False)] * 30 + [Judged(1, 1, 1, False)] * 30 + [Judged(0, 0, 2, False)] * 30
    f1, precision, recall = (f_score("", judged, *weights, "") for weights in ((1, 1), (1, 0), (0, 1)))
    assert (f1.value, precision.value, recall.value) == (180 / 300, 90 / 120, 90 / 180)
    for figure in (f1, precision, recall):
        low, high = figure.interval
        assert low < figure.value < high and 0.08 < high - low < 0.25
    nothing = f_score("", [Judged(0, 0, 0, False)], 1, 1, "")
    assert (nothing.value, nothing.interval) == (0, (0, 0))
