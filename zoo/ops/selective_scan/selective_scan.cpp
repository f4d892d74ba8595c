// Selective scan on CPUs, forward and backward: see reference.py for the maths and cpu.py for how this is built.
//
// A vector holds one number of each of several channels ("lanes") that share a group. A block of lanes walks along time
// in tiles of kTile steps. Within a tile the state index is the outer loop and time the inner one, so that the state of
// one index is a register, and the exponentials of successive steps, which are nearly all of the work, overlap.
//
// The backward pass keeps the state at the start of each tile only (for one batch entry and group at a time), and
// recomputes a tile's states from there. Sums over channels (the gradients of B and C) stay in vectors until a tile is
// finished. Tasks are independent, and results do not depend on the number of threads up to the order of those sums.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kTile = 128;  // steps: 512 bytes of a row at a time; with 32, latency of memory was half the time of a long scan

template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int count = kVectorBytes / sizeof(T);
};
template <typename T>
using Vec = typename Lanes<T>::Vector;
typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));

template <typename T>
inline Vec<T> splat(T value) {
  return value - Vec<T>{};
}

template <typename T>
inline T sum(Vec<T> x) {
  T total = 0;
  for (int lane = 0; lane < Lanes<T>::count; ++lane) total += x[lane];
  return total;
}

// 2^f for |f| <= 1/2, exact at 0: a polynomial fitted for the smallest relative error, which is 2e-9 before rounding.
inline Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = 0.00015353361888f * f + 0.00133988744224f;
  p = p * f + 0.00961843735783f;
  p = p * f + 0.05550332471070f;
  p = p * f + 0.24022647913627f;
  p = p * f + 0.69314720285508f;
  return p * f + 1.0f;
}

// 2^x. Below 2^-126 the result stays there instead of becoming denormal; NaN stays NaN.
inline Vec<float> exp2(Vec<float> x) {
  const Vec<float> low = splat(-126.0f), high = splat(128.0f);
#if defined(__AVX512F__)
  x = _mm512_min_ps(high, _mm512_max_ps(low, x));  // the second argument where one is NaN
  const Vec<float> integer = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_fraction(x - integer), integer);
#else
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec<float> shifted = x + magic;
  return (Vec<float>)((IntVec)exp2_fraction(x - (shifted - magic)) + ((IntVec)shifted << 23));
#endif
}

inline Vec<double> exp2(Vec<double> x) {
  for (int lane = 0; lane < Lanes<double>::count; ++lane) x[lane] = std::exp2(x[lane]);
  return x;
}

template <typename T>
constexpr T kLog2e = T(1.4426950408889634);

// log(1 + e^x), as max(x, 0) + log1p(e^-|x|) and log1p(v) = 2 atanh(v / (2 + v)), whose argument is at most 1/3.
inline Vec<float> softplus(Vec<float> x) {
  const Vec<float> positive = x < 0.0f ? Vec<float>{} : x;
  const Vec<float> v = exp2((x < 0.0f ? x : -x) * kLog2e<float>);
  const Vec<float> s = v / (2.0f + v), q = s * s;
  Vec<float> p = (1.0f / 15) * q + (1.0f / 13);
  p = p * q + (1.0f / 11);
  p = p * q + (1.0f / 9);
  p = p * q + (1.0f / 7);
  p = p * q + (1.0f / 5);
  p = p * q + (1.0f / 3);
  return positive + 2.0f * s * (p * q + 1.0f);
}

inline Vec<double> softplus(Vec<double> x) {
  for (int lane = 0; lane < Lanes<double>::count; ++lane)
    x[lane] = std::max(x[lane], 0.0) + std::log1p(std::exp(-std::abs(x[lane])));
  return x;
}

template <typename T>
inline Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exp2(-x * kLog2e<T>));
}

// A tensor as the kernel walks it: where a channel's row starts, and how far apart channels and steps are.
template <typename T>
struct Rows {
  T* data = nullptr;  // null for a tensor that is not there
  int64_t batch = 0, group = 0, row = 0, step = 0;  // strides

  Rows() = default;
  explicit Rows(const Tensor& x)  // [B, D, L] or, with groups, [B, G, N, L]
      : data(x.data_ptr<T>()), batch(x.stride(0)), row(x.stride(-2)), step(x.stride(-1)) {
    if (x.dim() == 4) group = x.stride(1);
  }
  explicit Rows(const OptionalTensor& x) : Rows(x ? Rows(*x) : Rows()) {}

  T* at(int64_t b, int64_t r, int64_t t) const { return data + b * batch + r * row + t * step; }
};

