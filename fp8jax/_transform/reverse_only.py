"""Forward-mode derivatives, refused in words of our own.

The products' backward passes carry amaxes out, which a tangent has no place for. JAX would say so
of a `custom_vjp` that the user never wrote; so the tangents of a function's arguments pass through
a primitive that has a transpose, for reverse mode, and nothing else.
"""

import contextlib
import functools
import warnings
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.interpreters import ad, batching, mlir


def _refuse(*args: Any, **params: Any):
    del args, params
    raise NotImplementedError(
        "functions in FP8 have reverse-mode derivatives only; got a forward-mode one, as of "
        "jax.jvp, jax.jacfwd, jax.linearize "
        "or jax.hessian. Use jax.grad, jax.vjp or jax.jacrev; or take the derivative inside the "
        "function that fp8jax.fp8 "
        "transforms: its products are sites, too."
    )


# Static scales may be meant, so it is no error.
FROZEN = (
    "gradients with respect to the weights come without those of the scales, which carry what was "
    "observed: these scales will never "
    "move. Differentiate both, as jax.grad(fp8_fn, argnums=(0, 1)), or Linen's variables as a "
    "whole, and update both by "
    "fp8jax.with_delayed_scaling(tx). Where scales are to stay, ignore it: "
    "warnings.filterwarnings('ignore', 'gradients with respect to')."
)

_tangent_p = core.Primitive("fp8jax_tangent")
_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda tangent: tangent)
mlir.register_lowering(_tangent_p, _refuse)
ad.deflinear2(_tangent_p, lambda cotangent, tangent: [cotangent])
batching.defvectorized(_tangent_p)


@contextlib.contextmanager
def in_our_words():
    """For `jax.jacfwd`, which batches tangents: there JAX objects at once, and not where they are
    to be computed.
    """
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        _refuse()


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def reverse_only(
    arrays: list[jax.Array],
    scales: tuple[int, ...] = (),
    weights: tuple[int, ...] = (),
    coded: tuple[tuple[int, str], ...] = (),
) -> list[jax.Array]:
    """`arrays` as they are, with reverse-mode derivatives only. Warns where `weights` among them
    are differentiated and `scales` are not; raises where `coded` ones are, given with their names.

    >>> jax.grad(lambda x: sum(reverse_only([x])) * 2.0)(1.0)
    Array(2., dtype=float32, weak_type=True)
    """
    return arrays


def _jvp(scales, weights, coded, primals, tangents):
    ((arrays,), (tangents,)) = primals, tangents
    differentiated = [not isinstance(tangent, SymbolicZero) for tangent in tangents]
    asked = list(dict.fromkeys(name for index, name in coded if differentiated[index]))
    if asked:
        raise ValueError(
            "weights that are held as FP8 codes have no gradient; got one asked for, of "
            f"{', '.join(asked[:5])}{' and others' if asked[5:] else ''}. Differentiate the other "
            "parameters alone, as adapters: pass them apart from these, or by nnx.DiffState's "
            "filter; or train dense weights, as of fp8jax.dequantize_params(params)."
        )
    if scales and any(differentiated[i] for i in weights):
        if not any(differentiated[i] for i in scales):
            warnings.warn(FROZEN, stacklevel=2)
    # The primals again, so that an outer forward-mode derivative, as of jax.hessian, meets the
    # same.
    return reverse_only(arrays), [
        tangent if isinstance(tangent, SymbolicZero) else _tangent_p.bind(tangent)
        for tangent in tangents
    ]


reverse_only.defjvp(_jvp, symbolic_zeros=True)
