#include "amplitude_phase/amplitude_phase_cpu.h"

#include "common/kernels_of_capability.h"

namespace mitnet_fast {

DEFINE_CPU_KERNELS(AmplitudePhaseCpuKernels, amplitude_phase)

namespace {

template <typename T>
struct Complex {
  T real;
  T imaginary;
};

// Calls function(the plane's bins in one self-conjugate column) for all of those columns. Rows are columns() apart.
template <typename T, typename Function>
void for_each_self_conjugate_column(const AmplitudePhaseShape& shape, void* spectrum, int64_t planes,
                                    Function function) {
  for (int64_t plane = 0; plane < planes; ++plane) {
    Complex<T>* bins = static_cast<Complex<T>*>(spectrum) + plane * shape.bins();
    function(bins);
    if (shape.width % 2 == 0) function(bins + shape.width / 2);
  }
}

template <typename T>
void clear(const AmplitudePhaseShape& shape, void* spectrum, int64_t planes) {
  for_each_self_conjugate_column<T>(shape, spectrum, planes, [&](Complex<T>* column) {
    column[0].imaginary = 0;
    if (shape.height % 2 == 0) column[shape.height / 2 * shape.columns()].imaginary = 0;
  });
}

template <typename T>
void mirror(const AmplitudePhaseShape& shape, void* spectrum, int64_t planes) {
  for_each_self_conjugate_column<T>(shape, spectrum, planes, [&](Complex<T>* column) {
    for (int64_t row = 0; row <= shape.height / 2; ++row) {
      Complex<T>& bin = column[row * shape.columns()];
      Complex<T>& mirrored = column[(shape.height - row) % shape.height * shape.columns()];
      const T real = T(0.5) * (bin.real + mirrored.real);
      const T imaginary = T(0.5) * (bin.imaginary - mirrored.imaginary);
      mirrored = {real, -imaginary};
      bin = {real, imaginary};
    }
  });
}

}  // namespace

void clear_real_bins(const AmplitudePhaseShape& shape, void* spectrum, int64_t planes) {
  shape.dtype == DataType::float64 ? clear<double>(shape, spectrum, planes) : clear<float>(shape, spectrum, planes);
}

void make_hermitian(const AmplitudePhaseShape& shape, void* spectrum, int64_t planes) {
  shape.dtype == DataType::float64 ? mirror<double>(shape, spectrum, planes) : mirror<float>(shape, spectrum, planes);
}

}  // namespace mitnet_fast
