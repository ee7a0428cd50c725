"""`sae import`: a dictionary of another tool into a run, or Neuronpedia's explanations to a dictionary."""

import json
from pathlib import Path

import click

from app.cli.options import json_option, overwrite_option


@click.command("import")
@click.argument("path")
@click.argument("run", metavar="RUN[/ID]")
@click.option("--name", metavar="ID", help="The dictionary's name in the run. [default: HOOK-ARCH-dN-FORMAT]")
@click.option("--hook", help="The hook it reads, where its files do not say so.")
@click.option("--target-hook", help="The hook that a transcoder predicts, where its files do not say so.")
@click.option(
    "--model", help="The model it is of, as `sae collect` takes it. [default: the run's, or what its files say]"
)
@overwrite_option
@json_option
def command(
    path: str,
    run: str,
    name: str | None,
    hook: str | None,
    target_hook: str | None,
    model: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make the dictionary at PATH (a folder, a file or a name on the hub) part of RUN, which may be new.

    Formats are told by their files: SAELens, dictionary_learning, sparsify, Gemma Scope, OpenMOSS and Llama Scope,
    OpenAI. Explanations that Neuronpedia exports (.jsonl, .jsonl.gz or their folder) are added to the dictionary
    RUN/ID.

    Examples: sae import google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82 runs/gemma;
    sae import explanations/batch-0.jsonl.gz runs/gemma
    """
    from autointerp.neuronpedia_import import import_explanations, is_export

    if is_export(Path(path)):
        if name or hook or target_hook or model or overwrite:
            raise click.UsageError("Explanations take no options: name the dictionary as RUN/ID.")
        done = import_explanations(Path(path), run)
        if as_json:
            click.echo(json.dumps(done._asdict()))
            return
        empty = f", {done.n_empty:,} without a text" if done.n_empty else ""
        click.echo(f"{done.n_added:,} explanations of {done.origin or 'nowhere'} added to {run}{empty}.")
        return
    from sae.interop.run import bring_in

    folder = bring_in(path, run, name=name, hook=hook, target_hook=target_hook, model=model, overwrite=overwrite)
    about = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    facts = {key: about["metadata"].get(key, "") for key in ("model_name", "hook_name")}
    if as_json:
        click.echo(json.dumps({"dictionary": str(folder), **facts, **about["metadata"]["imported"]}))
        return
    address = f"{run}/{folder.name}"
    kind = about["metadata"]["imported"]["format"]
    click.echo(
        f"{address}: {about['architecture']} of {about['d_sae']:,} latents from {kind}, at {facts['hook_name']}."
    )
    click.echo(
        f"Next: `sae collect {run} --model {facts['model_name'] or 'M'} --hook {facts['hook_name']}`, then "
        f"`sae eval {address}`, which takes its statistics, and `sae index {address}`."
    )
