#include "mlx_fused/check.h"

namespace mlx_fused {

namespace {

// As Python prints it.
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

std::ostream& operator<<(std::ostream& os, const Name& name) {
  os << name.text;
  return name.index < 0 ? os : os << "[" << name.index << "]";
}

void Check::ndim(const Name& name, const mx::array& a, int expected) const {
  if (static_cast<int>(a.ndim()) != expected) {
    auto shape = to_string(a.shape());
    fail(name, " must have ", expected, " dimensions but got ", a.ndim(), " with shape ", shape, ".");
  }
}

void Check::shape(const Name& name, const mx::array& a, const mx::Shape& expected) const {
  if (a.shape() != expected) {
    fail(name, " must have shape ", to_string(expected), " but got ", to_string(a.shape()), ".");
  }
}

void Check::broadcasts(const Name& name, const mx::array& a, const mx::Shape& expected) const {
  int more = expected.size() - a.ndim();
  bool fits = more >= 0;
  for (size_t i = 0; fits && i < a.ndim(); ++i) {
    fits = a.shape(i) == 1 || a.shape(i) == expected[i + more];
  }
  if (!fits) {
    fail(name, " must broadcast to ", to_string(expected), " but got ", to_string(a.shape()), ".");
  }
}

void Check::rows(const Name& name, const mx::array& a, int expected) const {
  ndim(name, a, 2);
  if (a.shape(0) != expected) {
    fail(name, " must have ", expected, " rows but got shape ", to_string(a.shape()), ".");
  }
}

void Check::floating(const Name& name, const mx::array& a) const {
  if (!mx::issubdtype(a.dtype(), mx::floating)) {
    fail(name, " must be float32, float16 or bfloat16 but got ", a.dtype(), ".");
  }
}

void Check::dtype(const Name& name, const mx::array& a, mx::Dtype expected) const {
  if (a.dtype() != expected) {
    fail(name, " must be ", expected, " but got ", a.dtype(), ".");
  }
}

void Check::positive(const Name& name, int value) const {
  if (value < 1) {
    fail(name, " must be at least 1 but got ", value, ".");
  }
}

}  // namespace mlx_fused
