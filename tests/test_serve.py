"""The page of `terraalign serve`, on a run trained in seconds: by requests, and in a browser."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pipeline import Model
from pipeline.answers import familiar
from pipeline.answers.best import check_trained
from pipeline.answers.model import Answer
from pipeline.errors import UserError
from pipeline.naming.table import Named
from pipeline.runs import Run, stages
from pipeline.serve import app
from pipeline.serve.desk import offered
from pipeline.serve.ledger import _override, command_of, experiments, ledger
from pipeline.serve.words import word_for
from pipeline.store.reader import CaptionTokens, ImageTokens
from pipeline.vlm import VLM
from stages.cli import app as cli

# One adapter, one recipe: what the page needs at least.
STAGES = [
    "prepare captions", "extract-images captions", "extract-captions captions",
    "prepare classes", "extract-images classes", "extract-captions classes",
    "inputs", "pretrain mlp", "name mlp", "finetune mlp captions",
]  # fmt: skip


@pytest.fixture(scope="module")
def served(tiny_project, tmp_path_factory) -> Iterator[str]:
    """The address of the page of a trained run, whose project is the current folder."""
    folder, addresses, there = tmp_path_factory.mktemp("served"), list[str](), threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(familiar, "FEWEST", 2)
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        params = tiny_project(folder, patch)
        for stage in STAGES:
            result = CliRunner().invoke(cli, stage.split())
            assert result.exit_code == 0, f"{stage}: {result.output}\n{result.exception!r}"

        def ready(address: str) -> None:
            addresses.append(address)
            there.set()

        threading.Thread(target=app.serve, args=(params, "127.0.0.1", 0, ready), daemon=True).start()
        assert there.wait(60)
        # Random weights are drawn by torch's global numbers: nothing else may draw any while the encoder is built.
        events(f"{addresses[0]}/api/answer", png(64, 64))
        yield addresses[0]


@pytest.fixture(scope="module")
def model(served: str) -> Model:
    return Model.load("data/tiny")


@pytest.fixture(scope="module")
def photos() -> list[Path]:
    return [Path(path) for path in ImageTokens.open(Run("tiny"), "classes").rows["image"][:4]]


def request(url: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    asked = urllib.request.Request(url, body, {key.replace("_", "-"): value for key, value in headers.items()})
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as fault:
        return fault.code, fault.read()


def get(url: str, **query: object) -> dict:
    status, content = request(f"{url}?{urlencode(query)}")
    assert status == 200, content
    return json.loads(content)


def events(url: str, body: bytes) -> dict[str, dict]:
    status, content = request(url, body)
    assert status == 200, content
    return {event["event"]: event for event in map(json.loads, content.splitlines())}


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def files() -> set[Path]:
    return {path for folder in (Path(), Path(tempfile.gettempdir())) for path in folder.rglob("*")}


# By requests.


def test_what_is_said_is_the_models_and_nothing_is_kept(served, model, photos):
    before, content = files(), photos[0].read_bytes()
    said = events(f"{served}/api/answer", content)
    assert said["caption"]["text"] == model.caption(content).text and said["caption"]["recipe"] == "captions"
    assert said["before"]["text"] == model.captions(trained=False)(model.encode([content]))[0].text
    for event, rule in (("names", "namer"), ("emd", "emd")):
        answer = model.names(rule=rule)(model.encode([content]))[0]
        assert said[event]["text"] == answer.text
        assert dict(said[event]["names"]) == pytest.approx(answer.names, abs=1e-6)
    assert "nothing is fine-tuned for the task classify yet" in said["classes"]["missing"]
    asked = events(f"{served}/api/ask?question=What%20is%20that%3F", content)
    assert asked["answer"]["text"] == model.ask(content, "What is that?").text and not asked["answer"]["caution"]
    assert files() == before


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"no picture at all", 400, "not a picture"),
        (b"", 400, "empty file"),
        (png(64, 64)[:-40], 400, "does not decode"),
        (png(20_000, 3_000, "1"), 400, "too large: 20000 x 3000 pixels"),
        (b"x" * (app.MOST_BYTES + 1), 413, "too large: at most 25 MB"),
    ],
)
def test_what_is_no_picture_or_too_large_is_refused(served, body, status, reason):
    for path in ("answer", "inside", "similar"):
        with contextlib.suppress(ConnectionError, urllib.error.URLError):  # refused before all of it was sent
            code, content = request(f"{served}/api/{path}", body)
            assert code == status and reason in json.loads(content)["error"]


def test_other_sites_and_other_names_are_refused(served):
    assert request(f"{served}/api/about")[0] == 200 == request(f"{served}/favicon.ico")[0]
    assert request(f"{served}/api/about", Sec_Fetch_Site="cross-site")[0] == 403
    assert request(f"{served}/api/about", Host="evil.example")[0] == 400


@pytest.mark.parametrize(
    "path",
    [
        "row?data=nowhere&at=0", "row?data=classes&at=9999", "row?data=classes&at=-1", "row?data=classes",
        "inside?data=classes&at=0&state=query&of=captions", "inside?data=classes&at=0&state=mlp&of=things",
        "mistakes?table=classes/query/", "plane?state=../x&data=classes", "ask?data=classes&at=0&question=%20",
        f"ask?data=classes&at=0&question={'x' * 1001}",
    ],
)  # fmt: skip
def test_what_is_not_there_is_one_clear_line(served, path):
    code, content = request(f"{served}/api/{path}")
    assert code == 400 and "\n" not in json.loads(content)["error"] and json.loads(content)["error"]


def test_nearest_words_and_similar_pictures(served, tiny_mistral):
    """Held against transformers' own embeddings and sklearn's neighbours."""
    table = AutoModelForCausalLM.from_pretrained(tiny_mistral).get_input_embeddings().weight.detach()
    images, run = ImageTokens.open(Run("tiny"), "classes"), Run("tiny")
    sets = {data: CaptionTokens.open(run, data) for data in ("captions", "classes")}
    ids = sorted({int(token) for text in sets.values() for token in text.token_ids})
    found = get(f"{served}/api/inside", data="classes", at=3, state="mlp", of="captions")
    state = load_file(run.pretrained("mlp") / "last.safetensors")
    pooled = torch.nn.functional.adaptive_avg_pool2d(images.tokens([3])[0].T.unflatten(1, (-1, found_side(images))), 3)
    hidden = torch.nn.functional.gelu(pooled.flatten(1).T @ state["body.0.weight"].T + state["body.0.bias"])
    tokens = hidden @ state["out.weight"].T + state["out.bias"] + state["offset"]
    distances, nearest = NearestNeighbors(n_neighbors=6).fit(table[ids].numpy()).kneighbors(tokens.numpy())
    assert found["side"] == 3 and len(found["tokens"]) == 9
    for token, far, rows in zip(range(9), distances, found["tokens"], strict=True):
        assert [found["distances"][word][token] for word in rows] == pytest.approx(far, abs=1e-3)
    assert len(set(found["words"])) == len(found["words"]) == len({i for row in nearest for i in row})

    means = {data: ImageTokens.open(run, data) for data in ("captions", "classes")}
    vectors = {data: some.tokens(list(range(len(some)))).mean(1).numpy() for data, some in means.items()}
    cosines = np.concatenate([cosine_similarity(vectors["classes"][3:4], some)[0] for some in vectors.values()])
    similar = get(f"{served}/api/similar", data="classes", at=3)
    assert {"data": "classes", "at": 3}.items() not in [one.items() for one in similar["pictures"]]
    assert [one["cosine"] for one in similar["pictures"]] == pytest.approx(sorted(cosines)[-2:-14:-1], abs=1e-3)
    assert similar["of"] == similar["looked_at"] == len(cosines)


def found_side(images: ImageTokens) -> int:
    return round(images.shape[0] ** 0.5)


def test_mistakes_are_those_of_the_namer(served):
    table = get(f"{served}/api/mistakes", table="classes/mlp//namer")
    named = Named.read(Run("tiny"), "mlp", "classes").rows
    test = named[named["split"] == "test"]
    right = [candidates[0] == label for candidates, label in zip(test["candidates"], test["label"], strict=True)]
    assert table["accuracy"] == pytest.approx(np.mean(right)) and len(table["rows"]) == len(test)
    ids = ImageTokens.open(Run("tiny"), "classes").ids
    assert [ids[at] for at, *_ in table["rows"]] == list(test.index)
    counts = {table["names"][label]: images for label, images, *_ in table["classes"]}
    assert counts == dict(test["label"].value_counts())
    assert table["command"] == "dvc repro name@mlp"


def test_curves_are_those_of_the_histories(served):
    found = get(f"{served}/api/runs")
    assert found["profiles"] == ["tiny"] and not found["differ"]
    counts = {data: len(ImageTokens.open(Run("tiny"), data)) for data in ("captions", "classes")}
    assert found["pictures"]["tiny"] == ", ".join(f"{count} pictures of {data}" for data, count in counts.items())
    [curve] = [one for one in found["curves"] if one["stage"] == "finetune"]
    history = pd.read_csv("data/tiny/finetune/mlp-captions/history.csv").dropna(subset=["val_loss"])
    assert curve["lines"]["val_loss"] == history[["step", "val_loss"]].values.tolist()
    assert curve["command"] == "dvc repro finetune@mlp-captions"


@pytest.mark.parametrize(
    ("key", "stage"),
    [
        ("emd/mlp/val", "pretrain@mlp"),
        ("retrieval/query/r1_raw", "pretrain@query"),
        ("pca/mlp/last/k80", "pca@mlp"),
        ("classes/mlp/acc/namer", "name@mlp"),
        ("classes/mlp/classes/acc/combined", "evaluate@mlp-classes"),
        ("captions/query/captions/val_loss", "finetune@query-captions"),
        ("captions/mlp/captions/scratch_val_loss", "finetune_scratch@mlp-captions"),
        ("classes/probe", "evaluate"),
        ("classes/top5/discriminant", "name"),
        ("seconds/finetune@mlp-captions", "finetune@mlp-captions"),
    ],
)
def test_the_command_behind_a_figure_is_a_stage(key, stage, tiny_params):
    assert command_of(key) == f"dvc repro {stage}"
    known = stages(tiny_params)
    scratch = [f"finetune_scratch@{a}-{r}" for a in tiny_params.run.scratch for r in tiny_params.run.scratch_recipes]
    assert stage in {*known, *scratch, *(name.split("@")[0] for name in known)}


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("emd/mlp/plain_val", "distance to the own picture in plain EMD: mlp"),
        ("mmd/mlp/image_gain_low", "image gain, lower end of its 95\u00a0% interval: mlp"),
        ("retrieval/mlp/r1_debiased", "finds its text, debiased: mlp"),
        ("retrieval/mlp/r5_raw", "finds its text among the 5 nearest, raw: mlp"),
        ("pca/mlp/last/k80", "components for 80\u00a0% of the variance after the last epoch: mlp"),
        ("classes/mlp/val_loss/namer", "validation loss of the namer: classes, mlp"),
        ("captions/mlp/captions/scratch_val_loss", "validation loss from scratch: captions, mlp, captions"),
        ("seconds/finetune@mlp-captions", "seconds of the stage finetune@mlp-captions"),
        ("captions/mlp/captions/own_figure", None),
    ],
)
def test_keys_have_words(key, words):
    assert word_for(key) == words


def test_figures_are_called_as_their_stages_do_and_runs_of_other_pictures_are_told(project):
    for profile, label in (("one", "accuracy"), ("two", "accuracy")):
        folder = Path("data") / profile
        for name, content in {
            "evaluate/mlp-own/classes/figures.json": [
                {"key": "acc", "label": label, "baseline": False},
                {"key": "probe", "label": "linear probe", "baseline": True},
            ],
            "name/mlp/classes/figures.json": [{"key": "acc/emd", "label": "by EMD", "baseline": False}],
            "metrics.json": {"classes/mlp/own/acc": 1, "classes/probe": 0.5, "classes/mlp/acc/emd": 0.5, "x": 1},
        }.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(content))
        (folder / "prepare").mkdir()
        rows = pd.DataFrame({"id": ["a", "b", "c"], "split": "train", "quarantine": [None, None, "broken"]})
        rows.to_parquet(folder / "prepare/classes.parquet")
    found = ledger()
    assert {key: one["label"] for key, one in found["figures"].items()} == {
        "classes/mlp/own/acc": "accuracy: classes, mlp, own", "classes/probe": "linear probe: classes",
        "classes/mlp/acc/emd": "by EMD: classes, mlp", "x": None,
    }  # fmt: skip
    assert found["pictures"] == dict.fromkeys(("one", "two"), "2 pictures of classes") and not found["differ"]
    rows.assign(split="test").to_parquet("data/two/prepare/classes.parquet")
    assert ledger()["differ"]


MADE = """
import json, pathlib, yaml
rate = yaml.safe_load(open("params.yaml"))["own"]["rate"]
folder = pathlib.Path("data/p/pretrain/mlp")
folder.mkdir(parents=True)
(folder / "history.csv").write_text(f"epoch,val\\n0,3\\n1,{rate}\\n")
pathlib.Path("metrics.json").write_text(json.dumps({"emd/mlp/val": rate}))
"""
GRAPH = """
stages:
  pretrain:
    cmd: python make.py
    params: [own]
    outs: [data/p/pretrain/mlp]
    metrics: [metrics.json: {cache: false}]