// Asks for the tile after the one at `row`: a tile touches more rows than the hardware's prefetcher follows. Past the end
// of a row this asks for memory that nobody reads, which is harmless.
template <bool kForWriting = false, typename T>
inline void prefetch_next_tile(const T* row, int64_t step) {
  constexpr int kLine = 64 / sizeof(T);
  if (step != 1) return;
  for (int t = kTile; t < 2 * kTile; t += kLine) __builtin_prefetch(row + t, kForWriting);
}

template <typename T>
void load_tile(const Rows<T>& x, int64_t b, int64_t channel, int lanes, int64_t t0, int steps, Vec<T>* tile) {
  constexpr int V = Lanes<T>::count;
  const T* source = x.at(b, channel, t0);
  T* target = reinterpret_cast<T*>(tile);
  if (lanes < V) std::memset(target, 0, steps * sizeof(Vec<T>));
  if (x.row == 1) {
    for (int t = 0; t < steps; ++t) std::memcpy(target + t * V, source + t * x.step, lanes * sizeof(T));
  } else {
    for (int lane = 0; lane < lanes; ++lane) {
      const T* row = source + lane * x.row;
      prefetch_next_tile(row, x.step);
      for (int t = 0; t < steps; ++t) target[t * V + lane] = row[t * x.step];
    }
  }
}

template <typename T>
void store_tile(const Rows<T>& x, int64_t b, int64_t channel, int lanes, int64_t t0, int steps, const Vec<T>* tile) {
  constexpr int V = Lanes<T>::count;
  T* target = x.at(b, channel, t0);
  const T* source = reinterpret_cast<const T*>(tile);
  for (int lane = 0; lane < lanes; ++lane)
    for (int t = 0; t < steps; ++t) target[lane * x.row + t * x.step] = source[t * V + lane];
}

// `lanes` numbers `stride` apart; the other lanes are zero.
template <typename T>
Vec<T> gather(const T* source, int64_t stride, int lanes) {
  Vec<T> x{};
  for (int lane = 0; lane < lanes; ++lane) x[lane] = source[lane * stride];
  return x;
}

template <typename T>
void scatter(Vec<T> x, T* target, int64_t stride, int lanes) {
  for (int lane = 0; lane < lanes; ++lane) target[lane * stride] = x[lane];
}

template <typename T>
struct Scan {
  static constexpr int V = Lanes<T>::count;
  int64_t batches, channels, length, states, groups;
  bool delta_softplus;
  Rows<T> u, delta, B, C, z;
  const T *A, *D = nullptr, *delta_bias = nullptr;  // contiguous

  Scan(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
       const OptionalTensor& D_, const OptionalTensor& z_, const OptionalTensor& delta_bias_, bool softplus_)
      : batches(u_.size(0)), channels(u_.size(1)), length(u_.size(2)), states(A_.size(1)), groups(B_.size(1)),
        delta_softplus(softplus_), u(u_), delta(delta_), B(B_), C(C_), z(z_), A(A_.data_ptr<T>()) {
    if (D_) D = D_->data_ptr<T>();
    if (delta_bias_) delta_bias = delta_bias_->data_ptr<T>();
  }

  int64_t group_channels() const { return channels / groups; }
  int64_t group_blocks() const { return (group_channels() + V - 1) / V; }
  int64_t tiles() const { return (length + kTile - 1) / kTile; }
};

// One block of lanes: the channels it covers and what is constant over time.
template <typename T>
struct Block {
  int64_t b, group, channel;
  int lanes;
  Vec<T> bias, D;
  std::vector<Vec<T>> a;  // A times log2(e), so that exp(delta A) is exp2(delta a)

  Block(const Scan<T>& scan, int64_t b_, int64_t group_, int64_t block) : b(b_), group(group_) {
    const int64_t first = block * Lanes<T>::count;
    channel = group * scan.group_channels() + first;
    lanes = int(std::min<int64_t>(Lanes<T>::count, scan.group_channels() - first));
    bias = scan.delta_bias ? gather(scan.delta_bias + channel, 1, lanes) : Vec<T>{};
    D = scan.D ? gather(scan.D + channel, 1, lanes) : Vec<T>{};
    for (int64_t n = 0; n < scan.states; ++n)
      a.push_back(gather(scan.A + channel * scan.states + n, scan.states, lanes) * kLog2e<T>);
  }

