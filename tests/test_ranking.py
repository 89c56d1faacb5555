"""Names ranked by log-likelihood: a tree of all names in one pass gives what each name gives by itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.adapters.module import build_adapter
from pipeline.config import LLM
from pipeline.errors import UserError
from pipeline.llms.load import load_llm
from pipeline.llms.ranking import Trie
from pipeline.vlm import VLM

NAMES = ["a cat", "a", "a dog", "a dog on a red background", "an apple", "", "apple</s>", "a dog"]
HINTS = ["a cat, a dog", "", "an apple " * 7]
PROMPT = "What is it?"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
READ_TREES = {
    "llama": SIZES | {"num_key_value_heads": 2},
    "gemma2": SIZES | {"num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    "qwen3": SIZES | {"num_key_value_heads": 2, "head_dim": 8},
    "phi": SIZES,
    "mistral": SIZES | {"num_key_value_heads": 2, "sliding_window": 200},
}
READ_NAMES = {
    "mixtral": SIZES | {"num_key_value_heads": 2, "sliding_window": 6},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


@pytest.fixture(params=["words before the image once", "one pass"])
def model(tiny_mistral: Path, request: pytest.FixtureRequest) -> VLM:
    """As a CPU does it, and as a GPU does, whichever this is."""
    llm = load_llm(LLM(loader="huggingface", model=str(tiny_mistral), dtype="float32"))
    model = VLM(build_adapter("linear", 8, 32), llm).eval()
    model.shares_prompt = request.param != "one pass"
    return model


@torch.no_grad()
def alone(model: VLM, tokens: torch.Tensor, names: list[str], hints: list[str] | None = None) -> torch.Tensor:
    """Each name's log-likelihood by `loss`, image by image."""
    return torch.tensor([
        [-model.loss(tokens[row : row + 1], PROMPT, [name], hints and [hints[row]])[0] for name in names]
        for row in range(len(tokens))
    ])  # fmt: skip


def test_a_trie_reads_a_common_beginning_once() -> None:
    trie = Trie([[5, 6, 2], [5, 2], [7, 2], [5, 6, 8, 2], [7]])
    assert trie.tokens == [5, 6, 7, 8] and trie.depths == [1, 2, 1, 3]
    assert sorted(trie.seen) == [(0, 0), (1, 0), (1, 1), (2, 2), (3, 0), (3, 1), (3, 3)]


@pytest.mark.parametrize("hints", [None, HINTS], ids=["no hints", "hints"])
def test_a_tree_gives_what_names_give_alone(model: VLM, hints: list[str] | None, monkeypatch) -> None:
    tokens = torch.randn(3, 4, 8)
    expected = alone(model, tokens, NAMES, hints)
    torch.testing.assert_close(model.rank(tokens, PROMPT, NAMES, hints).cpu(), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("pipeline.vlm.MOST_LOGITS", 1)  # an image at a time
    torch.testing.assert_close(model.rank(tokens, PROMPT, NAMES, hints).cpu(), expected, rtol=1e-5, atol=1e-5)
    model.max_answer_tokens = 1  # of each name the first token alone
    torch.testing.assert_close(
        model.rank(tokens, PROMPT, NAMES, hints, top=99).cpu(), alone(model, tokens, NAMES, hints)
    )
    model.max_answer_tokens, model.tree_reach = 64, 0
    torch.testing.assert_close(model.rank(tokens, PROMPT, NAMES, hints).cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trees", [True, False])
def test_names_of_their_own_for_each_image(model: VLM, trees: bool) -> None:
    tokens = torch.randn(3, 4, 8)
    model.tree_reach = model.tree_reach if trees else 0
    whole = model.rank(tokens, PROMPT, NAMES)
    found = model.rank(tokens, PROMPT, [NAMES[:2], NAMES[3:7], []], HINTS[1:2] * 3)
    expected = torch.full_like(found, -torch.inf)
    expected[0, :2], expected[1] = whole[0, :2], whole[1, 3:7]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*READ_TREES, *READ_NAMES])
