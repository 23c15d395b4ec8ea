// Heads with a router: heads.cuh.
#include "ops/routed_lora.h"

#include "cuda/heads.cuh"

namespace align::cuda {
template <typename T, typename TA>
int64_t routed_lora_forward_workspace(const HeadsInputs<T, TA>& inputs, const TA* R, const Routing& routing) {
  return HeadsLaunch<T, TA>(inputs, Router<TA>{R, routing}).forward_floats() * int64_t(sizeof(float));
}

template <typename T, typename TA>
int64_t routed_lora_backward_workspace(const HeadsInputs<T, TA>& inputs, const TA* R, const Routing& routing) {
  return HeadsLaunch<T, TA>(inputs, Router<TA>{R, routing}).backward_floats() * int64_t(sizeof(float));
}

template <typename T, typename TA>
void routed_lora_forward(const RoutedLoraForwardArgs<T, TA>& args, Stream stream) {
  heads_forward(args.projection, Router<TA>{args.R, args.routing}, args.w, stream);
}

template <typename T, typename TA>
void routed_lora_backward(const RoutedLoraBackwardArgs<T, TA>& args, Stream stream) {
  heads_backward(args.projection, Router<TA>{args.R, args.routing}, {args.w, args.dw_in, args.dR}, stream);
}

#define ALIGN_INSTANTIATE(T, TA)                                                                         \
  template int64_t routed_lora_forward_workspace(const HeadsInputs<T, TA>&, const TA*, const Routing&);  \
  template int64_t routed_lora_backward_workspace(const HeadsInputs<T, TA>&, const TA*, const Routing&); \
  template void routed_lora_forward<T, TA>(const RoutedLoraForwardArgs<T, TA>&, Stream);                 \
  template void routed_lora_backward<T, TA>(const RoutedLoraBackwardArgs<T, TA>&, Stream);
ALIGN_FOR_CUDA_TYPES_AND_ADAPTERS(ALIGN_INSTANTIATE)

}  // namespace align::cuda
