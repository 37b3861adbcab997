"""Recipes as data: JSON, and every error's text."""

import dataclasses
import json

import pytest

import fp8jax
from fp8jax import (
    BlockWise,
    CastSpec,
    DelayedScaling,
    PerChannel,
    PerToken,
    ProductCasts,
    Recipe,
    recipes,
)

E4M3, E5M2 = CastSpec("E4M3"), CastSpec("E5M2")


@pytest.mark.parametrize(
    "recipe",
    [
        recipes.delayed(),
        recipes.delayed(
            interval=3,
            margin=2.0,
            history_window=7,
            update_threshold=0.5,
            reduce=99.5,
            execution="emulated",
        ),
        recipes.delayed(outlier_ratio=None),
        recipes.delayed(outlier_ratio=8),
        recipes.current(forward="E4M3FNUZ", backward="E5M2FNUZ"),
        recipes.rowwise(power_of_two=False),
        recipes.rowwise_hp_wgrad(),
        recipes.blockwise(),
        recipes.mxfp8(),
        dataclasses.replace(
            recipes.current(),
            name="mine",
            dlhs=ProductCasts(grad=CastSpec("E4M3", rounding="toward_zero"), rhs=E4M3),
        ),
    ],
    ids=lambda recipe: recipe.name,
)
def test_json_and_back(recipe):
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe and hash(again) == hash(recipe)


def changed(**changes):
    return json.dumps(json.loads(recipes.delayed().to_json()) | changes)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: DelayedScaling(interval=0),
            ValueError,
            "interval must be a whole number of observations, at least 1; got 0",
        ),
        (lambda: DelayedScaling(interval=True), ValueError, "interval must be a whole number"),
        (
            lambda: DelayedScaling(history_window=0),
            ValueError,
            "history_window must be a whole number of observations, at least 1; got 0",
        ),
        (
            lambda: DelayedScaling(margin=0),
            ValueError,
            "margin must be a positive factor below .*; got 0. Use 1.0",
        ),
        (
            lambda: DelayedScaling(margin=float("nan")),
            ValueError,
            "margin must be a positive factor",
        ),
        (
            lambda: DelayedScaling(update_threshold=1.5),
            ValueError,
            r"update_threshold must be a share of the range in \(0, 1\]; got 1.5",
        ),
        (
            lambda: DelayedScaling(reduce="mean"),
            ValueError,
            r"reduce must be one of \('max', 'most_recent'\) or a percentile .* got 'mean'",
        ),
        (lambda: DelayedScaling(reduce=0), ValueError, "reduce must be one of"),
        (
            lambda: DelayedScaling(outlier_ratio=1.0),
            ValueError,
            r"outlier_ratio must be a factor above 1 .*, or None; got 1\.0\. Use None where each",
        ),
        (lambda: DelayedScaling(outlier_ratio=True), ValueError, "outlier_ratio must be"),
        (lambda: CastSpec("E4M4"), ValueError, "E4M4"),
        (lambda: CastSpec("E8M0"), ValueError, "format must hold values; got E8M0"),
        (
            lambda: CastSpec("E4M3", BlockWise((1, 2, 3))),
            ValueError,
            r"scaling of a product's operand must be PerTensor\(\), PerToken\(\) or BlockWise .* "
            r"got BlockWise",
        ),
        (
            lambda: CastSpec("E4M3", PerChannel(0)),
            ValueError,
            r"scaling of a product's operand must be .* got PerChannel.* PerToken\(\) gives a "
            r"scale",
        ),
        (
            lambda: CastSpec("E4M3", "PerToken"),
            ValueError,
            "scaling of a product's operand must be .* got 'PerToken'",
        ),
        (
            lambda: CastSpec("E4M3", power_of_two=1),
            TypeError,
            "power_of_two must be True or False; got 1",
        ),
        (
            lambda: CastSpec("E4M3", PerToken(), delayed=DelayedScaling()),
            ValueError,
            r"delayed scaling must be PerTensor\(\); got PerToken\(\). Finer groups .* use "
            r"delayed=None",
        ),
        (
            lambda: CastSpec("E4M3", delayed=DelayedScaling(), power_of_two=False),
            ValueError,
            "delayed scaling keeps exponents, .* got power_of_two=False",
        ),
        (
            lambda: dataclasses.replace(
                recipes.rowwise(execution="native"), drhs=ProductCasts(lhs=E4M3)
            ),
            ValueError,
            "execution 'native' needs float8 for both operands of drhs",
        ),
        (
            lambda: recipes.blockwise(block=0),
            ValueError,
            "block_shape must hold positive extents; got",
        ),
        (
            lambda: Recipe(forward=ProductCasts(), dlhs=ProductCasts(), drhs=ProductCasts()),
            ValueError,
            r"a recipe must cast something; got none for any operand. To leave sites as they are, "
            r"use Rule\(pattern, None\)",
        ),
        (
            lambda: CastSpec("E4M3", rounding="stochastic"),
            ValueError,
            "rounding of a product's operand .* got 'stochastic'. Stochastic",
        ),
        (
            lambda: CastSpec("E4M3", delayed=True),
            TypeError,
            "delayed must be a DelayedScaling or None; got True",
        ),
        (
            lambda: recipes.delayed(execution="fast"),
            ValueError,
            r"execution must be one of .* got 'fast'. Use 'auto'",
        ),
        (
            lambda: dataclasses.replace(recipes.current(), forward=None),
            TypeError,
            r"forward must be a ProductCasts; got None. Write",
        ),
        (
            lambda: dataclasses.replace(recipes.current(), dlhs=ProductCasts(lhs=E4M3, rhs=E4M3)),
            ValueError,
            "dlhs must have casts for grad and rhs alone; got one for lhs. These are the operands "
            "of that product",
        ),
        (
            lambda: dataclasses.replace(
                recipes.delayed(), drhs=ProductCasts(lhs=E5M2, grad=recipes.delayed().drhs.grad)
            ),
            ValueError,
            "lhs has delayed scaling, so both products that read it must cast it alike",
        ),
        (
            lambda: Recipe.from_json(changed(speed=9)),
            ValueError,
            r"Recipe has no field \['speed'\]; its fields are",
        ),
        (lambda: Recipe.from_json("[]"), ValueError, r"text must be a JSON object; got \[\]"),
        (
            lambda: Recipe.from_json(
                changed(forward={"lhs": {"format": "E4M3", "scaling": {"kind": "PerMoon"}}})
            ),
            ValueError,
            "kind of scaling must be one of .* got 'PerMoon'",
        ),
        (lambda: BlockWise(0), ValueError, "0"),
        (
            lambda: fp8jax.Rule("(", None),
            ValueError,
            r"pattern must be a regular expression over site names; got '\('",
        ),
        (
            lambda: fp8jax.Rule("a", None, first=-1),
            ValueError,
            "first must be a number of products, 0 or more; got -1",
        ),
        (
            lambda: fp8jax.Rule("a", None, last=True),
            ValueError,
            "last must be a number of products, 0 or more; got True",
        ),
        (
            lambda: fp8jax.fp8(abs, recipes.current(), min_flops=-1),
            ValueError,
            "min_flops must be a number of operations, 0 or more; got -1",
        ),
        (
            lambda: fp8jax.Rule("a", "delayed"),
            TypeError,
            "recipe of a rule must be a Recipe or None; got 'delayed'",
        ),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make()
