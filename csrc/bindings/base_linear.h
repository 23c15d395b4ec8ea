// The frozen base layer, computed by the GEMM of the vendor. It uses the out variants of the products: autocast, which
// may be active while the operator runs (for example in a backward pass), changes the functional ones but not these.
#pragma once

#include <array>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "bindings/base_order.h"
#include "bindings/tensors.h"
#include "bindings/torch_cuda.h"

namespace align {

inline void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (out.is_cpu()) {  // without the dispatcher, whose search by name takes longer than a tiny product
    return check_call(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()), "the base layer's product");
  }
  using torch::stable::detail::from;
  call_operator<3>("aten::mm", "out", {from(a), from(b), from(out)});  // returns out
}

// out += a b, in place.
inline void mm_add(const Tensor& a, const Tensor& b, const Tensor& out) {
  using AddProduct = decltype(&aoti_torch_cpu_addmm_out);
  static const auto on_cuda = reinterpret_cast<AddProduct>(find_in_torch_cuda(kAddProduct));
  const AddProduct add = out.is_cpu() ? &aoti_torch_cpu_addmm_out : on_cuda;
  ALIGN_CHECK(add != nullptr, "this torch has no ", kAddProduct);
  check_call(add(out.get(), out.get(), a.get(), b.get(), 1, 1), "the base layer's product");
}

// A contiguous x [..., columns] as [rows, columns].
inline Tensor rows_of(const Tensor& x, int64_t rows) {
  const int64_t columns = x.size(x.dim() - 1);
  return view_of<2>(x, {rows, columns}, {columns, 1});
}

inline Tensor transposed(const Tensor& weight) {
  return view_of<2>(weight, {weight.size(1), weight.size(0)}, {weight.stride(1), weight.stride(0)});
}

// A new tensor of a projection, y or dx, and the products of frozen layers in it: y = x Wᵀ for x [..., in_dim] with
// `rows` rows and weight [out_dim, in_dim], or dx = dy W, of several layers the sum. The kernels add the bias.
//
//   BaseProduct y({{x, transposed(weight)}}, rows, out, low_rank_first<Device>());
//   kernels(.in = data<T>(y.in), .out = mutable_data<T>(y.out));
//   y.finish();
class BaseProduct {
 public:
  struct Factors {
    Tensor x, weight;
  };
  Tensor out;
  OptionalTensor in;  // what the kernels add to; none: they write the term alone

  BaseProduct(const std::vector<Factors>& products, int64_t rows, const Tensor& to, bool later) : out(to), rows_(rows) {
    if (later) {
      left_ = products;
    } else {
      multiply(products, /*add=*/false);
      in = out;
    }
  }
  // Without a product: the kernels add to `given`, or to nothing.
  BaseProduct(const OptionalTensor& given, const Tensor& to) : out(to), in(given), rows_(0) {}

  // After the kernels.
  void finish() const { multiply(left_, /*add=*/true); }

 private:
  std::vector<Factors> left_;  // products that are still to come
  int64_t rows_;

  void multiply(const std::vector<Factors>& products, bool add) const {
    for (const auto& [x, weight] : products) {
      (add ? mm_add : mm_out)(rows_of(x, rows_), weight, rows_of(out, rows_));
      add = true;
    }
  }
};

}  // namespace align
