"""Exports: an example that runs where there is no TerraAlign, stock LLaVA, the hub, and what is refused."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import create_autospec

import huggingface_hub
import open_clip
import pandas as pd
import pytest
import timm
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from pipeline.adapters.blocks import Positions
from pipeline.adapters.module import Adapter, build_adapter
from pipeline.answers.model import Model
from pipeline.answers.names import likeliest
from pipeline.config import Params, load_params
from pipeline.config.schema import LoRA
from pipeline.devices import pick_dtype
from pipeline.encoders.base import Parts
from pipeline.encoders.timm_network import TimmTokens
from pipeline.encoders.vision import load_vision_encoder
from pipeline.errors import UserError
from pipeline.export import folder as plain
from pipeline.export import llava
from pipeline.export.names import values_of
from pipeline.export.processor import chat_template
from pipeline.export.program import program_of
from pipeline.export.projector import projector_of
from pipeline.export.towers import tower_of
from pipeline.export.trained import Trained, encoder_of
from pipeline.llms.load import load_llm
from pipeline.llms.text import Texts
from pipeline.media.decoding import Decoder
from pipeline.media.preprocess import Preprocess
from pipeline.naming.discriminant import Discriminant
from pipeline.naming.namer import Namer, Scales
from pipeline.naming.nearest import Nearest
from pipeline.naming.table import hinted
from pipeline.origin import ENCODER, Origin, Words, weights_of
from pipeline.store.reader import training_captions
from pipeline.vlm import add_lora, load_vlm
from stages.cli import app

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}  # fmt: skip
# Runs examples where neither pipeline nor stages can be imported; keeps soft prompts, what is behind them, and names.
RUNNER = """
import runpy, sys, torch
from pathlib import Path
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"pipeline", "stages"}:
            raise ImportError(f"{name} cannot be imported here")
sys.meta_path.insert(0, Gone())
photo, *folders = sys.argv[1:]
for folder in map(Path, folders):
    sys.argv, sys.path[0] = ["example.py", photo], str(folder)
    for name in ("modeling", "naming"):
        sys.modules.pop(name, None)
    found = runpy.run_path(str(folder / "example.py"), run_name="__main__")
    read = found["soft_prompt"], found["config"]["prompt"]["after"]
    torch.save((*read, found.get("names")), folder.with_suffix(".pt"))
sys.argv[1] = "nope.jpg"
runpy.run_path(str(folder / "example.py"), run_name="__main__")
"""


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    """open_clip's ViT of two layers, under the names tiny-clip and tiny-clip-quickgelu."""
    folder = tmp_path_factory.mktemp("open_clip")
    for name, more in (("tiny-clip", {}), ("tiny-clip-quickgelu", {"quick_gelu": True})):
        (folder / f"{name}.json").write_text(json.dumps({**TINY_CLIP, **more}))
    open_clip.add_model_config(folder)


def settings(vision: dict[str, Any], quantization: str = "none", dtype: str = "float32") -> Params:
    """The tiny parameters, with an encoder."""
    values = yaml.safe_load(Path("params.yaml").read_text())
    values["vision"] = {"batch": 2, "dtype": "float32", **vision}
    values["llm"] |= {"dtype": dtype, "quantization": quantization}
    values["run"]["adapters"], values["run"]["scratch"] = ["mlp"], ["mlp"]
    values["adapters"]["mlp"]["architecture"] = {"hidden": 24}
    values["finetune"]["lora"]["modules"] = ["q_proj", "down_proj"]
    Path("params.yaml").write_text(yaml.safe_dump(values))
    return load_params()


