#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "mlx/utils.h"
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

// Each is LinearOperands or a module.
mlx_fused::Linears linears(const nanobind::sequence& layers);

// fused_rms_norm
mlx::core::array rms_norm(
    const mlx::core::array& x, const OptionalArray& weight, float eps, mlx::core::StreamOrDevice s);

// Its name, whether it is gated, alpha and limit.
using ActivationTuple = std::tuple<std::string, bool, float, float>;

mlx_fused::Activation activation_of(const std::optional<ActivationTuple>& given);

void bind_cross_entropy(nanobind::module_& m);

// What logits are made from.
void bind_logits(nanobind::module_& m);

// What patching asks of modules and arrays.
void bind_patching(nanobind::module_& m);

// What stands in for the layers of a running module.
void bind_stand_ins(nanobind::module_& m);

// Submodule _internals: what the library's own tests look into.
void bind_internals(nanobind::module_& m);
