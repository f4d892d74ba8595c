// BitLinear on CPUs: the norm and int8 quantisation of activations, and their product with packed ternary weights.
//
// Four weights a byte, codes 0, 1 and 2 for -1, 0 and 1, as packing.py lays them out: byte k of packed row r holds the
// codes of the matrix's rows r, r + R, r + 2R and r + 3R at column k, lowest bits first. So one load of packed bytes
// gives four vectors of weights by masks and one shift, and all four meet the same vector of activations. The unsigned
// operand of the processor's 8-bit dot products are the codes, the signed one the activations; the sum of the
// activations, which is subtracted at the end, turns codes into weights. Codes are not all shifted down: sums that are a
// multiple of what they should be are shifted when they are complete. Everything is exact in int32, up to 2^17 columns.
//
// For a batch, a block of packed rows that fits the second cache meets all tokens, a few at a time, before the next one.

// What torch's vectors are compiled for; without Sleef, which their functions come from, for nothing in particular.
#if __has_include(<sleef.h>)
#if defined(__AVX512F__)
#define CPU_CAPABILITY_AVX512
#elif defined(__AVX2__)
#define CPU_CAPABILITY_AVX2
#endif
#endif

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__x86_64__) && !defined(ZOO_PORTABLE)
#define ZOO_X86 1
#include <immintrin.h>
#if __GNUC__ >= 11 || __clang_major__ >= 12
#define ZOO_AVX_VNNI 1
#endif
#endif

namespace {

using at::Tensor;

constexpr int64_t kAlign = 64;             // activations of a token are padded with zeros to a multiple of this
constexpr int64_t kBlockBytes = 96 * 1024;  // of packed weights that all tokens meet in turn
constexpr int kMaxTokens = 4;
constexpr int64_t kMaxInputs = 1 << 17;  // up to which sums are exact
// Bytes of packed weights that are asked of memory ahead of their use with one token, when nothing else covers the wait:
// the processor itself looks no further than the page's end.
constexpr int64_t kAhead = 4096;

int64_t padded(int64_t columns) { return (columns + kAlign - 1) / kAlign * kAlign; }

// Sums of one packed row times some tokens, into [kMaxTokens][4]: sums[token][i] is sum(code of row i times activation).
using RowKernel = void (*)(const uint8_t* packed, int64_t columns, const int8_t* codes, int64_t stride,
                           int32_t (*sums)[4]);

// The same of four packed rows, `apart` bytes from one to the next, and one token: sums[row][i].
using FourKernel = void (*)(const uint8_t* packed, int64_t apart, int64_t columns, const int8_t* codes, int32_t (*sums)[4]);

struct Kernels {
  const char* name;
  int tokens;                  // at most, at once
  RowKernel rows[kMaxTokens];  // for 1, 2, ... tokens
  FourKernel four = nullptr;   // where that is quicker than a row at a time
  bool streams = false;        // whether the four are read at once, each from a quarter of the rows at hand
};

template <int kTokens>
void rows_portable(const uint8_t* packed, int64_t columns, const int8_t* codes, int64_t stride, int32_t (*sums)[4]) {
  for (int token = 0; token < kTokens; ++token) {
    const int8_t* a = codes + token * stride;
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (int64_t k = 0; k < columns; ++k) {
      const int32_t w = packed[k], x = a[k];
      s0 += (w & 3) * x;
      s1 += ((w >> 2) & 3) * x;
      s2 += ((w >> 4) & 3) * x;
      s3 += (w >> 6) * x;
    }
    sums[token][0] = s0, sums[token][1] = s1, sums[token][2] = s2, sums[token][3] = s3;
  }
}

constexpr Kernels kPortable{"portable C++", 1, {rows_portable<1>}};

#if ZOO_X86

inline void prefetch(const uint8_t* bytes) { _mm_prefetch(reinterpret_cast<const char*>(bytes), _MM_HINT_T0); }

// The four sums of four vectors, those of the second and fourth divided by four.
__attribute__((target("avx2"))) inline void store_sums(__m256i s0, __m256i s1, __m256i s2, __m256i s3, int32_t* sums) {
  const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(s0, s1), _mm256_hadd_epi32(s2, s3));
  const __m128i total = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), _mm_srav_epi32(total, _mm_setr_epi32(0, 2, 0, 2)));
}

// Pairs of products add up in int16. One pair is at least 2 * 8 * -128, so that 16 of them just fit.
constexpr int64_t kPairs = 16;

template <int kTokens>
__attribute__((target("avx2"))) void rows_avx2(const uint8_t* packed, int64_t columns, const int8_t* codes,
                                               int64_t stride, int32_t (*sums)[4]) {
  const __m256i low = _mm256_set1_epi8(0x03), high = _mm256_set1_epi8(0x0c), ones = _mm256_set1_epi16(1);
  __m256i total[kTokens][4];
  for (int token = 0; token < kTokens; ++token)
    for (int i = 0; i < 4; ++i) total[token][i] = _mm256_setzero_si256();
  const int64_t blocks = columns / 32, tail = columns % 32;
  alignas(32) uint8_t rest[32] = {};
  if (tail) std::memcpy(rest, packed + blocks * 32, tail);
  for (int64_t first = 0; first < blocks + (tail != 0); first += kPairs) {
    __m256i sum[kTokens][4];
    for (int token = 0; token < kTokens; ++token)
      for (int i = 0; i < 4; ++i) sum[token][i] = _mm256_setzero_si256();
    const auto add = [&](const uint8_t* bytes, int64_t block) __attribute__((target("avx2"), always_inline)) {
      if (kTokens == 1) prefetch(packed + block * 32 + kAhead);
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
      const __m256i v = _mm256_srli_epi16(w, 4);
      const __m256i c[4] = {_mm256_and_si256(w, low), _mm256_and_si256(w, high), _mm256_and_si256(v, low),
                            _mm256_and_si256(v, high)};
      for (int token = 0; token < kTokens; ++token) {
        const __m256i a = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + token * stride + block * 32));
        for (int i = 0; i < 4; ++i) sum[token][i] = _mm256_add_epi16(sum[token][i], _mm256_maddubs_epi16(c[i], a));
      }
    };
    const int64_t last = std::min(first + kPairs, blocks);
    for (int64_t block = first; block < last; ++block) add(packed + block * 32, block);
    if (tail && first + kPairs > blocks) add(rest, blocks);
    for (int token = 0; token < kTokens; ++token)
      for (int i = 0; i < 4; ++i)
        total[token][i] = _mm256_add_epi32(total[token][i], _mm256_madd_epi16(sum[token][i], ones));
  }
  for (int token = 0; token < kTokens; ++token)
    store_sums(total[token][0], total[token][1], total[token][2], total[token][3], sums[token]);
}

