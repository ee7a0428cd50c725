"""The steps that join rooms: corpus to activations, run to dictionary, the demo. Commands and notebooks call these."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Unpack

from activations.cache import Activations
from activations.capture import MEMORY, STORED, collect, write_tokens
from activations.embedder import NAME as EMBEDDER
from activations.embedder import REVISION, load_embedder
from activations.errors import InputError
from activations.live import LiveActivations
from activations.model import Model, load_model, pick_device
from activations.modules import collect_vectors
from activations.ranks import joined
from activations.run import NO_MODEL, Run
from app.recipe import Recipe, hooks_of, recipe_of, training
from app.sources import Embeddings, Text, Vectors
from autointerp.client import ChatClient
from autointerp.index import index
from autointerp.label import label, pick_features
from autointerp.local_server import default_model, local_server, model_alias
from autointerp.scorers.detection import QUICK
from data.store import open_store
from data.store.schema import STORE_FILE
from sae.evals.subject import Options
from sae.evals.suite import EVAL, evaluate
from sae.parallel import Mesh
from sae.plan import check_memory
from sae.rows import rows_for, width_read
from sae.settings import Training, default_name
from sae.train import begun_with, train

DEFAULT_TEXT = Text()


def collect_run(
    path: Path,
    source: Text = DEFAULT_TEXT,
    *,
    model: str = "smollm2-135m-instruct",
    hooks: Sequence[str] = (),
    dtype: str = "bfloat16",
    model_dtype: str | None = None,
    gradients: bool = False,
    tokens_only: bool = False,
    memory: int = MEMORY,
    device: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> Run:
    """Make or extend the run at `path`: the activations at `hooks` (default: the residual stream in the middle).

    tokens_only: write the tokens alone, for training straight from the model. say: told what will be written, and what
    was left out. Started by torchrun, the ranks share the work. See `activations.capture.collect` for the rest.
    Raises InputError or CorpusError.
    """
    if dtype not in STORED:
        raise InputError(f"dtype {dtype!r} is unknown: expected one of {', '.join(STORED)}.")
    with joined() as ranks:
        loaded = load_model(model, dtype=model_dtype, device=ranks.device(device))

        def create() -> Run:
            return Run.create(
                path,
                model=loaded.name,
                revision=loaded.revision,
                model_dtype=str(loaded.dtype).removeprefix("torch."),
                **source.identity,
            )

        run = ranks.leader_first(create)
        categories = source.categories()
        sequences = source.sequences(loaded, categories, say)
        if tokens_only:
            ranks.leader_first(lambda: write_tokens(run, sequences, categories))
            return run
        chosen = list(hooks) or [middle_hook(loaded)]
        collect(
            run,
            loaded,
            chosen,
            sequences,
            dtype=dtype,
            gradients=gradients,
            categories=categories,
            memory=memory,
            ranks=ranks,
            say=say,
        )
    return run


def collect_vectors_run(
    path: Path, source: Vectors | Embeddings, *, dtype: str = "float32", device: str = "auto"
) -> Run:
    """Make the run at `path` of vectors, from files or from an embedder. Raises InputError, CorpusError."""
    if dtype not in STORED:
        raise InputError(f"dtype {dtype!r} is unknown: expected one of {', '.join(STORED)}.")
    if isinstance(source, Vectors):
        name, revision, width, blocks = NO_MODEL, "none", source.width, source.blocks()
    else:
        embedder = load_embedder(source.embedder, device=device)
        name, width, blocks = embedder.name, embedder.d, source.blocks(embedder)
        revision = REVISION if name == EMBEDDER else "none"
    run = Run.create(path, model=name, revision=revision, model_dtype="float32", **source.identity)
    collect_vectors(run, blocks, width=width, dtype=dtype)
    return run


def model_of(run: Run, *, device: str = "auto") -> Model:
    """The run's model, in its precision. Raises InputError when it cannot be loaded, or is another one by now."""
    model = load_model(run.model_name, dtype=run.meta["model_dtype"], device=device)
    if model.revision != run.meta["revision"]:
        raise InputError(
            f"{run.path} was made with revision {run.meta['revision']} of {run.meta['model']}, and what loads now is "
            f"{model.revision}: bring the old one back, or make a new run."
        )
    return model


