// Which transforms come first on CUDA devices where both can compute an image: a library's with the spectral step
// between them, for any size, or the kernels' own.
#pragma once

namespace mitnet_fast {

constexpr int log2_side_at_least = 3, log2_side_at_most = 10;

// [log2 of the height − 3][log2 of the width − 3]. Rests on the bytes that each way moves, counted and not measured: at
// B = 8, C = 20 and 256×256 a library's 548 MB forward and 800 MB backward, the own ones 295 MB and 463 MB.
constexpr bool own_transforms_preferred[][log2_side_at_most - log2_side_at_least + 1] = {
    //  8    16     32    64    128   256   512   1024
    {true, true, true, true, true, true, true, true},  // 8
    {true, true, true, true, true, true, true, true},  // 16
    {true, true, true, true, true, true, true, true},  // 32
    {true, true, true, true, true, true, true, true},  // 64
    {true, true, true, true, true, true, true, true},  // 128
    {true, true, true, true, true, true, true, true},  // 256
    {true, true, true, true, true, true, true, true},  // 512
    {true, true, true, true, true, true, true, true},  // 1024
};

}  // namespace mitnet_fast
