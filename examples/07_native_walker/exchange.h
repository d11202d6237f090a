// Collectives between threads.

#pragma once

#include <barrier>
#include <memory>

#include "files.h"

// What ranks give each other: the members of a group meet, and each takes its part of what all brought.
struct Group {
  std::vector<int64_t> members;
  std::vector<Tensor> brought;
  std::unique_ptr<std::barrier<>> meet;

  Tensor run(const std::string& op, int64_t rank, const Tensor& x) {
    size_t place = std::find(members.begin(), members.end(), rank) - members.begin(), many = members.size();
    brought[place] = x.contiguous();
    meet->arrive_and_wait();
    std::vector<Tensor> all = brought;
    meet->arrive_and_wait();
    if (op == "all_gather_into_tensor") return at::cat(all);
    if (op == "all_to_all_single") {
      for (auto& part : all) part = part.chunk(many)[place];
      return at::cat(all);
    }
    TORCH_CHECK(op == "all_reduce" || op == "reduce_scatter_tensor", "no exchange for ", op);
    Tensor sum = all[0].clone();
    for (size_t i = 1; i < many; i++) sum += all[i];
    return op == "all_reduce" ? sum : sum.chunk(many)[place].clone();
  }
};

// By the axes of the mesh.
struct Exchange {
  std::map<std::string, std::vector<Group>> groups;

  Tensor run(const std::string& op, const std::string& axis, int64_t rank, const Tensor& x) {
    for (auto& g : groups.at(axis))
      if (std::count(g.members.begin(), g.members.end(), rank)) return g.run(op, rank, x);
    TORCH_CHECK(false, "rank ", rank, " is in no group of ", axis);
  }
};

// Of "groups" of a manifest.
inline Exchange exchange_of(const Json& said) {
  Exchange made;
  for (auto& [axis, groups] : said.of)
    for (auto& g : groups.list) {
      size_t many = g.list.size();
      made.groups[axis].push_back({ints(g), std::vector<Tensor>(many), std::make_unique<std::barrier<>>(many)});
    }
  return made;
}
