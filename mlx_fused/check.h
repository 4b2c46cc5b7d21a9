#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "mlx/array.h"
#include "mlx/utils.h"

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
  void positive(const std::string& name, int value) const;

  const std::string& operation() const {
    return operation_;
  }

  // The message is all that is given, in a row.
  template <typename... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    std::ostringstream message;
    message << "[" << operation_ << "] ";
    (message << ... << parts);
    throw std::invalid_argument(message.str());
  }

 private:
  std::string operation_;
};

}  // namespace mlx_fused
