// Attention of one new token in each of some rows to what a ragged cache holds: see reference.py for the maths and
// _extension.py for the build.
//
// A task is a key head of a token: its keys and values are read once, where they lie, for all query heads that share
// them. Nothing depends on which other tokens are there, so that a sequence's result is the same in any batch.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using at::Tensor;

template <typename T>
T dot(const T* __restrict a, const T* __restrict b, int64_t width) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) sum += a[d] * b[d];
  return sum;
}

// scores [queries, count] become weights; the sum of each query's is divided out at the end.
template <typename T>
void attend(const T* q, const T* keys, const T* values, int64_t key_step, int64_t value_step, T* scores, T* out,
            int64_t queries, int64_t count, int64_t width) {
  const T scale = T(1) / std::sqrt(T(width));
  for (int64_t t = 0; t < count; ++t) {
    const T* key = keys + t * key_step;
    for (int64_t h = 0; h < queries; ++h) scores[h * count + t] = scale * dot(q + h * width, key, width);
  }
  std::fill(out, out + queries * width, T(0));
  for (int64_t h = 0; h < queries; ++h) {
    T* row = scores + h * count;
    const T highest = *std::max_element(row, row + count);
    T sum = 0;
    for (int64_t t = 0; t < count; ++t) sum += row[t] = std::exp(row[t] - highest);
    const T share = T(1) / sum;
    for (int64_t t = 0; t < count; ++t) row[t] *= share;
  }
  for (int64_t t = 0; t < count; ++t) {
    const T* __restrict value = values + t * value_step;
    for (int64_t h = 0; h < queries; ++h) {
      const T weight = scores[h * count + t];
      T* __restrict sum = out + h * width;
      for (int64_t d = 0; d < width; ++d) sum[d] += weight * value[d];
    }
  }
}

// q [N, H, K], rows [N] and counts [N] are contiguous; keys and values [B, Hkv, capacity, K] only along K.
Tensor attend_rows(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& rows, const Tensor& counts) {
  TORCH_CHECK(keys.stride(3) == 1 && values.stride(3) == 1, "keys and values have to be contiguous along their width");
  Tensor out = at::empty_like(q);
  const int64_t heads = keys.size(1), queries = q.size(1) / heads, width = q.size(2);
  const int64_t *row = rows.const_data_ptr<int64_t>(), *count = counts.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "attend_rows", [&] {
    const auto *from = q.const_data_ptr<scalar_t>(), *k = keys.const_data_ptr<scalar_t>();
    const auto* v = values.const_data_ptr<scalar_t>();
    auto* to = out.data_ptr<scalar_t>();
    at::parallel_for(0, q.size(0) * heads, 4, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> scores;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = task / heads, head = task % heads, place = task * queries * width;
        TORCH_CHECK(row[i] >= 0 && row[i] < keys.size(0) && count[i] > 0 && count[i] <= keys.size(2),
                    "row ", row[i], " with ", count[i], " tokens is not in the cache");
        scores.resize(std::max<size_t>(scores.size(), queries * count[i]));
        attend<scalar_t>(from + place, k + row[i] * keys.stride(0) + head * keys.stride(1),
                         v + row[i] * values.stride(0) + head * values.stride(1), keys.stride(2), values.stride(2),
                         scores.data(), to + place, queries, count[i], width);
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zoo_cpu, library) {
  library.def("attend_rows(Tensor q, Tensor keys, Tensor values, Tensor rows, Tensor counts) -> Tensor", &attend_rows);
}
