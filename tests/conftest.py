"""Settings for every test: offline, and polite on a shared machine. They must be in place before torch is imported."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch
import yaml

from pipeline.config import Params, load_params
from pipeline.sources.openmoji import tables

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers for a test, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


CHAT = "{{ bos_token }}{% for m in messages %} [INST] {{ m['content'] }} [/INST]{% endfor %}"


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Mistral of random weights and a byte-level tokenizer with Mistral's chat format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("mistral")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a cat and a dog on a red background, a picture of an apple"], trainer)
    # Like Mistral's own: a BOS wherever special tokens are not switched off.
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# As root there is no sandbox; a camera of Chromium's own shows a pattern.
ARGUMENTS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def fits_screens(browser: Any) -> Callable[[Path], None]:
    """What asserts that a page is no wider than a phone and a desktop, light and dark, and asks no other machine."""

    def check(path: Path) -> None:
        for width in (390, 1280):
            for scheme in ("light", "dark"):
                context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
                page, asked = context.new_page(), list[str]()
                page.on("request", lambda sent, asked=asked: asked.append(sent.url))
                page.goto(path.resolve().as_uri())
                assert page.evaluate("document.documentElement.scrollWidth") == width
                assert all(url.startswith(("file:", "data:")) for url in asked)
                context.close()

    return check


TinyProject = Callable[[Path, pytest.MonkeyPatch], Params]


@pytest.fixture(scope="session")
def tiny_project(tiny_mistral: Path) -> TinyProject:
    """What makes an empty folder a project, the current one, with the demo's parameters, cut to seconds: few rendered
    pictures of twelve foods, a tiny Mistral, few steps."""

    def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
        foods = dict(list(tables.FOODS.items())[:12])
        monkeypatch.setattr(tables, "FOODS", foods)  # so few are rendered in this process
        values = yaml.safe_load((Path(__file__).parent.parent / "profiles/demo.yaml").read_text())
        values["profile"] = "tiny"
        values["data"]["captions"]["count"], values["data"]["classes"]["count"] = 40, 4
        values["llm"] |= {"loader": "huggingface", "model": str(tiny_mistral), "system_prompt": None}
        values["cache"]["shards"] = 3
        values["vision"] |= {"encoder": "timm", "model": "resnet10t", "pretrained": "random"}
        values["pretrain"] |= {"epochs": 2, "candidates": 5}
        for recipe in values["finetune"]["recipes"].values():
            recipe |= {"max_steps": 3, "batch": 4, "validations": 2, "validation_images": 4}
        values["evaluate"] |= {"captions": 3, "caption_tokens": 4, "class_tokens": 3}
        values["pca"] |= {"images": 4, "vocabulary": 50}
        values["run"]["scratch"] = ["mlp"]
        for name in ("self_attention", "query"):
            values["adapters"][name]["architecture"]["width"] = 16
        monkeypatch.chdir(folder)
        Path("params.yaml").write_text(yaml.safe_dump(values))
        return load_params()

    return make


@pytest.fixture
def tiny_params(tiny_project: TinyProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """The parameters of a tiny project in an empty folder, the current one."""
    return tiny_project(tmp_path, monkeypatch)
