// The walker of a native package in C++: no Python, no helix_compile; each rank is a thread.
//
//     native_walker FOLDER STEPS OUT    FOLDER: of `helix-compile export --format aoti`
//                                       STEPS: safetensors with ids.0, positions.0 (-1: padding), ids.1, ...
//                                       OUT: a pickle of each rank's logits of each step, which torch.load() reads
//
// examples/07_native_walker.py builds it with torch's own headers and holds it to the model.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <iostream>
#include <thread>

#include "exchange.h"
#include "files.h"

using c10::IValue;
const std::string C10D = "_c10d_functional.", WAIT = C10D + "wait_tensor.default";

struct Walker {
  Json walk;
  std::map<std::string, std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> programs;
  Exchange exchange;

  static IValue value(const Json& x, const std::map<std::string, IValue>& env) {
    if (x.kind == '{') return env.at(x["node"].text);
    if (x.kind == '"') return x.text;
    if (x.kind == 'n') return {};
    if (x.kind == 't' || x.kind == 'f') return x.kind == 't';
    if (x.kind != '[' && x.text.find_first_of(".eIN") == x.text.npos) return static_cast<int64_t>(std::stoll(x.text));
    if (x.kind != '[') return std::stod(x.text);
    std::vector<IValue> items;
    for (auto& item : x.list) items.push_back(value(item, env));
    if (items.empty() || items[0].isTensor()) return c10::ivalue::Tuple::create(items);
    c10::List<int64_t> numbers;
    for (auto& item : items) numbers.push_back(item.toInt());
    return numbers;
  }

  static IValue item(const IValue& of, size_t place) {
    if (of.isTuple()) return of.toTupleRef().elements().at(place);
    return of.toTensorVector().at(place);
  }

  // An op of torch's or of helix_ops.cpp, "aten.add.Tensor", by its schema.
  static IValue call(const std::string& target, const std::vector<IValue>& args) {
    size_t dot = target.find('.'), last = target.rfind('.');
    std::string name = target.substr(0, dot) + "::" + target.substr(dot + 1, last - dot - 1);
    std::string overload = target.substr(last + 1);
    if (overload == "default") overload = "";
    auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    torch::jit::Stack stack = args;
    const auto& taken = op.schema().arguments();
    for (size_t i = args.size(); i < taken.size(); i++) stack.push_back(taken[i].default_value().value());
    op.callBoxed(stack);
    return stack.size() == 1 ? stack[0] : IValue(c10::ivalue::Tuple::create(stack));
  }

  IValue run(const Json& entries, const std::vector<IValue>& given, int64_t rank) {
    std::map<std::string, IValue> env;
    size_t next = 0;
    for (auto& entry : entries.list) {
      const std::string &name = entry["name"].text, &op = entry["op"].text, &target = entry["target"].text;
      TORCH_CHECK(!entry.of.count("kwargs"), name, ": ", target, " with keywords is not walked here");
      std::vector<IValue> args;
      if (entry.of.count("args"))
        for (auto& x : entry["args"].list) args.push_back(value(x, env));
      if (op == "placeholder") env[name] = given.at(next++);
      else if (op == "output") return args.at(0);
      else if (target == "operator.getitem") env[name] = item(args[0], args[1].toInt());
      else if (target == WAIT) env[name] = args[0];
      else if (target.starts_with(C10D)) {
        std::string collective = target.substr(C10D.size(), target.rfind('.') - C10D.size());
        env[name] = exchange.run(collective, args.back().toStringRef(), rank, args[0].toTensor());
      }
      else if (walk["bodies"].of.count(target)) env[name] = run(walk["bodies"][target], args, rank);
      else if (op == "call_module") {
        std::vector<Tensor> inputs;
        for (auto& x : args) inputs.push_back(x.toTensor());
        auto outputs = programs.at(target)->run(inputs);
        env[name] = c10::ivalue::Tuple::create(std::vector<IValue>(outputs.begin(), outputs.end()));
      } else env[name] = call(target, args);
    }
    TORCH_CHECK(false, "a graph without output");
  }
};

// Step after step of one rank: its weights, its place on the mesh and its cache by the names of the walk's inputs.
c10::List<Tensor> stepped(Walker& walker, const std::string& folder, const Tensors& steps, int64_t rank) {
  at::NoGradGuard no_grad;
  Tensors held = tensors_of(folder + "rank" + std::to_string(rank) + ".safetensors");
  c10::List<Tensor> logits;
  for (size_t step = 0; steps.count("ids." + std::to_string(step)); step++) {
    held["input_ids"] = steps.at("ids." + std::to_string(step));
    held["positions"] = steps.at("positions." + std::to_string(step));
    std::vector<IValue> given;
    for (auto& entry : walker.walk["outer"].list) {
      if (entry["op"].text != "placeholder") continue;
      const std::string& name = entry["meta"]["input"].list[1].text;
      if (name == "page_table") {  // the pages of each sequence one after the other
        int64_t B = held["input_ids"].size(0), pages = std::stoll(entry["shape"].list[1].text);
        held[name] = at::arange(B * pages).view({B, pages});
      } else if (!held.count(name)) {  // a cache, empty
        held[name] = at::zeros(ints(entry["shape"]), dtype_of(entry["dtype"].text));
      }
      given.push_back(held.at(name));
    }
    logits.push_back(walker.run(walker.walk["outer"], given, rank).toTensor());
  }
  return logits;
}

int main(int, char** argv) try {
  std::string folder = std::string(argv[1]) + "/";
  Json manifest = json(folder + "manifest.json");
  Walker walker{json(folder + "walk.json"), {}, exchange_of(manifest["groups"])};
  TORCH_CHECK(manifest["format"].text == "aoti" && manifest["version"].text == "2", folder, ": no native package");
  for (auto& [name, program] : manifest["programs"].of) {
    auto loader = std::make_unique<torch::inductor::AOTIModelPackageLoader>(folder + program["file"].text);
    bool ours = loader->get_metadata().at("helix_export") == manifest["helix_export"].text;
    TORCH_CHECK(ours, name, ": of another export");
    walker.programs[name] = std::move(loader);
  }
  Tensors steps = tensors_of(argv[2]);
  std::vector<c10::List<Tensor>> logits(std::stoul(manifest["ranks"].text));
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < logits.size(); rank++)
    threads.emplace_back([&, rank] {
      try {
        logits[rank] = stepped(walker, folder, steps, rank);
      } catch (const std::exception& error) {  // the others wait for this rank: all end
        std::cerr << "rank " << rank << ": " << error.what() << std::endl;
        std::_Exit(1);
      }
    });
  for (auto& thread : threads) thread.join();
  c10::List<c10::List<Tensor>> all;
  for (auto& of_rank : logits) all.push_back(of_rank);
  auto pickle = torch::jit::pickle_save(all);
  std::ofstream(argv[3], std::ios::binary).write(pickle.data(), pickle.size());
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
