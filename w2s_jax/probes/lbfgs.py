"""L-BFGS for a smooth convex function, made to be vmapped: one evaluation of the function a turn.

Nocedal & Wright 2006, algorithm 7.4, with a backtracking line search whose steps are turns of the same loop. So lanes of a vmap
never wait for each other's line search, and the function stands once in the compiled program (optax's search has it many times).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

MEMORY = 10  # pairs kept
DECREASE = 1e-4  # Armijo's constant
ROUNDING = 1e-6  # relative error of a value: within it the slope decides, as in Hager & Zhang 2005, eq. 4.1
PATIENCE = 20  # evaluations without progress after which it ends: what is left is rounding
SHORTEST = 1e-4  # steps below this start anew from the steepest descent, and end there


class State(NamedTuple):
    point: jax.Array
    value: jax.Array
    gradient: jax.Array
    direction: jax.Array
    step: jax.Array  # length of the next trial along the direction
    moves: jax.Array  # [MEMORY, size], newest last
    changes: jax.Array  # [MEMORY, size], of the gradient
    inverse: jax.Array  # [MEMORY], 1 / (move . change), 0 where there is none
    evaluations: jax.Array
    stuck: jax.Array
    mark: jax.Array  # [3]: value, gradient's norm and evaluations when there was progress last
    best: tuple[jax.Array, jax.Array, jax.Array]  # point, value and gradient's norm: of points of equal value that of the least norm


def minimise(function: Callable, start: jax.Array, tolerance, evaluations,
             with_gradient: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The minimum of `function(point [size]) -> scalar`, from `start`.

    Args:
        tolerance: stops where the gradient's norm is at most this.
        evaluations: of value and gradient, at most.
        with_gradient: the function gives (value, gradient) itself.

    Returns:
        The best point, the gradient's norm there, and how many evaluations it took. Where float32 shows no way further down, it
        stops with a larger norm.
    """
    value_and_grad = function if with_gradient else jax.value_and_grad(function)
    dot = functools.partial(jnp.vdot, precision=jax.lax.Precision.HIGHEST)

    def direction_of(gradient, moves, changes, inverse):
        def back(q, pair):
            move, change, inverse = pair
            weight = inverse * dot(move, q)
            return q - weight * change, weight

        def forth(q, pair):
            move, change, inverse, weight = pair
            return q + move * (weight - inverse * dot(change, q)), None

        q, weights = jax.lax.scan(back, -gradient, (moves, changes, inverse), reverse=True)
        q = q * jnp.where(inverse[-1] > 0, 1 / (inverse[-1] * dot(changes[-1], changes[-1])), 1.0)
        return jax.lax.scan(forth, q, (moves, changes, inverse, weights))[0]

    def turn(state: State) -> State:
        move = state.step * state.direction
        point = state.point + move
        value, gradient = value_and_grad(point)
        first = state.evaluations == 0
        slope, slope_there = dot(state.gradient, state.direction), dot(gradient, state.direction)
        lower = value <= state.value + DECREASE * state.step * slope
        level = (value <= state.value + ROUNDING * jnp.abs(state.value)) & (slope_there <= (2 * DECREASE - 1) * slope)
        taken = first | lower | level

        change = gradient - state.gradient
        bend = dot(move, change)
        useful = ~first & (bend > 1e-7 * jnp.sqrt(dot(move, move) * dot(change, change)))

        def remember(history, new):
            return jnp.where(useful, jnp.roll(history, -1, axis=0).at[-1].set(new), history)

        moves, changes = remember(state.moves, move), remember(state.changes, change)
        inverse = remember(state.inverse, 1 / jnp.where(useful, bend, 1.0))
        direction = direction_of(gradient, moves, changes, inverse)
        downhill = dot(direction, gradient) < 0
        accepted = State(point, value, gradient, jnp.where(downhill, direction, -gradient), jnp.float32(1), moves, changes,
                         jnp.where(downhill, inverse, 0.0), state.evaluations + 1, jnp.bool_(False), state.mark, state.best)

        # The minimum of the parabola through value, slope and the trial's value, but between a tenth and a half.
        parabola = -slope * state.step**2 / (2 * (value - state.value - slope * state.step))
        shorter = jnp.clip(jnp.where(jnp.isfinite(parabola), parabola, 0.0), 0.1 * state.step, 0.5 * state.step)
        tired = shorter < SHORTEST
        anew = tired & (state.inverse[-1] > 0)
        refused = state._replace(
            direction=jnp.where(anew, -state.gradient, state.direction), step=jnp.where(anew, 1.0, shorter),
            inverse=jnp.where(anew, 0.0, state.inverse), evaluations=state.evaluations + 1, stuck=tired & ~anew)
        state = jax.tree.map(lambda a, b: jnp.where(taken, a, b), accepted, refused)
        now = jnp.stack([state.value, jnp.linalg.norm(state.gradient), state.evaluations.astype(jnp.float32)])
        better = (now[0] < state.mark[0] - ROUNDING * jnp.abs(state.mark[0])) | (now[1] < 0.9 * state.mark[1])
        mark = jnp.where(better, now, state.mark)
        room = ROUNDING * jnp.abs(state.best[1])  # the last steps go to and fro within what rounding leaves
        nearer = (now[0] < state.best[1] - room) | ((now[0] <= state.best[1] + room) & (now[1] < state.best[2]))
        best = jax.tree.map(lambda a, b: jnp.where(nearer, a, b), (state.point, now[0], now[1]), state.best)
        return state._replace(mark=mark, best=best, stuck=state.stuck | (now[2] - mark[2] >= PATIENCE))

    def unfinished(state: State):
        far = (state.evaluations == 0) | (jnp.linalg.norm(state.gradient) > tolerance)
        return far & (state.evaluations < evaluations) & ~state.stuck

    zeros, history = jnp.zeros_like(start), jnp.zeros((MEMORY, *start.shape), start.dtype)
    state = State(start, jnp.float32(jnp.inf), zeros, zeros, jnp.float32(1), history, history, jnp.zeros(MEMORY, start.dtype),
                  jnp.int32(0), jnp.bool_(False), jnp.array([jnp.inf, jnp.inf, 0], jnp.float32),
                  (start, jnp.float32(jnp.finfo(jnp.float32).max), jnp.float32(jnp.inf)))
    state = jax.lax.while_loop(unfinished, turn, state)
    return state.best[0], state.best[2], state.evaluations