def fine_tuned(params: Params, adapter: Adapter | None = None, data: str = "captions") -> Trained:
    """A run's adapter with a LoRA, both of random weights, as stage `finetune` leaves them; and a manifest."""
    parts, identity = encoder_of(params)
    base = Path("data") / params.profile
    folder = base / "finetune" / f"mlp-{data}"
    trained = Trained(params, folder, data, parts)
    llm = load_llm(params.llm)
    words = Words.of_module(llm.network.get_input_embeddings())
    lora = add_lora(llm, LoRA(r=2, alpha=8, modules=params.finetune.lora.modules))
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    adapter = adapter or build_adapter("mlp", trained.shape[1], 32, **params.adapters["mlp"].architecture)
    adapter.save(folder, "adapter")
    lora.save_pretrained(folder / "lora")
    encoder = {key: identity[key] for key in ENCODER if key in identity}
    named = {key: getattr(params.llm, key) for key in ("loader", "model", "revision", "quantization", "system_prompt")}
    Origin("0", encoder, words, named, None).write(folder)
    (folder / "metrics.json").write_text(json.dumps({"val_loss": 1.25}))
    rows = {
        "id": ["a", "b", "c"], "image": ["a.png", "b.png", "c.png"], "split": ["train", "train", "test"],
        "sha256": ["x", "y", "x"],
        "quarantine": [None] * 3, "label": [None] * 3,
        "captions": [["a cat and a dog"], ["a cat on red"], ["an apple"]],
    }  # fmt: skip
    (base / "prepare").mkdir(parents=True, exist_ok=True)
    for data in params.run.data:
        pd.DataFrame(rows).to_parquet(base / "prepare" / f"{data}.parquet")
    figures = [
        {"key": "f1", "value": 0.5, "label": "F1 of things", "interval": [0.4, 0.6], "kind": "share", "baseline": False}
    ]
    (base / "evaluate" / "mlp-captions" / "captions").mkdir(parents=True, exist_ok=True)
    (base / "evaluate" / "mlp-captions" / "captions" / "figures.json").write_text(json.dumps(figures))
    return trained


def named(trained: Trained, names: list[str], adapter: Adapter | None = None) -> Namer:
    """What stages `pretrain` and `name` leave for a fine-tuned adapter: another adapter, and a namer of random values.

    It is sure of nothing, so that a hint has several names.
    """
    adapter = adapter or build_adapter("mlp", trained.shape[1], 32, **trained.params.adapters["mlp"].architecture)
    pretrained, folder = trained.run.pretrained("mlp"), trained.run.named("mlp") / trained.data
    adapter.save(pretrained, "last")
    namer = a_namer(names, trained.shape[1], 32, cost="euclidean", unmatched=0.2)
    namer.save(folder)
    origin = Origin.read(trained.folder)
    replace(origin, llm=None, start=weights_of(pretrained / "last.safetensors")).write(folder)
    return namer


def a_namer(names: list[str], d_img: int, d: int, together: tuple[float, float] = (2.0, 0.3), **nearest: Any) -> Namer:
    """Random values; names of one word, two, three, ..."""
    lengths = torch.arange(len(names)) + 1
    offsets = [0, *lengths.cumsum(0).tolist()]
    values = {
        "words": torch.randn(offsets[-1], d) * 0.5, "weights": torch.rand(offsets[-1]), "offsets": offsets,
        "center": torch.randn(d) * 0.1, "into_space": None, "bias": torch.randn(len(names)) * 0.2,
    }  # fmt: skip
    discriminant = Discriminant(torch.randn(len(names), d_img), torch.randn(len(names)))
    return Namer(names, Nearest(**values | nearest), discriminant, Scales(1.0, 1.0, together), 0.5)


class Ours(NamedTuple):
    """What `terraalign caption`, or `classify --llm`, says of a picture, reads of it and behind it, and its names."""

    text: str
    soft_prompt: torch.Tensor
    after: list[int]
    names: dict[str, float] | None = None


@torch.no_grad()
def ours(trained: Trained, photo: Path) -> Ours:
    params, task = trained.params, trained.task
    encoder = load_vision_encoder(params.vision, "cpu")
    tokens = encoder.encode(
        Decoder(encoder.preprocess).batch([Decoder(encoder.preprocess).load(photo.read_bytes())], 1)
    )
    model = load_vlm(params.llm, trained.folder, "adapter", "cpu")
    soft_prompt = model.adapter(tokens.clone())
    if trained.data == "classes":
        runtime = params.runtime.model_copy(update={"device": "cpu"})
        answering = Model(params.model_copy(update={"runtime": runtime}))
        names = answering.classify(photo, top=9).names
        hint = task.hint(hinted(names.items(), trained.recipe.hints))
        text = answering.classify(photo, llm=True).text
        return Ours(text, soft_prompt, model.prompt(task.prompt, hint)[1], names)
    decoding = task.decoding(model, training_captions(trained.run, "captions"))
    [text] = model.generate(tokens, task.prompt, task.max_tokens, **decoding)
    return Ours(text, soft_prompt, model.prompt(task.prompt)[1])


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Neither square nor of any encoder's size."""
    path = tmp_path / "photo.png"
    Image.effect_noise((70, 50), 90).convert("RGB").save(path)
    return path


