// Heads with a router: heads.cuh.
#include "ops/routed_lora.h"

#include "cuda/heads.cuh"

namespace align::cuda {
template <typename T, typename W>
int64_t routed_lora_forward_workspace(const HeadsInputs<T, W>& inputs, const W* R, const Routing& routing) {
  return HeadsLaunch<T, W>(inputs, Router<W>{R, routing}).forward_floats() * int64_t(sizeof(float));
}

template <typename T, typename W>
int64_t routed_lora_backward_workspace(const HeadsInputs<T, W>& inputs, const W* R, const Routing& routing) {
  return HeadsLaunch<T, W>(inputs, Router<W>{R, routing}).backward_floats() * int64_t(sizeof(float));
}

template <typename T, typename W>
void routed_lora_forward(const RoutedLoraForwardArgs<T, W>& args, Stream stream) {
  heads_forward(args.heads, Router<W>{args.R, args.routing}, args.w, stream);
}

template <typename T, typename W>
void routed_lora_backward(const RoutedLoraBackwardArgs<T, W>& args, Stream stream) {
  heads_backward(args.heads, Router<W>{args.R, args.routing}, {args.w, args.dw_in, args.dR}, stream);
}

#define ALIGN_INSTANTIATE(T, W)                                                                        \
  template int64_t routed_lora_forward_workspace(const HeadsInputs<T, W>&, const W*, const Routing&);  \
  template int64_t routed_lora_backward_workspace(const HeadsInputs<T, W>&, const W*, const Routing&); \
  template void routed_lora_forward<T, W>(const RoutedLoraForwardArgs<T, W>&, Stream);                 \
  template void routed_lora_backward<T, W>(const RoutedLoraBackwardArgs<T, W>&, Stream);
ALIGN_INSTANTIATE(float, float)
ALIGN_INSTANTIATE(bfloat16, bfloat16)
ALIGN_INSTANTIATE(bfloat16, float)
ALIGN_INSTANTIATE(float16, float16)
ALIGN_INSTANTIATE(float16, float)
#undef ALIGN_INSTANTIATE

}  // namespace align::cuda
