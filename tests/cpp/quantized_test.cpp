// The products with quantized weights against loops in double precision.
#include <stdexcept>

#include "mlx_fused/backend/cpu/embedding.h"
#include "mlx_fused/backend/cpu/sgemm.h"
#include "quantized.h"

namespace {

// Two segments of different widths: the forward pass and the input's gradient.
void check_case(
    std::mt19937& random, Format f, Type type, Type scale_type, int64_t rows, int64_t in, int64_t n) {
  Matrix x(random, type, plain, 1, rows, 1, in);
  QuantizedMatrix wq(random, f, scale_type, 2 * n, in), wk(random, f, scale_type, n, in);
  Matrix q(random, type, head_major, 1, rows, 2, n), k(random, type, head_major, 1, rows, 1, n);
  Matrix dq(random, type, head_major, 1, rows, 2, n), dk(random, type, head_major, 1, rows, 1, n);
  Matrix bias(random, type, plain, 1, 1, 1, 2 * n), residual(random, type, plain, 1, rows, 2, n);
  Matrix dx(random, type, plain, 1, rows, 1, in);
  std::string name = "mode " + std::to_string(static_cast<int>(f.mode)) + ", " + std::to_string(f.bits) +
                     " bits, group " + std::to_string(f.group_size) + ", rows " + std::to_string(rows);

  project(x.view, {{wq.q, bias.view, {}, q.view}, {wk.q, {}, {}, k.view}}, {});
  check_sum(("q, " + name).c_str(), q, terms(x, wq), {values_of(bias)});
  check_sum(("k, " + name).c_str(), k, terms(x, wk));
  project(x.view, {{wq.q, bias.view, {}, q.view}}, {residual.view});
  check_sum(("q + residual, " + name).c_str(), q, terms(x, wq), {values_of(bias), values_of(residual)});
  project_grad({}, {{dq.view, wq.q}, {dk.view, wk.q}}, dx.view);
  check_sum(("dx, " + name).c_str(), dx, terms(dq, wq, true) + terms(dk, wk, true));
}

void check_cases() {
  std::mt19937 random(1);
  int turn = 0;
  for (Format f : all_formats()) {
    auto check_rows = [&](int64_t groups, const std::vector<int64_t>& all_rows) {
      for (int64_t rows : all_rows) {
        Type type = types[turn % 3], scale_type = types[turn / 3 % 3];
        check_case(random, f, type, scale_type, rows, groups * f.group_size, 1 + turn % 7);
        ++turn;
      }
    };
    // One group, no multiple of any block, and more groups than lanes.
    check_rows(1, {1, 5, 17, 65});
    check_rows(3, {0, 1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 25, 63, 64, 65});
    check_rows(19, {1, 9, 33});
    for (Type type : types) {
      check_case(random, f, type, type, 1, 256, 35);
      check_case(random, f, type, type, 33, 256, 35);
    }
  }
}

// Weights of different formats, or dense and quantized, in one call.
void check_mixed() {
  std::mt19937 random(2);
  for (int64_t rows : {1, 3, 40}) {
    Matrix x(random, Type::bfloat16, plain, 1, rows, 1, 128);
    QuantizedMatrix four(random, {Mode::affine, 4, 64}, Type::bfloat16, 48, 128);
    QuantizedMatrix six(random, {Mode::affine, 6, 32}, Type::bfloat16, 17, 128);
    Matrix dense(random, Type::bfloat16, plain, 1, 16, 1, 128);
    Matrix q(random, Type::bfloat16, plain, 1, rows, 1, 48), k(random, Type::bfloat16, plain, 1, rows, 1, 17);
    Matrix v(random, Type::bfloat16, plain, 1, rows, 1, 16),
        dx(random, Type::bfloat16, plain, 1, rows, 1, 128);
    project(x.view, {{four.q, {}, {}, q.view}, {six.q, {}, {}, k.view}, {dense.view, {}, {}, v.view}}, {});
    check_sum("4 bits", q, terms(x, four));
    check_sum("6 bits", k, terms(x, six));
    check_sum("dense", v, {{values_of(x), values_of(dense)}});
    auto expected = terms(q, four, true) + terms(k, six, true);
    expected.push_back({values_of(v), values_of(dense, true)});
    project_grad({}, {{q.view, four.q}, {k.view, six.q}, {v.view, dense.view}}, dx.view);
    check_sum("dx", dx, expected);
  }
}

void check_embedded() {
  std::mt19937 random(3);
  int turn = 0;
  for (Format f : all_formats()) {
    for (int64_t groups : {1, 3, 19}) {
      for (int64_t count : {0, 1, 2, 40}) {
        Type type = types[turn++ % 3];
        QuantizedMatrix table(random, f, type, 7, groups * f.group_size);
        Matrix out(random, type, plain, 1, count, 1, table.q.cols);
        std::vector<int64_t> places;
        for (int64_t i = 0; i < count; ++i) {
          places.push_back(int64_t(random() % 14) - 7);
        }
        embed(table.q, places.data(), out.view);
        double unit = type == Type::float32 ? 0x1p-24 : type == Type::float16 ? 0x1p-11 : 0x1p-8;
        double smallest = type == Type::float16 ? 0x1p-24 : 0;
        for (int64_t i = 0; i < count; ++i) {
          int64_t row = places[i] < 0 ? places[i] + 7 : places[i];
          for (int64_t j = 0; j < table.q.cols; ++j) {
            double product = table.get(row, j), sum = product + table.get_bias(row, j);
            double bound = unit * (1 + unit) * (std::abs(product) + std::abs(sum)) + smallest;
            check(std::abs(out.get(i, j) - sum) <= bound, "a row of a table");
          }
        }
        for (int64_t place : {-8, 7}) {
          bool thrown = false;
          try {
            places.assign(count, place);
            embed(table.q, places.data(), out.view);
          } catch (const std::out_of_range&) {
            thrown = true;
          }
          check(thrown == (count > 0), "no row of a table");
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1) {
    sgemm_min_rows = 0;  // as on macOS
  }
  check_cases();
  check_mixed();
  check_embedded();
  std::puts("quantized_test: all products and rows are right");
}