ENCODERS = [
    {"encoder": "efficientnet_lite0"},
    {"encoder": "open_clip", "model": "tiny-clip", "pretrained": "random"},
    {"encoder": "timm", "model": "test_vit", "pretrained": "random"},
]
DTYPES = ["bfloat16", "auto", "float32", "float32"]  # of the LLM
NAMES = ["a cat", "a red apple", "crème brûlée", "dog"]


def test_the_example_answers_as_we_do_where_there_is_no_terraalign(
    tiny_params: Params, tiny_clip: None, photo: Path, tmp_path: Path
) -> None:
    """With a beam and words that are said once, also of an LLM in 4 bits, by the encoders' own packages; with hints."""
    expected = {}
    for number, vision in enumerate([*ENCODERS, ENCODERS[-1]]):
        Path(str(number)).mkdir()
        os.chdir(tmp_path / str(number))
        Path("params.yaml").write_text((tmp_path / "params.yaml").read_text())
        params = settings(vision, "nf4" if number == 2 else "none", DTYPES[number])
        trained = fine_tuned(params, data="captions" if number < 3 else "classes")
        if number == 3:
            named(trained, NAMES)
        expected[number] = ours(trained, photo)
        plain.export(trained, tmp_path / "out" / str(number))
        os.chdir(tmp_path)
    folders = [tmp_path / "out" / str(number) for number in expected]
    tiny = [config for config in (Path(path) for path in open_clip.factory._MODEL_CONFIG_PATHS) if config.is_dir()][-1]
    script = f"import open_clip; open_clip.add_model_config({str(tiny)!r})\n{RUNNER}"
    done = subprocess.run(
        [sys.executable, "-c", script, photo, *folders], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stderr.splitlines()[-1].startswith("nope.jpg: ") and done.returncode == 1, done.stderr
    alone = subprocess.run([sys.executable, folders[0] / "example.py"], capture_output=True, text=True, check=False)
    assert "Warning" not in done.stderr  # of libraries
    assert alone.returncode == 1 and "python example.py PHOTO" in alone.stderr and "Traceback" not in alone.stderr
    names = expected[3].names
    assert names and 0.3 < max(names.values()) < 0.9, "a hint of several"
    said = [own.text for own in expected.values()]
    shown = [f"{100 * share:5.1f} %  {name}" for name, share in names.items()]
    assert done.stdout.splitlines() == [*said[:3], *shown, said[3]]
    for number, own in expected.items():
        soft_prompt, after, found = torch.load(tmp_path / "out" / f"{number}.pt")
        dtype = pick_dtype(DTYPES[number], torch.device("cpu"))
        assert soft_prompt.dtype == dtype
        error = 1e-5 if dtype == torch.float32 else 0.01
        torch.testing.assert_close(soft_prompt.float(), own.soft_prompt, atol=error, rtol=error)
        assert after == own.after
        assert dict(found or []) == pytest.approx(own.names or {}, abs=1e-4)


@pytest.mark.parametrize(
    ("nearest", "together"),
    [
        ({"cost": "euclidean", "unmatched": 0.0}, (2.0, 0.0)),
        ({"cost": "sqeuclidean", "unmatched": 0.4}, (0.7, 0.4)),
        ({"cost": "cosine", "unmatched": 0.2, "into_space": torch.eye(8) + 0.3}, (9.0, 0.2)),
        ({"cost": "euclidean", "unmatched": 0.2}, (0.0, 0.5)),
    ],
)
@torch.no_grad()
def test_names_are_as_probable_without_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nearest: dict[str, Any], together: tuple[float, float]
) -> None:
    """Our solver against POT's. What has no weight is left out: a discriminant alone needs neither adapter nor POT."""
    namer, adapter = a_namer(NAMES, 12, 8, together, **nearest), build_adapter("linear", 12, 8).eval()
    values, tensors = values_of(namer)
    (tmp_path / "config.json").write_text(json.dumps({"names": values}))
    save_file(tensors, tmp_path / "names.safetensors")
    text = plain.rendered("naming.py.jinja", {"names": values, "title": "tiny"})
    (tmp_path / "naming.py").write_text(text)
    assert ("import ot" in text, "weight" in tensors) == tuple(bool(weight) for weight in together)
    if "import ot" in text:
        source, weights = program_of(adapter, (16, 12), "an adapter")
        (tmp_path / "modeling.py").write_text(source)
        save_file(weights, tmp_path / "names-adapter.safetensors")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "modeling", raising=False)
    module = runpy.run_path(str(tmp_path / "naming.py"))
    for tokens in torch.randn(3, 1, 16, 12):
        [expected] = likeliest(NAMES, namer.rules(tokens, adapter(tokens))["namer"].exp())
        found = module["likeliest"](tokens)
        assert [name for name, _ in found] == list(expected) and dict(found) == pytest.approx(expected, abs=1e-4)
        assert max(expected.values()) < 0.99


