#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "mlx_fused/routing.h"

// Routes that `mlx-fused tune` measured on this machine.
namespace mlx_fused {

// All that calls must share to share a measured route, but for their rows: is it a gradient, is it one by
// weights too, the dtype, the format of quantized weights (mode, bits, group size), is there a bias, the
// input features, and the output features and the adapter's rank (0 without one) of each segment.
using CallKind = std::tuple<
    bool,
    bool,
    mx::Dtype::Val,
    std::optional<std::tuple<std::string, int, int>>,
    bool,
    int64_t,
    std::vector<int>,
    std::vector<int>>;

// By rows. No route where neither is clearly the faster.
using TunedRows = std::map<int64_t, std::optional<Route>>;

// Replaces the routes of all devices by those of one. To be called before other threads make calls.
void set_tuned_routes(mx::Device::DeviceType device, std::map<CallKind, TunedRows> routes);

// The route measured at the nearest rows below, or at the fewest; nullopt if the table in routing.cpp
// decides.
std::optional<Route> tuned_route(const CallKind& kind, int64_t rows);
std::optional<Route> tuned_route(const Workload& work, const DeviceInfo& device);

}  // namespace mlx_fused