  // Step sizes before softplus into `raw`, after it into `dt`, inputs into `x`.
  void load(const Scan<T>& scan, int64_t t0, int steps, Vec<T>* raw, Vec<T>* dt, Vec<T>* x) const {
    load_tile(scan.u, b, channel, lanes, t0, steps, x);
    load_tile(scan.delta, b, channel, lanes, t0, steps, raw);
    for (int t = 0; t < steps; ++t) {
      raw[t] += bias;
      dt[t] = scan.delta_softplus ? softplus(raw[t]) : raw[t];
    }
  }
};

template <typename T>
void forward_block(const Scan<T>& scan, const Block<T>& block, const Rows<T>& y, T* last_state) {
  Vec<T> raw[kTile], dt[kTile], x[kTile], out[kTile];
  std::vector<Vec<T>> state(scan.states, Vec<T>{});
  for (int64_t t0 = 0; t0 < scan.length; t0 += kTile) {
    const int steps = int(std::min<int64_t>(kTile, scan.length - t0));
    block.load(scan, t0, steps, raw, dt, x);
    for (int lane = 0; lane < block.lanes; ++lane)
      prefetch_next_tile<true>(y.at(block.b, block.channel + lane, t0), y.step);
    for (int t = 0; t < steps; ++t) {
      out[t] = block.D * x[t];
      x[t] *= dt[t];
    }
    for (int64_t n = 0; n < scan.states; ++n) {
      const T *b = scan.B.at(block.b, n, t0) + block.group * scan.B.group;
      const T *c = scan.C.at(block.b, n, t0) + block.group * scan.C.group;
      prefetch_next_tile(b, scan.B.step);
      prefetch_next_tile(c, scan.C.step);
      const Vec<T> a = block.a[n];
      Vec<T> h = state[n];
      for (int t = 0; t < steps; ++t) {
        h = exp2(dt[t] * a) * h + x[t] * b[t * scan.B.step];
        out[t] += h * c[t * scan.C.step];
      }
      state[n] = h;
    }
    if (scan.z.data) {
      load_tile(scan.z, block.b, block.channel, block.lanes, t0, steps, x);
      for (int t = 0; t < steps; ++t) out[t] *= x[t] * sigmoid<T>(x[t]);
    }
    store_tile(y, block.b, block.channel, block.lanes, t0, steps, out);
  }
  for (int64_t n = 0; n < scan.states; ++n)
    scatter(state[n], last_state + (block.b * scan.channels + block.channel) * scan.states + n, scan.states, block.lanes);
}

template <typename T>
void forward(const Scan<T>& scan, const Rows<T>& y, T* last_state) {
  const int64_t blocks = scan.group_blocks();
  at::parallel_for(0, scan.batches * scan.groups * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / blocks;
      forward_block(scan, Block<T>(scan, pair / scan.groups, pair % scan.groups, task % blocks), y, last_state);
    }
  });
}

template <typename T>
struct Gradients {
  Rows<T> y;                              // incoming
  const T* last_state = nullptr;          // incoming, [B, D, N], may be null
  Rows<T> u, delta, z;                    // [B, D, L]
  Rows<T> B, C;                           // [B, parts * G, N, L]: the channels of a group may be in several parts
  T *A, *D, *delta_bias;                  // [B, D, N], [B, D], [B, D]: a sum per batch entry
};

