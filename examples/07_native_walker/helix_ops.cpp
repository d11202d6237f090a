// helix:: ops for a process without Python, as helix_compile/kernels/reference.py defines them: what a walk of MLA or of
// grouped queries calls beside programs and collectives, on a cache in the model's dtype. Any walker finds them by torch's
// dispatcher; an op that is not here (of windows, FP8, an indexer's choice) is refused there by name.

#include <ATen/ATen.h>
#include <torch/library.h>

using at::Tensor;
using In = const Tensor&;
using Two = std::tuple<Tensor, Tensor>;
constexpr auto DEAD = -std::numeric_limits<double>::infinity();

at::ScalarType wide(In x) { return at::promote_types(x.scalar_type(), at::kFloat); }

Two shard_index(In positions, In rank, int64_t cp, int64_t tpb) {
  Tensor block = positions.floor_divide(tpb), ends = positions + 1;
  Tensor slots = block.floor_divide(cp) * tpb + positions.remainder(tpb);
  Tensor rest = (ends.remainder(tpb * cp) - rank * tpb).clamp(0, tpb);
  Tensor mine = block.remainder(cp).eq(rank).logical_and(positions >= 0);
  return {at::where(mine, slots, -1), (ends.floor_divide(tpb * cp) * tpb + rest).to(at::kInt)};
}

Tensor cache_append(Tensor cache, In pages, In slots, In visible, In first, In second) {
  auto mine = at::where(slots >= 0);
  auto of_mine = [&](In x) { return x.index({mine[0], mine[1]}); };
  Tensor slot = of_mine(slots), page = pages.index({mine[0], slot.floor_divide(cache.size(1))});
  Tensor rows = at::cat({of_mine(first), of_mine(second)}, -1).to(cache.scalar_type());
  cache.index_put_({page, slot.remainder(cache.size(1))}, rows);
  return visible.clone();
}

Two gqa_decode(In q, In keys, In values, In pages, In visible, double scale) {
  int64_t T = q.size(1), H = q.size(2), K = keys.size(2), V = values.size(3);
  int64_t B = q.size(0);
  Tensor o = at::zeros({B, T, H, V}, q.options()), lse = at::full({B, T, H}, DEAD, q.options().dtype(wide(q)));
  for (int64_t b = 0; b < B; b++) {
    int64_t S = visible[b].max().item<int64_t>();
    if (!S) continue;  // an empty shard: o = 0 and lse = -inf stand
    Tensor used = pages[b].slice(0, 0, (S + keys.size(1) - 1) / keys.size(1));
    auto rows = [&](In c) { return c.index({used}).flatten(0, 1).slice(0, 0, S).to(wide(q)).movedim(1, 0); };
    Tensor queries = q[b].to(wide(q)).reshape({T, K, H / K, -1}).movedim(1, 0).reshape({K, T * H / K, -1});
    Tensor scores = (at::matmul(queries, rows(keys).mT()) * scale).view({K, T, H / K, S});
    scores = scores.masked_fill((at::arange(S) >= visible[b].unsqueeze(1)).unsqueeze(1), DEAD);
    Tensor total = at::logsumexp(scores, {-1});
    Tensor weights = (scores - total.masked_fill(total == DEAD, 0).unsqueeze(-1)).exp().view({K, -1, S});
    o[b].copy_(at::matmul(weights, rows(values)).view({K, T, H / K, V}).movedim(0, 1).reshape({T, H, V}));
    lse[b].copy_(total.movedim(0, 1).reshape({T, H}));
  }
  return {o, lse};
}

Two mla_decode(In latent, In rope, In cache, In pages, In visible, double scale) {
  Tensor keys = cache.unsqueeze(2);  // one KV head, whose values are the first channels of its keys
  return gqa_decode(at::cat({latent, rope}, -1), keys, keys.slice(3, 0, latent.size(3)), pages, visible, scale);
}

Tensor pack_heads(In o, In lse, int64_t peers) {
  auto rows = [&](In x) {
    return x.unflatten(2, {peers, x.size(2) / peers}).movedim(2, 0).reshape({peers, -1}).contiguous();
  };
  if (o.scalar_type() == lse.scalar_type()) return at::cat({rows(lse), rows(o)}, 1);
  return at::cat({rows(lse).view(at::kByte), rows(o).view(at::kByte)}, 1);
}

Tensor moe_experts(In x, In ids, In weights, In gate_up, In down, In first) {
  Tensor out = at::zeros(x.sizes(), x.options().dtype(wide(x)));
  for (int64_t expert = 0; expert < gate_up.size(0); expert++) {
    auto chosen = at::where(ids - first == expert);
    Tensor rows = x.index({chosen[0]});
    Tensor gate = at::matmul(rows, gate_up[expert][0].t()), up = at::matmul(rows, gate_up[expert][1].t());
    Tensor y = at::matmul(at::silu(gate) * up, down[expert].t()).to(wide(x));
    out.index_add_(0, chosen[0], y * weights.index({chosen[0], chosen[1]}).to(wide(x)).unsqueeze(1));
  }
  return out.to(x.scalar_type());
}

TORCH_LIBRARY(helix, m) {
  m.def("shard_index", &shard_index), m.def("cache_append", &cache_append), m.def("gqa_decode", &gqa_decode);
  m.def("mla_decode", &mla_decode), m.def("pack_heads", &pack_heads), m.def("moe_experts", &moe_experts);
}
