"""The attentive probe: one learned query chooses among a picture's image tokens; what it takes is classified linearly.

As the pooling of CoCa (Yu et al. 2022) and the probes of V-JEPA (Bardes et al. 2024), but for the projections of keys
and values: with one query and one head they are only another way to write the query and the classifier.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.devices import CPU
from pipeline.naming.classes import class_names, labelled, numbers
from pipeline.store.reader import ImageTokens

# Chosen on validation pictures of groceries (2,381 to learn from, 81 classes, EfficientNet-Lite0), where more heads,
# less dropout or no norm learn the pictures by heart.
EPOCHS, BATCH, RATE, DECAY, DROPOUT = 12, 64, 3e-3, 0.1, 0.5
HIDDEN = (0.0, 0.5, 0.8)  # shares of a picture's tokens that are not seen in training, of which val chooses one
READ = 256  # pictures at a time, where nothing is learned


class Attentive(nn.Module):
    """Image tokens [B, N, D] to logits [B, C]; at first, with a query of zeros, of their mean.

    `mean` and `scale` [D] are those of the training pictures' tokens; `hidden` is the share of a picture's tokens that
    it does not see in training.
    """

    def __init__(self, mean: Tensor, scale: Tensor, classes: int, hidden: float):
        super().__init__()
        self.mean, self.scale = nn.Buffer(mean), nn.Buffer(scale)
        self.hidden = hidden
        self.query = nn.Parameter(torch.zeros_like(mean))
        self.norm, self.dropout = nn.LayerNorm(len(mean)), nn.Dropout(DROPOUT)
        self.linear = nn.Linear(len(mean), classes)

    def forward(self, tokens: Tensor) -> Tensor:
        scores = tokens @ (self.query / self.scale) / len(self.query) ** 0.5  # [B, N]; the mean moves all alike
        if self.training:
            scores = scores.masked_fill(torch.rand(scores.shape, device=scores.device) < self.hidden, -1e4)
        pooled = (scores.softmax(1)[:, None] @ tokens)[:, 0]
        return self.linear(self.dropout(self.norm((pooled - self.mean) / self.scale)))


def attentive_probe(images: ImageTokens, seed: int, device: torch.device = CPU) -> float:
    """Test accuracy of an attentive probe, trained on the train and val parts.

    Trained on the train part alone it shows with which share of hidden tokens, and after which epoch, the loss on the
    val part is least; so it is then trained on both. Where there is no val part, none are hidden.
    """
    names, val, test = class_names(images), labelled(images, "val"), labelled(images, "test")
    own = [torch.tensor(numbers(images, positions, names)) for positions in (val, test)]
    losses = {(HIDDEN[0], EPOCHS): 0.0}
    with torch.random.fork_rng():
        if val:
            losses = {
                (hidden, epoch): cross_entropy(logits(probe, images, val), own[0]).item()
                for hidden in HIDDEN
                for epoch, probe in enumerate(trained(images, ("train",), names, hidden, seed, device), 1)
            }
        hidden, epochs = min(losses, key=losses.__getitem__)
        *_, probe = islice(trained(images, ("train", "val"), names, hidden, seed, device), epochs)
    return float((logits(probe, images, test).argmax(1) == own[1]).double().mean())


def trained(
    images: ImageTokens, parts: tuple[str, ...], names: list[str], hidden: float, seed: int, device: torch.device
) -> Iterator[Attentive]:
    """The probe after each of EPOCHS, by AdamW and cosine decay; seeds torch's own random numbers."""
    torch.manual_seed(seed)
    positions = labelled(images, *parts)
    probe = Attentive(*spread(images, positions, device), len(names), hidden).to(device)
    right = torch.tensor(numbers(images, positions, names), device=device)
    optimiser = torch.optim.AdamW(probe.parameters(), RATE, weight_decay=DECAY)
    steps = EPOCHS * -(-len(positions) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(EPOCHS):
        probe.train()
        for some in torch.randperm(len(positions)).split(BATCH):
            tokens = images.tokens([positions[i] for i in some], device)
            optimiser.zero_grad()
            cross_entropy(probe(tokens), right[some.to(device)]).backward()
            optimiser.step()
            schedule.step()
        yield probe.eval()


def spread(images: ImageTokens, positions: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of the tokens of some pictures; 1 of a channel that is always the same."""
    sums = torch.zeros(2, images.shape[1], dtype=torch.double, device=device)
    for at in range(0, len(positions), READ):
        tokens = images.tokens(positions[at : at + READ], device).flatten(0, 1).double()
        sums += torch.stack([tokens.sum(0), tokens.square().sum(0)])
    mean, square = sums / (len(positions) * images.shape[0])
    variance = square - mean.square()
    return mean.float(), torch.where(variance > 1e-9 * square, variance, 1).sqrt().float()


@torch.inference_mode()
def logits(probe: Attentive, images: ImageTokens, positions: list[int]) -> Tensor:
    """Of some pictures, [n, C] on the CPU."""
    device = probe.query.device
    parts = [positions[at : at + READ] for at in range(0, len(positions), READ)]
    return torch.cat([probe(images.tokens(part, device)).cpu() for part in parts])
