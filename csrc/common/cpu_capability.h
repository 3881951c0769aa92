// Which vector instructions this processor and its operating system offer.
#pragma once

#include <string>

namespace mitnet_fast {

// "AVX512", "AVX2" (with FMA) or "DEFAULT", the names that PyTorch uses for its own kernels.
std::string cpu_capability();

}  // namespace mitnet_fast
