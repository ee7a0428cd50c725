"""`sae collect`: text through the model once, activations into the run; or vectors that are there already."""

from pathlib import Path

import click

from app.cli.options import COUNT, device_option, gpus_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--model", default="smollm2-135m-instruct", show_default=True, help="A name, or a local folder.")
@click.option(
    "--hook", "hooks", multiple=True, metavar="HOOK", help="Where to read; may be repeated. [default: middle]"
)
@click.option("--corpus", default="sample", show_default=True, help="sample, a file or folder, or a datasets name.")
@click.option(
    "--layout",
    default="packed",
    show_default=True,
    metavar="packed|documents|chat",
    help="Documents end to end, each by itself, or dialogues through the chat template.",
)
@click.option("--tokens", default="2M", show_default=True, type=COUNT, help="How many, in whole sequences.")
@click.option("--context", type=click.IntRange(2), help="Longest sequence. [default: 128 packed, else 1024]")
@click.option("--text-column", default="text", show_default=True, help="Column or key that holds the text.")
@click.option("--label-column", help="Keep each document's label from this column; with --layout documents.")
@click.option("--split", default="train", show_default=True, help="Of a dataset on the hub.")
@click.option("--revision", help="Of a dataset on the hub.")
@click.option("--vectors", type=click.Path(), help="A .npy, Parquet or folder of vectors instead of a model and text.")
@click.option("--column", help="With --vectors: the Parquet column of lists.")
@click.option("--embedder", metavar="NAME", help="One vector a document from this embedder (all-minilm-l6-v2).")
@click.option(
    "--dtype", help="Of the stored rows: bfloat16, float16, float32, float8. [default: bfloat16; vectors float32]"
)
@click.option("--model-dtype", default=None, help="Precision of the model. [default: the fastest of this machine]")
@click.option("--gradients", is_flag=True, help="Store the loss' gradient beside each row.")
@click.option("--tokens-only", is_flag=True, help="Write the tokens alone, for sae train --live.")
@click.option("--memory", default="4B", show_default=True, type=COUNT, help="Bytes of rows held at once.")
@gpus_option
@device_option
def command(
    run: Path,
    model: str,
    hooks: tuple[str, ...],
    corpus: str,
    layout: str,
    tokens: int,
    context: int | None,
    text_column: str,
    label_column: str | None,
    split: str,
    revision: str | None,
    vectors: str | None,
    column: str | None,
    embedder: str | None,
    dtype: str | None,
    model_dtype: str | None,
    gradients: bool,
    tokens_only: bool,
    memory: int,
    gpus: int,
    device: str,
) -> None:
    """Cache a model's activations in RUN. Example: sae collect runs/mine --hook blocks.15.hook_resid_post --tokens 2M

    Started again it goes on where it stopped; with another --hook it adds that one. Several --hook share one pass of
    the model. On several hosts: torchrun --no-python ... sae collect ..., with RUN on a disk that all see.
    """
    if vectors is not None and embedder is not None:
        raise click.UsageError("--vectors and --embedder are two sources: give one.")
    from activations.ranks import Ranks
    from app.cli.ranks import spread

    if spread(gpus):
        return
    from app.pipeline import collect_run, collect_vectors_run
    from app.sources import Embeddings, Text, Vectors

    if vectors is not None:
        made = collect_vectors_run(run, Vectors(path=vectors, column=column, rows=tokens), dtype=dtype or "float32")
    elif embedder is not None:
        source = Embeddings(embedder=embedder, corpus=corpus, rows=tokens, text_column=text_column)
        made = collect_vectors_run(run, source, dtype=dtype or "float32", device=device)
    else:
        made = collect_run(
            run,
            Text(
                corpus=corpus,
                layout=layout,
                tokens=tokens,
                context=context,
                text_column=text_column,
                label_column=label_column,
                split=split,
                revision=revision,
            ),
            model=model,
            hooks=hooks,
            dtype=dtype or "bfloat16",
            model_dtype=model_dtype,
            gradients=gradients,
            tokens_only=tokens_only,
            memory=memory,
            device=device,
            say=click.echo,
        )
    if not Ranks.from_environment().leads:
        return
    if tokens_only:
        click.echo(f"The tokens are there. Next: sae train {run} --live --hook {hooks[0] if hooks else 'HOOK'}")
    for hook in made.hooks():
        cache = made.activations(hook)
        click.echo(
            f"{hook}: {cache.n_rows:,} rows of {cache.d_in}, {cache.n_ordinary:,} ordinary, "
            f"sinks {cache.sink_share:.2%}, median norm {cache.median_norm:.1f}"
        )
        if cache.sink_share > 0.01:
            click.echo(f"Warning: over 1 % of the rows at {hook} are sinks; they are left out of training.", err=True)