constexpr Kernels kAvx2{"AVX2", 2, {rows_avx2<1>, rows_avx2<2>}};

// The processor's own 8-bit dot products, which add four products of a code and an activation to each int32. GCC copies the
// sums at every use of the intrinsics, which takes up to a third of the time.

#if ZOO_AVX_VNNI
__attribute__((target("avx2,avxvnni"), always_inline)) inline void dot(__m256i& sums, __m256i codes, __m256i a) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(codes), "x"(a));
}

template <int kTokens>
__attribute__((target("avx2,avxvnni"))) void rows_avx_vnni(const uint8_t* packed, int64_t columns, const int8_t* codes,
                                                           int64_t stride, int32_t (*sums)[4]) {
  const __m256i low = _mm256_set1_epi8(0x03), high = _mm256_set1_epi8(0x0c);
  __m256i sum[kTokens][4];
  for (int token = 0; token < kTokens; ++token)
    for (int i = 0; i < 4; ++i) sum[token][i] = _mm256_setzero_si256();
  for (int64_t k = 0; k < columns; k += 32) {
    alignas(32) uint8_t rest[32] = {};
    const uint8_t* bytes = packed + k;
    if (columns - k < 32) bytes = static_cast<const uint8_t*>(std::memcpy(rest, bytes, columns - k));
    if (kTokens == 1) prefetch(packed + k + kAhead);
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    const __m256i v = _mm256_srli_epi16(w, 4);
    const __m256i c[4] = {_mm256_and_si256(w, low), _mm256_and_si256(w, high), _mm256_and_si256(v, low),
                          _mm256_and_si256(v, high)};
    for (int token = 0; token < kTokens; ++token) {
      const __m256i a = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + token * stride + k));
      for (int i = 0; i < 4; ++i) dot(sum[token][i], c[i], a);
    }
  }
  for (int token = 0; token < kTokens; ++token)
    store_sums(sum[token][0], sum[token][1], sum[token][2], sum[token][3], sums[token]);
}

constexpr Kernels kAvxVnni{"AVX-VNNI", 2, {rows_avx_vnni<1>, rows_avx_vnni<2>}};
#endif

#define ZOO_AVX512_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"), always_inline)) inline

ZOO_AVX512_VNNI void dot(__m512i& sums, __m512i codes, __m512i a) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(a));
}

// The sums of one packed row and one token. GCC keeps a struct in registers, but not an array.
struct Sums512 {
  __m512i s0, s1, s2, s3;

  // Nothing is shifted: the codes of the second to fourth row count 4, 16 and 64 times, and those of the fourth meet the
  // activations together with the other three, whose sums are subtracted in the end. That wraps around and comes out right.
  ZOO_AVX512_VNNI void add(__m512i w, __m512i a) {
    dot(s0, _mm512_and_si512(w, _mm512_set1_epi8(0x03)), a);
    dot(s1, _mm512_and_si512(w, _mm512_set1_epi8(0x0c)), a);
    dot(s2, _mm512_and_si512(w, _mm512_set1_epi8(0x30)), a);
    dot(s3, w, a);
  }

  // Four numbers in each of four lanes, which are what is left to add.
  ZOO_AVX512_VNNI __m512i lanes() const {
    const __m512i first = _mm512_add_epi32(_mm512_unpacklo_epi32(s0, s1), _mm512_unpackhi_epi32(s0, s1));
    const __m512i second = _mm512_add_epi32(_mm512_unpacklo_epi32(s2, s3), _mm512_unpackhi_epi32(s2, s3));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
  }
};

ZOO_AVX512_VNNI __m512i add_lanes(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// Sums of four times four, from what lanes() left of them; see Sums512::add for what is subtracted and shifted.
ZOO_AVX512_VNNI void store_sums(__m512i all, int32_t (*sums)[4]) {
  __m512i others = _mm512_maskz_mov_epi32(0x7777, all);
  others = _mm512_add_epi32(others, _mm512_shuffle_epi32(others, _MM_PERM_BADC));
  others = _mm512_add_epi32(others, _mm512_shuffle_epi32(others, _MM_PERM_CDAB));
  const __m512i shifts = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 2, 4, 6));
  _mm512_storeu_si512(sums, _mm512_srav_epi32(_mm512_mask_sub_epi32(all, 0x8888, all, others), shifts));
}

