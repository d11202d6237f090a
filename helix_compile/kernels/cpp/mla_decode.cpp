// Absorbed attention of the queries of one step to a shard of latents, which is read once: scores and values of a block of slots
// while it lies in the cache of the core, maximum and sum kept running. kernels/cpp/build.py puts two lines before this file:
// what Entry (of queries and cache) is, and Sum (of statistics and sums). The spec is mla_decode_reference.
//
//     rows (t, h) of a sequence, 128 at a time: a tile, so that its queries and sums stay in L2; of it L lanes of a vector: a group
//     q     [group][W][L]     scaled
//     s     [group][slot][L]  scores of a block, then their weights
//     o     [row][R]          not yet divided by the sum
//
// A sequence is cut in `parts` where threads would be left without work; finish() adds them.

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

using Vec = at::vec::Vectorized<Sum>;
constexpr int64_t L = Vec::size();
constexpr int64_t TILE = 128;
constexpr int64_t BLOCK = 64;  // slots: 147 KB in float32 at 512 + 64
constexpr Sum NONE = -std::numeric_limits<Sum>::infinity();
constexpr bool SAME = std::is_same_v<Entry, Sum>;
static_assert(TILE % L == 0);

constexpr int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Call {
  const Entry *q_latent, *q_rope, *cache;
  const int64_t *page_table;  // [B, pages]
  const int32_t *visible;     // [B, T]
  Entry *partial_o;           // [B, T, H, R]
  Sum *lse;                   // [B, T, H]
  Sum *work;
  int64_t B, T, H, R, r, page_size, pages, threads;
  int64_t batch;  // sequences of the step, of which these are a part: how each is cut hangs on all
  int64_t q_b, q_t, q_h, q_c, rope_b, rope_t, rope_h, rope_c, cache_page, cache_slot;
  double scale;

  int64_t width() const { return R + r; }
  int64_t channels() const { return up(R, L); }
  int64_t tiles() const { return up(T * H, TILE) / TILE; }
  int64_t lanes() const { return std::min(TILE, up(T * H, L)); }  // of the widest tile
  int64_t parts() const { return batch * tiles() ? std::min(up(threads, batch * tiles()) / (batch * tiles()), up(pages * page_size, BLOCK) / BLOCK) : 1; }
  // what a thread works on, and what is left of a part
  int64_t scratch() const { return (width() + BLOCK + 1) * lanes() + (SAME ? 0 : BLOCK * width()); }
  int64_t part() const { return lanes() * (channels() + 2); }
  int64_t kept() const { return parts() > 1 ? B * tiles() * parts() : threads; }
};

struct Rows {  // of one sequence
  int64_t b, first, count;
};

struct Part {
  Sum *o, *top, *sum;
  Part(const Call &x, int64_t number) : o(x.work + x.threads * x.scratch() + number * x.part()), top(o + x.lanes() * x.channels()), sum(top + x.lanes()) {}
};

// s of N slots and one group: an entry is one number for all rows of it
template <int N>
void scores(const Sum *q, const Sum *kv, int64_t stride, int64_t width, Sum *s) {
  Vec sums[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; n++) sums[n] = Vec(Sum(0));
  for (int64_t w = 0; w < width; w++) {
    const Vec own = Vec::loadu(q + w * L);
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) sums[n] = at::vec::fmadd(Vec(kv[n * stride + w]), own, sums[n]);
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; n++) sums[n].store(s + n * L);
}

// o of N rows and C vectors of channels: what was there times `shrink`, and the slots of a block. `last`: channels of a vector that is not full
template <int N, int C, bool FULL>
void values(const Sum *weights, const Sum *kv, int64_t stride, int64_t slots, const Sum *shrink, Sum *o, int64_t o_stride, int64_t last) {
  Vec sums[N][C];
#pragma GCC unroll 8
  for (int n = 0; n < N; n++)
#pragma GCC unroll 2
    for (int c = 0; c < C; c++) sums[n][c] = Vec::loadu(o + n * o_stride + c * L) * Vec(shrink[n]);
  for (int64_t i = 0; i < slots; i++) {
    Vec entries[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; c++)
      entries[c] = FULL ? Vec::loadu(kv + i * stride + c * L) : Vec::loadu(kv + i * stride + c * L, last);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const Vec weight(weights[i * L + n]);
#pragma GCC unroll 2
      for (int c = 0; c < C; c++) sums[n][c] = at::vec::fmadd(weight, entries[c], sums[n][c]);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; n++)
#pragma GCC unroll 2
    for (int c = 0; c < C; c++) sums[n][c].store(o + n * o_stride + c * L);
}

