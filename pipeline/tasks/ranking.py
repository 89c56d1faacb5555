"""Names of test pictures by an LLM that ranks them, or whose last state a classifier reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.naming.classes import labelled, numbers
from pipeline.naming.weigh import LOWEST, combined, fit_weights

if TYPE_CHECKING:
    from pipeline.naming.table import Named
    from pipeline.store.reader import ImageTokens
    from pipeline.vlm import VLM

FITTED, AVERAGED = 128, 32  # validation pictures that weights are fitted on, and that a name's average is of
READ = 1024  # training pictures that the classifier of the LLM's states is fitted on
Scores = tuple[dict[str, Tensor], dict[str, Tensor]]  # of validation and of test pictures [n, C], by who scores them


@dataclass
class Ranking:
    """A fine-tuned model asked for the names of test pictures; `speeds` are images per second by rule, when it was."""

    model: VLM
    images: ImageTokens
    named: Named
    test: list[int]
    prompt: str
    batch: int
    hints: Callable[[list[int]], list[str] | None]
    speeds: dict[str, float] = field(default_factory=dict)

    def by_rule(self) -> dict[str, Tensor]:
        """Log-probabilities of the names by each of LLM_RULES, [n, C].

        ranked: how likely the answers are to the LLM, of the names that stage `name` finds likeliest; the others count
        as impossible. calibrated: less what a name gets on average of validation pictures (surface form competition,
        Holtzman et al. 2021). combined: with the namer's. state: logistic regression on the LLM's last state, from
        training pictures, in place of its output layer. What they are weighed by makes the right names of validation
        pictures most probable.
        """
        val = some_of(labelled(self.images, "val"), FITTED)
        average = self._likelihoods(some_of(val, AVERAGED), self.named.names).mean(0)
        listed = [[self.named.candidates(self.images.ids[i], len(self.named.names)) for i in val]]
        found = [self.named.in_columns(self._likelihoods(val, listed[0]), listed[0])]
        listed.append([self.named.candidates(self.images.ids[i], len(self.named.names)) for i in self.test])
        began = time.perf_counter()
        found.append(self.named.in_columns(self._likelihoods(self.test, listed[1]), listed[1]))
        self.speeds |= dict.fromkeys(("ranked", "calibrated", "combined"), self._speed(began))
        own = [self.named.log_probabilities("namer", [self.images.ids[i] for i in some]) for some in (val, self.test)]
        scores: dict[str, Scores] = {
            "ranked": ({"llm": found[0]}, {"llm": found[1]}),
            "calibrated": ({"llm": found[0] - average}, {"llm": found[1] - average}),
            "combined": ({"llm": found[0] - average, "namer": own[0]}, {"llm": found[1] - average, "namer": own[1]}),
            "state": self._from_states(val),
        }
        right = numbers(self.images, val, self.named.names)
        known = [i for i, one in enumerate(right) if self.named.names[one] in listed[0][i]]
        told = [right[i] for i in known]
        return {
            rule: combined(test, fit_weights({key: one[known] for key, one in fit.items()}, told))
            for rule, (fit, test) in scores.items()
        }

    def _likelihoods(self, some: list[int], names: Sequence[str] | list[list[str]]) -> Tensor:
        return self.model.ranks(self.images, some, self.prompt, names, self.batch, self.hints(some))

    def _from_states(self, val: list[int]) -> Scores:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        train = some_of(labelled(self.images, "train"), READ)
        labels = self.images.rows["label"].to_numpy()[train]
        if len({*labels}) == 1:  # nothing to fit
            return {"state": torch.zeros(len(val), 1)}, {"state": torch.zeros(len(self.test), 1)}
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
        classifier.fit(self._states(train).numpy(), labels)
        columns = [self.named.names.index(label) for label in classifier.classes_]

        def scores(some: list[int]) -> dict[str, Tensor]:
            found = torch.full((len(some), len(self.named.names)), LOWEST)
            shares = torch.from_numpy(classifier.predict_log_proba(self._states(some).numpy()))
            found[:, columns] = shares.float().clamp_min(LOWEST)
            return {"state": found}

        fit, began = scores(val), time.perf_counter()
        test = scores(self.test)
        self.speeds["state"] = self._speed(began)
        return fit, test

    def _states(self, some: list[int]) -> Tensor:
        return self.model.states(self.images, some, self.prompt, self.batch, self.hints(some))

    def _speed(self, began: float) -> float:
        return len(self.test) / (time.perf_counter() - began)


def some_of(positions: list[int], count: int) -> list[int]:
    """At most so many, evenly spread."""
    return positions[:: max(1, -(-len(positions) // count))]