"""


@pytest.mark.skipif(not shutil.which("git"), reason="dvc exp needs git")
def test_experiments_have_figures_curves_and_the_command_that_makes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        subprocess.run(words, check=True, capture_output=True)

    call("git", "init", "-q", ".")
    call("git", "config", "user.email", "a@example.org")
    call("git", "config", "user.name", "a")
    call(sys.executable, "-m", "dvc", "init", "-q")
    for name, text in ("make.py", MADE), ("dvc.yaml", GRAPH), ("params.yaml", 'own: {rate: 1.5, note: "as is"}\n'):
        Path(name).write_text(text)
    call("git", "add", "-A")
    call("git", "commit", "-qm", "first")
    changes = ("-S", "own.rate=0.5", "-S", "own.note=two words")
    call(sys.executable, "-m", "dvc", "exp", "run", "-q", "-n", "lower", *changes)
    call("git", "checkout", "-q", "params.yaml")
    listed = experiments()
    [one], [curve] = listed["experiments"], listed["curves"]
    assert one["name"] == "lower" and one["figures"]["emd/mlp/val"]["value"] == 0.5
    command = ["dvc", "exp", "run", "-S", "own.rate=0.5", "-S", "own.note='two words'"]
    assert shlex.split(one["command"]) == command and listed["without_curves"] == []
    assert (curve["profile"], curve["stage"], curve["of"]) == ("lower", "pretrain", "mlp")
    assert curve["lines"] == {"val": [[0.0, 3.0], [1.0, 0.5]]}
    shutil.rmtree(".dvc/cache")
    assert experiments()["without_curves"] == ["lower"]


@pytest.mark.parametrize(
    "value",
    [
        *(
            "word",
            "3",
            "null",
            "Describe it, please.",
            "it's",
            "He said (x)",
            "ends\\",
            "a\\'b",
            "",
            0.5,
            None,
            True,
            -3,
        ),
        *(["accuracy", {"metric": "judge", "llm": {"model": "/models/a b"}}], []),
    ],
)
def test_a_changed_value_is_read_back_as_it_was(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    [override] = OverridesParser.create().parse_overrides([f"own.key={_override(value)}"])
    assert not override.is_sweep_override() and override.value() == value


def test_who_leaves_frees_the_model(served, photos, monkeypatch):
    stopped, until = threading.Event(), time.monotonic() + 60

    def endless(self, *arguments, on_text, **options):
        try:
            while time.monotonic() < until:
                on_text("and so on")
                time.sleep(0.01)
        except BaseException:
            stopped.set()
            raise

    monkeypatch.setattr(VLM, "generate", endless)
    with urllib.request.urlopen(f"{served}/api/ask?question=Why%3F", photos[0].read_bytes(), timeout=60) as answer:
        answer.readline()
    assert stopped.wait(20)


def test_a_run_that_is_not_trained_says_what_to_do(tiny_params):
    told = app.about(app.Place.of(tiny_params))
    assert told["offered"].startswith("nothing yet; no names: no adapter is trained yet; no captions: ")
    [missing] = told["missing"]  # in the words of `classify`
    with pytest.raises(UserError) as refused:
        check_trained(tiny_params, "classify", llm=False)
    assert missing == str(refused.value) and "`terraalign try FOLDER`" in missing
    assert not told["states"] and not told["tables"] and not told["samples"]


def test_what_a_run_can_answer_is_said_in_words(tiny_params):
    alone = tiny_params.run.model_copy(update={"data": ["classes"], "recipes": ["classes"], "adapters": ["mlp"]})
    params = tiny_params.model_copy(update={"run": alone})
    untaught = "; no captions: it was trained on pictures without captions"
    untuned = "; no questions: no adapter is fine-tuned yet"
    files = {"pretrain/mlp/last.safetensors": "", "name/mlp/classes/namer.json": '{"val_loss": 1}'}
    files["finetune/mlp-classes/metrics.json"] = '{"val_loss": 1}'
    said = []
    for name, content in files.items():
        path = Run.of(params).base / name
        path.parent.mkdir(parents=True)
        path.write_text(content)
        said.append(offered(params))
    assert said == [
        f"names (by EMD){untaught}{untuned}",
        f"names (by EMD, discriminant analysis){untaught}{untuned}",
        f"names (by EMD, discriminant analysis, the language model), questions{untaught}",
    ]
    place = app.Place.of(params)
    assert app.about(place)["ways"] == ["names", "emd", "classes"]
    assert "taught names alone" in str(place.desk._caution(Answer("a pear", "mlp", "classes")))


def test_a_port_that_is_taken_is_one_line(tiny_params):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match=r"in use.*--port"):
        app.serve(tiny_params, "127.0.0.1", taken.getsockname()[1], print)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send to one process alone")
@pytest.mark.parametrize("state", ["starting", "answering", "unread"])
def test_ctrl_c_ends_it_at_once(served, photos, state):
    """While models load in a thread, in the middle of an answer, with an adapter in the LLM, or read by nobody more."""
    command = [sys.executable, "-m", "stages.cli", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().split()[0]
        with contextlib.ExitStack() as stack:
            if state == "answering":
                asked = f"{address}/api/ask?question=Why%3F"
                answer = stack.enter_context(urllib.request.urlopen(asked, photos[0].read_bytes(), timeout=60))
                answer.readline()
            if state == "unread":
                process.stdout.close()
                process.stdout = None
            process.send_signal(signal.SIGINT)
            began = time.monotonic()
            said, faults = process.communicate(timeout=60)
        assert time.monotonic() - began < 5 and process.returncode == 0
    assert (said is None or said.endswith("stopped\n")) and "ERROR" not in faults and "terminate called" not in faults


# In a browser.


@pytest.fixture
def page(browser, served):
    """The page, opened; it may ask its own server alone, and nothing may go wrong in it."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield opened(context, served)
    faults, elsewhere = context.faults, context.elsewhere
    context.close()
    assert not elsewhere and not faults


