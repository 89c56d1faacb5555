"""The objectives of LLaVA and BLIP-2: against the model of fine-tuning, and against their definitions."""

import math

import pytest
import torch
from torch.nn import functional as F

from pipeline.config import LLM
from pipeline.errors import UserError
from pipeline.llms.load import load_llm
from pipeline.objectives import caption_ce
from pipeline.objectives.base import Means
from pipeline.objectives.caption_ce import CaptionCE, CaptionCESettings
from pipeline.objectives.pairs import Pairs
from pipeline.objectives.qformer import QFormer, QFormerSettings
from pipeline.vlm import VLM

TEXTS = ["a cat", "a dog on a red background", "an apple", "a picture of a cat and a dog"]


@pytest.fixture(scope="module")
def llm(tiny_mistral):
    return load_llm(LLM(loader="huggingface", model=str(tiny_mistral), dtype="float32"))


@pytest.fixture
def through_llm(llm):
    """The objective on captions of a tiny Mistral: row i of the table is token i, backwards."""
    count = len(llm.tokenizer)
    table = llm.network.get_input_embeddings().weight.detach().flip(0)
    captions = [[[count - 1 - i for i in llm.tokenizer(text, add_special_tokens=False).input_ids]] for text in TEXTS]
    pairs = Pairs(lambda _: torch.empty(0), captions, table, list(range(count))[::-1], [0], [0], 4)
    return CaptionCE(CaptionCESettings(name="caption_ce"), pairs, Means(llm=llm))


def by_vlm(llm, tokens, texts, image):
    """Mean cross-entropies, a pair at a time, of the model that fine-tuning trains."""
    model, prompt = VLM(torch.nn.Identity(), llm), "Provide a brief description of the given image."
    model.shares_prompt = False
    found = [model.loss(tokens[i : i + 1], prompt, [text]) for text, i in zip(texts, image, strict=True)]
    return torch.stack([total / count for total, count in found])


@pytest.mark.parametrize("most", [1, 150, 10_000])
def test_the_loss_of_captions_is_that_of_fine_tuning(most, llm, through_llm, monkeypatch):
    """Value and gradient, captions of several lengths together and one at a time; nothing of the LLM learns."""
    monkeypatch.setattr(caption_ce, "MOST_TOKENS", most)
    tokens = torch.randn(3, 2, llm.width, requires_grad=True)
    image, weights = [0, 0, 2, 1], torch.tensor([1.0, -2.0, 3.0, 0.5])
    captions = [captions[0] for captions in through_llm.pairs.captions]
    found, expected = through_llm.distances(tokens, captions, image), by_vlm(llm, tokens, TEXTS, image)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad((values * weights).sum(), tokens)[0] for values in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert ours.abs().min() > 0
    assert all(p.grad is None and not p.requires_grad for p in llm.network.parameters())
    with torch.no_grad():
        assert not through_llm.distances(tokens, captions, image).requires_grad
    step = through_llm.start(tokens, [0, 2, 3]).result()
    torch.testing.assert_close(step, by_vlm(llm, tokens, [TEXTS[i] for i in (0, 2, 3)], range(3)).mean())


@pytest.mark.parametrize("most", [20, 10_000])
@pytest.mark.parametrize("reads_trees", [True, False])
def test_captions_are_ranked_by_their_loss(reads_trees, most, llm, through_llm, monkeypatch):
    monkeypatch.setattr(caption_ce, "MOST_TOKENS", most)
    if not reads_trees:
        monkeypatch.setattr("pipeline.llms.ranking.tree_reach", lambda network: 0)
    tokens, captions = torch.randn(3, 2, llm.width), [captions[0] for captions in through_llm.pairs.captions]
    expected = torch.stack([by_vlm(llm, tokens, TEXTS, [i] * len(TEXTS)) for i in range(3)])
    torch.testing.assert_close(through_llm.all_distances(tokens, captions), expected, rtol=1e-5, atol=1e-5)


def test_a_caption_has_to_fit_into_the_context(llm, through_llm, monkeypatch):
    through_llm.initialise(lambda tokens: tokens, torch.zeros(1, 2, llm.width))
    monkeypatch.setattr(llm.network.config, "max_position_embeddings", 20)
    with pytest.raises(UserError, match=r"the longest caption are .* tokens, the LLM's context is 20; lower"):
        through_llm.initialise(lambda tokens: tokens, torch.zeros(1, 2, llm.width))


# BLIP-2's first stage

WORDS, WIDTH, IMAGES = 20, 6, 12


def qformer(captions=None):
    captions = captions or [[[i, (3 * i) % WORDS, 5][: 1 + i % 3]] for i in range(IMAGES)]
    torch.manual_seed(4)
    images, table = torch.randn(IMAGES, 3, WIDTH), torch.randn(WORDS, WIDTH)
    every = list(range(IMAGES))
    pairs = Pairs(lambda some: images[some], captions, table, list(range(WORDS)), every, every, IMAGES)
    return QFormer(QFormerSettings(name="qformer", width=64, blocks=1), pairs, Means(seed=1)), images


