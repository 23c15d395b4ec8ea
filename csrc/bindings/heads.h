// Shared by the bindings of dropout_sum, routed_lora and sibling_lora: checks, outputs, and the arguments of the
// kernels.
#pragma once

#include "bindings/projection.h"
#include "ops/heads.h"

namespace align {

inline std::vector<int64_t> latent_sizes(const HeadsShape& shape) {
  if (!shape.A_per_head && shape.site != DropoutSite::kInputPerHead) {
    return {shape.tokens, shape.rank};
  }
  return {shape.tokens, shape.heads, shape.rank};
}

// The adapters as the caller gave them.
struct HeadsAdapters {
  const Tensor& A;
  const Tensor& B;
  const OptionalTensor& A0;
  const OptionalTensor& B0;
};

inline void check_offset(HeadsShape& shape, const Tensor& x, const HeadsAdapters& given) {
  ALIGN_CHECK(given.A0.has_value() == given.B0.has_value(), "give both A0 and B0, or neither");
  if (!given.A0) return;
  ALIGN_CHECK(given.A0->dim() == 2, "A0 must be [offset_rank, in_dim], got ", shape_of(*given.A0));
  check_floating(*given.A0, "A0");
  check_floating(*given.B0, "B0");
  shape.offset_rank = given.A0->size(0);
  check_shape(*given.A0, {shape.offset_rank, shape.in_dim}, "A0");
  check_shape(*given.B0, {shape.out_dim, shape.offset_rank}, "B0");
  check_device(given.A0, x, "A0");
  check_device(given.B0, x, "B0");
}

// The sum of all ranks of a product. On CUDA the ranks that see a mask of x begin at multiples of 8.
inline int64_t ranks_of(const HeadsShape& shape, int64_t logits) {
  return shape.heads * ((shape.rank + 7) / 8 * 8) + shape.offset_rank + logits;
}

inline void check_ranks(const HeadsShape& shape, int64_t logits) {
  check_size(shape.rank, kMaxRanks, "rank, of B,");
  check_size(shape.offset_rank, kMaxRanks, "offset_rank, the rows of A0,");
  check_size(ranks_of(shape, logits), kMaxRanks, "the ranks of all heads, of A0 and of R together");
}

inline HeadsShape check_heads(const Tensor& x, const HeadsAdapters& given, int64_t site, bool may_have_A_per_head) {
  const auto& [A, B, A0, B0] = given;
  HeadsShape shape = {};
  shape.tokens = tokens_of(x);
  shape.in_dim = x.size(x.dim() - 1);
  ALIGN_CHECK(site >= 0 && site <= int64_t(DropoutSite::kInputPerHead), "site must be 0 .. 3, got ", site);
  shape.site = DropoutSite(site);
  ALIGN_CHECK(B.dim() == 3 && B.size(0) > 0, "B must be [heads, out_dim, rank] with one head at least, got ",
              shape_of(B));
  check_floating(A, "A");
  check_floating(B, "B");
  shape.heads = B.size(0);
  shape.out_dim = B.size(1);
  shape.rank = B.size(2);
  check_columns(shape.in_dim, shape.out_dim);
  check_size(shape.heads, kMaxCount, "heads, of B,");
  shape.A_per_head = may_have_A_per_head && A.dim() == 3;
  if (shape.A_per_head) {
    check_shape(A, {shape.heads, shape.rank, shape.in_dim}, "A");
  } else {
    check_shape(A, {shape.rank, shape.in_dim}, "A");
  }
  check_device(A, x, "A");
  check_device(B, x, "B");
  check_offset(shape, x, given);
  check_ranks(shape, /*logits=*/0);
  return shape;
}

// The inputs of both passes, contiguous, with all adapters in one dtype: that of x or float32.
struct HeadsTensors {
  HeadsShape shape;
  double scaling, offset_scaling;
  Tensor x, A, B;
  OptionalTensor A0, B0;
  Dropout dropout;

  HeadsTensors(const HeadsShape& checked, const Tensor& given_x, const HeadsAdapters& given, ScalarType adapters,
               double s, double offset_s, double p, const OptionalTensor& rng)
      : shape(checked),
        scaling(s),
        offset_scaling(offset_s),
        x(as_contiguous(given_x)),
        A(contiguous_as(given.A, adapters)),
        B(contiguous_as(given.B, adapters)),
        A0(contiguous_as(given.A0, adapters)),
        B0(contiguous_as(given.B0, adapters)),
        dropout(p, rng, given_x) {}

  template <typename T, typename TA = T>
  HeadsInputs<T, TA> inputs() const {
    return {.shape = shape,
            .dropout = dropout.view,
            .scaling = scaling,
            .offset_scaling = offset_scaling,
            .x = data<T>(x),
            .A = data<TA>(A),
            .B = data<TA>(B),
            .A0 = data<TA>(A0),
            .B0 = data<TA>(B0)};
  }
};

// The outputs y, with the base's output and the bias, and z.
struct HeadsOutputs {
  BaseProduct y;
  Tensor z;
  OptionalTensor bias;

  HeadsOutputs(const HeadsTensors& in, const OptionalTensor& weight, const OptionalTensor& given_bias,
               const OptionalTensor& base_out, bool product_last)
      : y(output_of(in.x, in.shape, weight, given_bias, base_out, product_last)),
        z(make_empty(in.x, latent_sizes(in.shape), acc_type(in.x))) {
    if (given_bias) bias = as_contiguous(*given_bias);
  }

  template <typename T, typename TA = T>
  HeadsForwardArgs<T, TA> args(const HeadsTensors& in, void* workspace) {
    return {.inputs = in.inputs<T, TA>(),
            .y_in = data<T>(y.in),
            .bias = data<T>(bias),
            .z = mutable_data<Acc<T>>(z),
            .y = mutable_data<T>(y.out),
            .workspace = workspace};
  }
};

// The gradients but dx, and the tensors from which they are computed.
struct HeadsGradients {
  Tensor dy, z, dA, dB;
  OptionalTensor dz;

  HeadsGradients(const HeadsTensors& in, const HeadsAdapters& adapters, const Tensor& given_dy,
                 const OptionalTensor& given_dz, const Tensor& given_z, const OptionalTensor& weight)
      : dy(checked(in, given_dy, given_dz, given_z, weight)),
        z(contiguous_as(given_z, acc_type(in.x))),
        dA(like_adapter(adapters.A, in.x)),
        dB(like_adapter(adapters.B, in.x)),
        dz(contiguous_as(given_dz, acc_type(in.x))) {}

  template <typename T, typename TA = T>
  HeadsBackwardArgs<T, TA> args(const HeadsTensors& in, BaseProduct& dx, bool need_dx, void* workspace) {
    return {.inputs = in.inputs<T, TA>(),
            .z = data<Acc<T>>(z),
            .dx_in = data<T>(dx.in),
            .dy = data<T>(dy),
            .dz_in = data<Acc<T>>(dz),
            .dx = need_dx ? mutable_data<T>(dx.out) : nullptr,
            .dA = mutable_data<Acc<T>>(dA),
            .dB = mutable_data<Acc<T>>(dB),
            .workspace = workspace};
  }

 private:
  // Returns dy in the dtype of x, contiguous.
  static Tensor checked(const HeadsTensors& in, const Tensor& given_dy, const OptionalTensor& given_dz,
                        const Tensor& given_z, const OptionalTensor& weight) {
    check_gradients(in.shape, in.x, given_dy, given_dz, given_z, weight);
    return contiguous_as(given_dy, in.x.scalar_type());
  }
};

}  // namespace align
