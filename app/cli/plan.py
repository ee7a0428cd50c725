"""`sae plan`: what a command will take, said before it starts. Takes the options of the command that it plans."""

import copy
import json
from typing import TYPE_CHECKING, Any, cast

import click

from app.cli import collect, sweep, train
from app.cli.options import COUNT, json_option

if TYPE_CHECKING:
    from app.planning import Place, Plan

_PLACE = (
    click.Option(
        ["--machine"],
        default="here",
        show_default=True,
        metavar="here|h100",
        help="Measure this machine, or take built-in rates of another.",
    ),
    click.Option(["--gpus"], type=click.IntRange(1), help="GPUs that share it. [default: as few as hold it]"),
    click.Option(["--gpu-memory"], type=COUNT, help="Bytes of a GPU, such as 80B. [default: what the machine has]"),
    click.Option(["--again"], is_flag=True, help="Measure this machine anew, though its rates are remembered."),
)
_SOURCE = (
    click.Option(["--d-in"], type=COUNT, help="Width of the activations, where there is no RUN yet."),
    click.Option(["--model"], help="The model whose width it is, where there is no RUN yet."),
)


@click.group()
def command() -> None:
    """Say what a command will take, without starting it. Example: sae plan train runs/mine --d-sae 32k --tokens 1B

    Memory, disk, time and GPU-hours, each with what it rests on. With --machine h100 for a machine that is not at hand:
    sae plan train --d-in 12288 --d-sae 16M --tokens 40B --batch 131072 --machine h100
    """


def _planner(of: click.Command, extra: tuple[click.Parameter, ...], work: Any) -> click.Command:
    """A command with all options of the command `of` and those of a plan; RUN may be left out."""
    taken = {param.name for param in extra}
    params = [_optional(param) for param in of.params if param.name not in taken]
    help_ = f"What `sae {of.name}` with the same options will take."

    def callback(as_json: bool, **options: Any) -> None:
        _show(work(options), as_json)

    made = click.Command(of.name, params=[*params, *extra], callback=callback, help=help_)
    if not any(param.name == "as_json" for param in params):
        json_option(made)
    return made


def _optional(param: click.Parameter) -> click.Parameter:
    if param.name != "run":
        return param
    param = copy.copy(param)
    param.required = False
    return param


def _place(options: dict[str, Any]) -> "Place":
    from app.planning import Place

    names = ("machine", "device", "gpus", "gpu_memory", "again")
    return Place(**{name: options[name] for name in names if name in options})


def _train(options: dict[str, Any]) -> "Plan":
    from app.planning import plan_train
    from app.recipe import Recipe

    # By identity: 0 is a value that was given, and equals False.
    given = {name: v for name, v in options.items() if not (v is None or v is False or v == ())}
    recipe = cast(Recipe, {name: v for name, v in given.items() if name in Recipe.__annotations__})
    at: dict[str, Any] = {name: options[name] for name in ("keep", "d_in", "model")}
    return plan_train(options["run"], place=_place(options), **at, **recipe)


def _collect(options: dict[str, Any]) -> "Plan":
    from app.planning import plan_collect
    from app.sources import Text

    if options["vectors"] is not None or options["embedder"] is not None:
        raise click.UsageError("A plan is for text through a language model: leave out --vectors and --embedder.")
    text = ("corpus", "layout", "tokens", "context", "text_column", "label_column", "split", "revision")
    names = ("model", "hooks", "model_dtype", "gradients", "memory")
    return plan_collect(
        options["run"],
        Text(**{name: options[name] for name in text}),
        place=_place(options),
        dtype=options["dtype"] or "bfloat16",
        **{name: options[name] for name in names},
    )


def _sweep(options: dict[str, Any]) -> "Plan":
    from app.planning import plan_sweep

    at: dict[str, Any] = {name: options[name] for name in ("keep", "d_in", "model")}
    return plan_sweep(options["run"], options["file"], place=_place(options), **at)


def _show(plan: "Plan", as_json: bool) -> None:
    from app.planning import describe

    if not as_json:
        click.echo(describe(plan))
        return
    figures = {name: figure._asdict() for name, figure in plan.figures.items()}
    click.echo(json.dumps({"what": plan.what, "machine": plan.machine, "figures": figures, "notes": plan.notes}))


train.command.name, collect.command.name, sweep.command.name = "train", "collect", "sweep"
command.add_command(_planner(collect.command, _PLACE, _collect))
command.add_command(_planner(train.command, (*_PLACE, *_SOURCE), _train))
command.add_command(_planner(sweep.command, (*_PLACE, *_SOURCE), _sweep))