def test_itc_is_info_nce_of_the_nearest_token():
    objective, images = qformer()
    captions = [captions[0] for captions in objective.pairs.captions[:4]]
    found = -objective.all_distances(images[:4], captions)
    lengths = sorted({len(caption) for caption in captions})
    assert lengths == [1, 2, 3]  # so some are padded
    image = F.linear(images[:4], objective.module.image_out.weight, objective.module.image_out.bias)
    alone = torch.cat([objective.module.text_embeddings(torch.tensor([caption])) for caption in captions])
    expected = torch.stack([F.cosine_similarity(i[None], alone[:, None], dim=2).amax(1) for i in image])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(-objective.distances(images[:4], captions, range(4)), expected.diagonal())
    info_nce = -sum((expected / 0.07).softmax(side).diagonal().log().mean() for side in (0, 1)) / 2
    torch.testing.assert_close(objective.contrast(expected, torch.eye(4).bool()), info_nce)


def test_a_caption_that_two_pictures_share_is_no_wrong_answer():
    objective, _ = qformer()
    similar, own = torch.tensor([[0.9, 0.9, 0.1], [0.9, 0.9, 0.1], [0.1, 0.1, 0.9]]), torch.eye(3).bool()
    own[0, 1] = own[1, 0] = True
    assert objective.contrast(similar, own) < 1e-4 < 0.4 < objective.contrast(similar, torch.eye(3).bool())


def test_negatives_are_hard_and_never_right():
    own = torch.eye(4).bool()
    own[0, 1] = own[1, 0] = True  # an equal caption
    logits = torch.tensor([[9.0, 9, 0, 2], [9, 9, 0, 0], [0, 0, 9, 0], [0, 0, 0, 9]])
    drawn = [QFormer.negatives(logits, own) for _ in range(300)]
    assert not any(own[row, column] for found in drawn for row, column in enumerate(found))
    assert sum(found[0] == 3 for found in drawn) > 200 > sum(found[1] == 3 for found in drawn)
    own[2] = True
    assert QFormer.negatives(logits, own)[2] is None
    assert QFormer.negatives(logits, torch.ones(4, 4).bool()) == [None] * 4


def test_itm_shows_each_pair_and_its_negatives(monkeypatch):
    """What is held to be no match is never the picture's own caption, nor one that says the same."""
    captions = [[[1, 2]], [[3]], [[1, 2]], [[4, 5, 6], [7]], [[3]]]
    objective, images = qformer(captions)
    shown, real = [], objective.module.matches

    def matches(tokens, words):
        shown.append((tokens, words))
        return real(tokens, words)

    monkeypatch.setattr(objective.module, "matches", matches)
    for _ in range(20):
        objective.start(images[:5], [0, 1, 2, 3, 4])
    for tokens, words in shown:
        assert len(tokens) == 5 + 2 * 5
        of = [(images == picture).all(2).all(1).nonzero().item() for picture in tokens]
        said = [[word for word in row if word >= 0] for row in words.tolist()]
        right = [text in captions[picture] for picture, text in zip(of, said, strict=True)]
        assert right == [True] * 5 + [False] * 10


def test_a_lone_picture_has_no_negatives():
    objective, images = qformer()
    assert objective.start(images[:1].requires_grad_(), [0]).result().isfinite()


def test_itg_sees_the_image_and_the_words_before_alone():
    objective, images = qformer([[[1, 2, 3, 4]], [[7, 8]]])
    tower, words = objective.module.eval(), torch.tensor([[1, 2, 3, 4], [7, 8, -1, -1]])
    with torch.no_grad():
        found = tower.next_words(images[:2], words)
        later = tower.next_words(images[:2], torch.tensor([[1, 2, 9, 4], [7, 8, -1, -1]]))
        other = tower.next_words(images[2:4], words)
        short = tower.next_words(images[1:2], words[1:, :2])
    torch.testing.assert_close(later[0, :3], found[0, :3])
    assert ((later - found)[0, 3:].abs().amax(1) > 1e-4).all()
    assert ((other - found).abs().amax(2) > 1e-4)[0].all()
    torch.testing.assert_close(short[0], found[1, :3])  # padding changes nothing
    ends = torch.tensor([[1, 2, 3, 4, WORDS], [7, 8, WORDS, -1, -1]])
    lost = -found.log_softmax(2).gather(2, ends.clamp_min(0)[:, :, None])[:, :, 0][ends >= 0]
    torch.testing.assert_close(objective.writing(images[:2], words), lost.mean())


def test_the_three_losses_are_learned():
    objective, images = qformer([[[i, (3 * i + 1) % WORDS, 5]] for i in range(IMAGES)])
    tokens, every = images.clone().requires_grad_(), list(range(IMAGES))
    first = objective.start(tokens, every).result().item()
    assert first == pytest.approx(math.log(IMAGES) + 0.64 + math.log(WORDS), rel=0.3)  # guessing: 1 of 3 matches
    optimizer = torch.optim.Adam([tokens, *objective.module.parameters()], lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        objective.start(tokens, every).result().backward()
        optimizer.step()
    objective.module.eval()
    assert objective.start(tokens, every).result() < 0.3 * first
    captions = [captions[0] for captions in objective.pairs.captions]
    assert (objective.all_distances(tokens, captions).argmin(1) == torch.arange(IMAGES)).float().mean() > 0.8


def test_the_text_tower_starts_alike_and_disturbs_no_random_numbers():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, _ = qformer()
    torch.manual_seed(7)
    second = QFormer(first.settings, first.pairs, Means(seed=1))
    assert torch.equal(torch.rand(3), expected)
    for ours, theirs in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
