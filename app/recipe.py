"""What a person says of one dictionary (options of `sae train`, keys of a sweep's file), and the settings from it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from activations.errors import InputError
from sae.base import fields_from
from sae.registry import REGISTRY
from sae.rows import sizes_of_hooks
from sae.settings import Training


class Recipe(TypedDict, total=False):
    """The options of `sae train` that describe the dictionary, `_` for `-`; one that is not there has its default."""

    arch: str
    hook: str | Sequence[str]
    target_hook: Sequence[str]
    base: str
    d_sae: int
    expansion: int
    k: float
    options: Mapping[str, Any]
    tokens: int
    roles: Sequence[str]
    live: bool
    dead_after: int
    # As in `Training`.
    batch: int
    lr: float
    seed: int
    order_seed: int
    warmup: float
    decay: float
    clip: float
    k_from: int
    k_anneal: float
    sparsity_warmup: float
    ema: float
    resample_every: int
    matmul: str


SAME = Recipe.__annotations__.keys() & {field.name for field in dataclasses.fields(Training)} - {"hook", "roles"}
EXPANSION, K, TOKENS = 8, 32, 10_000_000


def hooks_of(recipe: Recipe) -> tuple[str, ...]:
    """The hooks that the recipe names to be read; () for none."""
    hook = recipe.get("hook", ())
    return (hook,) if isinstance(hook, str) else tuple(hook)


def elsewhere(arch: str) -> dict[str, str]:
    """Fields of the architecture's config that are no `options`, with what to do about each."""
    said = {"d_in": "use --hook", "d_sae": "use --d-sae", "k": "use -k", REGISTRY[arch].sparsity: "use -k"}
    of_hooks = sizes_of_hooks(arch, [0], [0])
    said |= {name: "use --target-hook" if name == "d_out" else "use --hook" for name in of_hooks}
    return said | {"scales": "training sets it"}


def training(recipe: Recipe, *, hook: str, d_in: int, widths: Mapping[str, int] | None = None) -> Training:
    """The settings of a dictionary of the activations at `hook`, d_in wide; widths: of all hooks that the recipe names.

    Raises InputError.
    """
    arch = recipe.get("arch", "topk")
    if arch not in REGISTRY:
        raise InputError(f"Architecture {arch!r} is unknown: expected one of {', '.join(REGISTRY)}.")
    field, k = REGISTRY[arch].sparsity, recipe.get("k", K)
    whole = {each.name: each.type for each in dataclasses.fields(REGISTRY[arch].config)}[field] is int
    if whole and k != int(k):
        raise InputError(f"k={k:g} is no whole number: {arch} keeps exactly k latents a token.")
    options = fields_from(recipe.get("options", {}))
    for name, instead in elsewhere(arch).items():
        if name in options:
            raise InputError(f"{name} is not for -o, which sets what an architecture alone has: {instead}.")
    given: dict[str, Any] = {name: value for name, value in recipe.items() if name in SAME}
    hooks, targets = hooks_of(recipe) or (hook,), tuple(recipe.get("target_hook", ()))
    width = dict.fromkeys((*hooks, *targets), d_in) | dict(widths or {})
    made = Training(
        architecture=arch,
        hook=hooks[0],
        hooks=hooks if len(hooks) > 1 else (),
        target_hooks=targets,
        sizes={
            "d_sae": recipe.get("d_sae") or recipe.get("expansion", EXPANSION) * d_in,
            field: int(k) if whole else float(k),
            **sizes_of_hooks(arch, [width[name] for name in hooks], [width[name] for name in targets]),
            **options,
        },
        n_tokens=recipe.get("tokens", TOKENS),
        order="stream" if recipe.get("live") else "shuffled",
        roles=tuple(recipe.get("roles", ())),
        dead_tokens=recipe.get("dead_after"),
        **given,
    )
    made.config(sum(width[name] for name in hooks) if REGISTRY[arch].sae.joint else d_in)
    return made


def recipe_of(settings: Training) -> Recipe:
    """The other way: every option, as `settings` has it."""
    of, apart = dataclasses.asdict(settings), elsewhere(settings.architecture)
    whole: dict[str, Any] = {name: of[name] for name in SAME} | {
        "arch": settings.architecture,
        "hook": settings.hooks or settings.hook,
        "target_hook": settings.target_hooks or None,
        "d_sae": settings.sizes["d_sae"],
        "k": settings.sizes[REGISTRY[settings.architecture].sparsity],
        "options": {name: value for name, value in settings.sizes.items() if name not in apart} or None,
        "tokens": settings.n_tokens,
        "roles": settings.roles,
        "live": settings.order == "stream",
        "dead_after": settings.dead_tokens,
    }
    return Recipe(**{name: value for name, value in whole.items() if value is not None})  # type: ignore[typeddict-item]
