#include "mlx_fused/check.h"

#include <sstream>
#include <stdexcept>

#include "mlx/utils.h"

namespace mlx_fused {

namespace {

std::string to_string(const mx::Shape& shape) {
  std::ostringstream os;
  os << "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    os << (i ? ", " : "") << shape[i];
  }
  os << (shape.size() == 1 ? ",)" : ")");
  return os.str();
}

}  // namespace

void Check::ndim(const std::string& name, const mx::array& a, int expected) const {
  if (static_cast<int>(a.ndim()) != expected) {
    std::ostringstream msg;
    msg << name << " must have " << expected << " dimensions but got " << a.ndim() << " with shape "
        << to_string(a.shape()) << ".";
    fail(msg.str());
  }
}

void Check::shape(const std::string& name, const mx::array& a, const mx::Shape& expected) const {
  if (a.shape() != expected) {
    fail(name + " must have shape " + to_string(expected) + " but got " + to_string(a.shape()) + ".");
  }
}

void Check::rows(const std::string& name, const mx::array& a, int expected) const {
  ndim(name, a, 2);
  if (a.shape(0) != expected) {
    fail(
        name + " must have " + std::to_string(expected) + " rows but got shape " + to_string(a.shape()) +
        ".");
  }
}

void Check::floating(const std::string& name, const mx::array& a) const {
  if (!mx::issubdtype(a.dtype(), mx::floating)) {
    std::ostringstream msg;
    msg << name << " must be float32, float16 or bfloat16 but got " << a.dtype() << ".";
    fail(msg.str());
  }
}

void Check::dtype(const std::string& name, const mx::array& a, mx::Dtype expected) const {
  if (a.dtype() != expected) {
    std::ostringstream msg;
    msg << name << " must be " << expected << " but got " << a.dtype() << ".";
    fail(msg.str());
  }
}

void Check::positive(const char* name, int value) const {
  if (value < 1) {
    fail(std::string(name) + " must be at least 1 but got " + std::to_string(value) + ".");
  }
}

void Check::fail(const std::string& message) const {
  throw std::invalid_argument("[" + operation_ + "] " + message);
}

}  // namespace mlx_fused