// One packed row and one token, into two sums, since a dot product takes as long as four others take to start.
ZOO_AVX512_VNNI __m512i row_avx512_vnni(const uint8_t* packed, int64_t columns, const int8_t* codes) {
  const __m512i zero = _mm512_setzero_si512();
  Sums512 even{zero, zero, zero, zero}, odd = even;
  int64_t k = 0;
  for (; k + 128 <= columns; k += 128) {
    prefetch(packed + k + kAhead), prefetch(packed + k + kAhead + 64);
    even.add(_mm512_loadu_si512(packed + k), _mm512_load_si512(codes + k));
    odd.add(_mm512_loadu_si512(packed + k + 64), _mm512_load_si512(codes + k + 64));
  }
  for (; k < columns; k += 64) {
    const __mmask64 inside = columns - k < 64 ? (uint64_t{1} << (columns - k)) - 1 : ~uint64_t{0};
    even.add(_mm512_maskz_loadu_epi8(inside, packed + k), _mm512_load_si512(codes + k));
  }
  return Sums512{_mm512_add_epi32(even.s0, odd.s0), _mm512_add_epi32(even.s1, odd.s1),
                 _mm512_add_epi32(even.s2, odd.s2), _mm512_add_epi32(even.s3, odd.s3)}
      .lanes();
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void one_avx512_vnni(
    const uint8_t* packed, int64_t columns, const int8_t* codes, int64_t, int32_t (*sums)[4]) {
  const __m512i zero = _mm512_setzero_si512();
  store_sums(add_lanes(add_lanes(row_avx512_vnni(packed, columns, codes), zero), zero), sums);
}

template <int kTokens>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void rows_avx512_vnni(
    const uint8_t* packed, int64_t columns, const int8_t* codes, int64_t stride, int32_t (*sums)[4]) {
  const __m512i zero = _mm512_setzero_si512();
  Sums512 first{zero, zero, zero, zero}, second = first, third = first, fourth = first;
  const auto add = [&](int64_t k, __mmask64 inside)
      __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"), always_inline)) {
    const __m512i w = _mm512_maskz_loadu_epi8(inside, packed + k);
    first.add(w, _mm512_load_si512(codes + k));
    second.add(w, _mm512_load_si512(codes + stride + k));
    if (kTokens > 2) third.add(w, _mm512_load_si512(codes + 2 * stride + k));
    if (kTokens > 3) fourth.add(w, _mm512_load_si512(codes + 3 * stride + k));
  };
  int64_t k = 0;
  for (; k + 64 <= columns; k += 64) add(k, ~uint64_t{0});
  if (k < columns) add(k, (uint64_t{1} << (columns - k)) - 1);
  store_sums(add_lanes(add_lanes(first.lanes(), second.lanes()), add_lanes(third.lanes(), fourth.lanes())), sums);
}

// What is left to add of a row takes a third of its time, so that four share that. Memory is read in order.
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void four_avx512_vnni(
    const uint8_t* packed, int64_t apart, int64_t columns, const int8_t* codes, int32_t (*sums)[4]) {
  __m512i row[4];
  for (int i = 0; i < 4; ++i) row[i] = row_avx512_vnni(packed + i * apart, columns, codes);
  store_sums(add_lanes(add_lanes(row[0], row[1]), add_lanes(row[2], row[3])), sums);
}

// The same, all four rows at once. Intel's processors read several streams faster than one from memory, AMD's do not.
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void four_streams_avx512_vnni(
    const uint8_t* packed, int64_t apart, int64_t columns, const int8_t* codes, int32_t (*sums)[4]) {
  const __m512i zero = _mm512_setzero_si512();
  Sums512 sums0{zero, zero, zero, zero}, sums1 = sums0, sums2 = sums0, sums3 = sums0;
  const uint8_t *row0 = packed, *row1 = row0 + apart, *row2 = row1 + apart, *row3 = row2 + apart;
  const auto add = [&](int64_t k, __mmask64 inside)
      __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"), always_inline)) {
    const __m512i a = _mm512_load_si512(codes + k);
    sums0.add(_mm512_maskz_loadu_epi8(inside, row0 + k), a);
    sums1.add(_mm512_maskz_loadu_epi8(inside, row1 + k), a);
    sums2.add(_mm512_maskz_loadu_epi8(inside, row2 + k), a);
    sums3.add(_mm512_maskz_loadu_epi8(inside, row3 + k), a);
  };
  int64_t k = 0;
  for (; k + 64 <= columns; k += 64) {
    prefetch(row0 + k + kAhead), prefetch(row1 + k + kAhead), prefetch(row2 + k + kAhead), prefetch(row3 + k + kAhead);
    add(k, ~uint64_t{0});
  }
  if (k < columns) add(k, (uint64_t{1} << (columns - k)) - 1);
  store_sums(add_lanes(add_lanes(sums0.lanes(), sums1.lanes()), add_lanes(sums2.lanes(), sums3.lanes())), sums);
}

constexpr Kernels with_four(const char* name, FourKernel four, bool streams) {
  return {name, 4, {one_avx512_vnni, rows_avx512_vnni<2>, rows_avx512_vnni<3>, rows_avx512_vnni<4>}, four, streams};
}

constexpr Kernels kAvx512Vnni = with_four("AVX-512 VNNI", four_avx512_vnni, false);
constexpr Kernels kAvx512VnniStreams = with_four("AVX-512 VNNI, four streams", four_streams_avx512_vnni, true);

#endif

// Those that this processor can run, best first.
std::vector<const Kernels*> find_kernels() {
  std::vector<const Kernels*> found;
#if ZOO_X86
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    found = {&kAvx512Vnni, &kAvx512VnniStreams};
    if (__builtin_cpu_is("intel")) std::swap(found[0], found[1]);
  }
#if ZOO_AVX_VNNI
  if (__builtin_cpu_supports("avxvnni") && __builtin_cpu_supports("avx2")) found.push_back(&kAvxVnni);