def opened(context, served: str):
    page = context.new_page()
    context.faults, context.elsewhere = getattr(context, "faults", []), getattr(context, "elsewhere", [])
    page.on("pageerror", lambda fault: context.faults.append(fault))
    refused = "status of 4"  # what is refused on purpose
    page.on("console", lambda said: said.type != "error" or refused in said.text or context.faults.append(said.text))
    own = (served, "data:", "blob:")
    page.on("request", lambda sent: sent.url.startswith(own) or context.elsewhere.append(sent.url))
    page.goto(served)
    page.wait_for_selector("html[data-ready]")
    return page


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def test_upload_caption_question_and_a_broken_file(page, model, photos, tmp_path):
    page.set_input_files("#file", photos[1])
    expect(page.locator("#caption")).to_have_text(model.caption(photos[1]).text, timeout=30_000)
    best = model.classify(photos[1])
    expect(page.locator("#bars li")).to_have_count(5)
    expect(page.locator("#bars li").first).to_contain_text(f"{best.text}{best.names[best.text]:.1%}".replace("%", " %"))
    expect(page.locator("#stages li")).to_have_count(5)
    expect(page.locator("[data-stage=classes]")).to_contain_text("Not there yet")
    expect(page.locator("#names-strange")).to_be_hidden()
    page.get_by_label("Question").fill("Was ist das für ein Tier? \N{CAT FACE}")
    page.get_by_label("Question").press("Enter")
    expect(page.locator("#reply-note")).to_contain_text("fine-tuned on captions")
    assert page.locator("#reply").inner_text().split() == (  # a browser shows several spaces as one
        model.ask(photos[1], "Was ist das für ein Tier? \N{CAT FACE}").text.split() or ["(nothing)"]
    )
    (tmp_path / "broken.jpg").write_bytes(photos[0].read_bytes()[:200])
    page.set_input_files("#file", tmp_path / "broken.jpg")
    expect(page.get_by_role("alert").filter(visible=True)).to_contain_text("no photo that can be read")
    expect(page.locator("#answers")).to_be_hidden()
    Image.effect_noise((300, 200), 200).save(tmp_path / "noise.png")  # unlike all that is known
    page.set_input_files("#file", tmp_path / "noise.png")
    expect(page.locator("#names-strange")).to_contain_text("unlike the pictures that mlp was trained on for this")
    expect(page.locator("#fault")).to_be_hidden()


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_photo_is_dropped_or_pasted(page, model, photos, way):
    hand_over = """([way, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "photo.jpg", { type: "image/jpeg" }));
        const options = { bubbles: true, cancelable: true };
        document.body.dispatchEvent(way === "drop" ? new DragEvent("drop", { ...options, dataTransfer: data })
            : new ClipboardEvent("paste", { ...options, clipboardData: data }));
    }"""
    page.evaluate(hand_over, [way, list(photos[3].read_bytes())])
    expect(page.locator("#bars li").first).to_contain_text(model.classify(photos[3]).text, timeout=30_000)


