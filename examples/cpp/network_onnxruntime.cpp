#include <algorithm>
#include <filesystem>
#include <numeric>
#include <stdexcept>

#include <onnxruntime_cxx_api.h>

#include "network.hpp"

struct Network::State {
  Ort::Env env{ORT_LOGGING_LEVEL_ERROR};
  Ort::Session session{nullptr};
  std::vector<std::string> outputs;
};

Network::Network(const std::string& path, const Options& options) : state_(new State) {
  if (options.is_bfloat16) throw std::runtime_error("only OpenVINO computes in bfloat16 by itself");
  Ort::SessionOptions settings;
  settings.SetIntraOpNumThreads(options.threads);
  state_->session = Ort::Session(state_->env, std::filesystem::path(path).c_str(), settings);
  const Ort::AllocatorWithDefaultOptions allocator;
  for (size_t i = 0; i < state_->session.GetOutputCount(); ++i)
    state_->outputs.push_back(state_->session.GetOutputNameAllocated(i, allocator).get());
}

Network::~Network() = default;

std::string Network::metadata() const {
  const Ort::AllocatorWithDefaultOptions allocator;
  const auto value =
      state_->session.GetModelMetadata().LookupCustomMetadataMapAllocated("sparseinst_jax", allocator);
  if (!value) throw std::runtime_error("the model was not written by `sparseinst export`");
  return value.get();
}

Selection Network::run(const Image& padded, Size valid) {
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const int64_t images_shape[] = {1, padded.size.height, padded.size.width, 3}, valid_shape[] = {1, 2};
  int64_t valid_size[] = {valid.height, valid.width};
  auto* pixels = const_cast<uint8_t*>(padded.rgb.data());  // a tensor over them; it is only read
  const Ort::Value inputs[] = {
      Ort::Value::CreateTensor<uint8_t>(memory, pixels, padded.rgb.size(), images_shape, 4),
      Ort::Value::CreateTensor<int64_t>(memory, valid_size, 2, valid_shape, 2)};
  const char* input_names[] = {"images", "valid_size"};
  std::vector<const char*> output_names;
  for (const auto& name : state_->outputs) output_names.push_back(name.c_str());
  const auto outputs = state_->session.Run(Ort::RunOptions{}, input_names, inputs, 2,
                                           output_names.data(), output_names.size());

  Selection found;
  const auto find = [&](const char* name) -> const Ort::Value* {
    const auto at = std::find(state_->outputs.begin(), state_->outputs.end(), name);
    return at == state_->outputs.end() ? nullptr : &outputs[size_t(at - state_->outputs.begin())];
  };
  const auto *scores = find("scores"), *labels = find("labels"), *is_kept = find("is_kept");
  const auto* masks = find("mask_probs") ? find("mask_probs") : find("mask_logits");
  if (!scores || !labels || !is_kept || !masks)
    throw std::runtime_error("the model was not written by `sparseinst export`");
  const auto size_of = [](const Ort::Value* value) { return value->GetTensorTypeAndShapeInfo().GetElementCount(); };
  const size_t count = size_of(scores);
  const auto* index = find("query_index");
  if (size_of(labels) != count || size_of(is_kept) != count || (index && size_of(index) != count))
    throw std::runtime_error("the model gives other numbers of labels than of scores");
  found.scores.assign(scores->GetTensorData<float>(), scores->GetTensorData<float>() + count);
  found.labels.assign(labels->GetTensorData<int64_t>(), labels->GetTensorData<int64_t>() + count);
  found.is_kept.assign(is_kept->GetTensorData<bool>(), is_kept->GetTensorData<bool>() + count);
  found.mask_index.resize(count);
  std::iota(found.mask_index.begin(), found.mask_index.end(), 0);
  if (index) std::copy_n(index->GetTensorData<int64_t>(), count, found.mask_index.begin());
  const std::vector<int64_t> shape = masks->GetTensorTypeAndShapeInfo().GetShape();
  if (shape.size() != 4) throw std::runtime_error("the model's masks have no four axes");
  found.grid = {int(shape[2]), int(shape[3])};
  found.masks.assign(masks->GetTensorData<float>(), masks->GetTensorData<float>() + size_of(masks));
  return found;
}
