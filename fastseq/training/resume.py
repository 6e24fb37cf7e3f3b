"""Checks a checkpoint, which may come from a stranger, before Lightning resumes from it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import torch

from fastseq.errors import UserError
from fastseq.training.callbacks import BestAndLast, Patience
from fastseq.training.checkpoint import load_checkpoint, start_again
from fastseq.training.metrics import NAMES, monitors
from fastseq.training.moving_average import RAW, MovingAverage
from fastseq.training.progress import EpochLines
from fastseq.training.task import Seq2SeqTask

LARGEST = 1 << 53  # of a counter
VERSION = "pytorch-lightning_version"
RELEASE = re.compile(r"2(\.\d{1,4}){1,2}((a|b|rc|\.dev|\.post)\d{1,8})?")
LOADER = {"epoch": 0, "done": 0, "batches": 0}  # TokenBatches.state_dict()
BEST = {"monitor": "", "best": 0.0, "best_epoch": 0}
LINES = {"loss_sum": 0.0, "updates": 0}
SCALER = {"scale": 0.0, "growth_factor": 0.0, "backoff_factor": 0.0, "growth_interval": 0, "_growth_tracker": 0}


class _Damaged(Exception):
    """A field of the checkpoint has another type, size or range than training writes; the argument is its name."""


def resumable(checkpoint: dict[str, Any], task: Seq2SeqTask, trainer: L.Trainer, path: Path) -> dict[str, Any]:
    """The fields that `trainer` needs to resume, each checked. Learning rates and hyper-parameters are computed anew.

    Raises UserError naming the first field that is missing, or that has another type, size or range than it was
    written with.
    """
    try:
        return _checked(checkpoint, task, trainer)
    except _Damaged as error:
        raise UserError(
            f"{path} cannot be resumed: {error} is missing or damaged; {start_again(path.parent.parent)}"
        ) from error


def with_best(checkpoint: dict[str, Any], trainer: L.Trainer, path: Path) -> None:
    """Put the best value of best.ckpt, at ``path``, into a checked checkpoint that has a worse one or none.

    A process killed between best.ckpt and last.ckpt left it there alone; a worse epoch would replace best.ckpt.
    """
    (callback,) = (c for c in trainer.callbacks if isinstance(c, BestAndLast))
    if not path.exists():
        return
    try:
        state = _callbacks(load_checkpoint(path).get("callbacks"), trainer).get(callback.state_key)
    except _Damaged as error:
        raise UserError(f"{path} is damaged: {error}; delete it, then resume again") from error
    known = checkpoint["callbacks"].get(callback.state_key)
    if state is not None and callback.beats(state, known):
        checkpoint["callbacks"][callback.state_key] = state


def _checked(checkpoint: dict[str, Any], task: Seq2SeqTask, trainer: L.Trainer) -> dict[str, Any]:
    for name in ("epoch", "global_step", "updates_per_epoch"):
        _like(checkpoint.get(name), 0, name)
    version = checkpoint.get(VERSION)
    _require(isinstance(version, str) and RELEASE.fullmatch(version), VERSION)
    loop = _field(checkpoint.get("loops"), "fit_loop", "loops")
    _check_loop(loop, trainer, checkpoint)
    task.trainer = trainer
    fresh = task.configure_optimizers()
    (group,) = fresh["optimizer"].state_dict()["param_groups"]
    step = checkpoint["global_step"]
    kept = {name: checkpoint[name] for name in ("epoch", "global_step", "updates_per_epoch", VERSION, "state_dict")}
    kept["loops"] = {"fit_loop": loop}
    kept["callbacks"] = _callbacks(checkpoint.get("callbacks"), trainer)
    kept["optimizer_states"] = [{"state": _moments(checkpoint, task), "param_groups": [group]}]
    schedule = {"base_lrs": [task.options.lr], "last_epoch": step, "_step_count": step + 1, "lr_lambdas": [None]}
    kept["lr_schedulers"] = [schedule | {"_last_lr": [group["lr"]]}]
    kept["random_states"] = _random_states(checkpoint.get("random_states"))
    if any(isinstance(callback, MovingAverage) for callback in trainer.callbacks):
        kept[RAW] = _raw_weights(checkpoint.get(RAW), task)
    name = type(trainer.precision_plugin).__qualname__
    if name in checkpoint:
        kept[name] = {key: checkpoint[name][key] for key in _like(checkpoint[name], SCALER, name)}
    return kept


def _require(condition: object, field: str) -> None:
    if not condition:
        raise _Damaged(field)


def _field(holder: object, name: object, where: str) -> Any:
    _require(isinstance(holder, dict) and name in holder, f"{where}.{name}")
    return holder[name]


def _like(found: object, expected: object, where: str) -> Any:
    """`expected`, after a check that `found` has its keys, lengths and types; numbers are finite, counters >= 0."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            _like(_field(found, key, where), value, f"{where}.{key}")
        _require(isinstance(found, dict), where)
    elif isinstance(expected, (bool, str)):
        _require(type(found) is type(expected) and len(str(found)) < 1000, where)
    elif isinstance(expected, int):
        _require(type(found) is int and 0 <= found <= LARGEST, where)
    else:
        _require(type(found) in (int, float) and abs(found) <= LARGEST, where)  # false for nan
    return expected