// The blocks [first, last) of one batch entry and group; the only task that writes its rows of any gradient.
template <typename T>
void backward_part(const Scan<T>& scan, const Gradients<T>& grad, int64_t b, int64_t group, int64_t part,
                   int64_t first, int64_t last) {
  const int64_t N = scan.states, tiles = scan.tiles(), blocks = last - first;
  Vec<T> raw[kTile], dt[kTile], x[kTile], dx[kTile], dy[kTile], du[kTile], ddt[kTile], gate[kTile], out[kTile];
  Vec<T> decay[kTile], state[kTile + 1];
  std::vector<Vec<T>> start(blocks * tiles * N);  // state at the start of each tile
  std::vector<Vec<T>> adjoint(blocks * N), dA(blocks * N, Vec<T>{}), dD(blocks, Vec<T>{}), dbias(blocks, Vec<T>{});
  std::vector<Vec<T>> dB(N * kTile), dC(N * kTile);

  std::vector<Block<T>> part_blocks;
  for (int64_t i = 0; i < blocks; ++i) part_blocks.emplace_back(scan, b, group, first + i);

  for (int64_t i = 0; i < blocks; ++i) {
    const Block<T>& block = part_blocks[i];
    std::vector<Vec<T>> h(N, Vec<T>{});
    for (int64_t tile = 0; tile < tiles; ++tile) {
      std::copy(h.begin(), h.end(), start.begin() + (i * tiles + tile) * N);
      if (tile + 1 == tiles) break;
      block.load(scan, tile * kTile, kTile, raw, dt, x);
      for (int t = 0; t < kTile; ++t) x[t] *= dt[t];
      for (int64_t n = 0; n < N; ++n) {
        const T* B = scan.B.at(b, n, tile * kTile) + group * scan.B.group;
        const Vec<T> a = block.a[n];
        Vec<T> state_n = h[n];
        for (int t = 0; t < kTile; ++t) state_n = exp2(dt[t] * a) * state_n + x[t] * B[t * scan.B.step];
        h[n] = state_n;
      }
    }
    for (int64_t n = 0; n < N; ++n) {
      const T* last_grad = grad.last_state ? grad.last_state + (b * scan.channels + block.channel) * N + n : nullptr;
      adjoint[i * N + n] = last_grad ? gather(last_grad, N, block.lanes) : Vec<T>{};
    }
  }

  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t t0 = tile * kTile;
    const int steps = int(std::min<int64_t>(kTile, scan.length - t0));
    std::fill(dB.begin(), dB.end(), Vec<T>{});
    std::fill(dC.begin(), dC.end(), Vec<T>{});
    for (int64_t i = 0; i < blocks; ++i) {
      const Block<T>& block = part_blocks[i];
      block.load(scan, t0, steps, raw, dt, x);
      load_tile(grad.y, b, block.channel, block.lanes, t0, steps, dy);
      if (scan.z.data) {  // dy becomes the gradient before the gate; `out`, the output there, is for the gate's own
        load_tile(scan.z, b, block.channel, block.lanes, t0, steps, gate);
        for (int t = 0; t < steps; ++t) {
          const Vec<T> s = sigmoid<T>(gate[t]);
          out[t] = block.D * x[t];
          du[t] = dy[t] * s * (T(1) + gate[t] * (T(1) - s));  // times `out` it is the gradient of z
          dy[t] *= gate[t] * s;
          gate[t] = du[t];
        }
      }
      for (int t = 0; t < steps; ++t) {
        dx[t] = ddt[t] = Vec<T>{};
        dD[i] += dy[t] * x[t];
        du[t] = dt[t] * x[t];
      }
      for (int64_t n = 0; n < N; ++n) {
        const T* B = scan.B.at(b, n, t0) + group * scan.B.group;
        const T* C = scan.C.at(b, n, t0) + group * scan.C.group;
        const Vec<T> a = block.a[n];
        state[0] = start[(i * tiles + tile) * N + n];
        for (int t = 0; t < steps; ++t) {
          decay[t] = exp2(dt[t] * a);
          state[t + 1] = decay[t] * state[t] + du[t] * B[t * scan.B.step];
        }
        if (scan.z.data)
          for (int t = 0; t < steps; ++t) out[t] += state[t + 1] * C[t * scan.C.step];
        Vec<T> g = adjoint[i * N + n], dA_n = dA[i * N + n];
        for (int t = steps - 1; t >= 0; --t) {
          g += dy[t] * C[t * scan.C.step];
          dC[n * kTile + t] += dy[t] * state[t + 1];
          dB[n * kTile + t] += g * du[t];
          dx[t] += g * B[t * scan.B.step];  // gradient of dt * x
          g *= decay[t];
          const Vec<T> through = g * state[t];  // gradient of the exponent dt * A
          ddt[t] += through * a;
          dA_n += through * dt[t];
        }
        adjoint[i * N + n] = g;
        dA[i * N + n] = dA_n;
      }
      for (int t = 0; t < steps; ++t) {
        Vec<T> d = ddt[t] * T(1 / kLog2e<double>) + dx[t] * x[t];  // a is A times log2(e)
        if (scan.delta_softplus) d *= sigmoid<T>(raw[t]);
        dbias[i] += d;
        ddt[t] = d;
        du[t] = dx[t] * dt[t] + block.D * dy[t];
      }
      store_tile(grad.u, b, block.channel, block.lanes, t0, steps, du);
      store_tile(grad.delta, b, block.channel, block.lanes, t0, steps, ddt);
      if (scan.z.data) {
        for (int t = 0; t < steps; ++t) out[t] *= gate[t];
        store_tile(grad.z, b, block.channel, block.lanes, t0, steps, out);
      }
    }
    for (int64_t n = 0; n < N; ++n)
      for (int t = 0; t < steps; ++t) {
        *(grad.B.at(b, n, t0 + t) + (part * scan.groups + group) * grad.B.group) = sum<T>(dB[n * kTile + t]);
        *(grad.C.at(b, n, t0 + t) + (part * scan.groups + group) * grad.C.group) = sum<T>(dC[n * kTile + t]);
      }
  }

  for (int64_t i = 0; i < blocks; ++i) {
    const Block<T>& block = part_blocks[i];
    const int64_t row = b * scan.channels + block.channel;
    for (int64_t n = 0; n < N; ++n) scatter(dA[i * N + n], grad.A + row * N + n, N, block.lanes);
    scatter(dD[i], grad.D + row, 1, block.lanes);
    scatter(dbias[i], grad.delta_bias + row, 1, block.lanes);
  }
}

