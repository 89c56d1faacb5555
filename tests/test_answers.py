"""Whether a picture is like those that were trained on, on tokens made up; and whose parameters a run has."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from sklearn.neighbors import NearestNeighbors
from transformers import LlamaConfig, LlamaForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

from pipeline.answers import familiar
from pipeline.answers.best import check_trained, finetuned
from pipeline.answers.familiar import Familiar
from pipeline.answers.model import Answer, Model
from pipeline.answers.pictures import content_of
from pipeline.config import Params, load_params
from pipeline.errors import UserError, UserErrors
from pipeline.extraction import near
from pipeline.extraction.near import sample_of
from pipeline.llms.gguf import GGUF
from pipeline.media.pictures import decode
from pipeline.runs import Run
from pipeline.sources.folders import pictures_below
from pipeline.store.reader import ImageTokens
from stages.answer import answer as tell
from stages.answer import row_of
from stages.cli import app


@pytest.fixture
def demo(project: Path) -> Params:
    """The demo's parameters in an empty project, the current folder."""
    shutil.copy(Path(__file__).parents[1] / "profiles/demo.yaml", "params.yaml")
    return load_params()


def images(counts: dict[str, int], around: torch.Tensor) -> ImageTokens:
    """Pictures of three tokens of width 16, scattered around a direction."""
    splits = [split for split, count in counts.items() for _ in range(count)]
    tokens = around + 0.2 * torch.randn(len(splits), 3, 16)
    rows = pd.DataFrame({"id": list(map(str, range(len(splits)))), "split": splits})
    return ImageTokens(rows, (3, 16), "float32", lambda at: {"tokens": tokens[at].numpy()})


def test_a_picture_unlike_the_training_pictures_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = torch.eye(16)[0], torch.eye(16)[1]
    sets = {"a": images({"train": 300, "val": 60, "test": 60}, here)}
    monkeypatch.setattr(familiar, "read_sample", lambda run, data: sample_of(sets[data]))
    known = Familiar.of(Run("any"), ["a"])
    like, unlike = images({"test": 200}, here), images({"test": 50}, elsewhere)
    usual = known.strangeness(like.tokens(list(range(200))))
    assert 0.4 < sum(usual) / 200 < 0.6  # as strange as those held out: half of them are nearer
    assert min(known.strangeness(unlike.tokens(list(range(50))))) == 1
    # The distances are sklearn's.
    means = [sets["a"].tokens(sets["a"].split(split)).mean(1).numpy() for split in ("train", "val", "test")]
    nearest = NearestNeighbors(n_neighbors=1, metric="cosine").fit(means[0])
    expected = torch.tensor([*nearest.kneighbors(means[1])[0][:, 0], *nearest.kneighbors(means[2])[0][:, 0]])
    torch.testing.assert_close(known.usual.double(), expected.double().sort().values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [20, 48, 98, 99, 300])
def test_none_of_few_held_out_pictures_is_strange(count: int) -> None:
    """Strangeness is one less the p-value of conformal prediction; of few pictures what lies well beyond them is 1."""
    usual = torch.linspace(0.1, 0.3, count)
    known = Familiar(torch.eye(2)[:1], usual)

    def of(distance: torch.Tensor) -> float:
        cosine = 1 - distance.double()
        return known.of_means(torch.stack([cosine, (1 - cosine**2).sqrt()])[None].float())[0]

    for at in range(0, count - 1, 7):
        between = (usual[at] + usual[at + 1]) / 2
        assert 1 - of(between) == pytest.approx((1 + int((usual >= between).sum())) / (count + 1))
    furthest = of(usual[-1] + 1e-4)  # decoded by another decoder than that of extraction
    assert furthest == pytest.approx(count / (count + 1)) and (furthest >= familiar.STRANGE) == (count >= 99)
    assert of(usual[-1] * (1 + 2.2 / count)) == 1