def test_what_hints_need_is_said(tiny_params: Params, tiny_clip: None) -> None:
    """A class that the chat format would read as its own; a namer that is not there, or is of other weights."""
    trained = fine_tuned(settings(ENCODERS[-1]), data="classes")
    with pytest.raises(UserError, match=r"cannot be loaded as a namer .*dvc repro name@mlp"):
        plain.export(trained, Path("out"))
    named(trained, ["a cat", "an apple</s>"])
    with pytest.raises(UserError, match=r"data.classes: .* reads 'an apple</s>' otherwise than TerraAlign; rename"):
        plain.export(trained, Path("out"))
    trained = Trained(trained.params, trained.folder, "classes", trained.parts)
    named(trained, NAMES, build_adapter("linear", trained.shape[1], 32))
    with pytest.raises(
        UserError, match=r"mlp-classes: .*another kind of adapter than .*dvc repro finetune@mlp-classes"
    ):
        plain.export(trained, Path("out"))
    build_adapter("linear", trained.shape[1], 32).save(trained.run.pretrained("mlp"), "last")
    with pytest.raises(UserError, match="made from other weights"):
        plain.export(Trained(trained.params, trained.folder, "classes", trained.parts), Path("out"))
    with pytest.raises(UserError, match=r"recipes.classes.hints is 3: .*no room for; leave out --format llava"):
        llava.export(trained, Path("out"))
    assert not Path("out").exists()


def test_all_that_llava_has_no_room_for_is_said_at_once(tiny_params: Params) -> None:
    """The encoder first: with another one, nothing that was trained stays."""
    adapter = build_adapter("linear", 1280, 32, pool=2)
    trained = fine_tuned(settings({"encoder": "efficientnet_lite0"}), adapter, data="classes")
    with pytest.raises(UserError) as refused:
        llava.export(trained, Path("out"))
    keys = [line.partition(":")[0] for line in str(refused.value).splitlines()]
    pool = "adapters.mlp.architecture.pool is 2"
    assert keys == ["vision.encoder efficientnet_lite0", pool, "finetune.recipes.classes.hints is 3"]
    assert not Path("out").exists()