def test_a_photo_is_taken(page):
    page.get_by_role("button", name="Take one").click()
    page.get_by_role("button", name="Take the photo").click()
    expect(page.locator("#bars li")).to_have_count(5, timeout=30_000)
    expect(page.locator("#shot")).to_be_hidden()


def test_there_is_no_place_for_captions_where_a_run_has_none(browser, served):
    context = browser.new_context()
    about = get(f"{served}/api/about") | {"ways": ["names", "emd", "classes"], "offered": "names alone"}
    context.route("**/api/about*", lambda route: route.fulfill(json=about))
    page = opened(context, served)
    expect(page.locator("#before")).to_contain_text("It answers: names alone.")
    page.get_by_label("Test picture 1 of").click()
    expect(page.get_by_role("heading", name="Most likely")).to_be_visible()
    expect(page.get_by_role("heading", name="Caption")).to_be_hidden()
    context.close()


def test_two_at_once(browser, served, photos, monkeypatch):
    """While the LLM is at work for one, another gets names, and the caption after it."""
    gate, generate = threading.Event(), VLM.generate

    def held(self, *arguments, **options):
        assert gate.wait(60)
        return generate(self, *arguments, **options)

    monkeypatch.setattr(VLM, "generate", held)
    contexts = [browser.new_context() for _ in range(2)]
    first, second = (opened(context, served) for context in contexts)
    for one, photo in ((first, photos[0]), (second, photos[2])):
        one.set_input_files("#file", photo)
        expect(one.locator("#bars li")).to_have_count(5, timeout=30_000)
        expect(one.locator("#caption")).to_have_text("")
    expect(second.locator("#caption-note")).to_contain_text("this one is next")
    gate.set()
    for one in (first, second):
        expect(one.locator("#stages li")).to_have_count(5, timeout=30_000)
        expect(one.locator("#caption-note")).to_contain_text("fine-tuned on captions")
    for context in contexts:
        assert not context.faults and not context.elsewhere
        context.close()