def _check_loop(loop: object, trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Check the counters of Lightning's loop, and that epochs and updates agree."""
    _like(loop, trainer.fit_loop.state_dict(), "loops.fit_loop")
    where = "loops.fit_loop.state_dict.combined_loader"
    loaders = _field(loop["state_dict"], "combined_loader", "loops.fit_loop.state_dict")
    _require(isinstance(loaders, list) and len(loaders) == 1, where)
    _like(loaders[0], LOADER, where)
    _require(loaders[0]["done"] <= loaders[0]["batches"], f"{where}.done")
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    step, length = checkpoint["global_step"], checkpoint["updates_per_epoch"]
    epochs = loop["epoch_progress"]["current"]
    done, begun = epochs["completed"], epochs["ready"]
    where = "loops.fit_loop.epoch_progress.current"
    _require(steps == step, "global_step")
    _require(done == checkpoint["epoch"] and done * length <= step <= (done + 1) * length, "epoch")
    processed = begun if step == begun * length else done  # after the last update of an epoch, or before
    _require(begun == epochs["started"] == done + 1 and epochs["processed"] == processed, where)


def _callbacks(states: object, trainer: L.Trainer) -> dict[str, Any]:
    """The states of the callbacks that `trainer` has; one that is new has none."""
    _require(isinstance(states, dict), "callbacks")
    kept = {}
    for callback in trainer.callbacks:
        key = callback.state_key
        if key not in states:
            continue
        state, where = states[key], f"callbacks.{type(callback).__name__}"
        _require(isinstance(state, dict), where)
        if isinstance(callback, BestAndLast):
            _require(state.get("monitor") in monitors(NAMES), f"{where}.monitor")
            for name in ("best", "best_epoch"):
                if _field(state, name, where) is not None:
                    _like(state[name], BEST[name], f"{where}.{name}")
            _require((state["best"] is None) == (state["best_epoch"] is None), f"{where}.best_epoch")
            state = {name: state[name] for name in BEST}
        elif isinstance(callback, EpochLines):
            state = {name: state[name] for name in _like(state, LINES, where)}
        elif isinstance(callback, Patience):
            _like(state, {"wait_count": 0, "stopped_epoch": 0}, where)
            best = state.get("best_score")
            _require(_is_tensor(best, ()), f"{where}.best_score")
            state = {name: state[name] for name in ("wait_count", "stopped_epoch", "best_score")}
        else:
            continue
        kept[key] = state
    return kept


def _is_tensor(found: object, shape: tuple[int, ...]) -> bool:
    dense = isinstance(found, torch.Tensor) and found.layout is torch.strided and found.device.type == "cpu"
    return dense and found.is_floating_point() and tuple(found.shape) == shape


def _moments(checkpoint: dict[str, Any], task: Seq2SeqTask) -> dict[int, dict[str, torch.Tensor]]:
    """AdamW's step and moments of each parameter by its number; none for parameters that no update has reached."""
    where = "optimizer_states"
    states = checkpoint.get(where)
    _require(isinstance(states, list) and len(states) == 1, where)
    parameters, moments = list(task.parameters()), _field(states[0], "state", where)
    _require(isinstance(moments, dict), where)
    for number, state in moments.items():
        _require(type(number) is int and 0 <= number < len(parameters), f"{where}.state")
        shape = tuple(parameters[number].shape)
        for name, size in (("step", ()), ("exp_avg", shape), ("exp_avg_sq", shape)):
            field = f"{where}.state.{number}.{name}"
            _require(_is_tensor(_field(state, name, f"{where}.state.{number}"), size), field)
        _require(math.isfinite(state["step"]) and 0 <= float(state["step"]) <= LARGEST, f"{where}.state.{number}.step")
    names = ("step", "exp_avg", "exp_avg_sq")
    return {number: {name: state[name] for name in names} for number, state in moments.items()}


def _raw_weights(weights: object, task: Seq2SeqTask) -> dict[str, torch.Tensor]:
    """The weights beside the moving average, by the name of the parameter."""
    expected = dict(task.model.named_parameters())
    _require(isinstance(weights, dict) and weights.keys() == expected.keys(), RAW)
    for name, parameter in expected.items():
        _require(_is_tensor(weights[name], tuple(parameter.shape)), f"{RAW}.{name}")
    return weights


def _random_states(states: object) -> list[dict[str, torch.Tensor]]:
    _require(isinstance(states, list) and states, "random_states")
    for number, state in enumerate(states):
        try:
            torch.Generator().set_state(_field(state, "cpu", f"random_states.{number}"))
        except (RuntimeError, TypeError) as error:
            raise _Damaged(f"random_states.{number}.cpu") from error
        cuda = state.get("cuda")
        sixteen = isinstance(cuda, torch.Tensor) and cuda.dtype is torch.uint8 and tuple(cuda.shape) == (16,)
        _require(cuda is None or sixteen, f"random_states.{number}.cuda")
    return states
