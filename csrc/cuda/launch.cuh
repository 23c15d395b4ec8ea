// Kernel launches, shared memory, properties of the device, and sums over a block. The only file that depends on the
// compiler: nvcc gets the real <<<>>>, a host compiler gets the SIMT engine of cpp_tests/simt.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#include <stdexcept>
#include <vector>
#else
#define ALIGN_ON_SIMT
#include "simt.h"
#endif

#include "cuda/plan.h"

namespace align::cuda {

constexpr int kWarp = 32;

#ifdef __CUDACC__
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Each block gets shared_bytes of dynamic shared memory. More than the default limit must be requested.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const Grid& grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Args... args) {
  constexpr size_t kDefaultLimit = 48 << 10;
  if (shared_bytes > kDefaultLimit) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  }
  kernel<<<dim3(grid.x, grid.y, grid.z), block, shared_bytes, stream>>>(args...);
  check(cudaGetLastError());
}

// The dynamic shared memory of the block.
__device__ inline void* dynamic_shared() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

inline std::vector<Device> all_devices() {
  int count = 0;
  check(cudaGetDeviceCount(&count));
  std::vector<Device> devices(count);
  for (int index = 0; index < count; ++index) {
    Device& device = devices[index];
    check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
    check(cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index));
    check(cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  }
  return devices;
}

// The device that the calling thread has chosen. Devices are asked for their properties once.
inline Device current_device() {
  static const std::vector<Device> devices = all_devices();
  int index = 0;
  check(cudaGetDevice(&index));
  return devices.at(index);
}

// Stops the program unless the condition holds, for example if an index from a tensor is out of range.
__device__ inline void require(bool condition) {
  if (!condition) __trap();
}
#else
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const Grid& grid, dim3 block, size_t shared_bytes, cudaStream_t, Args... args) {
  simt::launch_shared(kernel, dim3(grid.x, grid.y, grid.z), block, shared_bytes, args...);
}
using simt::dynamic_shared;
inline Device current_device() {
  const simt::Options& device = simt::options();
  return {device.multiprocessors, device.major, device.shared_bytes};
}
inline void require(bool condition) { simt::require(condition); }
#endif

// The sum over the block, in an order that depends only on the size of the block. Every thread gets it. All threads
// must call it, and the block must consist of whole warps.
template <typename A>
__device__ A block_sum(A value) {
  __shared__ A partial[kWarp];  // one for each warp
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();  // partial is complete
  A total = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += partial[warp];
  __syncthreads();  // partial may be overwritten by the next call
  return total;
}

}  // namespace align::cuda