def test_every_architecture_ranks_as_its_loss_does(kind: str, tiny_mistral: Path, tmp_path: Path) -> None:
    sizes = (READ_TREES | READ_NAMES)[kind]
    config = AutoConfig.for_model(kind, vocab_size=400, bos_token_id=0, eos_token_id=1, pad_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_mistral).save_pretrained(tmp_path)
    llm = load_llm(LLM(loader="huggingface", model=str(tmp_path), dtype="float32"))
    model, tokens = VLM(build_adapter("linear", 8, llm.width), llm).eval(), torch.randn(3, 4, 8)
    assert (model.tree_reach > 100) == (kind in READ_TREES)
    expected = alone(model, tokens, NAMES, HINTS)
    torch.testing.assert_close(model.rank(tokens, PROMPT, NAMES, HINTS).cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top", [1, 3, 99])
@pytest.mark.parametrize("weight", [0.0, 99.0], ids=["no prior", "prior"])
def test_the_best_are_found_without_reading_all(model: VLM, top: int, weight: float) -> None:
    names = [f"{start} {end}" for start in ("a", "red", "on", "ct", "ap") for end in ("cat", "dog", "pie and ice")]
    tokens, hints = torch.randn(6, 4, 8), [*HINTS, *HINTS]
    prior = weight * torch.randn(6, len(names))
    whole, found = (
        model.rank(tokens, PROMPT, names, hints, **more).cpu() for more in ({}, {"prior": prior, "top": top})
    )
    best = (whole + prior).topk(min(top, len(names)), 1).indices
    assert torch.equal((found + prior).topk(min(top, len(names)), 1).indices, best)
    read = found > -torch.inf
    torch.testing.assert_close(found[read], whole[read], rtol=1e-4, atol=1e-4)
    assert read.all() == (top == 99) or not weight


def test_a_name_beyond_the_context_is_refused(model: VLM) -> None:
    model.context = model.context - model.room(PROMPT, 4) + 2
    assert model.rank(torch.randn(1, 4, 8), PROMPT, ["a"]).shape == (1, 1)
    for top in (None, 1):
        with pytest.raises(UserError, match="the LLM's context is"):
            model.rank(torch.randn(1, 4, 8), PROMPT, ["a picture of a red dog"], top=top)


@torch.no_grad()
def test_the_state_is_what_the_first_word_is_read_from(model: VLM) -> None:
    images = SimpleNamespace(tokens=lambda some, device: torch.stack([torch.full((4, 8), float(i)) for i in some]))
    positions = [3, 1, 4]
    for hints in (None, HINTS):
        states = model.states(images, positions, PROMPT, 2, hints).to(model.device)
        read = model.network.get_output_embeddings()(states).float().log_softmax(1).cpu()
        model.max_answer_tokens = 1  # of each name the first token alone
        expected = alone(model, images.tokens(positions, ""), NAMES[:3], hints)
        firsts = [model.answer_ids([name])[0][0] for name in NAMES[:3]]
        torch.testing.assert_close(read[:, firsts], expected, rtol=1e-5, atol=1e-5)
    assert model.states(images, [], PROMPT, 2).shape == (0, 32)


def test_many_images_are_ranked_in_parts(model: VLM) -> None:
    images = SimpleNamespace(tokens=lambda some, device: torch.stack([torch.full((4, 8), float(i)) for i in some]))
    positions, hints, prior = [3, 1, 4], ["a cat", "", "a dog"], torch.randn(3, len(NAMES))
    tokens = images.tokens(positions, "")
    found = model.ranks(images, positions, PROMPT, NAMES, 2, hints, prior, top=len(NAMES))
    torch.testing.assert_close(found, model.rank(tokens, PROMPT, NAMES, hints).cpu(), rtol=1e-5, atol=1e-5)
    own = [NAMES[:1], NAMES[:2], NAMES[:5]]
    found = model.ranks(images, positions, PROMPT, own, 2)
    torch.testing.assert_close(found, model.rank(tokens, PROMPT, own).cpu(), rtol=1e-5, atol=1e-5)
    assert model.ranks(images, [], PROMPT, NAMES, 2).shape == (0, len(NAMES))