def test_the_command_writes_a_folder_whose_parts_others_read(tiny_params: Params, photo: Path) -> None:
    from peft import PeftConfig

    fine_tuned(settings({"encoder": "timm", "model": "test_vit", "pretrained": "random"}))
    result = CliRunner().invoke(app, ["export", "data/tiny", "out"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "tiny: mlp on captions, for caption: out" in result.output
    readable = Path("out").stat().st_mode & 0o666
    assert {file.stat().st_mode & 0o777 for file in Path("out").rglob("*") if file.is_file()} == {readable}, (
        "as others may read them"
    )
    lora = PeftConfig.from_pretrained("out/lora")
    assert lora.base_model_name_or_path == tiny_params.llm.model and lora.r == 2
    assert set(load_file("out/adapter.safetensors")) == {"body.0.weight", "body.0.bias", "out.weight", "out.bias"}
    config = json.loads(Path("out/config.json").read_text())
    assert config["encoder"]["model"] == "test_vit" and config["generation"]["num_beams"] == 3
    card = Path("out/README.md").read_text().replace("\u00a0", " ")
    assert "**These figures promise too much: 1 of 1 test pictures is in training, too" in card
    header = yaml.safe_load(card.split("---")[1])
    [metric] = header["model-index"][0]["results"][0]["metrics"]
    assert (metric["type"], metric["value"]) == ("f1", 0.5)
    assert "| F1 of things | 50.0 % (40.0 % to 60.0 %) |" in card
    assert "| captions | caption | openmoji_scenes | 2, 0, 1 | pre-training, fine-tuning |" in card
    assert "validation loss | 1.250" in card and "CC BY-SA 4.0" in card
    again = CliRunner().invoke(app, ["export", "out"])
    assert again.exit_code == 2 and "there is something already" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data/other", "out"], "data/other: no such run"),
        (["--adapter", "query", "out"], "run.adapters has none of this name; it has mlp"),
        (["--recipe", "nope", "out"], "run.recipes has none of this name; it has captions, classes"),
        (["--recipe", "classes", "out"], "nothing is fine-tuned for the task classify"),
        (["a", "b", "c"], "3 paths"),
    ],
)
def test_what_cannot_be_exported_is_said(tiny_params: Params, arguments: list[str], message: str) -> None:
    settings({"encoder": "timm", "model": "test_vit", "pretrained": "random"})
    (Path("data") / "tiny").mkdir(parents=True)
    result = CliRunner().invoke(app, ["export", *arguments])
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("linear", {"pool": 2}),
        ("mlp", {"positions": 16, "dropout": 0.5}),
        ("self_attention", {"width": 8, "heads": 2, "blocks": 1}),
        ("query", {"width": 8, "heads": 2, "blocks": 2, "queries": 5, "pool": 2}),
    ],
)
def test_an_adapters_program_does_what_it_does(kind: str, architecture: dict[str, Any]) -> None:
    """With all that pre-training may add, for any number of pictures, and by torch alone."""
    adapter = build_adapter(kind, 12, 20, **architecture)
    adapter.start_at(torch.randn(adapter(torch.zeros(1, 16, 12)).shape[1], 20), torch.randn(3, 16, 12))
    adapter.skip_by(torch.randn(13, 20))
    adapter.mix(torch.randn(7, 20))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.2)
    adapter.eval()
    source, weights = program_of(adapter, (16, 12), "an adapter")
    assert "pipeline" not in source and set(weights) <= set(adapter.state_dict())
    module: dict[str, Any] = {}
    exec(source, module)
    for count in (1, 2, 5):
        tokens = torch.randn(count, 16, 12)
        torch.testing.assert_close(module["adapter"](weights, tokens), adapter(tokens), atol=1e-5, rtol=1e-5)


# LLaVA


def tiny_siglip(**more: Any) -> Parts:
    """timm's SigLIP of two layers."""
    options: dict[str, Any] = {
        "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "class_token": False,
        "global_pool": "map", "num_classes": 0,
    }  # fmt: skip
    network = timm.models.vision_transformer.VisionTransformer(**options | more).eval()
    preprocess = Preprocess((32, 32), "bicubic", 255.0, (0.5,) * 3, (0.5,) * 3, text="siglip 32")
    return Parts(network, TimmTokens(network, lambda why: UserError("vision.model", why)), preprocess)


def randomised(parts: Parts) -> Parts:
    """Norms and biases that do something, and states of the size that trained towers have."""
    for parameter in parts.network.parameters():
        nn.init.normal_(parameter, std=0.4)
    parts.network.requires_grad_(False)
    return parts


def tiny_open_clip(model: str) -> Parts:
    return encoder_of(settings({"encoder": "open_clip", "model": model, "pretrained": "random"}))[0]


TOWERS: dict[str, Callable[[], Parts]] = {
    "clip": lambda: tiny_open_clip("tiny-clip"),
    "quickgelu": lambda: tiny_open_clip("tiny-clip-quickgelu"),
    "siglip": tiny_siglip,
    "siglip2": lambda: tiny_siglip(act_layer="gelu_tanh"),
    "no last norm": lambda: tiny_siglip(final_norm=False),
}


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_tower_of_transformers_gives_the_encoders_tokens(tiny_params: Params, tiny_clip: None, name: str) -> None:
    """The difference of its last two states, or its last state."""
    made = randomised(TOWERS[name]())
    pixels = torch.randn(2, 3, 32, 32)
    tower = tower_of(made, "tiny")
    states = tower.model(pixel_values=pixels, output_hidden_states=True).hidden_states
    found = states[-1] - states[-2] if tower.normed else states[-1]
    torch.testing.assert_close(found[:, tower.prefix :], made.tokens(pixels), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["clip and mlp", "siglip and linear"])
