#pragma once

#include <string>

#include "mlx/array.h"

// Argument checks. They throw (Python: ValueError) with the operation, the argument, what it must be and what
// it is.
namespace mlx_fused {

namespace mx = mlx::core;

class Check {
 public:
  explicit Check(std::string operation) : operation_(std::move(operation)) {}

  void ndim(const std::string& name, const mx::array& a, int expected) const;
  void shape(const std::string& name, const mx::array& a, const mx::Shape& expected) const;
  // The array must be a matrix with this many rows.
  void rows(const std::string& name, const mx::array& a, int expected) const;
  void floating(const std::string& name, const mx::array& a) const;
  void dtype(const std::string& name, const mx::array& a, mx::Dtype expected) const;
  void positive(const char* name, int value) const;

  const std::string& operation() const {
    return operation_;
  }

  [[noreturn]] void fail(const std::string& message) const;

 private:
  std::string operation_;
};

}  // namespace mlx_fused