def test_too_few_pictures_tell_nothing(
    demo: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = sample_of(images({"train": 300, "val": 19}, torch.eye(16)[0]))
    monkeypatch.setattr(familiar, "read_sample", lambda run, data: sample)
    with pytest.raises(UserError, match="19 pictures are held out, fewer than the 20 that tell"):
        Familiar.of(Run("any"), ["a"])
    model = Model(demo)
    for _ in range(2):  # said once
        assert model._familiar_with(["classes"])(torch.zeros(3, 3, 16)) == [None] * 3
    assert capsys.readouterr().err.count("whether pictures are like those trained on is not told: 19") == 1
    sample = sample_of(images({"train": 5000, "val": 900}, torch.eye(16)[0]))
    monkeypatch.setattr(familiar, "read_sample", lambda run, data: sample)
    known = Familiar.of(Run("any"), ["a"])
    assert len(known.known) <= near.KNOWN and len(known.usual) <= near.HELD_OUT


@pytest.mark.parametrize(
    "content",
    [
        b"junk",
        b"",
        save({"known": torch.ones(2, 3)}),
        save({"known": torch.ones(2), "held_out": torch.ones(2)}),
        save({"known": torch.ones(2, 3), "held_out": torch.ones(2, 4)}),
    ],
)
def test_a_sample_that_is_none_is_told(demo: Params, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = Run.of(demo).sample("classes")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert familiar.familiar_with(Run.of(demo), ["classes"]) is None
    assert (
        "sample.safetensors: not what `extract-images` writes; run `dvc repro --force extr" in capsys.readouterr().err
    )


@pytest.mark.parametrize("as_json", [True, False])
def test_what_is_to_be_known_of_many_answers_is_summed_up(
    demo: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    names = [f"{i}.jpg" for i in range(9)]
    for name in names:
        Image.new("RGB", (8, 8)).save(name)
    found = [Answer("a pear", "mlp", None, "emd", {}, 1.0 if i < 5 else 0.5) for i in range(9)]
    monkeypatch.setattr(Model, "each", lambda self, files, ask, batch: zip(files, found, strict=True))
    monkeypatch.setattr(Model, "trained_on", lambda self, file: file.name in ("4.jpg", "7.jpg"))
    tell(demo, names, lambda model: model.encode, as_json, None)  # type: ignore[arg-type, return-value]
    told = capsys.readouterr().err.splitlines()[1:]
    assert [line[: len("warning: 0.jpg: unlike")] for line in told[:3]] == [
        f"warning: {i}.jpg: unlike" for i in range(3)
    ]
    assert told[3] == "warning: so are 2 more of the 9 pictures" + ("" if as_json else "; --json says which")
    assert told[4].startswith("note: the model was trained on 2 of these 9 pictures (4.jpg") and len(told) == 5


@pytest.mark.parametrize(
    ("is_text_alone", "by_llm", "is_lean"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_a_language_model_with_a_tower_for_pictures_gets_all_of_transformers(
    demo: Params, monkeypatch: pytest.MonkeyPatch, is_text_alone: bool, by_llm: bool, is_lean: bool
) -> None:
    Image.new("RGB", (8, 8)).save("a.png")
    entered = list[bool]()
    lean = contextmanager(lambda: iter([entered.append(True)]))
    monkeypatch.setattr("pipeline.answers.lean.transformers_for_answers", lean)
    monkeypatch.setattr(GGUF, "is_text_alone", lambda self: is_text_alone)
    monkeypatch.setattr(Model, "each", lambda *_: iter(()))
    tell(demo, ["a.png"], lambda model: model.encode, False, None, by_llm=by_llm)  # type: ignore[arg-type, return-value]
    assert bool(entered) == is_lean


def test_a_question_without_quotes_is_told(project: Path) -> None:
    Image.new("RGB", (9, 9)).save("a.png")
    said = CliRunner().invoke(app, ["ask", "a.png", "What", "is", "that?"])
    assert said.exit_code == 2 and "ask: What: no such file; a question goes in quotes" in said.output


def test_an_answer_says_when_it_is_worth_little() -> None:
    answer = Answer("a pear", "mlp", strangeness=0.995)
    assert answer.is_strange and str(answer) == "a pear"
    assert not Answer("a pear", "mlp", strangeness=0.9).is_strange and not Answer("a pear", "mlp").is_strange


def test_a_run_is_read_with_its_own_parameters(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiles = Path(__file__).parents[1] / "profiles"
    (project / "data/demo").mkdir(parents=True)
    photos = (profiles / "photos.yaml").read_text().replace("root: null", "root: photos")
    (project / "params.yaml").write_text(photos)
    with pytest.raises(UserError, match="is of the profile photos, and there is no"):
        Model.load("data/demo")
    (project / "profiles").mkdir()
    shutil.copy(profiles / "demo.yaml", project / "profiles")
    assert Model.load(project / "data/demo").params.profile == "demo"
    assert "parameters of profiles/demo.yaml" in capsys.readouterr().err
    (project / "params.yaml").write_text(photos.replace("seed: 17", "seed: soon"))
    with pytest.raises(UserErrors, match="seed"):  # which profile that was meant for, nobody knows
        Model.load("data/demo")
    with pytest.raises(UserError, match="not the results of a run"):
        Model.load("data/nowhere")


ASKED_WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = None
from typer.testing import CliRunner
from stages.cli import app
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    print(result.exit_code, *result.output.split())
"""


def asked_without_torch(*commands: list[str]) -> list[str]:
    """What commands print, with their exit codes, where torch cannot be imported; each on a line."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    script = [sys.executable, "-c", ASKED_WITHOUT_TORCH, json.dumps(commands)]
    return subprocess.run(script, check=True, capture_output=True, env=environment, text=True).stdout.splitlines()


LEAN = """
import sys
from pathlib import Path
import torch
from pipeline.answers.lean import transformers_for_answers
with transformers_for_answers():
    from transformers import LlamaForCausalLM
    network = LlamaForCausalLM.from_pretrained("tiny").eval()
print(network.generate(inputs_embeds=torch.zeros(1, 2, 8), max_new_tokens=3, num_beams=2, eos_token_id=None).shape)
unused = {"scipy", "sympy", "torchvision", "torch.distributed.tensor", "torch._dynamo.convert_frame"}
unused.add("torch.nn.attention.flex_attention")
print(sorted(unused & set(sys.modules)))
whole = LlamaForCausalLM.from_pretrained("tiny").eval()
print([torch.equal(*pair) for pair in zip(network.buffers(), whole.buffers(), strict=True)])
import scipy.optimize, torchvision
compiled = torch.compile(torch.sin, backend="eager")
from torch._dynamo import convert_frame, utils
from transformers.utils import import_utils
path = Path(import_utils.__file__).parents[1] / "models"
read = import_utils.create_import_structure_from_path
once = read(path)
read.cache_clear()
print(read(path) == once, read.cache_info().maxsize)
print(torch.distributed.is_available(), compiled(torch.zeros(1)).item(), convert_frame.counters is utils.counters)
"""


ASKED = """
import sys, torch
from pipeline.answers.lean import COMPILER, transformers_for_answers
with transformers_for_answers():
    stub = sys.modules[COMPILER]
    print(stub.disable(len) is len, stub.is_compiling(), sys.modules[COMPILER] is stub)  # more than a mark
from torch._dynamo import utils
print(sys.modules[COMPILER] is torch._dynamo, torch.compile(torch.sin, backend="eager")(torch.zeros(1)).item())
"""


BESIDE = """
import torchvision, sys
from pipeline.answers.lean import transformers_for_answers
with transformers_for_answers():
    from transformers import LlamaForCausalLM
    LlamaForCausalLM.from_pretrained("tiny")
    import torchvision.ops, torch._dynamo.utils
print("torch._dynamo.convert_frame" in sys.modules, torch._dynamo.is_compiling())
"""


BUILT = """
import os, sys
from contextlib import nullcontext
import torch
from pipeline.answers.lean import transformers_for_answers
from pipeline.llms.huggingface import TOWERS
how, *kinds = sys.argv[1:]
with transformers_for_answers() if how == "lean" else nullcontext():
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known
    for kind in kinds or known:
        if child := os.fork():  # one process each, as one that has imported the compiler is not lean any more
            if os.waitpid(child, 0)[1]:
                print(kind, flush=True)
            continue
        try:
            config = AutoConfig.for_model(kind)
            if how == "whole" or TOWERS.isdisjoint(config.to_dict()):
                with torch.device("meta"):
                    AutoModelForCausalLM.from_config(config)
        except Exception:
            os._exit(1)
        os._exit(0)
"""
KINDS = "bloom falcon gemma3_text gemma4_text gpt2 gpt_neox llama mistral mpt olmo2 phi3 qwen3 smollm3"


def not_built(how: str, kinds: str = "") -> list[str]:
    """The kinds of causal language models, of these or of all, that transformers cannot build without weights."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    script = [sys.executable, "-c", BUILT, how, *kinds.split()]
    return subprocess.run(script, check=True, capture_output=True, env=environment, text=True).stdout.split()


def test_usual_language_models_are_built_for_answers() -> None:
    assert not_built("lean", KINDS) == []


@pytest.mark.slow
def test_whichever_language_model_can_be_built_is_built_for_answers() -> None:
    assert set(not_built("lean")) <= set(not_built("whole"))


def test_answers_with_an_encoder_that_needs_torchvision(tmp_path: Path) -> None:
    _write_tiny(tmp_path / "tiny")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", BESIDE], capture_output=True, env=environment, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["True False"], done.stderr


def _write_tiny(folder: Path) -> None:
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)


def test_who_asks_for_the_compiler_gets_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, env=environment, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["True False False", "True 0.0"], done.stderr


def test_answers_import_what_they_need_and_the_rest_is_still_there(tmp_path: Path) -> None:
    _write_tiny(tmp_path / "tiny")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, env=environment, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["torch.Size([1, 3])", "[]", "[True, True]", "True None", "True 0.0 True"]


def test_what_is_not_trained_is_said_at_once(demo: Params) -> None:
    Path("a.jpg").write_bytes(b"")
    commands = [["caption", "a.jpg"], ["ask", "a.jpg", "What?"], ["classify", "--llm", "a.jpg"], ["classify", "a.jpg"]]
    commands.append(["show"])
    said = asked_without_torch(*commands)
    missing = ["the task caption", "the task caption", "the task classify", "no adapter is trained", "no report yet"]
    for line, what in zip(said, missing, strict=True):
        assert line.startswith("2 error: data/demo/") and what in line
        assert "`terraalign try FOLDER`" in line and "`terraalign run` runs the profile demo" in line


@pytest.mark.parametrize(("data", "words"), [("classes", ("names", "captions")), ("captions", ("captions", "names"))])
def test_what_a_run_does_not_learn_is_said_in_words(demo: Params, data: str, words: tuple[str, str]) -> None:
    run = demo.run.model_copy(update={"data": [data], "recipes": [data]})
    params = demo.model_copy(update={"run": run})
    own, other = ("classify", "caption") if data == "classes" else ("caption", "classify")
    for llm in (True, False)[: 1 if other == "caption" else 2]:
        with pytest.raises(
            UserError, match=f"profile demo.* learns {words[0]}, not {words[1]}; `terraalign {own}`, or"
        ):
            check_trained(params, other, llm=llm)
    for tasks in ([own], ["caption", "classify"]):  # a question is for whatever there is
        with pytest.raises(UserError, match=f"nothing is fine-tuned for the task {own} yet"):
            check_trained(params, *tasks)
    folder = Run.of(params).finetuned("mlp", data)
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"val_loss": 1}')
    check_trained(params, own)
    check_trained(params, "caption", "classify")
    assert finetuned(params, own) == {folder: 1}


@pytest.mark.parametrize(("recipe", "cautioned"), [("classes", True), ("captions", False)])
def test_a_question_to_what_knows_names_alone_is_answered_with_a_caution(
    demo: Params, monkeypatch: pytest.MonkeyPatch, recipe: str, cautioned: bool
) -> None:
    folder = Run.of(demo).finetuned("mlp", recipe)
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"val_loss": 1}')
    for name in "ab":
        Image.new("RGB", (8, 8)).save(f"{name}.png")
    said = Answer("a pear", "mlp", recipe)
    monkeypatch.setattr(Model, "question", lambda *_: None)
    monkeypatch.setattr(Model, "names", lambda *_: None)
    monkeypatch.setattr(Model, "each", lambda self, files, *_: ((file, said) for file in files))
    done = CliRunner().invoke(app, ["ask", "a.png", "b.png", "Why?"])
    assert done.stdout == "a.png: a pear\nb.png: a pear\n"
    notes = [line for line in done.stderr.splitlines() if "taught names alone" in line]
    assert len(notes) == cautioned
    if cautioned:
        assert "taught names" not in CliRunner().invoke(app, ["classify", "--llm", "a.png"]).stderr


def test_a_name_with_a_tilde_is_that_file_or_one_in_the_home_folder(
    demo: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, size in (("home/a.png", 1), ("~/b.png", 2), ("home/b.png", 3), ("~c.png", 4)):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (size, 1)).save(name)
    pictures = [decode(content_of(name)) for name in ("~/a.png", "~/b.png", Path("~c.png"))]
    assert [picture.width for picture in pictures] == [1, 2, 4]
    Path("home/d.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(ValueError, match="save it as JPEG or PNG"):
        Model(demo).encode(["~/d.heic"])


def test_whether_a_picture_was_trained_on_is_told_or_said_to_be_unknown(
    demo: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    run, photo = Run.of(demo), Path("a.png")
    Image.new("RGB", (8, 8)).save(photo)
    digest = hashlib.sha256(photo.read_bytes()).hexdigest()
    run.manifest("captions").parent.mkdir(parents=True)
    for data, split, quarantine in (("captions", "test", None), ("classes", "train", None)):
        rows = {"id": ["1"], "sha256": [digest], "split": [split], "quarantine": [quarantine], "captions": [[]]}
        pd.DataFrame(rows).to_parquet(run.manifest(data))
    assert Model(demo).trained_on(photo) is True and Model(demo).trained_on("gone.png") is None
    assert Model(demo).trained_on(b"another") is False and capsys.readouterr().err == ""
    pd.DataFrame(rows | {"quarantine": ["broken"]}).to_parquet(run.manifest("classes"))
    assert Model(demo).trained_on(photo) is False
    for content, words in ((b"PAR1", "cannot be read ("), (None, "no such manifest")):
        run.manifest("classes").write_bytes(content) if content else run.manifest("classes").unlink()
        model = Model(demo)
        assert model.trained_on(photo) is None and model.trained_on(photo) is None
        [said] = capsys.readouterr().err.splitlines()
        assert said.startswith("whether pictures were trained on is not told: ") and words in said


def test_names_that_lead_nowhere_are_one_line_each(demo: Params) -> None:
    weights = Run.of(demo).pretrained("mlp") / "last.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"")
    Path("empty").mkdir()
    [one, both, empty] = asked_without_torch(
        ["classify", "https://x.org/a.jpg"], ["classify", "", "b.jpg"], ["classify", "empty"]
    )
    assert one == "2 error: https://x.org/a.jpg: no such file or folder; download it first"
    assert both.count("error:") == 2 and "empty name" in both and "b.jpg: no such" in both
    assert empty.startswith("2 error: empty: no picture in it; give JPEG")


def test_what_is_no_picture_is_named(demo: Params, tmp_path: Path) -> None:
    model = Model(demo)
    Path("a.txt").write_text("no picture")
    Path("photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    names = {
        "nowhere.jpg": "no such file", "a.txt": "no picture by its content", "x" * 300: "too long",
        "photo.heic": "of a format that is not read here; save it as JPEG or PNG",
    }  # fmt: skip
    left_out = {one.name: one.reason for one in pictures_below(Path()).left_out}
    assert left_out.items() >= {name: names[name] for name in ("photo.heic", "a.txt")}.items()  # said of a folder's
    for name, reason in names.items():
        for picture in (name, Path(name)):
            with pytest.raises(ValueError, match=f"^{name}: .*{reason}"):
                model.encode([picture])
    with pytest.raises(ValueError, match=r"^not a picture"):
        model.encode([b"no picture"])
    for wrong in (None, ["a.jpg"], torch.zeros(3, 4, 4)):
        with pytest.raises(TypeError, match=r"^picture: a file's name, its bytes"):
            model.encode([wrong])  # type: ignore[list-item]
    for array in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)):
        with pytest.raises(TypeError, match=r"^picture: an array has to be uint8 \[H, W, 3\], not "):
            model.encode([array])
    with pytest.raises(ValueError, match=r"^top: at least 1, not 0"):
        model.classify("a.jpg", top=0)
    with pytest.raises(ValueError, match=r"^batch: at least 1, not 0"):
        list(model.each(["a.jpg"], lambda tokens: [], batch=0))


def test_an_array_is_the_picture_that_it_holds() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (np.asarray(decode(content_of(pixels))) == pixels).all()


def test_the_help_lists_what_json_has() -> None:
    always = {"photo", "answer", "adapter", "rule", "trained_on"}
    named = Answer("a pear", "mlp", None, "namer", {"a pear": 0.9, "a fig": 0.1}, 0.5)
    assert row_of(Path("a.jpg"), Answer("a pear", "mlp"), True).keys() == always
    assert row_of(Path("a.jpg"), named, False).keys() == always | {"probability", "names", "strangeness", "strange"}
    assert [row_of(Path("a.jpg"), replace(named, strangeness=one), False)["strange"] for one in (0.5, 1)] == [
        False,
        True,
    ]
    ranked = row_of(Path("a.jpg"), replace(named, rule="llm", recipe="classes", strangeness=None), False)
    assert ranked.keys() == always | {"recipe", "probability", "names"}
    [option] = [one for one in get_command(app).commands["classify"].params if "--json" in one.opts]  # type: ignore[attr-defined]
    assert all(key in option.help for key in always | ranked.keys() | {"strangeness", "strange"})
