// csrc/common/ptx.cuh on a CPU: the same functions, documented there, in the place of the assembly.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace mitnet_fast {
namespace emulated {

// Registers of one lane in a matrix product.
struct Operands {
  uint32_t a[4];
  uint32_t b[2];
  float c[4];
};

struct Result {
  float d[4];
};

// Tensor cores cut off what does not fit, they do not round to nearest.
inline float toward_zero(double value) {
  const auto rounded = static_cast<float>(value);
  return std::isfinite(rounded) && std::fabs(static_cast<double>(rounded)) > std::fabs(value)
             ? std::nextafter(rounded, 0.0f)
             : rounded;
}

// Where element k of a row of A (or column of B) lies: the lane's t, and its registers, `step` apart.
struct Tf32 {
  static constexpr int depth = 8;
  static double element(const uint32_t* registers, int k, int step) {
    return __uint_as_float(registers[k / 4 * step] & 0xffffe000);  // what the hardware reads of a register
  }
  static int lane(int k) { return k % 4; }
};

template <typename Half>
struct Half16 {
  static constexpr int depth = 16;
  static double element(const uint32_t* registers, int k, int step) {
    Half half;
    half.bits = static_cast<uint16_t>(registers[k / 8 * step] >> 16 * (k % 2));
    return static_cast<float>(half);
  }
  static int lane(int k) { return k % 8 / 2; }
};

template <typename Format>
void multiply(const Operands* const* inputs, Result* const* outputs) {
  double a[16][Format::depth], b[8][Format::depth];
  for (int k = 0; k < Format::depth; ++k) {
    for (int row = 0; row < 16; ++row) {
      a[row][k] = Format::element(inputs[row % 8 * 4 + Format::lane(k)]->a + row / 8, k, 2);
    }
    for (int column = 0; column < 8; ++column) {
      b[column][k] = Format::element(inputs[column * 4 + Format::lane(k)]->b, k, 1);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = inputs[lane]->c[i];
      for (int k = 0; k < Format::depth; ++k) sum += a[row][k] * b[column][k];
      outputs[lane]->d[i] = toward_zero(sum);
    }
  }
}

template <typename Format>
void mma(const char* instruction, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
         const char* file, int line) {
  Operands operands;
  std::memcpy(operands.a, a, sizeof a);
  std::memcpy(operands.b, b, sizeof b);
  std::memcpy(operands.c, c, sizeof c);
  const Result result = cuda_on_host::in_warp<Operands, Result>(
      instruction, 0xffffffff, operands, {file, line},
      [](const Operands* const* inputs, Result* const* outputs) { multiply<Format>(inputs, outputs); });
  std::memcpy(d, result.d, sizeof d);
}

struct Matrices {
  uint32_t registers[4];
};

template <bool transposed>
void load(uint32_t (&matrices)[4], const void* shared_row, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16) {
    cuda_on_host::current->block->fail("ldmatrix: the address of a row is no multiple of 16");
  }
  const Matrices result = cuda_on_host::in_warp<const void*, Matrices>(
      "ldmatrix", 0xffffffff, shared_row, {file, line}, [](const void* const* const* rows, Matrices* const* outputs) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            uint16_t pair[2];
            for (int j = 0; j < 2; ++j) {
              const int row = transposed ? lane % 4 * 2 + j : lane / 4;
              const int column = transposed ? lane / 4 : lane % 4 * 2 + j;
              pair[j] = static_cast<const uint16_t*>(*rows[8 * i + row])[column];
            }
            outputs[lane]->registers[i] = pair[0] | uint32_t{pair[1]} << 16;
          }
        }
      });
  std::memcpy(matrices, result.registers, sizeof matrices);
}

}  // namespace emulated

inline uint32_t round_to_tf32(float value) {
  const uint32_t word = __float_as_uint(value);
  return std::isfinite(value) ? (word + 0x1000) & 0xffffe000 : value != value ? 0x7fffe000 : word;
}

inline float exp2_approximate(float value) {
  const float result = std::exp2(value);
  return result < 0x1p-126f ? 0.0f : result;
}

inline int computed_anew(int value) { return value; }

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                             const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulated::mma<emulated::Tf32>("mma_m16n8k8_tf32", d, a, b, c, file, line);
}

template <typename Half>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulated::mma<emulated::Half16<Half>>("mma_m16n8k16", d, a, b, c, file, line);
}

inline void load_matrices(uint32_t (&matrices)[4], const void* shared_row, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  emulated::load<false>(matrices, shared_row, file, line);
}

inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* shared_row,
                                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulated::load<true>(matrices, shared_row, file, line);
}

// Nothing arrives before it is waited for: until then there is NaN.
template <int bytes>
void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  if (reinterpret_cast<uintptr_t>(shared) % bytes || (valid && reinterpret_cast<uintptr_t>(global) % bytes)) {
    cuda_on_host::current->block->fail("cp.async: an address is no multiple of the size");
  }
  std::memset(shared, 0xff, bytes);
  cuda_on_host::current->copies.push_back({shared, valid ? global : nullptr, bytes});
}

inline void commit_copies() { cuda_on_host::current->copy_groups.push_back(cuda_on_host::current->copies.size()); }

template <int pending>
void wait_for_copies() {
  cuda_on_host::current->finish_copies(pending);
}

}  // namespace mitnet_fast
