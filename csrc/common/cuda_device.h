// What the CUDA runtime sees, asked without PyTorch: a CPU build of PyTorch cannot.
#pragma once

#include <string>
#include <vector>

namespace mitnet_fast {

struct CudaDevice {
  std::string name;
  int major;  // compute capability
  int minor;
  int multiprocessors;
  long long memory;             // bytes
  int shared_memory_per_block;  // bytes a block may opt into
};

// Version of the runtime that the extension was linked with, 13000 for 13.0.
int cuda_runtime_version();

// All devices; empty without a driver or without a GPU.
std::vector<CudaDevice> cuda_devices();

}  // namespace mitnet_fast