template <typename T>
void backward(const Scan<T>& scan, const Gradients<T>& grad, int64_t parts) {
  const int64_t blocks = scan.group_blocks();
  at::parallel_for(0, scan.batches * scan.groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts, pair = task / parts;
      backward_part(scan, grad, pair / scan.groups, pair % scan.groups, part, part * blocks / parts,
                    (part + 1) * blocks / parts);
    }
  });
}

// Shapes and dtypes are those of zoo.ops.selective_scan, whose op checks them; here all are of one dtype, B and C have
// groups, A, D and delta_bias are contiguous, and nothing is empty.
std::tuple<Tensor, Tensor> selective_scan_forward(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
    const OptionalTensor& z, const OptionalTensor& delta_bias, bool delta_softplus) {
  Tensor y = at::empty(u.sizes(), u.options());
  Tensor last_state = at::empty({u.size(0), u.size(1), A.size(1)}, u.options());
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "selective_scan_forward", [&] {
    const Scan<scalar_t> scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus);
    forward(scan, Rows<scalar_t>(y), last_state.data_ptr<scalar_t>());
  });
  return {y, last_state};
}

// Gradients of u, delta, A, B, C, D, z and delta_bias; those of tensors that are not there mean nothing.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Tensor& grad_y, const OptionalTensor& grad_last_state, const Tensor& u, const Tensor& delta, const Tensor& A,
    const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
    const OptionalTensor& delta_bias, bool delta_softplus) {
  const auto options = u.options();
  const int64_t batches = u.size(0), channels = u.size(1), states = A.size(1), groups = B.size(1);
  Tensor du = at::empty(u.sizes(), options), ddelta = at::empty(u.sizes(), options);
  Tensor dz = at::empty(z ? u.sizes() : at::IntArrayRef{0}, options);
  Tensor dA = at::empty({batches, channels, states}, options);
  Tensor dD = at::empty({batches, channels}, options), dbias = at::empty({batches, channels}, options);
  Tensor dB, dC;
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "selective_scan_backward", [&] {
    const Scan<scalar_t> scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus);
    const int64_t threads = at::get_num_threads(), pairs = batches * groups;
    const int64_t parts = std::clamp<int64_t>((threads + pairs - 1) / pairs, 1, scan.group_blocks());
    dB = at::empty({batches, parts * groups, states, scan.length}, options);
    dC = at::empty({batches, parts * groups, states, scan.length}, options);
    Gradients<scalar_t> grad;
    grad.y = Rows<scalar_t>(grad_y);
    if (grad_last_state) grad.last_state = grad_last_state->data_ptr<scalar_t>();
    grad.u = Rows<scalar_t>(du);
    grad.delta = Rows<scalar_t>(ddelta);
    if (z) grad.z = Rows<scalar_t>(dz);
    grad.B = Rows<scalar_t>(dB);
    grad.C = Rows<scalar_t>(dC);
    grad.A = dA.data_ptr<scalar_t>();
    grad.D = dD.data_ptr<scalar_t>();
    grad.delta_bias = dbias.data_ptr<scalar_t>();
    backward(scan, grad, parts);
    if (parts > 1) {
      dB = dB.view({batches, parts, groups, states, scan.length}).sum(1);
      dC = dC.view({batches, parts, groups, states, scan.length}).sum(1);
    }
  });
  return {du, ddelta, dA.sum(0), dB, dC, dD.sum(0), dz, dbias.sum(0)};
}

}  // namespace

TORCH_LIBRARY(zoo_cpu, library) {
  library.def(
      "selective_scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, bool delta_softplus) -> (Tensor, Tensor)",
      selective_scan_forward);
  library.def(
      "selective_scan_backward(Tensor grad_y, Tensor? grad_last_state, Tensor u, Tensor delta, Tensor A, Tensor B, "
      "Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      selective_scan_backward);
}
