// The only file that knows Python: what mitnet_fast._C offers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_capability.h"
#ifdef MITNET_FAST_WITH_CUDA
#include "common/cuda_device.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["torch"] = MITNET_FAST_TORCH_VERSION;
#ifdef MITNET_FAST_WITH_CUDA
  info["cuda"] = MITNET_FAST_CUDA_VERSION;
  info["cuda_architectures"] = MITNET_FAST_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
#endif
#ifdef NDEBUG
  info["debug"] = false;
#else
  info["debug"] = true;
#endif
  return info;
}

py::list cuda_devices() {
  py::list devices;
#ifdef MITNET_FAST_WITH_CUDA
  for (const auto& device : mitnet_fast::cuda_devices()) {
    py::dict entry;
    entry["name"] = device.name;
    entry["compute_capability"] = py::make_tuple(device.major, device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["memory"] = device.memory;
    entry["shared_memory_per_block"] = device.shared_memory_per_block;
    devices.append(entry);
  }
#endif
  return devices;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled half of mitnet_fast";
  module.def(
      "build_info", &build_info,
      "Compiler, torch and CUDA versions of this build, its CUDA architectures, and whether it is a debug build");
  module.def("cpu_capability", &mitnet_fast::cpu_capability,
             "Widest vector instructions of this processor: 'AVX512', 'AVX2' or 'DEFAULT'");
  module.def("cuda_devices", &cuda_devices,
             "Every CUDA device as the CUDA runtime describes it; empty in a CPU build or without a GPU");
}
