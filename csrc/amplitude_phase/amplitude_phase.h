// The spectral step of the amplitude / phase convolution, the same on every device: what happens between
// the transform of x and the inverse transform to y.
//
//   A = |X|, u = X/|X|, P = angle(X), M = conv1×1 → LeakyReLU → conv1×1 over channels
//   amplitude: Y = M(A)·u          phase: Y = A·exp(i·M(P))
//
// Spectra are unnormalised half spectra of real images, [B, C, H, W/2 + 1] pairs of real and imaginary
// part, contiguous. X has +0 for the imaginary part of the bins that are real for every real image; an
// amplitude below 1e-30 (float64: 1e-290) counts as A = 0 with u = 1 and P = 0.
//
// With G the gradient of Y (∂L/∂Re + i·∂L/∂Im), v = exp(i·M(P)) and Mᵀ the adjoint of M:
//   amplitude: g_a = Mᵀ(Re(ūG)),  g_θ = M(A)·Im(ūG)        phase: g_a = Re(v̄G),  g_θ = Mᵀ(A·Im(v̄G))
//   ∂X = u·(g_a + i·g_θ/A),  0 where A = 0
// An output_weight over [X, Y] is one of X, W_s, and one of Y side by side. ∂X has W_sᵀ·c/HW·grad too then, whatever A
// is: the product takes X as it is.
#pragma once

#include <cstdint>

#include "common/tensor_view.h"

namespace mitnet_fast {

struct AmplitudePhaseShape {
  DataType dtype;  // float32 or float64
  int64_t batch;
  int64_t channels;         // C, of x and of Y
  int64_t hidden_channels;  // Ch
  int64_t out_channels;     // Co, C where there is no output_weight
  int64_t height;           // of the image
  int64_t width;
  bool phase;  // else amplitude
  double negative_slope;
  bool tf32;  // products over channels may be TF32 where the device has it
  bool skip;  // output_weight is over [X, Y], else over Y

  int64_t columns() const { return width / 2 + 1; }
  int64_t bins() const { return height * columns(); }
  int64_t output_inputs() const { return (skip ? 2 : 1) * channels; }  // columns of output_weight
};

// Contiguous.
struct SpectralMap {
  const void* weight1;        // [Ch, C]
  const void* bias1;          // [Ch]
  const void* weight2;        // [C, Ch]
  const void* bias2;          // [C]
  const void* output_weight;  // [Co, C], or [Co, 2C] with skip, or null
  const void* output_bias;    // [Co] or null; null where output_weight is
};

// y = output_weight · Y / HW, or · [X, Y] / HW, whose inverse transform is unnormalised, before its self-conjugate
// columns are made Hermitian. Its bin (0, 0), the mean of the image, has output_bias added.
struct AmplitudePhaseForward {
  AmplitudePhaseShape shape;
  SpectralMap map;
  const void* x;  // spectrum [B, C, H, W/2 + 1]
  void* y;        // spectrum [B, Co, H, W/2 + 1]; may be x where Co = C
};

// A gradient that is null is not computed. With c = 1 in columns 0 and W/2 and 2 elsewhere, G is
// c/HW · output_weightᵀ · grad, and ∂X/c is what an unnormalised inverse transform takes to the gradient
// of x, its self-conjugate columns made Hermitian first. The gradient of output_bias is bin (0, 0) of grad.
struct AmplitudePhaseBackward {
  AmplitudePhaseShape shape;
  SpectralMap map;
  const void* grad;  // spectrum [B, Co, H, W/2 + 1] of the gradient of y
  const void* x;     // spectrum [B, C, H, W/2 + 1]
  void* grad_x;      // ∂X/c; may be x
  void* grad_weight1;
  void* grad_bias1;
  void* grad_weight2;
  void* grad_bias2;
  void* grad_output_weight;
  void* grad_output_bias;
};

}  // namespace mitnet_fast
