"""`sae collect`: text through the model once, activations into the run."""

from pathlib import Path

import click

from app.cli.options import COUNT, device_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--model", default="smollm2-135m-instruct", show_default=True, help="A name, or a local folder.")
@click.option(
    "--hook", "hooks", multiple=True, metavar="HOOK", help="Where to read; may be repeated. [default: middle]"
)
@click.option("--corpus", default="sample", show_default=True, help="sample, a file or folder, or a datasets name.")
@click.option("--tokens", default="2M", show_default=True, type=COUNT, help="How many, in whole contexts.")
@click.option("--context", default=128, show_default=True, type=click.IntRange(2), help="Tokens in a context.")
@click.option("--dtype", default="bfloat16", show_default=True, help="Of the stored activations.")
@click.option("--model-dtype", default=None, help="Precision of the model. [default: the fastest of this machine]")
@device_option
def command(
    run: Path,
    model: str,
    hooks: tuple[str, ...],
    corpus: str,
    tokens: int,
    context: int,
    dtype: str,
    model_dtype: str | None,
    device: str,
) -> None:
    """Cache a model's activations in RUN. Example: sae collect runs/mine --hook blocks.15.hook_resid_post --tokens 2M

    Started again it goes on where it stopped; with another --hook it adds that one.
    """
    from app.pipeline import collect_run

    result = collect_run(
        run,
        model=model,
        hooks=hooks,
        corpus=corpus,
        tokens=tokens,
        context=context,
        dtype=dtype,
        model_dtype=model_dtype,
        device=device,
    )
    for hook in result.hooks():
        cache = result.activations(hook)
        click.echo(
            f"{hook}: {cache.n_rows:,} tokens, {cache.n_ordinary:,} ordinary, sinks {cache.sink_share:.2%}, "
            f"median norm {cache.median_norm:.1f}"
        )
        if cache.sink_share > 0.01:
            click.echo(f"Warning: over 1 % of the tokens at {hook} are sinks; they are left out of training.", err=True)