def test_look_inside_mistakes_and_runs(page):
    page.get_by_label("Test picture 1 of").click()
    page.get_by_role("tab", name="Look inside").click()
    expect(page.locator("#grid button")).to_have_count(9)
    page.locator("#words button").first.hover()
    heat = page.locator("#grid button").evaluate_all("all => all.map(one => Number(one.style.getPropertyValue('--h')))")
    assert max(heat) == pytest.approx(0.62) and min(heat) == 0
    page.locator("#grid button").first.focus()
    expect(page.locator("#words button.near")).to_have_count(6)
    expect(page.locator("#plane-at")).to_contain_text("of the variance", timeout=30_000)
    page.locator("#plane").press("ArrowRight")
    page.locator("#plane").press("Enter")
    expect(page.locator("#picture-similar button")).to_have_count(12)
    expect(page.locator("#picture-facts")).to_contain_text("val")
    page.get_by_role("button", name="Close").click()
    tab = page.get_by_role("tab", name="Look inside")
    tab.press("ArrowRight")
    expect(page.get_by_role("tab", name="Mistakes")).to_be_focused()
    page.locator("#classes button").first.click()
    expect(page.locator("#cell button").first).to_be_visible()
    page.locator("#cell button").first.click()
    expect(page.locator("#picture-facts")).to_contain_text("test")
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="Runs").click()
    expect(page.locator("#curves figure")).to_have_count(2)
    expect(page.locator("#words-of")).to_have_text("words of captions and class names")