template <int C, bool FULL>
void values_of_group(const Sum *weights, const Sum *kv, int64_t stride, int64_t slots, const Sum *shrink, Sum *o, int64_t o_stride, int64_t rows, int64_t last) {
  int64_t n = 0;
  if constexpr (L >= 8)
    for (; n + 8 <= rows; n += 8) values<8, C, FULL>(weights + n, kv, stride, slots, shrink + n, o + n * o_stride, o_stride, last);
  for (; n + 4 <= rows; n += 4) values<4, C, FULL>(weights + n, kv, stride, slots, shrink + n, o + n * o_stride, o_stride, last);
  for (; n < rows; n++) values<1, C, FULL>(weights + n, kv, stride, slots, shrink + n, o + n * o_stride, o_stride, last);
}

// scores -> weights of one group, relative to the largest so far; `shrink`: of what was summed relative to the one before
void weigh(Sum *s, int64_t slots, Sum *top, Sum *sum, Sum *shrink) {
  const Vec before = Vec::loadu(top);
  Vec now = before;
  for (int64_t i = 0; i < slots; i++) now = at::vec::maximum(now, Vec::loadu(s + i * L));  // a NaN stays one
  const Vec safe = Vec::blendv(now, Vec(Sum(0)), now == Vec(NONE));  // nothing seen yet: no -inf - -inf
  const Vec factor = (before - safe).exp();
  Vec total = Vec::loadu(sum) * factor;
  for (int64_t i = 0; i < slots; i++) {
    const Vec weight = (Vec::loadu(s + i * L) - safe).exp();
    weight.store(s + i * L);
    total = total + weight;
  }
  now.store(top);
  total.store(sum);
  factor.store(shrink);
}

void load_queries(const Call &x, const Rows &rows, Sum *q) {
  std::fill(q, q + x.width() * x.lanes(), Sum(0));
  for (int64_t n = 0; n < rows.count; n++) {
    const int64_t t = (rows.first + n) / x.H, h = (rows.first + n) % x.H;
    Sum *own = q + n / L * x.width() * L + n % L;
    const Entry *latent = x.q_latent + rows.b * x.q_b + t * x.q_t + h * x.q_h;
    const Entry *rope = x.q_rope + rows.b * x.rope_b + t * x.rope_t + h * x.rope_h;
    for (int64_t w = 0; w < x.R; w++) own[w * L] = Sum(latent[w * x.q_c]) * Sum(x.scale);
    for (int64_t w = 0; w < x.r; w++) own[(x.R + w) * L] = Sum(rope[w * x.rope_c]) * Sum(x.scale);
  }
}

// slots from `from` on, which lie in one page
void attend_block(const Call &x, const Rows &rows, int64_t from, int64_t slots, const Sum *kv, int64_t stride, const Sum *q, Sum *s, Sum *shrink, const Part &part) {
  for (int64_t group = 0; group < rows.count; group += L) {
    const int64_t count = std::min(L, rows.count - group), wide = x.R - x.R % (2 * L);
    const Sum *queries = q + group * x.width();
    Sum *own = s + group * BLOCK, *o = part.o + group * x.channels();
    int64_t i = 0;
    for (; i + 16 <= slots; i += 16) scores<16>(queries, kv + i * stride, stride, x.width(), own + i * L);
    for (; i + 4 <= slots; i += 4) scores<4>(queries, kv + i * stride, stride, x.width(), own + i * L);
    for (; i < slots; i++) scores<1>(queries, kv + i * stride, stride, x.width(), own + i * L);
    for (int64_t n = 0; n < count; n++) {
      const int64_t seen = x.visible[rows.b * x.T + (rows.first + group + n) / x.H] - from;
      for (int64_t hidden = std::max<int64_t>(0, seen); hidden < slots; hidden++) own[hidden * L + n] = NONE;
    }
    weigh(own, slots, part.top + group, part.sum + group, shrink + group);
    for (int64_t c = 0; c < wide; c += 2 * L)
      values_of_group<2, true>(own, kv + c, stride, slots, shrink + group, o + c, x.channels(), count, L);
    for (int64_t c = wide; c < x.R; c += L)
      values_of_group<1, false>(own, kv + c, stride, slots, shrink + group, o + c, x.channels(), count, std::min(L, x.R - c));
  }
}

