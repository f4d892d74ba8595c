// The gated recurrence on CPUs, forward and backward: see reference.py for the maths and _extension.py for the build.
//
// There are two operations to three numbers from memory, so what matters is to walk memory well. A task is a stretch of
// one sequence's columns; it goes along time, and its state (or the gradient of it) stays in the first cache.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#ifdef __AVX__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Columns of a task: narrow enough that both halves of the released models' 1024 columns have a thread. What the hardware
// does not see coming in so short rows is asked for some rows ahead, into the second cache: rows that are a page apart
// would push each other out of the first.
constexpr int64_t kColumns = 512;
constexpr int64_t kAhead = 4;
constexpr int64_t kMany = 4 << 20;  // bytes, of which with the inputs few caches hold three times as much

template <typename T>
inline void prefetch(const T* row, int64_t columns) {
  for (int64_t d = 0; d < columns; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d, 0, 2);
}

// A row of states to memory: past the caches if told to, for which it must be aligned. To write into a line that is in no
// cache, it would be read first; of three numbers that come and go, a fourth of the way.
template <typename T>
inline void store(T* __restrict out, const T* __restrict state, int64_t columns, bool past_caches) {
  int64_t d = 0;
#ifdef __AVX__
  if (past_caches) {
    constexpr int64_t kStep = 32 / int64_t(sizeof(T));
    for (; d + kStep <= columns; d += kStep)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + d),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(state + d)));
  }
#endif
  for (; d < columns; ++d) out[d] = state[d];
}

// Whether states are better written past the caches: they are many, and every row is aligned.
template <typename T>
bool past_caches(const T* states, int64_t numbers, int64_t width) {
  return numbers * int64_t(sizeof(T)) >= kMany && reinterpret_cast<uintptr_t>(states) % 32 == 0 &&
         width * int64_t(sizeof(T)) % 32 == 0;
}

// Calls task(sequence, first column, columns) for stretches of columns of each sequence, on all threads.
template <typename Task>
void for_columns(int64_t batches, int64_t width, const Task& task) {
  const int64_t tasks = (width + kColumns - 1) / kColumns;
  at::parallel_for(0, batches * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % tasks * kColumns;
      task(i / tasks, first, std::min(kColumns, width - first));
    }
  });
}

template <typename T>
void forward(const T* f, const T* v, const T* start, T* states, int64_t batches, int64_t length, int64_t width) {
  const bool past = past_caches(states, batches * length * width, width);
  for_columns(batches, width, [&](int64_t b, int64_t first, int64_t columns) {
    alignas(64) T state[kColumns];
    for (int64_t d = 0; d < columns; ++d) state[d] = start ? start[b * width + first + d] : T(0);
    for (int64_t t = 0; t < length; ++t) {
      const int64_t row = (b * length + t) * width + first;
      const T *__restrict f_t = f + row, *__restrict v_t = v + row;
      if (t + kAhead < length) {
        prefetch(f_t + kAhead * width, columns);
        prefetch(v_t + kAhead * width, columns);
      }
      for (int64_t d = 0; d < columns; ++d) state[d] = f_t[d] * state[d] + v_t[d];
      store(states + row, state, columns, past);
    }
#ifdef __AVX__
    _mm_sfence();
#endif
  });
}

template <typename T>
void backward(const T* grad, const T* f, const T* states, const T* start, T* grad_f, T* grad_v, int64_t batches,
              int64_t length, int64_t width) {
  const int64_t numbers = batches * length * width;
  const bool past = past_caches(grad_f, numbers, width) && past_caches(grad_v, numbers, width);
  for_columns(batches, width, [&](int64_t b, int64_t first, int64_t columns) {
    T carry[kColumns] = {};  // f[t+1] g[t+1]
    alignas(64) T g[kColumns], g_before[kColumns];
    for (int64_t t = length - 1; t >= 0; --t) {
      const int64_t row = (b * length + t) * width + first;
      const T *__restrict grad_t = grad + row, *__restrict f_t = f + row;
      const T* __restrict before = t > 0 ? states + row - width : start ? start + b * width + first : nullptr;
      if (t > kAhead) {
        prefetch(grad_t - kAhead * width, columns);
        prefetch(f_t - kAhead * width, columns);
        prefetch(before - kAhead * width, columns);
      }
      for (int64_t d = 0; d < columns; ++d) g[d] = grad_t[d] + carry[d];
      for (int64_t d = 0; d < columns; ++d) carry[d] = f_t[d] * g[d];
      if (before) {
        for (int64_t d = 0; d < columns; ++d) g_before[d] = g[d] * before[d];
      } else {
        std::fill_n(g_before, columns, T(0));
      }
      store(grad_v + row, g, columns, past);
      store(grad_f + row, g_before, columns, past);
    }
#ifdef __AVX__
    _mm_sfence();
#endif
  });
}

template <typename T>
const T* data(const OptionalTensor& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

// All tensors are contiguous: [B, T, D], and [B, D] for the initial state.
Tensor hgrn_scan_forward(const Tensor& f, const Tensor& v, const OptionalTensor& start) {
  Tensor states = at::empty_like(v);
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "hgrn_scan_forward", [&] {
    forward<scalar_t>(f.const_data_ptr<scalar_t>(), v.const_data_ptr<scalar_t>(), data<scalar_t>(start),
                      states.data_ptr<scalar_t>(), v.size(0), v.size(1), v.size(2));
  });
  return states;
}

std::tuple<Tensor, Tensor> hgrn_scan_backward(const Tensor& grad, const Tensor& f, const Tensor& states,
                                              const OptionalTensor& start) {
  Tensor grad_f = at::empty_like(f), grad_v = at::empty_like(f);
  AT_DISPATCH_FLOATING_TYPES(f.scalar_type(), "hgrn_scan_backward", [&] {
    backward<scalar_t>(grad.const_data_ptr<scalar_t>(), f.const_data_ptr<scalar_t>(), states.const_data_ptr<scalar_t>(),
                       data<scalar_t>(start), grad_f.data_ptr<scalar_t>(), grad_v.data_ptr<scalar_t>(), f.size(0),
                       f.size(1), f.size(2));
  });
  return {grad_f, grad_v};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zoo_cpu, library) {
  library.def("hgrn_scan_forward(Tensor f, Tensor v, Tensor? initial_state) -> Tensor", &hgrn_scan_forward);
  library.def(
      "hgrn_scan_backward(Tensor grad, Tensor f, Tensor states, Tensor? initial_state) -> (Tensor, Tensor)",
      &hgrn_scan_backward);
}