#endif
  if (__builtin_cpu_supports("avx2")) found.push_back(&kAvx2);
#endif
  found.push_back(&kPortable);
  return found;
}

const std::vector<const Kernels*>& all_kernels() {
  static const std::vector<const Kernels*> found = find_kernels();
  return found;
}

const Kernels& kernels(int64_t choice) {
  TORCH_CHECK(choice >= 0 && choice < int64_t(all_kernels().size()), "this processor has no kernels ", choice);
  return *all_kernels()[choice];
}

// Packed rows for one thread at least, of which each meets so many activations: what takes less time than waking another.
int64_t grain(int64_t activations) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(activations, 1)); }

// One token's product with packed rows; write(row, sum of code times activation) gets each element.
template <typename Write>
void multiply_rows(const Kernels& k, const uint8_t* packed, int64_t packed_rows, int64_t rows, int64_t columns,
                   const int8_t* codes, int64_t begin, int64_t end, const Write& write) {
  int32_t sums[kMaxTokens][4];
  const auto put = [&](int64_t row, const int32_t* row_sums) {
    for (int i = 0; i < 4; ++i)
      if (row + i * packed_rows < rows) write(row + i * packed_rows, row_sums[i]);
  };
  const int64_t fours = k.four ? (end - begin) / 4 : 0, rows_apart = k.streams ? fours : 1;
  for (int64_t n = 0; n < fours; ++n) {
    const int64_t first = begin + (k.streams ? n : 4 * n);
    k.four(packed + first * columns, rows_apart * columns, columns, codes, sums);
    for (int i = 0; i < 4; ++i) put(first + i * rows_apart, sums[i]);
  }
  for (int64_t row = begin + 4 * fours; row < end; ++row) {
    k.rows[0](packed + row * columns, columns, codes, 0, sums);
    put(row, sums[0]);
  }
}

// The product of `tokens` tokens (codes with their row's stride) and packed weights; write(token, row, sum of code times
// activation) gets each element.
template <typename Write>
void multiply(const Kernels& k, const uint8_t* packed, int64_t packed_rows, int64_t rows, int64_t columns,
              const int8_t* codes, int64_t stride, int64_t tokens, const Write& write) {
  const int64_t block = std::clamp<int64_t>(kBlockBytes / std::max<int64_t>(columns, 1), 4, 64);
  at::parallel_for(0, packed_rows, grain(columns * tokens), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += block) {
      const int64_t last = std::min(first + block, end);
      for (int64_t token = 0; token < tokens; token += k.tokens) {
        const int count = int(std::min<int64_t>(k.tokens, tokens - token));
        if (count == 1) {
          multiply_rows(k, packed, packed_rows, rows, columns, codes + token * stride, first, last,
                        [&](int64_t row, int32_t sum) { write(token, row, sum); });
          continue;
        }
        const RowKernel kernel = k.rows[count - 1];
        for (int64_t r = first; r < last; ++r) {
          int32_t sums[kMaxTokens][4];
          kernel(packed + r * columns, columns, codes + token * stride, stride, sums);
          for (int t = 0; t < count; ++t)
            for (int i = 0; i < 4; ++i)
              if (r + i * packed_rows < rows) write(token + t, r + i * packed_rows, sums[t][i]);
        }
      }
    }
  });
}

// Activations of tokens in int8.
struct Quantised {
  std::vector<int8_t> storage;
  int8_t* codes;            // [tokens, stride], aligned, zeros after each token's columns
  int64_t stride;
  std::vector<float> step;   // what 1 is worth
  std::vector<int32_t> sum;  // of the codes

  Quantised(int64_t tokens, int64_t columns)
      : storage(tokens * padded(columns) + kAlign), stride(padded(columns)), step(tokens), sum(tokens) {
    const auto address = reinterpret_cast<uintptr_t>(storage.data());
    codes = storage.data() + (padded(address) - address);
  }
};

constexpr int kLanes = 16;
constexpr float kJustBelowHalf = 0.49999997f;

// As reference.py, up to the order of the sum of squares. `y` has room for a token.
void quantise_token(const float* x, const float* weight, float eps, int64_t columns, float* y, int8_t* codes, float* step,
                    int32_t* sum) {
  float squares[kLanes] = {}, largest[kLanes] = {};
  int32_t bad[kLanes] = {};
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) squares[lane] += x[k + lane] * x[k + lane];
  for (int64_t k = whole; k < columns; ++k) squares[k - whole] += x[k] * x[k];
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += squares[lane];
  const float inverse = 1.0f / std::sqrt(total / float(columns) + eps);
  const auto normalise = [&](int64_t k, int lane) {
    const float value = x[k] * inverse * weight[k];
    const float size = std::fabs(value);
    y[k] = value;
    largest[lane] = size > largest[lane] ? size : largest[lane];
    bad[lane] |= size != size;
  };
  for (int64_t k = 0; k < whole; k += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) normalise(k + lane, lane);
  for (int64_t k = whole; k < columns; ++k) normalise(k, int(k - whole));
  float most = 1e-5f;
  bool is_bad = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    most = std::max(most, largest[lane]);
    is_bad |= bad[lane] != 0;
  }
  if (is_bad || std::isinf(most)) {  // NaN comes out
    std::memset(codes, 0, columns);
    *step = std::nanf("");
    *sum = 0;
    return;
  }
  const float scale = 127.0f / most;
  for (int64_t k = 0; k < columns; ++k) {
    const float scaled = y[k] * scale;
    const int32_t code = int32_t(scaled + std::copysign(kJustBelowHalf, scaled));
    codes[k] = int8_t(std::min(std::max(code, -128), 127));
  }
  int32_t codes_sum = 0;
  for (int64_t k = 0; k < columns; ++k) codes_sum += codes[k];
  *step = most / 127.0f;
  *sum = codes_sum;
}

