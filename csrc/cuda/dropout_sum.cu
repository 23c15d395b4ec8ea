// Heads without a router: heads.cuh.
#include "ops/dropout_sum.h"

#include "cuda/heads.cuh"

namespace align::cuda {
namespace {

template <typename W>
constexpr Router<W> kNoRouter = {nullptr, {0, 0, 1}};

}  // namespace

template <typename T, typename W>
int64_t dropout_sum_forward_workspace(const HeadsInputs<T, W>& inputs) {
  return HeadsLaunch<T, W>(inputs, kNoRouter<W>).forward_floats() * int64_t(sizeof(float));
}

template <typename T, typename W>
int64_t dropout_sum_backward_workspace(const HeadsInputs<T, W>& inputs) {
  return HeadsLaunch<T, W>(inputs, kNoRouter<W>).backward_floats() * int64_t(sizeof(float));
}

template <typename T, typename W>
void dropout_sum_forward(const DropoutSumForwardArgs<T, W>& args, Stream stream) {
  heads_forward(args, kNoRouter<W>, nullptr, stream);
}

template <typename T, typename W>
void dropout_sum_backward(const DropoutSumBackwardArgs<T, W>& args, Stream stream) {
  heads_backward(args, kNoRouter<W>, {}, stream);
}

#define ALIGN_INSTANTIATE(T, W)                                                        \
  template int64_t dropout_sum_forward_workspace(const HeadsInputs<T, W>&);            \
  template int64_t dropout_sum_backward_workspace(const HeadsInputs<T, W>&);           \
  template void dropout_sum_forward<T, W>(const DropoutSumForwardArgs<T, W>&, Stream); \
  template void dropout_sum_backward<T, W>(const DropoutSumBackwardArgs<T, W>&, Stream);
ALIGN_INSTANTIATE(float, float)
ALIGN_INSTANTIATE(bfloat16, bfloat16)
ALIGN_INSTANTIATE(bfloat16, float)
ALIGN_INSTANTIATE(float16, float16)
ALIGN_INSTANTIATE(float16, float)
#undef ALIGN_INSTANTIATE

}  // namespace align::cuda