def test_stock_llava_gives_our_logits(tiny_params: Params, tiny_clip: None, photo: Path, kind: str) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    trained = fine_tuned(settings({"encoder": "open_clip", "model": "tiny-clip", "pretrained": "random"}))
    parts = randomised(trained.parts if kind == "clip and mlp" else tiny_siglip())
    if kind == "siglip and linear":
        trained = fine_tuned(trained.params, build_adapter("linear", 32, 32))
    trained = Trained(trained.params, trained.folder, "captions", parts)
    llava.export(trained, Path("out"))
    model, processor = LlavaForConditionalGeneration.from_pretrained("out"), AutoProcessor.from_pretrained("out")
    prompt = trained.asked.text
    content = [{"type": "text", "text": prompt}, {"type": "image", "image": Image.open(photo)}]
    given = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    vlm = load_vlm(trained.params.llm, trained.folder, "adapter", "cpu")
    answer = [5, 6, 7]
    with torch.no_grad():
        expected, _ = vlm._taught(parts.tokens(given["pixel_values"]), prompt, [answer], None)
        ids = torch.cat([given["input_ids"], torch.tensor([answer])], 1)
        logits = model(input_ids=ids, pixel_values=given["pixel_values"]).logits[:, -len(answer) - 1 : -1]
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, atol=1e-4, rtol=1e-4)
    # The picture as the encoder itself takes it, but for PIL's rounding.
    own = trained.tokens(Image.open(photo))
    torch.testing.assert_close(parts.tokens(given["pixel_values"]), own, atol=0.2, rtol=0.1)
    said = model.generate(**given)
    assert said.shape[1] > given["input_ids"].shape[1]
    assert "LlavaForConditionalGeneration" in Path("out/README.md").read_text()


def test_an_llm_that_does_more_than_its_parts_is_refused(
    tiny_params: Params, tiny_clip: None, tmp_path: Path, tiny_mistral: Path
) -> None:
    """Cohere's scales its logits, which LLaVA leaves out: seen by the logits, before anything is written."""
    config = AutoConfig.for_model(
        "cohere", vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained("cohere")
    AutoTokenizer.from_pretrained(tiny_mistral).save_pretrained("cohere")
    params = settings({"encoder": "open_clip", "model": "tiny-clip", "pretrained": "random"})
    params = params.model_copy(update={"llm": params.llm.model_copy(update={"model": str(tmp_path / "cohere")})})
    with pytest.raises(
        UserError, match=r"llm.model .*cohere: LLaVA with it gives other logits .*without --format llava"
    ):
        llava.export(fine_tuned(params), Path("out"))
    assert not Path("out").exists()


CHAT = "{{ bos_token }}{% for m in messages %} [INST] {{ m['content'] }} [/INST]{% endfor %}"
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT


@pytest.mark.parametrize("own", [CHAT, REFUSES], ids=["system role", "none"])
@pytest.mark.parametrize("system", [None, "", "Be brief.\nSay 'ü' \"so\"."])
def test_the_chat_template_writes_our_prompt(tiny_mistral: Path, own: str, system: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_mistral)
    tokenizer.chat_template = own
    before, after = Texts(tokenizer).prompt("Describe this image", system)
    content = [{"type": "text", "text": "Describe this image"}, {"type": "image"}]
    moved = own is REFUSES and system is not None
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, chat_template=chat_template(own, system, moved)
    )
    assert chat == f"{tokenizer.decode(before)}<image>{tokenizer.decode(after)}"


def with_offset(adapter: Adapter, rows: torch.Tensor) -> Adapter:
    adapter.offset = nn.Parameter(rows)
    return adapter


def with_positions(rows: torch.Tensor) -> Adapter:
    adapter = build_adapter("mlp", 8, 6, hidden=4, positions=len(rows))
    part = next(part for part in adapter.body.children() if isinstance(part, Positions))
    part.bias = nn.Parameter(rows)
    return adapter


