#include <numeric>
#include <stdexcept>

#include <openvino/openvino.hpp>

#include "network.hpp"

struct Network::State {
  std::shared_ptr<ov::Model> model;
  ov::CompiledModel compiled;
  ov::InferRequest request;
};

Network::Network(const std::string& path, const Options& options) : state_(new State) {
  ov::Core core;
  state_->model = core.read_model(path);
  // Without this hint OpenVINO computes in bfloat16 wherever the CPU has it.
  const auto precision = options.is_bfloat16 ? ov::element::bf16 : ov::element::f32;
  ov::AnyMap settings = {ov::hint::inference_precision(precision),
                         ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY)};
  if (options.threads) settings.insert(ov::inference_num_threads(options.threads));
  state_->compiled = core.compile_model(state_->model, "CPU", settings);
  state_->request = state_->compiled.create_infer_request();
}

Network::~Network() = default;

std::string Network::metadata() const {
  if (!state_->model->has_rt_info("framework", "sparseinst_jax"))
    throw std::runtime_error("the model was not written by `sparseinst export`");
  return state_->model->get_rt_info<std::string>("framework", "sparseinst_jax");
}

Selection Network::run(const Image& padded, Size valid) {
  const size_t height = size_t(padded.size.height), width = size_t(padded.size.width);
  int64_t valid_size[] = {valid.height, valid.width};
  auto* pixels = const_cast<uint8_t*>(padded.rgb.data());  // a tensor over them; it is only read
  state_->request.set_tensor("images", ov::Tensor(ov::element::u8, {1, height, width, 3}, pixels));
  state_->request.set_tensor("valid_size", ov::Tensor(ov::element::i64, {1, 2}, valid_size));
  state_->request.infer();

  const auto get = [&](const char* name, size_t count = 0) {
    const ov::Tensor tensor = state_->request.get_tensor(name);
    if (count && tensor.get_size() != count)
      throw std::runtime_error(std::string("the model gives another number of ") + name + " than scores");
    return tensor;
  };
  const ov::Tensor scores = get("scores");
  const size_t count = scores.get_size();
  const ov::Tensor labels = get("labels", count), is_kept = get("is_kept", count);
  Selection found;
  found.scores.assign(scores.data<float>(), scores.data<float>() + count);
  found.labels.assign(labels.data<int64_t>(), labels.data<int64_t>() + count);
  found.is_kept.assign(is_kept.data<bool>(), is_kept.data<bool>() + count);
  found.mask_index.resize(count);
  std::iota(found.mask_index.begin(), found.mask_index.end(), 0);
  const char* masks_name = "mask_probs";
  for (const auto& output : state_->compiled.outputs()) {
    if (output.get_names().count("mask_logits")) masks_name = "mask_logits";
    if (!output.get_names().count("query_index")) continue;
    const ov::Tensor index = get("query_index", count);
    found.mask_index.assign(index.data<int64_t>(), index.data<int64_t>() + count);
  }
  const ov::Tensor masks = get(masks_name);
  if (masks.get_shape().size() != 4) throw std::runtime_error("the model's masks have no four axes");
  found.grid = {int(masks.get_shape()[2]), int(masks.get_shape()[3])};
  found.masks.assign(masks.data<float>(), masks.data<float>() + masks.get_size());
  return found;
}
