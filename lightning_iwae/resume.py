"""What a checkpoint must be for a run to go on from it, or to be tested: said before anything is written."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

# What the checkpoint's state would overrule (optimisers, schedulers), or what makes the run another one.
PINNED = (
    "seed_everything",
    "data",
    "model.network",
    "model.optimizer_",
    "model.scheduler_",
    "trainer.callbacks.EarlyStopping.patience",
)
FREE = ("data.init_args.folder", "data.init_args.download")  # where the data are, not what


def read(path: Path) -> dict[str, Any]:
    """The checkpoint, of tensors and plain values alone; ValueError naming the file if it is anything else."""
    if not path.is_file():
        last = path.with_name("last.ckpt")
        other = " The run has a last.ckpt: --ckpt_path last." if path.name == "best.ckpt" and last.is_file() else ""
        raise ValueError(f"ckpt_path: no file {path}.{other}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"ckpt_path: {path} is no checkpoint, or has been cut short ({path.stat().st_size} bytes).")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"ckpt_path: {path} must hold tensors and plain values only, and is not loaded, since other objects can "
            f"run code of their own. It holds {_global(error)}."
        ) from None
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(f"ckpt_path: {path} is damaged: {error}.") from error
    missing = [key for key in ("state_dict", "loops") if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise ValueError(f"ckpt_path: {path} is no checkpoint of a run: it has no {missing[0]}.")
    return checkpoint


def _global(error: Exception) -> str:
    words = str(error).partition("GLOBAL ")[2].split()
    return words[0] if words else "something else"


def check_weights(path: Path, checkpoint: dict[str, Any], model: nn.Module) -> None:
    """ValueError unless names and shapes of the checkpoint's weights are the model's."""
    there = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    here = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    other = [name for name in here | there if here.get(name) != there.get(name)]
    if other:
        first = other[0]
        more = f", and {len(other) - 1} more" if len(other) > 1 else ""
        raise ValueError(
            f"ckpt_path: {path} is of another model. {first} must have shape {here.get(first, 'of nothing')}. "
            f"Got {there.get(first, 'none')}{more}."
        )


def check_settings(path: Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    """ValueError naming every setting that cannot change when a run goes on, with both values."""
    old, new = dict(_flat(saved)), dict(_flat(given))
    changed = [key for key in old | new if old.get(key) != new.get(key) and _pinned(key)]
    if changed:
        pairs = "; ".join(f"{key} must be {old.get(key)}, as in the checkpoint. Got {new.get(key)}" for key in changed)
        raise ValueError(
            f"{pairs}. A run cannot change this when it goes on from {path}: give the checkpoint's value, or start a "
            f"new run in another directory."
        )


def _pinned(key: str) -> bool:
    return key.startswith(PINNED) and not key.startswith(FREE)


def _flat(settings: Any, prefix: str = "") -> Any:
    """(dotted key, value) of nested dicts; callbacks go by their class, other lists are values."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif name == "callbacks" and isinstance(value, list):
            for callback in value:
                yield from _flat(callback.get("init_args", {}), f"{prefix}{name}.{_name(callback['class_path'])}.")
        else:
            yield prefix + name, value


def _name(class_path: str) -> str:
    return class_path.rpartition(".")[2]