@pytest.mark.parametrize(
    "adapter",
    [
        lambda: build_adapter("linear", 8, 6),
        lambda: build_adapter("linear", 8, 6, pool=4, dropout=0.5),
        lambda: build_adapter("mlp", 8, 6, hidden=6),
        lambda: with_offset(build_adapter("mlp", 8, 6, hidden=3), torch.randn(1, 6).expand(16, 6).clone()),
        lambda: with_positions(torch.randn(1, 4).expand(16, 4).clone()),
    ],
)
@torch.no_grad()
def test_what_is_alike_for_all_tokens_folds_into_the_projector(adapter: Callable[[], Adapter]) -> None:
    from transformers.activations import ACT2FN

    made, tokens = adapter().eval(), torch.randn(2, 16, 8)
    found = projector_of(made, "mlp", 16)
    hidden = ACT2FN[found.act](nn.functional.linear(tokens, *found.first))
    torch.testing.assert_close(nn.functional.linear(hidden, *found.second), made(tokens), atol=1e-5, rtol=1e-5)
    assert found.first[0].shape == (6, 8) and found.second[0].shape == (6, 6)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            lambda: build_adapter("query", 8, 6, width=8),
            "architecture.kind is query: LLaVA's projector is a linear or an mlp",
        ),
        (
            lambda: build_adapter("linear", 8, 6, pool=2),
            "architecture.pool is 2: .* the encoder gives 16; leave pool out",
        ),
        (lambda: build_adapter("mlp", 8, 6), "architecture.hidden is 12: .*set it to 6 or less"),
        (
            lambda: with_offset(build_adapter("linear", 8, 6), torch.randn(16, 6)),
            "start is constant_set: .*`start: random`",
        ),
        (lambda: with_positions(torch.randn(16, 4)), "architecture.positions is 16: .*leave it out"),
    ],
)
def test_what_llava_has_no_room_for_is_refused_by_its_key(adapter: Callable[[], Adapter], message: str) -> None:
    with pytest.raises(UserError, match=message):
        projector_of(adapter(), "mine", 16)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"encoder": "timm", "model": "test_resnet", "pretrained": "random"}, "has no equal among the towers"),
        ({"encoder": "efficientnet_lite0"}, "has no equal among the towers .*take a CLIP ViT of open_clip"),
        ({"encoder": "timm", "model": "test_vit", "pretrained": "random"}, "has class tokens, which SigLIP has not"),
    ],
)
def test_an_encoder_without_a_tower_is_refused_by_name(
    tiny_params: Params, vision: dict[str, Any], message: str
) -> None:
    parts, _ = encoder_of(settings(vision))
    with pytest.raises(UserError, match=f"vision.encoder mine: {message}"):
        tower_of(parts, "vision.encoder mine")


# The hub


@pytest.fixture
def written() -> Path:
    folder = Path("out")
    (folder / "lora").mkdir(parents=True)
    for name in ("README.md", "config.json", "lora/adapter_model.safetensors"):
        (folder / name).write_text("{}")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "modeling.pyc").write_text("left by an example that ran")
    return folder


@pytest.mark.parametrize(("offline", "reason"), [(True, "HF_HUB_OFFLINE is set"), (False, "nobody is logged in")])
def test_push_says_what_it_would_do(
    project: Path, written: Path, monkeypatch: pytest.MonkeyPatch, offline: bool, reason: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    result = CliRunner().invoke(app, ["push", "me/model", "out"])
    assert result.exit_code == 3, result.output
    assert f"nothing uploaded: {reason}" in result.output
    assert "private repository me/model" in result.output and "3 files, 6 bytes" in result.output
    assert "lora/adapter_model.safetensors" in result.output


def test_push_says_so_where_the_hub_cannot_be_reached(
    project: Path, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    api = create_autospec(huggingface_hub.HfApi, instance=True)
    api.whoami.side_effect = OSError("no route to host")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: api)
    result = CliRunner().invoke(app, ["push", "me/model", "out"])
    assert result.exit_code == 3 and "cannot be reached (no route to host)" in result.output


def test_push_uploads_with_the_users_login(project: Path, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a stand-in with the signatures of huggingface_hub's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    api = create_autospec(huggingface_hub.HfApi, instance=True)
    api.create_repo.return_value = huggingface_hub.RepoUrl("https://huggingface.co/me/model")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: api)
    result = CliRunner().invoke(app, ["push", "me/model", "out"])
    assert result.exit_code == 0 and "https://huggingface.co/me/model" in result.output, result.output
    api.create_repo.assert_called_once_with("me/model", private=True, exist_ok=True)
    sent = api.upload_folder.call_args.kwargs
    assert sent["repo_id"] == "me/model" and sent["folder_path"] == Path("out")
    every = [str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()]
    kept = list(filter_repo_objects(every, ignore_patterns=sent["ignore_patterns"]))
    assert sorted(kept) == ["README.md", "config.json", "lora/adapter_model.safetensors"]
    refused = CliRunner().invoke(app, ["push", "not a name", "out"])
    assert refused.exit_code == 2 and "name it as user/model" in refused.output
    (written / "config.json").unlink()
    empty = CliRunner().invoke(app, ["push", "me/model", "out"])
    assert empty.exit_code == 2 and "no config.json in it" in empty.output
