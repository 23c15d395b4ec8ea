// Kernel launch and block-wide sums. The only file that knows which compiler is at work: nvcc gets the real <<<>>>, a
// host compiler gets the SIMT engine of cpp_tests/simt.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#include <stdexcept>
#else
#include "simt.h"
#endif

namespace align::cuda {

constexpr int kWarp = 32;

#ifdef __CUDACC__
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, Args... args) {
  kernel<<<grid, block, 0, stream>>>(args...);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    throw std::runtime_error(cudaGetErrorString(error));
  }
}
#else
using simt::launch;
#endif

// Sum over the block in an order that depends on the block's size alone; every thread receives it. All threads must
// call it, and there must be whole warps of them.
template <typename A>
__device__ A block_sum(A value) {
  __shared__ A partial[kWarp];  // one a warp
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();  // partial is complete
  A total = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += partial[warp];
  __syncthreads();  // partial may be overwritten by the next call
  return total;
}

}  // namespace align::cuda