Quantised quantise(const float* x, const float* norm_weight, int64_t tokens, int64_t columns, float eps) {
  Quantised q(tokens, columns);
  at::parallel_for(0, tokens, std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1)), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> y(new float[columns]);
    for (int64_t t = begin; t < end; ++t)
      quantise_token(x + t * columns, norm_weight, eps, columns, y.get(), q.codes + t * q.stride, &q.step[t], &q.sum[t]);
  });
  return q;
}

// A packed BitLinear and where its answers go, [tokens, rows].
struct Layer {
  const uint8_t* packed;
  int64_t packed_rows, rows;
  float unit;  // what a weight of 1 is worth
  const float* norm_weight;
  float* out;

  Layer(const Tensor& packed, const Tensor& scale, const Tensor& norm_weight, int64_t rows, float* out)
      : packed(packed.const_data_ptr<uint8_t>()), packed_rows(packed.size(0)), rows(rows),
        unit(*scale.const_data_ptr<float>()), norm_weight(norm_weight.const_data_ptr<float>()), out(out) {}
};

// BitLinears of the same token x [columns], one after the other, so that threads are woken once. Each thread quantises
// it for itself, since waiting for another to do so takes longer.
void multiply_token(const Kernels& k, at::ArrayRef<Layer> layers, const float* x, int64_t columns, float eps) {
  int64_t total = 0;
  for (const Layer& layer : layers) total += layer.packed_rows;
  at::parallel_for(0, total, grain(columns), [&](int64_t begin, int64_t end) {
    Quantised q(1, columns);
    const std::unique_ptr<float[]> y(new float[columns]);
    for (const Layer& layer : layers) {  // whose rows begin at 0 from here on
      const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, layer.packed_rows);
      begin -= layer.packed_rows, end -= layer.packed_rows;
      if (first >= last) continue;
      quantise_token(x, layer.norm_weight, eps, columns, y.get(), q.codes, &q.step[0], &q.sum[0]);
      const float step = q.step[0] * layer.unit;
      multiply_rows(k, layer.packed, layer.packed_rows, layer.rows, columns, q.codes, first, last,
                    [&](int64_t row, int32_t sum) { layer.out[row] = float(sum - q.sum[0]) * step; });
    }
  });
}

// BitLinears of the same tokens x [tokens, columns].
void multiply_tokens(const Kernels& k, at::ArrayRef<Layer> layers, const float* x, int64_t tokens, int64_t columns,
                     float eps) {
  if (tokens == 1) return multiply_token(k, layers, x, columns, eps);
  for (const Layer& layer : layers) {
    const Quantised q = quantise(x, layer.norm_weight, tokens, columns, eps);
    multiply(k, layer.packed, layer.packed_rows, layer.rows, columns, q.codes, q.stride, tokens,
             [&](int64_t token, int64_t row, int32_t sum) {
               layer.out[token * layer.rows + row] = float(sum - q.sum[token]) * (q.step[token] * layer.unit);
             });
  }
}

bool is_float(const Tensor& x) { return x.is_cpu() && x.scalar_type() == at::kFloat; }

// Whether packed is [R, columns] uint8, norm_weight [columns], and scale, what a weight of 1 is worth, one number, both
// float32.
bool fits(const Tensor& packed, const Tensor& scale, const Tensor& norm_weight, int64_t rows, int64_t columns) {
  return packed.is_cpu() && packed.scalar_type() == at::kByte && packed.dim() == 2 && packed.size(0) == (rows + 3) / 4 &&
         packed.size(1) == columns && columns <= kMaxInputs && is_float(scale) && scale.numel() == 1 &&
         is_float(norm_weight) && norm_weight.dim() == 1 && norm_weight.numel() == columns;
}

// The same, and whether x is [..., columns] float32.
bool fits(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& norm_weight, int64_t rows) {
  return is_float(x) && x.dim() > 0 && fits(packed, scale, norm_weight, rows, x.size(-1));
}

Tensor packed_bit_linear(const Tensor& x_, const Tensor& packed_, const Tensor& scale, const Tensor& norm_weight_,
                         int64_t rows, double eps, int64_t choice) {
  const Kernels& k = kernels(choice);
  TORCH_CHECK(fits(x_, packed_, scale, norm_weight_, rows), "packed_bit_linear: the tensors do not fit ", rows,
              " outputs");
  const Tensor x = x_.contiguous(), packed = packed_.contiguous(), norm_weight = norm_weight_.contiguous();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = rows;
  Tensor out = at::empty(shape, x.options());
  if (out.numel() == 0) return out;
  if (x.numel() == 0) return out.zero_();  // no inputs
  const Layer layer(packed, scale, norm_weight, rows, out.data_ptr<float>());
  const int64_t columns = packed.size(1);
  multiply_tokens(k, layer, x.const_data_ptr<float>(), x.numel() / columns, columns, float(eps));
  return out;
}

// The same, or nothing where tensors must be cast or refused, or the environment asks for an implementation: what decides
// that in Python takes longer than a third of a small product.
std::optional<Tensor> packed_bit_linear_at_once(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                                const Tensor& norm_weight, int64_t rows, double eps) {
  const char* forced = std::getenv("ZOO_BIT_LINEAR");
  if ((forced && *forced) || !fits(x, packed, scale, norm_weight, rows))
    return std::nullopt;
  return packed_bit_linear(x, packed, scale, norm_weight, rows, eps, 0);
}

