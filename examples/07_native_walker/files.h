// The files of a native package: JSON, as far as json.dumps writes it, and safetensors.

#pragma once

#include <ATen/ATen.h>

#include <fstream>
#include <sstream>

using at::Tensor;
using Tensors = std::map<std::string, Tensor>;

struct Json {
  char kind;  // { [ " or the first character of a number, true, false, null
  std::map<std::string, Json> of;
  std::vector<Json> list;
  std::string text;
  const Json& operator[](const std::string& key) const { return of.at(key); }
};

inline Json parsed(const std::string& s, size_t& at) {
  auto skip = [&] { at = s.find_first_not_of(" \n\t\r,:", at); };
  skip();
  Json j{s.at(at)};
  if (j.kind == '{' || j.kind == '[') {
    for (at++, skip(); s.at(at) != j.kind + 2; skip()) {
      if (j.kind == '[') { j.list.push_back(parsed(s, at)); continue; }
      std::string key = parsed(s, at).text;
      j.of.emplace(key, parsed(s, at));
    }
    at++;
  } else if (j.kind == '"') {
    for (at++; s.at(at) != '"'; at++) j.text += s.at(at += s[at] == '\\');
    at++;
  } else {
    size_t end = s.find_first_of(",]} \n", at);
    j.text = s.substr(at, end - at), at = end;
  }
  return j;
}

inline std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, path, " can't be read");
  return (std::stringstream() << file.rdbuf()).str();
}

inline Json json(const std::string& path) {
  size_t at = 0;
  return parsed(read(path), at);
}

inline at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known{
      {"F64", at::kDouble},     {"F32", at::kFloat},     {"F16", at::kHalf},     {"BF16", at::kBFloat16},
      {"float64", at::kDouble}, {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16},
      {"I64", at::kLong},       {"I32", at::kInt},       {"BOOL", at::kBool}};
  return known.at(name);
}

inline std::vector<int64_t> ints(const Json& list) {
  std::vector<int64_t> found;
  for (auto& x : list.list) found.push_back(std::stoll(x.text));
  return found;
}

inline Tensors tensors_of(const std::string& path) {
  std::string bytes = read(path);
  size_t at = 8, start = 8 + *reinterpret_cast<const uint64_t*>(bytes.data());
  Tensors found;
  for (auto& [name, x] : parsed(bytes, at).of) {
    if (name == "__metadata__") continue;
    char* first = bytes.data() + start + ints(x["data_offsets"])[0];
    found[name] = at::from_blob(first, ints(x["shape"]), dtype_of(x["dtype"].text)).clone();
  }
  return found;
}
