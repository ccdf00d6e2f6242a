#include <cuda_runtime.h>

#include "device_info.h"

namespace segclip {

DeviceInfo device_info() {
  DeviceInfo info;
  cudaRuntimeGetVersion(&info.runtime_version);
  if (cudaDriverGetVersion(&info.driver_version) != cudaSuccess) info.driver_version = 0;
  if (info.driver_version == 0) {
    info.reason = "no CUDA driver found";
    return info;
  }
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    info.reason = status == cudaSuccess ? "no CUDA device found" : cudaGetErrorString(status);
    cudaGetLastError();  // clear it: the caller's own CUDA calls must not see it
    return info;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) == cudaSuccess) info.names.emplace_back(properties.name);
  }
  return info;
}

}  // namespace segclip
