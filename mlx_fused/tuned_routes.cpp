#include "mlx_fused/tuned_routes.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace mlx_fused {

namespace {

struct Tuned {
  mx::Device::DeviceType device = mx::Device::cpu;
  std::map<CallKind, TunedRows> routes;
};

Tuned& tuned() {
  static Tuned tuned;
  return tuned;
}

CallKind kind_of(const Workload& work) {
  auto& call = work.call;
  std::vector<int> features;
  for (auto& segment : call.segments) {
    features.push_back(segment.features);
  }
  std::optional<std::tuple<std::string, int, int>> format;
  if (auto& q = call.quantization) {
    format.emplace(q->mode, q->bits, q->group_size);
  }
  auto is_weight = [](const Slot& slot) { return slot.role == Role::weight; };
  bool of_weights = work.is_grad() && std::any_of(work.wanted->begin(), work.wanted->end(), is_weight);
  return {
      work.is_grad(),
      of_weights,
      work.promoted[0].val(),
      std::move(format),
      call.has_bias,
      work.in_features,
      std::move(features),
      work.ranks};
}

}  // namespace

void set_tuned_routes(mx::Device::DeviceType device, std::map<CallKind, TunedRows> routes) {
  tuned() = {device, std::move(routes)};
}

std::optional<Route> tuned_route(const CallKind& kind, int64_t rows) {
  auto found = tuned().routes.find(kind);
  if (found == tuned().routes.end() || found->second.empty()) {
    return std::nullopt;
  }
  auto next = found->second.upper_bound(rows);
  return (next == found->second.begin() ? next : std::prev(next))->second;
}

std::optional<Route> tuned_route(const Workload& work, const DeviceInfo& device) {
  auto type = device.kind == DeviceInfo::cpu ? mx::Device::cpu : mx::Device::gpu;
  if (tuned().routes.empty() || type != tuned().device) {
    return std::nullopt;
  }
  return tuned_route(kind_of(work), work.rows);
}

}  // namespace mlx_fused
