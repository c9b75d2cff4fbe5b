"""What `fit --help` and its like print: the run's own options, model, data, and Lightning's trainer last."""

import re
import textwrap
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Iterator
from typing import Any

from . import COMMANDS

WIDTH, INDENT = 110, 34
SECTIONS = {
    "run": "",
    "model": "both networks, their estimators and optimisers",
    "data": "the data set",
    "trainer": "Lightning's; first sentences only, see its docs for more",
}
RUN = ("config", "seed_everything", "ckpt_path", "weights_only")
HEAD = """\
usage: python -m lightning_iwae {name} -c CONFIG [-c OVERLAY ...] [--KEY VALUE ...]
{short}
{name}: {what}

Every key can stand in a config or on the command line, which wins; a later file wins over an earlier one.
In a config `model.phi.particles` is {{model: {{phi: {{particles: 8}}}}}}.
"""
SHORT = """\
       python -m lightning_iwae {name} RUN [FILE] [--KEY VALUE ...]

RUN, a run's directory, stands for its config.yaml, itself and its best checkpoint. FILE, .npy or .npz, is data of
your own, taken as they are, but uint8 divided by 255.
"""
CLASSES = """\
CLASS is a dotted path, yours or one below; its arguments follow as init_args:
  --model.network lightning_iwae.models.MLP --model.network.init_args.latent 20
and are listed by
  python -m lightning_iwae {name} --model.network.help lightning_iwae.models.MLP
Models are in lightning_iwae.models, data in lightning_iwae.data, callbacks in lightning_iwae.callbacks and
lightning.pytorch.callbacks, optimisers in torch.optim, schedulers in torch.optim.lr_scheduler.
"""
REQUIRED = ("model.network", "data")
OURS = {
    "config": "a run's YAML, or an overlay for one; may be repeated",
    "seed_everything": "of every random draw; a whole number",
    "ckpt_path": "a checkpoint, or `best` or `last` of the run in trainer.default_root_dir",
    "weights_only": "load no pickled code from a checkpoint",
    "data": "a data set; its seed is seed_everything",
    "trainer.default_root_dir": "the run's directory; without it a fresh one is made below runs/",
}


def command_help(parser: ArgumentParser, name: str) -> str:
    """The help of the sub-command `name`."""
    short = "" if name == "fit" else SHORT.format(name=name)
    what = COMMANDS.get(name, parser.description)
    lines = [HEAD.format(name=name, what=what, short=short), CLASSES.format(name=name)]
    actions = {action.dest: action for action in parser._actions if shows(action)}
    for title, what in SECTIONS.items():
        lines.append(f"{title}:{f'  {what}' if what else ''}")
        keys = RUN if title == "run" else [k for k in actions if k.partition(".")[0] == title]
        for key in keys:
            if key in actions:
                lines += entry(actions[key], brief=title in ("trainer", "run"))
        if title == "run":
            lines += columns("--print_config", "print the whole config, files and options merged, and exit")
            lines += columns("-h, --help", "this text")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def shows(action: Action) -> bool:
    """Whether an action is a value that can be set."""
    loader = type(action).__name__ in ("_ActionConfigLoad", "ActionLink")
    return bool(action.option_strings) and action.default != SUPPRESS and not loader


def entry(action: Action, brief: bool) -> Iterator[str]:
    """An option: its name and type, then what it is and its default."""
    name = next((o for o in action.option_strings if o.startswith("--")), action.option_strings[0])
    names = f"-c, {name}" if action.dest == "config" else name
    text = OURS.get(action.dest) or " ".join(str(action.help or "").replace("``", "").split())
    if brief:
        text = re.split(r"(?<=[a-z)\"])\. ", text.replace("e.g. ", "e.g., "))[0].rstrip(".")
    default = "" if action.dest == "config" else f" ({value(action)})"
    yield from columns(f"{names} {kind(action)}", text.rstrip(".") + default)


def value(action: Action) -> str:
    """The default, or that there is none."""
    default: Any = action.default
    if action.dest in REQUIRED:
        return "required"
    if isinstance(default, dict):
        default = default.get("class_path", default)
    return (
        {None: "null", True: "true", False: "false"}[default]
        if default is None or isinstance(default, bool)
        else str(default)
    )


def kind(action: Action) -> str:
    """What is to be given, as a placeholder."""
    choices = re.fullmatch(r"\{(.+)\}", str(action.metavar or ""))
    if choices and len(choices[1]) < 30:
        return choices[1].replace(",", "|")
    hint = str(getattr(action, "_typehint", ""))
    words = {"FILE": action.dest == "config", "CLASS": re.search(r"Callable|lightning\.|torch\.", hint)}
    words |= {"NUMBER": re.search(r"\bfloat\b", hint), "INT": re.search(r"\bint\b", hint), "VALUE": True}
    return next(word for word, found in words.items() if found)


def columns(left: str, right: str) -> Iterator[str]:
    """Two columns; a long first one takes a line of its own."""
    wrapped = textwrap.wrap(right, WIDTH - INDENT) or [""]
    head = f"  {left}"
    if len(head) >= INDENT - 1:
        yield head
        head = ""
    yield f"{head:{INDENT}}{wrapped[0]}".rstrip()
    yield from (f"{'':{INDENT}}{line}" for line in wrapped[1:])
