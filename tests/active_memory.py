"""What MLX holds in memory."""

import mlx.core as mx


def kept(loss, arrays):
    """The bytes that the backward pass of ``loss`` needs of the forward's, besides its ``arrays``."""
    mx.synchronize()
    mx.clear_cache()  # whose buffers may be larger than what is asked for
    before = mx.get_active_memory()
    value, gradients = mx.vjp(lambda *a: [loss(*a)], arrays, [mx.array(1.0)])
    mx.eval(value)
    mx.synchronize()
    held = mx.get_active_memory() - before
    mx.eval(gradients)
    return held
