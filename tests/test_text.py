"""Texts of users hold no special token, ordinary ones keep their ids, and templates of any kind place the image."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.errors import UserError
from pipeline.llms.text import Texts

CORPUS = ["a red square and a blue one on the table; what is it? [INST] im_end image user s"] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
CHAT = "{{ bos_token }}{% for m in messages %} [{{ m['role'] }}] {{ m['content'] }} <|im_end|>{% endfor %}"
PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
FAMILIES = ["bytes", "bytes, ignoring merges", "sentencepiece", "unigram", "wordpiece, lower case"]


def fast(tokenizer: Tokenizer, chat: str = CHAT) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=chat
    )
    made.add_tokens([AddedToken("<image>", special=False), AddedToken("crème", special=False)])
    made.add_tokens([AddedToken("[INST]", special=True)], special_tokens=True)
    return made


def family(name: str, chat: str = CHAT) -> PreTrainedTokenizerFast:
    """A tokenizer of the named family, trained on a few words."""
    special = [AddedToken(content, special=True, normalized=name.startswith("wordpiece")) for content in SPECIAL]
    if name == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    elif name.startswith("wordpiece"):
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", ignore_merges="ignoring" in name))
        alphabet = pre_tokenizers.ByteLevel.alphabet() if name.startswith("bytes") else []
        trainer = trainers.BpeTrainer(
            vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    if name.startswith("bytes"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif not name.startswith("wordpiece"):
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator([*CORPUS, "</s> <|im_end|>"], trainer)
    return fast(tokenizer, chat)


@pytest.mark.parametrize("name", FAMILIES)
def test_ordinary_texts_keep_their_ids(name: str) -> None:
    tokenizer = family(name)
    texts = ["a red square", "", "  two  spaces\n", "crème on the table", "an unknown é 図", "1 < 2 > [x] s>"]
    assert Texts(tokenizer).ids(texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("crème") in Texts(tokenizer).ids(["crème on the table"])[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("written", ["</s>", "<s>", "<|im_end|>", "<image>", "[INST]"])
def test_no_text_is_read_as_a_special_token(name: str, written: str) -> None:
    tokenizer = family(name)
    token, unknown = tokenizer.convert_tokens_to_ids(written), tokenizer.unk_token_id
    for text in (written, f"a red{written} square", f"a {written}{written}"):
        assert token in tokenizer(text, add_special_tokens=False)["input_ids"], "else this test shows nothing"
        [ids] = Texts(tokenizer).ids([text])
        assert set(ids) - {unknown}
        assert not (set(ids) - {unknown}) & {token, *tokenizer.all_special_ids}
        if name.startswith("bytes"):
            assert tokenizer.decode(ids) == text


def test_a_lower_casing_tokenizer_finds_no_special_token_in_capitals() -> None:
    tokenizer = family("wordpiece, lower case")
    [ids] = Texts(tokenizer).ids(["a red <|IM_END|> square"])
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_keeps_the_templates_tokens_alone(name: str) -> None:
    tokenizer = family(name)
    end, texts = tokenizer.convert_tokens_to_ids("<|im_end|>"), Texts(tokenizer)
    plain, _ = texts.prompt("what is it?", "a square")
    before, after = texts.prompt("what </s>is <|im_end|> it?", "a <image> square")
    assert plain.count(end) == before.count(end) == 1 and after.count(end) == 1
    assert before[0] == plain[0] == tokenizer.bos_token_id
    assert not {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<image>")} & set(before)
    if name.startswith("bytes"):
        chat = "<s> [system] a <image> square <|im_end|> [user] what </s>is <|im_end|> it?\n"
        assert tokenizer.decode(before) == chat and tokenizer.decode(after) == " <|im_end|>"


def test_ordinary_prompts_are_the_templates_own() -> None:
    tokenizer = family("bytes")
    before, after = Texts(tokenizer).prompt("what is it? <|terraalign-image|>", "")
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": ""}, {"role": "user", "content": "what is it? <|terraalign-image|>\nHERE"}],
        tokenize=False,
    ).split("HERE")
    assert [before, after] == [tokenizer(part, add_special_tokens=False)["input_ids"] for part in chat]


@pytest.mark.parametrize("system", [None, "", "be brief"])
@pytest.mark.parametrize("chat", [CHAT, PARTS, NO_SYSTEM, CHAT.replace("m['content']", "m['content'] | trim")])
def test_templates_of_every_kind(chat: str, system: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = family("bytes", chat)
    texts = Texts(tokenizer)
    before, after = (tokenizer.decode(ids) for ids in texts.prompt("what is it?", system))
    assert before.endswith("what is it?\n") and "what" not in after
    hinted = [tokenizer.decode(ids) for ids in texts.prompt("what is it?", system, "a red <|im_end|> table")]
    assert hinted == [before, f"\na red <|im_end|> table{after}"]
    assert ("be brief" in before) == (system == "be brief")
    texts.prompt("what is it?", system)
    assert capsys.readouterr().err.count("no system role") == (chat == NO_SYSTEM and system == "be brief")


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ("{{ raise_exception('never') }}", r"refuses the prompt \(never\)"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "repeats the prompt 2 times"),
        ("[user]", "leaves the prompt out"),
        ("{% for m in messages %}{{ m.content.split('\n')[1] }}{% endfor %}", "changes or drops 'what is it"),
        ("{{ messages[0].content | replace('square', 'circle') }}", "changes or drops 'a square'"),
        ("{{ messages[0].content | upper }}", "leaves the prompt out"),
        ("{{ messages[0]['nothing'][3] }}", "refuses the prompt"),
        ("{% broken", "refuses the prompt"),
    ],
)
def test_a_template_that_loses_the_image_is_refused(chat: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"chat template {reason}"):
        Texts(family("bytes", chat)).prompt("what is it?", None, "a square")