def middle_hook(model: Model) -> str:
    """The residual stream after the middle block. Raises InputError for a model of an unknown family."""
    posts = [hook for hook in model.hooks() if hook.endswith("hook_resid_post")]
    if not posts:
        raise InputError(f"{model.name} has no hooks by name: give --hook a module path.")
    return posts[len(posts) // 2]


class Trained(NamedTuple):
    folder: Path
    finished_before: bool


def train_run(
    path: Path,
    *,
    name: str | None = None,
    resume: bool = False,
    keep: int = 2,
    overwrite: bool = False,
    data_parallel: int = 1,
    device: str = "auto",
    track: Sequence[str] = (),
    **recipe: Unpack[Recipe],
) -> Trained:
    """Train one dictionary of the run at `path` by `recipe`; see `sae.train.train`.

    resume: what the recipe does not say is as `name` was begun with. live (in the recipe): read the rows in the order
    in which they come, so that the cache need not be whole: from a capture that still goes on, or, when the hook has no
    cache, from the model. Started by torchrun, the ranks train together; data_parallel: how many groups of them read
    rows of their own (`sae.parallel`). Raises InputError.
    """
    with joined(device) as ranks:
        where = ranks.device(device)
        run, settings, caches = ranks.together(lambda: _planned(path, name, resume and not overwrite, recipe, where))
        ranks.agree({"--data-parallel": data_parallel})
        kind = "cuda" if where.startswith("cuda") else "cpu"
        mesh = ranks.together(lambda: Mesh(ranks, data_parallel=data_parallel, device=kind))
        folder = run.dictionary(name or default_name(settings))

        def cleared() -> bool:
            if overwrite and folder.exists():
                d_in = width_read(settings, rows_for(settings, caches.__getitem__))
                check_memory([settings], d_in, pick_device(where), shards=mesh.n_latents, rows=mesh.n_rows)
                shutil.rmtree(folder)
            return (folder / "cfg.json").exists()

        finished = ranks.by_leader(cleared)
        train(run, settings, name=name, device=where, keep=keep, source=caches, track=track, mesh=mesh)
    return Trained(folder, finished)


def _planned(
    path: Path, name: str | None, resume: bool, recipe: Recipe, device: str
) -> tuple[Run, Training, dict[str, Activations]]:
    """The run, what is to be trained, and the rows at each hook."""
    run = Run.open(path)
    begun = begun_with(run.dictionary(name)) if resume and name else None
    if begun is not None:
        before = recipe_of(begun)
        before.pop("options", None)  # they follow with the other sizes, whatever the architecture is now
        if "expansion" in recipe:
            del before["d_sae"]
        recipe = before | recipe
    hooks = hooks_of(recipe) or (only_hook(run),)
    caches = {hook: _rows(run, hook, recipe, device) for hook in (*hooks, *recipe.get("target_hook", ()))}
    widths = {hook: cache.d_in for hook, cache in caches.items()}
    settings = training(recipe, hook=hooks[0], d_in=widths[hooks[0]], widths=widths)
    if begun is not None:
        settings = dataclasses.replace(settings, sizes={**begun.sizes, **settings.sizes})
    return run, settings, caches


def only_hook(run: Run) -> str:
    """Raises InputError when it has none or several."""
    hooks = run.hooks()
    if len(hooks) != 1:
        raise InputError(f"{run.path} has {len(hooks)} hooks ({', '.join(hooks) or 'none'}): name one with --hook.")
    return hooks[0]


def _rows(run: Run, hook: str, recipe: Recipe, device: str) -> Activations:
    """The rows at `hook`, from the cache or from the model."""
    live, roles = recipe.get("live", False), recipe.get("roles", ())
    if not live or hook in run.hooks():
        return run.activations(hook, roles=roles, follow=live)
    if roles:
        raise InputError("Roles are chosen from a cache: run `sae collect` first, or leave out --role.")
    return LiveActivations(run, model_of(run, device=device), hook)


DEMO_TOKENS = 300_000
DEMO_VISITS = 1_500_000
DEMO_LATENTS = 4_608
DEMO_LABELS = 20


def demo(path: Path, *, device: str = "auto", say: Callable[[str], None] = print) -> Path:
    """The whole pipeline, small: activations, a TopK dictionary, metrics, feature store, labels. Returns its folder.

    What is done already is passed over, so a killed demo goes on. say: receives one line a stage.
    """
    done = {"start": time.monotonic()}

    def stage(line: str) -> None:
        say(f"[{time.monotonic() - done['start']:4.0f} s] {line}")

    stage(
        f"1/5 activations: {DEMO_TOKENS:,} tokens of the sample corpus through the middle layer of the embedded model"
    )
    run = collect_run(path, Text(tokens=DEMO_TOKENS), device=device)
    hook = run.hooks()[0]
    stage(f"2/5 dictionary: TopK, {DEMO_LATENTS:,} latents, k 32, {DEMO_VISITS:,} token visits at {hook}")
    folder = train_run(path, hook=hook, d_sae=DEMO_LATENTS, k=32, tokens=DEMO_VISITS, device=device).folder
    stage("3/5 metrics, on documents that were not trained on")
    if not (folder / EVAL).exists():
        evaluate(folder, load_model(run.meta["model"], device=device), options=Options(contexts=48))
    stage("4/5 feature store")
    if not (folder / STORE_FILE).exists():
        index(folder, device=device)
    stage(f"5/5 explanations: simple rules for every living feature, the local language model for {DEMO_LABELS}")
    label(folder, explainer="lexical")
    try:
        with local_server() as url:
            with open_store(folder) as store:
                features = pick_features(store, DEMO_LABELS)
            client = ChatClient(model_alias(default_model()), url)
            label(folder, features=features, client=client, options=QUICK)
    except InputError as error:  # the extra is not installed: the rules' explanations stand
        stage(f"no language model's labels: {error}")
    stage("done")
    return folder