// What a block computes besides its products, bit by bit as torch's operators do, since a difference in the last bit may
// give an activation another code. Not by those operators: a block's weights push their code out of the caches, after
// which each takes 5 to 20 us for what takes less than one. Whether the same comes out is found out once.

using at::vec::Vectorized;

constexpr int64_t kUndivided = 32768;  // numbers that torch's elementwise operators leave to one thread
constexpr int64_t kSumLanes = 8;       // of torch's sum on every x86 processor

// As vectorized_inner_sum in torch's SumKernel.cpp: four sums of vectors, each in levels of 16 or more, then of lanes.
float sum_as_torch(const float* x, int64_t n) {
  constexpr int kLevels = 4, kRows = 4;
  const int64_t vectors = n / kSumLanes, steps = vectors / kRows;
  int64_t log = 0;
  while ((int64_t{1} << log) < steps) ++log;
  const int64_t power = std::max<int64_t>(4, log / kLevels), step = int64_t{1} << power;
  float sums[kLevels][kRows * kSumLanes] = {};
  const auto add = [&](int64_t i) {
    for (int lane = 0; lane < kRows * kSumLanes; ++lane) sums[0][lane] += x[i * kRows * kSumLanes + lane];
  };
  int64_t i = 0;
  while (i + step <= steps) {
    for (int64_t j = 0; j < step; ++j) add(i++);
    for (int level = 1; level < kLevels; ++level) {
      for (int lane = 0; lane < kRows * kSumLanes; ++lane) {
        sums[level][lane] += sums[level - 1][lane];
        sums[level - 1][lane] = 0;
      }
      if (i & ((step - 1) << (level * power))) break;
    }
  }
  while (i < steps) add(i++);
  for (int level = 1; level < kLevels; ++level)
    for (int lane = 0; lane < kRows * kSumLanes; ++lane) sums[0][lane] += sums[level][lane];
  float* total = sums[0];
  for (int64_t v = steps * kRows; v < vectors; ++v)
    for (int lane = 0; lane < kSumLanes; ++lane) total[lane] += x[v * kSumLanes + lane];
  for (int row = 1; row < kRows; ++row)
    for (int lane = 0; lane < kSumLanes; ++lane) total[lane] += total[row * kSumLanes + lane];
  float all = 0;
  for (int64_t k = vectors * kSumLanes; k < n; ++k) all += x[k];
  for (int lane = 0; lane < kSumLanes; ++lane) all += total[lane];
  return all;
}

// Torch's elementwise operators take two vectors at a time, and what is left one by one.
template <typename Vector, typename One>
void map_as_torch(float* x, int64_t n, const Vector& vector, const One& one) {
  constexpr int64_t kLanes = Vectorized<float>::size();
  int64_t k = 0;
  for (; k + 2 * kLanes <= n; k += 2 * kLanes)
    for (int64_t half = k; half < k + 2 * kLanes; half += kLanes)
      vector(Vectorized<float>::loadu(x + half)).store(x + half);
  for (; k < n; ++k) x[k] = one(x[k]);
}

void silu_as_torch(float* x, int64_t n) {
  const Vectorized<float> unit(1.0f);
  map_as_torch(x, n, [&](Vectorized<float> v) { return v / (unit + v.neg().exp()); },
               [](float v) { return v / (1.0f + std::exp(-v)); });
}

void sigmoid_as_torch(float* x, int64_t n) {
  const Vectorized<float> unit(1.0f), zero(0.0f);
  map_as_torch(x, n, [&](Vectorized<float> v) { return (unit + (zero - v).exp()).reciprocal(); },
               [](float v) { return 1.0f / (1.0f + std::exp(-v)); });
}

bool is_as_torch() {
  static const bool found = [] {
    for (const int64_t n : {9, 64, 200, 1000, 1024, 2048, 2560, 2816, 5632, 6912, 30000}) {
      const Tensor x = at::empty({n}, at::kFloat);
      float* data = x.data_ptr<float>();
      for (int64_t k = 0; k < n; ++k) data[k] = 12.0f * std::sin(float(k * k % 9973)) + 1e-3f * float(k % 7);
      const Tensor silu = x.clone(), sigmoid = x.clone(), means = x.repeat({3, 1}).mean(-1);
      silu_as_torch(silu.data_ptr<float>(), n), sigmoid_as_torch(sigmoid.data_ptr<float>(), n);
      if (!at::equal(silu, at::silu(x)) || !at::equal(sigmoid, x.sigmoid())) return false;
      for (int64_t row = 0; row < 3; ++row)
        if (means.const_data_ptr<float>()[row] != sum_as_torch(data, n) / float(n)) return false;
    }
    return true;
  }();
  return found;
}

Tensor view_of(float* x, int64_t rows, int64_t columns, int64_t stride) {
  return at::from_blob(x, {rows, columns}, {stride, 1}, at::kFloat);
}

// In what follows, `quick` is without torch's operators where that is known to be the same.

void silu(float* x, int64_t n, bool quick) {
  if (quick && n <= kUndivided) return silu_as_torch(x, n);
  const Tensor view = view_of(x, 1, n, n);
  view.copy_(at::silu(view));
}

void sigmoid(float* x, int64_t n, bool quick) {
  if (quick && n <= kUndivided) return sigmoid_as_torch(x, n);
  view_of(x, 1, n, n).sigmoid_();
}

