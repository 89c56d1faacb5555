"""The training loop: an interrupted run ends where an uninterrupted one does."""

import time

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config.schema import Optimisation
from pipeline.errors import UserError
from pipeline.started import NoPlan, Started
from pipeline.training import loop as training
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.loop import Trainer, batch_at, total_steps

SETTINGS = Optimisation(epochs=3, batch=4, lr=0.05, accumulate=2)
DATA = torch.randn(22, 5, generator=torch.Generator().manual_seed(1))


def trainer(folder, key="k", breaks_at=None):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    calls = 0

    def loss(number):
        nonlocal calls
        calls += 1
        if calls == breaks_at:
            raise KeyboardInterrupt
        batch = batch_at(number, SETTINGS.batch, len(DATA), 7)
        predicted = model(DATA[batch]).squeeze(1)  # with its random draws
        return Started(lambda: (predicted - DATA[batch].sum(1)).square().mean())

    def validate(step):
        return {"val": loss_of_all(model)}

    groups = [{"params": list(model.parameters())}]
    checkpoint = Checkpoint(folder / "run.pt", key)
    return Trainer("test", model, groups, SETTINGS, len(DATA), 7, loss, validate, {3, 6}, checkpoint)


def loss_of_all(model):
    return (model(DATA).squeeze(1) - DATA.sum(1)).square().mean().item()


@pytest.mark.parametrize("every_step", [True, False])
@pytest.mark.parametrize("breaks_at", [2, 9, 13])
def test_resumed_run_equals_uninterrupted(tmp_path, monkeypatch, every_step, breaks_at):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0 if every_step else 1e9)
    whole = trainer(tmp_path / "a")
    history = whole.run()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "b", breaks_at=breaks_at).run()
    resumed = trainer(tmp_path / "b")
    again = resumed.run()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)
    assert [{**row, "seconds": 0} for row in again][1:] == [{**row, "seconds": 0} for row in history][1:]


def test_seconds_of_training_are_of_its_own_work_alone(tmp_path):
    """What waits for the machine, as beside another program, is no time of training on a CPU."""
    waiting = trainer(tmp_path)
    loss = waiting.loss
    waiting.loss = lambda number: (time.sleep(0.1), loss(number))[1]
    began = time.monotonic()
    assert waiting.run()[-1]["seconds"] < (time.monotonic() - began) / 2


def test_a_checkpoint_of_other_parameters_is_left_aside(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, breaks_at=9).run()
    trainer(tmp_path, key="other").run()
    assert "other parameters or inputs; starting afresh" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_left_aside(tmp_path, capsys):
    (tmp_path / "run.pt").write_bytes(b"not a checkpoint")
    assert len(trainer(tmp_path).run()) == 4
    assert "not readable" in capsys.readouterr().err


def test_training_learns_and_validates_where_asked(tmp_path):
    run = trainer(tmp_path)
    history = run.run()
    assert [row["step"] for row in history] == [0, 3, 6, total_steps(SETTINGS, len(DATA))]
    assert history[-1]["val"] < history[0]["val"]


def test_an_epoch_visits_every_example_once():
    for epoch in range(2):
        seen = [i for number in range(6) for i in batch_at(epoch * 6 + number, 4, 22, seed=5)]
        assert sorted(seen) == list(range(22))
    assert batch_at(0, 4, 22, seed=5) != batch_at(6, 4, 22, seed=5)


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path):
    run = trainer(tmp_path)
    run.loss = lambda number: Started(lambda: run.model(DATA[:4]).sum() * float("nan"))
    with pytest.raises(UserError, match="the loss is nan at step 0; lower lr"):
        run.run()


@pytest.mark.parametrize(("in_flight", "accumulate"), [(1, 3), (2, 3), (3, 3), (2, 1), (4, 2)])
def test_losses_start_and_finish_in_order_as_many_at_a_time_as_asked(tmp_path, in_flight, accumulate):
    run, events = trainer(tmp_path), []
    run.settings = run.settings.model_copy(update={"accumulate": accumulate, "max_steps": 2})
    run.in_flight, start = in_flight, run.loss

    def watched(batch):
        number = sum(event == "start" for event, _ in events)
        events.append(("start", number))
        finish = start(batch)

        def finished():
            events.append(("finish", number))
            return finish.result()

        return Started(finished)

    run.loss = watched
    run.run()
    for event in ("start", "finish"):
        assert [number for kind, number in events if kind == event] == list(range(2 * accumulate))
    under_way = np.cumsum([1 if event == "start" else -1 for event, _ in events])
    assert under_way.max() == min(in_flight, accumulate)
    assert under_way[2 * accumulate - 1] == 0  # none outlives its step


def test_what_fails_at_the_finish_names_the_step(tmp_path):
    run = trainer(tmp_path)

    def fails():
        raise NoPlan("EMD of pair 3 (image 1): a ground cost is not finite")

    run.loss, run.in_flight = lambda number: Started(fails), 2
    with pytest.raises(
        UserError, match=r"test: step 0: EMD of pair 3 .image 1.: a ground cost is not finite; lower lr"
    ):
        run.run()
