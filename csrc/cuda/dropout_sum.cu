// Heads without a router: heads.cuh.
#include "ops/dropout_sum.h"

#include "cuda/heads.cuh"

namespace align::cuda {
namespace {

template <typename TA>
constexpr Router<TA> kNoRouter = {nullptr, {0, 0, 1}};

}  // namespace

template <typename T, typename TA>
int64_t dropout_sum_forward_workspace(const HeadsInputs<T, TA>& inputs) {
  return HeadsLaunch<T, TA>(inputs, kNoRouter<TA>).forward_floats() * int64_t(sizeof(float));
}

template <typename T, typename TA>
int64_t dropout_sum_backward_workspace(const HeadsInputs<T, TA>& inputs) {
  return HeadsLaunch<T, TA>(inputs, kNoRouter<TA>).backward_floats() * int64_t(sizeof(float));
}

template <typename T, typename TA>
void dropout_sum_forward(const DropoutSumForwardArgs<T, TA>& args, Stream stream) {
  heads_forward(args, kNoRouter<TA>, nullptr, stream);
}

template <typename T, typename TA>
void dropout_sum_backward(const DropoutSumBackwardArgs<T, TA>& args, Stream stream) {
  heads_backward(args, kNoRouter<TA>, {}, stream);
}

#define ALIGN_INSTANTIATE(T, TA)                                                         \
  template int64_t dropout_sum_forward_workspace(const HeadsInputs<T, TA>&);             \
  template int64_t dropout_sum_backward_workspace(const HeadsInputs<T, TA>&);            \
  template void dropout_sum_forward<T, TA>(const DropoutSumForwardArgs<T, TA>&, Stream); \
  template void dropout_sum_backward<T, TA>(const DropoutSumBackwardArgs<T, TA>&, Stream);
ALIGN_FOR_CUDA_TYPES_AND_ADAPTERS(ALIGN_INSTANTIATE)

}  // namespace align::cuda
