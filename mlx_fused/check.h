#pragma once

#include <string>

#include "mlx/array.h"
#include "mlx_fused/routing.h"

// Argument checks that raise ValueError with the operation, the argument, what was expected and what came.
namespace mlx_fused {

namespace mx = mlx::core;

class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  void ndim(const std::string& name, const mx::array& a, int expected) const;
  void shape(const std::string& name, const mx::array& a, const mx::Shape& expected) const;
  // A matrix of so many rows.
  void rows(const std::string& name, const mx::array& a, int expected) const;
  void floating(const std::string& name, const mx::array& a) const;
  void dtype(const std::string& name, const mx::array& a, mx::Dtype expected) const;
  void positive(const char* name, int value) const;

  // Routes a call, once the caller's wish, if there is one, is known and can be met.
  Route route(const Call& call, mx::Stream stream, const std::optional<std::string>& wish) const;

  [[noreturn]] void fail(const std::string& message) const;

 private:
  const char* op_;
};

}  // namespace mlx_fused
