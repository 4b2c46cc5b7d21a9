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

// What a message calls an argument: its name, with an index if it is one of a tuple.
struct Name {
  const char* text;
  int index = -1;
};

std::ostream& operator<<(std::ostream& os, const Name& name);

class Check {
 public:
  // The operation's name must outlive it.
  explicit Check(const std::string& operation) : operation_(operation) {}

  void ndim(const Name& name, const mx::array& a, int expected) const;
  void shape(const Name& name, const mx::array& a, const mx::Shape& expected) const;
  void broadcasts(const Name& name, const mx::array& a, const mx::Shape& expected) const;
  // The array must be a matrix with this many rows.
  void rows(const Name& name, const mx::array& a, int expected) const;
  void floating(const Name& name, const mx::array& a) const;
  void dtype(const Name& name, const mx::array& a, mx::Dtype expected) const;
  void positive(const Name& name, int value) const;

  // The message is all that is given, in a row.
  template <typename... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    std::ostringstream message;
    message << "[" << operation_ << "] ";
    (message << ... << parts);
    throw std::invalid_argument(message.str());
  }

 private:
  const std::string& operation_;
};

}  // namespace mlx_fused
