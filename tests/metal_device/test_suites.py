"""The CPU's suites once more, test by test, on the device: values, layouts, gradients, transforms, models."""

from importlib import import_module

SUITES = ("forward", "backward", "layouts", "properties", "autodiff", "transforms", "nn", "models")

NO_FLOAT64 = "a GPU has none"
NO_KERNEL = "counts our gradient nodes where a GPU has MLX's matmuls and sums"
NOT_HERE = {
    "forward.test_float64": NO_FLOAT64,
    "backward.test_float64": NO_FLOAT64,
    "backward.test_agrees_with_finite_differences": NO_FLOAT64,
    "autodiff.test_float64_gradients": NO_FLOAT64,
    "autodiff.test_one_node_each_way_and_only_the_gradients_asked_for": NO_KERNEL,
    "transforms.test_vmap_of_vmap_runs_our_kernels": NO_KERNEL,
    "transforms.test_equal_output_gradients_merge_and_different_ones_do_not": NO_KERNEL,
}

FOUND = {
    f"{suite}.{name}": value
    for suite in SUITES
    for name, value in vars(import_module(f"test_{suite}")).items()
    if name.startswith("test_")
}
assert NOT_HERE.keys() <= FOUND.keys(), NOT_HERE.keys() - FOUND.keys()
globals().update({"test_" + n.replace(".test", ""): t for n, t in FOUND.items() if n not in NOT_HERE})