// silu(gate) * value of each token's [gate, value], twice `columns` in a row; torch's silu takes the rows one by one.
void gated(float* both, int64_t tokens, int64_t columns, float* out, bool quick) {
  if (quick && tokens * columns <= kUndivided) {
    for (int64_t t = 0; t < tokens; ++t) {
      std::copy_n(both + 2 * t * columns, columns, out + t * columns);
      silu_as_torch(out + t * columns, columns);
    }
  } else {
    view_of(out, tokens, columns, columns).copy_(at::silu(view_of(both, tokens, columns, 2 * columns)));
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < columns; ++k) out[t * columns + k] *= both[(2 * t + 1) * columns + k];
}

// x / sqrt(mean(x^2) + eps) * weight of each token.
void rms_norm(const float* x, const float* weight, float eps, int64_t tokens, int64_t columns, float* out, bool quick) {
  for (int64_t n = 0; n < tokens * columns; ++n) out[n] = x[n] * x[n];
  quick = quick && columns >= kSumLanes && columns < kUndivided;
  const Tensor means = quick ? Tensor() : view_of(out, tokens, columns, columns).mean(-1);
  for (int64_t t = 0; t < tokens; ++t, x += columns, out += columns) {
    const float mean = quick ? sum_as_torch(out, columns) / float(columns) : means.const_data_ptr<float>()[t];
    const float inverse = 1.0f / std::sqrt(mean + eps);
    for (int64_t k = 0; k < columns; ++k) out[k] = x[k] * inverse * weight[k];
  }
}

// Whether all that matmulfree_step takes fits together.
bool step_fits(const Tensor& x, at::TensorList states, const Tensor& floors, at::TensorList layers, at::TensorList norms) {
  const int64_t blocks = states.size(), width = x.size(1);
  if (!is_float(x) || !is_float(floors) || !floors.is_contiguous() || floors.numel() != blocks * width) return false;
  const auto is_weight = [](const Tensor& weight, int64_t columns) {
    return is_float(weight) && weight.is_contiguous() && weight.dim() == 1 && weight.numel() == columns;
  };
  const int64_t mlp = blocks ? layers[17].numel() : 0;
  for (int64_t block = 0; block < blocks; ++block) {
    if (!is_float(states[block]) || states[block].sizes() != x.sizes()) return false;
    for (int i = 0; i < 3; ++i)
      if (!is_weight(norms[3 * block + i], width)) return false;
    for (int i = 0; i < 6; ++i) {
      const Tensor* of = &layers[18 * block + 3 * i];
      const int64_t rows = i == 4 ? 2 * mlp : width, columns = i == 5 ? mlp : width;
      if (!of[0].is_contiguous() || !of[2].is_contiguous() || !fits(of[0], of[1], of[2], rows, columns)) return false;
    }
  }
  return true;
}

// Blocks of MatMul-free LM for one new token of each row, as MatMulFreeBlock.forward computes them, with packed layers:
// in one call, since starting some thirty operators for each takes longer than they do.
//
// x is [B, D]; so are the states, one for each block; floors is [L, D]. Of each of a block's i_proj, f_proj, g_proj,
// o_proj, gate_proj and down_proj there are the packed weights, the scale and the norm's weight; norms are those of the
// two mixers' inputs and of the gate. Gives the last block's output and the states after the token; no output where a
// tensor is not on the CPU, contiguous and of its size and dtype. `operators`: all but the products by torch's operators,
// to compare with.
std::tuple<std::optional<Tensor>, std::vector<Tensor>> matmulfree_step(const Tensor& x, at::TensorList states,
                                                                       const Tensor& floors, at::TensorList layers,
                                                                       at::TensorList norms, double norm_eps,
                                                                       double layer_eps, bool operators) {
  const int64_t blocks = states.size(), tokens = x.size(0), width = x.size(1), numbers = x.numel();
  TORCH_CHECK(int64_t(layers.size()) == 18 * blocks && int64_t(norms.size()) == 3 * blocks,
              "matmulfree_step: expected six layers and three norms for each of ", blocks, " blocks");
  if (!step_fits(x, states, floors, layers, norms)) return {std::nullopt, {}};
  const bool quick = !operators && is_as_torch();
  Tensor out = x.clone(at::MemoryFormat::Contiguous);
  std::vector<Tensor> after;
  if (numbers == 0 || blocks == 0) {
    for (const Tensor& state : states) after.push_back(state.clone());
    return {out, after};
  }
  const Kernels& k = kernels(0);
  const int64_t mlp = layers[17].numel();
  std::vector<float> room(numbers * 5 + tokens * mlp * 3);
  float *mixed = room.data(), *value = mixed + numbers, *forget = value + numbers, *gate = forget + numbers;
  float *y = gate + numbers, *both = y + numbers, *hidden = both + 2 * tokens * mlp;
  float* stream = out.data_ptr<float>();
  for (int64_t block = 0; block < blocks; ++block) {
    const auto layer = [&](int i, int64_t rows, float* target) {
      const Tensor* of = &layers[18 * block + 3 * i];
      return Layer(of[0], of[1], of[2], rows, target);
    };
    const auto multiply = [&](at::ArrayRef<Layer> some, const float* input, int64_t columns) {
      multiply_tokens(k, some, input, tokens, columns, float(layer_eps));
    };
    const auto norm = [&](int i, const float* input, float* target) {
      const float* weight = norms[3 * block + i].const_data_ptr<float>();
      rms_norm(input, weight, float(norm_eps), tokens, width, target, quick);
    };
    const Tensor state_before = states[block].contiguous();
    norm(0, stream, mixed);
    multiply({layer(0, width, value), layer(1, width, forget), layer(2, width, gate)}, mixed, width);
    silu(value, numbers, quick);
    sigmoid(forget, numbers, quick);
    after.push_back(at::empty_like(state_before));
    float* state = after.back().data_ptr<float>();
    const float *before = state_before.const_data_ptr<float>(), *low = floors.const_data_ptr<float>() + block * width;
    for (int64_t n = 0; n < numbers; ++n) {
      const float kept = low[n % width] + (1.0f - low[n % width]) * forget[n];
      state[n] = kept * before[n] + value[n] * (1.0f - kept);
    }
    std::copy(state, state + numbers, value);
    silu(value, numbers, quick);
    norm(2, gate, mixed);
    for (int64_t n = 0; n < numbers; ++n) mixed[n] *= value[n];
    multiply(layer(3, width, y), mixed, width);
    for (int64_t n = 0; n < numbers; ++n) y[n] += stream[n];
    norm(1, y, mixed);
    multiply(layer(4, 2 * mlp, both), mixed, width);
    gated(both, tokens, mlp, hidden, quick);
    multiply(layer(5, width, stream), hidden, mlp);
    for (int64_t n = 0; n < numbers; ++n) stream[n] += y[n];
  }
  return {out, after};
}

