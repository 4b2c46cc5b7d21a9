#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "mlx_fused/activation.h"
#include "mlx_fused/arguments.h"

using OptionalArray = std::optional<mlx::core::array>;

// mlx_fused.LinearOperands
using LinearTuple = std::tuple<
    mlx::core::array,
    OptionalArray,
    OptionalArray,
    OptionalArray,
    std::optional<int>,
    std::optional<int>,
    std::string,
    OptionalArray,
    OptionalArray,
    float>;

mlx_fused::Linears linears(std::vector<LinearTuple>& layers);

// Its name, whether it is gated, alpha and limit.
using ActivationTuple = std::tuple<std::string, bool, float, float>;

mlx_fused::Activation activation_of(const std::optional<ActivationTuple>& given);

void bind_cross_entropy(nanobind::module_& m);

// Submodule _internals: what the library's own tests look into.
void bind_internals(nanobind::module_& m);