@pytest.mark.parametrize("classes", [12, 81])
def test_the_confusion_matrix_has_names(browser, served, classes):
    """On its axes or, where there are too many for these, of what is pointed at; and lists say how long they are."""
    context = browser.new_context(viewport={"width": 390, "height": 1400})
    names = [f"a name as long as that of class {number}" for number in range(classes)]
    rows = [[0, number, number, ""] for number in range(classes)] + [[0, 2, None, "what?"]]
    by_class = [[number, 1, 1, 1.0] for number in range(classes)]
    found = {"data": "classes", "names": names, "rows": rows, "classes": by_class, "command": "", "accuracy": 0.9}
    context.route("**/api/mistakes*", lambda route: route.fulfill(json=found))
    page = opened(context, served)
    page.get_by_role("tab", name="Mistakes").click()
    expect(page.locator("#matrix .axis")).to_have_text(["what was said", "what it is"])
    said = page.locator("#matrix text:not(.axis) title").all_text_contents()
    assert said == ([*names, *names, "no name"] if classes == 12 else [])
    square, behind = page.locator("#matrix rect.off").bounding_box(), page.locator("#matrix .behind").bounding_box()
    page.mouse.move(square["x"] + square["width"] / 2, square["y"] + square["height"] / 2)
    expect(page.locator("#matrix-at")).to_have_text(f"It is {names[2]}, and no name was said: 1 picture.")
    assert behind["x"] + behind["width"] == pytest.approx(square["x"] + square["width"], abs=1)
    more = "one => getComputedStyle(one, '::after').content"
    shown, hidden = page.locator("#classes"), re.compile(r"▾ \d+ more")
    assert hidden.search(shown.evaluate(more)) and page.locator("#confusions").evaluate(more) == "none"
    shown.evaluate("one => one.scrollTo(0, one.scrollHeight)")
    expect(shown).not_to_have_class(re.compile("more"))
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_curve_has_a_look_of_its_own(browser, served, scheme):
    """Of eight profiles with three each in one chart; and all stand out from what is behind them (WCAG 1.4.11)."""
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    profiles = [f"p{number}" for number in range(8)]
    lines = {
        profile: {key: [[0, max(i, 1) + j], [1, max(i, 1)]] for j, key in enumerate(("val", "shuffled", "const_set"))}
        for i, profile in enumerate(profiles)  # the first two are the same
    }
    curves = [
        {"profile": profile, "stage": "pretrain", "of": "mlp", "x": "epoch", "command": "", "lines": lines[profile]}
        for profile in profiles
    ]
    figure = {"command": "", "label": "finds its text: mlp", "values": {"p1": 0.5}}
    found = {"profiles": profiles, "curves": curves, "pictures": {"p1": "9 pictures of birds"}, "differ": True}
    found["figures"] = {"retrieval/mlp/r1_raw": figure}
    context.route("**/api/runs*", lambda route: route.fulfill(json=found))
    page = opened(context, served)
    page.get_by_role("tab", name="Runs").click()
    expect(page.locator("#curves figure")).to_have_count(1)
    expect(page.locator("#figures tbody th")).to_have_text("finds its text: mlpretrieval/mlp/r1_raw")
    expect(page.locator("#runs-lead")).to_contain_text("p1 (9 pictures of birds), p2")
    expect(page.locator("#runs-lead")).to_contain_text("of different pictures")
    for place in ("figure > svg g", ".legend g"):
        looks = page.locator(f"#curves {place}").evaluate_all(
            """all => all.map(one => [getComputedStyle(one.querySelector("polyline")).stroke,
            getComputedStyle(one.querySelector("polyline")).strokeDasharray, one.querySelector("text")?.textContent])"""
        )
        assert len(looks) == 24 == len({tuple(look) for look in looks})
    behind = page.locator("#curves figure").evaluate("one => getComputedStyle(one).backgroundColor")
    assert min(contrast(colour, behind) for colour, *_ in looks) >= 3
    expect(page.get_by_role("button", name="p0: own text")).to_contain_text("the same as p1")
    page.get_by_role("button", name="p2: own text").focus()
    faint = "all => all.map(one => Number(getComputedStyle(one).opacity) < 1)"
    assert page.locator("#curves figure > svg g").evaluate_all(faint).count(False) == 1
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    context.close()


def contrast(*colours: str) -> float:
    """Of two colours as a browser writes them, by WCAG 2.2."""
    shares = [[int(part) / 255 for part in re.findall(r"\d+", colour)] for colour in colours]
    lights = [[c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in own] for own in shares]
    dark, light = sorted(float(np.dot(own, (0.2126, 0.7152, 0.0722))) for own in lights)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen(browser, served, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page = opened(context, served)
    for tab in ("Try", "Look inside", "Mistakes", "Runs"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") == 390, tab
    named = "all => all.filter(one => !one.labels?.length && !one.ariaLabel && !one.textContent.trim()).length"
    assert page.locator("button, input, select").evaluate_all(named) == 0  # each has words for a screen reader
    context.close()