// The same in two steps: codes [..., columns] int8 and what 1 is worth [..., 1]; their exact product, int32.
std::tuple<Tensor, Tensor> quantise_activations(const Tensor& x, const Tensor& norm_weight, double eps) {
  const int64_t columns = norm_weight.numel(), tokens = columns ? x.numel() / columns : 0;
  const float *data = x.const_data_ptr<float>(), *weight = norm_weight.const_data_ptr<float>();
  const Quantised q = quantise(data, weight, tokens, columns, float(eps));
  std::vector<int64_t> shape = x.sizes().vec();
  Tensor codes = at::empty(shape, x.options().dtype(at::kChar));
  shape.back() = 1;
  Tensor step = at::empty(shape, x.options());
  for (size_t t = 0; t < q.step.size(); ++t)
    std::memcpy(codes.data_ptr<int8_t>() + t * columns, q.codes + t * q.stride, columns);
  std::copy(q.step.begin(), q.step.end(), step.data_ptr<float>());
  return {codes, step};
}

Tensor packed_product(const Tensor& codes, const Tensor& packed, int64_t rows, int64_t choice) {
  const int64_t columns = packed.size(1), tokens = columns ? codes.numel() / columns : 0;
  std::vector<int64_t> shape = codes.sizes().vec();
  shape.back() = rows;
  Tensor out = at::empty(shape, codes.options().dtype(at::kInt));
  Quantised q(tokens, columns);
  for (int64_t t = 0; t < tokens; ++t) {
    const int8_t* source = codes.const_data_ptr<int8_t>() + t * columns;
    std::memcpy(q.codes + t * q.stride, source, columns);
    for (int64_t k = 0; k < columns; ++k) q.sum[t] += source[k];
  }
  int32_t* target = out.data_ptr<int32_t>();
  multiply(kernels(choice), packed.const_data_ptr<uint8_t>(), packed.size(0), rows, columns, q.codes, q.stride, tokens,
           [&](int64_t token, int64_t row, int32_t sum) { target[token * rows + row] = sum - q.sum[token]; });
  return out;
}

// weight [rows, columns] float32, contiguous, to packed [R, columns]; rounds halves to even, as torch does.
Tensor pack(const Tensor& weight, const Tensor& scale) {
  const int64_t rows = weight.size(0), columns = weight.size(1), packed_rows = (rows + 3) / 4;
  Tensor packed = at::empty({packed_rows, columns}, weight.options().dtype(at::kByte));
  const float inverse = 1.0f / *scale.const_data_ptr<float>();
  const float* source = weight.const_data_ptr<float>();
  uint8_t* target = packed.data_ptr<uint8_t>();
  at::parallel_for(0, packed_rows, std::max<int64_t>(1, 4096 / std::max<int64_t>(columns, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      uint8_t* out = target + r * columns;
      std::memset(out, 0, columns);
      for (int i = 0; i < 4; ++i) {
        const int64_t row = r + i * packed_rows;
        if (row >= rows) break;
        const float* w = source + row * columns;
        for (int64_t k = 0; k < columns; ++k) {  // |w / scale| > 0.5 becomes 1: one half itself goes to 0, which is even
          const float value = w[k] * inverse;
          const int code = 1 + (value > 0.5f) - (value < -0.5f);
          out[k] |= uint8_t(code << (2 * i));
        }
      }
    }
  });
  return packed;
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const Kernels* k : all_kernels()) names.emplace_back(k->name);
  return names;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zoo_cpu, library) {
  library.def(
      "packed_bit_linear(Tensor x, Tensor packed, Tensor scale, Tensor norm_weight, int rows, float eps, int kernels=0) "
      "-> Tensor",
      &packed_bit_linear);
  library.def(
      "packed_bit_linear_at_once(Tensor x, Tensor packed, Tensor scale, Tensor norm_weight, int rows, float eps) -> Tensor?",
      &packed_bit_linear_at_once);
  library.def(
      "matmulfree_step(Tensor x, Tensor[] states, Tensor floors, Tensor[] layers, Tensor[] norms, float norm_eps, "
      "float layer_eps, bool operators=False) -> (Tensor?, Tensor[])",
      &matmulfree_step);
  library.def("quantise_activations(Tensor x, Tensor norm_weight, float eps) -> (Tensor, Tensor)", &quantise_activations);
  library.def("packed_product(Tensor codes, Tensor packed, int rows, int kernels=0) -> Tensor", &packed_product);
  library.def("pack_ternary(Tensor weight, Tensor scale) -> Tensor", &pack);
  library.def("bit_linear_kernels() -> str[]", &kernel_names);
  library.def("matmulfree_step_is_as_torch() -> bool", &is_as_torch);
}