void attend(const Call &x, const Rows &rows, int64_t number, Sum *scratch, const Part &part) {
  int64_t length = 0;  // slots that no row sees are not read
  for (int64_t t = rows.first / x.H; t <= (rows.first + rows.count - 1) / x.H; t++)
    length = std::max<int64_t>(length, x.visible[rows.b * x.T + t]);
  const int64_t slots = up(up(length, x.parts()) / x.parts(), BLOCK);
  const int64_t start = number * slots, end = std::min(start + slots, length);
  std::fill(part.o, part.top, Sum(0));
  std::fill(part.top, part.sum, NONE);
  std::fill(part.sum, part.sum + x.lanes(), Sum(0));
  if (start >= end) return;
  Sum *q = scratch, *s = q + x.width() * x.lanes(), *shrink = s + BLOCK * x.lanes(), *widened = shrink + x.lanes();
  load_queries(x, rows, q);
  for (int64_t from = start; from < end;) {
    const int64_t slot = from % x.page_size, count = std::min({BLOCK, end - from, x.page_size - slot});
    const Entry *cached = x.cache + x.page_table[rows.b * x.pages + from / x.page_size] * x.cache_page + slot * x.cache_slot;
    for (int64_t i = 0; !SAME && i < count; i++)
      for (int64_t w = 0; w < x.width(); w++) widened[i * x.width() + w] = Sum(cached[i * x.cache_slot + w]);
    const Sum *kv = SAME ? reinterpret_cast<const Sum *>(cached) : widened;
    attend_block(x, rows, from, count, kv, SAME ? x.cache_slot : x.width(), q, s, shrink, part);
    from += count;
  }
}

// the parts of a tile from `number` on; of a row that a part did not see nothing is read
void finish(const Call &x, const Rows &rows, int64_t number) {
  const Part whole(x, number);
  for (int64_t n = 0; n < rows.count; n++) {
    Sum top = NONE, total = 0, *o = whole.o + n * x.channels();
    for (int64_t k = 0; k < x.parts(); k++) {
      const Sum own = Part(x, number + k).top[n];
      top = std::isnan(own) || own > top ? own : top;
    }
    for (int64_t k = 0; k < x.parts(); k++) {
      const Part part(x, number + k);
      const bool seen = part.top[n] != NONE;
      const Sum weight = seen ? std::exp(part.top[n] - top) : Sum(0);
      if (seen) total += weight * part.sum[n];
      for (int64_t c = 0; c < x.R && x.parts() > 1; c++) {
        const Sum own = seen ? weight * part.o[n * x.channels() + c] : Sum(0);
        o[c] = k ? o[c] + own : own;
      }
    }
    const int64_t row = rows.b * x.T * x.H + rows.first + n;
    x.lse[row] = top == NONE ? NONE : top + std::log(total);
    for (int64_t c = 0; c < x.R; c++) x.partial_o[row * x.R + c] = Entry(top == NONE ? Sum(0) : o[c] / total);
  }
}

Call call_of(void *const *tensors, const int64_t *numbers, double scale) {
  Call x;
  x.q_latent = static_cast<const Entry *>(tensors[0]);
  x.q_rope = static_cast<const Entry *>(tensors[1]);
  x.cache = static_cast<const Entry *>(tensors[2]);
  x.page_table = static_cast<const int64_t *>(tensors[3]);
  x.visible = static_cast<const int32_t *>(tensors[4]);
  x.partial_o = static_cast<Entry *>(tensors[5]);
  x.lse = static_cast<Sum *>(tensors[6]);
  x.work = static_cast<Sum *>(tensors[7]);
  for (int64_t *field : {&x.B, &x.T, &x.H, &x.R, &x.r, &x.page_size, &x.pages, &x.threads, &x.batch, &x.q_b, &x.q_t, &x.q_h, &x.q_c, &x.rope_b,
                         &x.rope_t, &x.rope_h, &x.rope_c, &x.cache_page, &x.cache_slot})
    *field = *numbers++;
  x.scale = scale;
  return x;
}

}  // namespace

// how many of Sum `work` holds
extern "C" int64_t mla_decode_work(const int64_t *numbers) {
  void *const none[8] = {};
  const Call x = call_of(none, numbers, 1);
  return x.threads * x.scratch() + x.kept() * x.part();
}

extern "C" void mla_decode(void *const *tensors, const int64_t *numbers, double scale) {
  const Call x = call_of(tensors, numbers, scale);
  const int64_t parts = x.parts(), tiles = x.tiles();
  const auto rows_of = [&](int64_t tile) {
    const int64_t first = tile % tiles * TILE;
    return Rows{tile / tiles, first, std::min(TILE, x.T * x.H - first)};
  };
#pragma omp parallel num_threads(x.threads) if (x.threads > 1)
  {
    int64_t thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < x.B * tiles * parts; task++) {
      const int64_t kept = parts > 1 ? task : thread;
      attend(x, rows_of(task / parts), task % parts, x.work + thread * x.scratch(), Part(x, kept));
      if (parts == 1) finish(x, rows_of(task), kept);
    }
#pragma omp for schedule(dynamic)
    for (int64_t tile = 0; tile < (parts > 1 ? x.B * tiles : 0); tile++) finish(x, rows_of(tile), tile * parts);
  }
}
