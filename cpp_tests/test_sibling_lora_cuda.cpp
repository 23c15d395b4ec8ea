// The CUDA kernels of sibling_lora, unmodified, under the SIMT engine: no error in any thread order, the numbers of
// naive loops in double, the same bits in every order, and one read of x in each direction.
#include "cuda/plan.h"
#include "sibling_lora_problem.h"
#include "simt_support.h"

using namespace align;
using namespace align::test;
using simt::Buffer;
using simt::Op;

namespace {

// The tensors of one layer in device memory.
template <typename T, typename TA>
struct OnDevice {
  Buffer<TA> A, B, A0, B0, R;
  Buffer<T> y_in, bias, dy, y;
  Buffer<float> dz_in, dw_in, z, w, dA, dB, dR;

  explicit OnDevice(const HeadsData<T>& data)
      : A("A", cast<TA>(data.A)),
        B("B", cast<TA>(data.B)),
        A0("A0", cast<TA>(data.A0)),
        B0("B0", cast<TA>(data.B0)),
        R("R", cast<TA>(data.R)),
        y_in("y_in", data.y_in),
        bias("bias", data.bias),
        dy("dy", data.dy),
        y("y", data.y_in.size()),
        dz_in("dz_in", data.dz_in),
        dw_in("dw_in", data.dw_in),
        z("z", data.dz_in.size()),
        w("w", data.dw_in.size()),
        dA("dA", data.A.size()),
        dB("dB", data.B.size()),
        dR("dR", data.R.size()) {}
};

template <typename T, typename TA = T>
void run(const SiblingProblem& problem, SiblingData<T>& data) {
  const Buffer<uint64_t> rng("rng", data.layers[0].rng);
  const Buffer<T> x("x", data.layers[0].x), dx_in("dx_in", data.layers[0].dx_in), dx("dx", data.layers[0].x.size());
  std::vector<std::unique_ptr<OnDevice<T, TA>>> layers;
  SiblingLoraForwardArgs<T, TA> forward{problem.count(), {}, nullptr};
  SiblingLoraBackwardArgs<T, TA> backward{problem.count(), {}, nullptr};
  for (int i = 0; i < problem.count(); ++i) {
    layers.push_back(std::make_unique<OnDevice<T, TA>>(data.layers[i]));
    OnDevice<T, TA>& layer = *layers.back();
    const HeadsProblem of_layer = problem.layer(i);
    const HeadsInputs<T, TA> inputs{.shape = of_layer.shape,
                                    .dropout = {problem.p, rng.data()},
                                    .scaling = of_layer.scaling,
                                    .offset_scaling = of_layer.offset_scaling,
                                    .x = x.data(),
                                    .A = layer.A.data(),
                                    .B = layer.B.data(),
                                    .A0 = layer.A0.data(),
                                    .B0 = layer.B0.data()};
    forward.layers[i] = {{inputs, layer.y_in.data(), layer.bias.data(), layer.z.data(), layer.y.data(), nullptr},
                         of_layer.routing,
                         layer.R.data(),
                         layer.w.data()};
    backward.layers[i] = {{.inputs = inputs,
                           .z = layer.z.data(),
                           .dx_in = problem.gradients_in ? dx_in.data() : nullptr,
                           .dy = layer.dy.data(),
                           .dz_in = problem.gradients_in ? layer.dz_in.data() : nullptr,
                           .dx = problem.dx_wanted ? dx.data() : nullptr,
                           .dA = layer.dA.data(),
                           .dB = layer.dB.data(),
                           .workspace = nullptr},
                          of_layer.routing,
                          layer.R.data(),
                          layer.w.data(),
                          problem.gradients_in ? layer.dw_in.data() : nullptr,
                          layer.dR.data()};
  }
  {
    const Buffer<char> workspace("partials", cuda::sibling_lora_workspace(forward));
    forward.workspace = workspace.data();
    cuda::sibling_lora_forward<T, TA>(forward, nullptr);
  }
  const Buffer<char> workspace("partials", cuda::sibling_lora_workspace(backward));
  backward.workspace = workspace.data();
  cuda::sibling_lora_backward<T, TA>(backward, nullptr);
  for (int i = 0; i < problem.count(); ++i) {
    HeadsData<T>& layer = data.layers[i];
    layer.z = layers[i]->z.host(), layer.w = layers[i]->w.host(), layer.y = layers[i]->y.host();
    layer.dA = layers[i]->dA.host(), layer.dB = layers[i]->dB.host(), layer.dR = layers[i]->dR.host();
  }
  data.layers[0].dx = dx.host();
}

template <typename T, typename TA = T>
void check_problem(const SiblingProblem& problem, int major = 9) {
  SiblingData<T> data = make_data<T>(problem);
  simt::options() = {};
  simt::options().major = major;
  simt::options().traffic = false;
  simt::reports().clear();
  run<T, TA>(problem, data);
  CHECK(clean());
  check_results(problem, data, /*rounds_latent=*/true);
  simt::options() = {};
}

void check_all_types(const SiblingProblem& problem) {
  check_problem<float>(problem);
  check_problem<bfloat16>(problem);
  check_problem<float16>(problem);
}

constexpr int64_t kTwoSplits = 9 * 64 + 24;  // columns of ten tiles of 16-bit elements: two splits, with a tail

}  // namespace

TEST(layers_agree_with_naive_loops) {
  for (double p : {0.0, 0.3}) {
    check_all_types({140, 72, {{40, 8}, {24, 8}, {136, 8}}, p});  // padded ranks 32, 16 for each mask
    check_all_types({33, 31, {{17, 3}, {40, 20}}, p});            // one and two passes over dy
    check_all_types({20, 40, {{24, 33}, {16, 5}, {8, 40}}, p});   // several chunks of ranks
    check_all_types({20, 16, {{8, 4}}, p});
  }
  check_problem<bfloat16>({140, kTwoSplits, {{kTwoSplits + 8, 8}, {200, 8}}, 0.1});
  check_problem<bfloat16>({600, 72, {{40, 8}, {24, 8}, {24, 8}}, 0.1});  // two chunks of rows
}

TEST(layers_with_heads_and_routers_agree_with_naive_loops) {
  for (const SiblingKind& kind : {kMLora, kPissa, kHydra, kRLora, kLoraMoe}) {
    check_all_types({20, 72, {{40, 8}, {24, 8}, {136, 8}}, 0.3, kind});
    check_problem<bfloat16>({33, 31, {{18, 3}, {40, 5}}, 0.0, kind});
  }
  check_problem<bfloat16>({140, kTwoSplits, {{kTwoSplits + 8, 8}, {200, 8}}, 0.1, kRLora});
  check_problem<bfloat16>({600, 40, {{40, 8}, {24, 4}}, 0.1, kHydra});  // two chunks of rows for each mask
}

TEST(adapters_may_be_float_on_16_bit_inputs) {
  check_problem<bfloat16, float>({40, 72, {{56, 8}, {24, 8}}, 0.2, kRLora});
  check_problem<bfloat16, float>({40, 72, {{56, 8}, {24, 8}}, 0.2});
  check_problem<float16, float>({40, 71, {{57, 20}, {23, 8}}, 0.2});
}

TEST(before_sm_80_ordinary_multiply_adds_do_the_same) {
  check_problem<float>({140, 72, {{56, 8}, {24, 8}}, 0.2}, 7);
  check_problem<float16>({40, 72, {{57, 8}, {24, 20}}, 0.2}, 7);
  check_problem<float16>({40, 72, {{56, 8}, {24, 20}}, 0.2, kRLora}, 7);
}

TEST(optional_gradients_may_be_absent) {
  for (const SiblingKind& kind : {SiblingKind{}, kRLora}) {
    check_all_types({40, 48, {{56, 8}, {24, 8}}, 0.3, kind, /*gradients_in=*/false});
    check_all_types({40, 48, {{56, 8}, {24, 8}}, 0.3, kind, true, /*dx_wanted=*/false});
  }
}

TEST(there_may_be_no_rows) {
  for (const SiblingKind& kind : {SiblingKind{}, kHydra}) check_all_types({0, 8, {{8, 4}, {8, 4}}, 0.5, kind});
}

TEST(no_order_of_threads_makes_an_error_or_changes_a_bit) {
  for (const SiblingKind& kind : {SiblingKind{}, kRLora}) {
    const SiblingProblem problem{140, 136, {{264, 8}, {40, 8}, {40, 24}}, 0.1, kind};
    SiblingData<bfloat16> data = make_data<bfloat16>(problem);
    std::vector<SiblingData<bfloat16>> all;
    for_each_order([&] {
      simt::options().traffic = false;
      run(problem, data);
      CHECK(clean());
      all.push_back(data);
    });
    for (const SiblingData<bfloat16>& one : all) {
      for (int i = 0; i < problem.count(); ++i) {
        const HeadsData<bfloat16>&layer = one.layers[i], &first = all[0].layers[i];
        CHECK(check::same_bits(layer.z, first.z) && check::same_bits(layer.dA, first.dA) &&
              check::same_bits(layer.dB, first.dB));
        CHECK(std::memcmp(layer.y.data(), first.y.data(), layer.y.size() * sizeof(bfloat16)) == 0);
      }
      const auto &dx = one.layers[0].dx, &first = all[0].layers[0].dx;
      CHECK(std::memcmp(dx.data(), first.data(), dx.size() * sizeof(bfloat16)) == 0);
    }
  }
}

// Three layers read x once in shrink, and once for dA and dR, whatever masks they see. dx is written once.
void check_traffic(const SiblingKind& kind, int64_t rank, double p) {
  const SiblingProblem problem{256, 512, {{512, rank}, {128, rank}, {128, rank}}, p, kind};
  SiblingData<bfloat16> data = make_data<bfloat16>(problem);
  simt::options() = {};
  simt::reports().clear();
  run(problem, data);
  CHECK(clean());
  const auto moved = [](Op op, const char* buffer) {
    int64_t sectors = 0;
    for (const simt::Report& report : simt::reports()) sectors += report.global(op, buffer).sectors;
    return sectors;
  };
  const auto sectors = [](int64_t elements) { return elements * int64_t(sizeof(bfloat16)) / 32; };
  const int64_t x = sectors(problem.tokens * problem.in_dim), y = sectors(problem.tokens * (512 + 128 + 128));
  CHECK(moved(Op::kLoad, "x") == 2 * x);
  CHECK(moved(Op::kLoad, "dx_in") == x && moved(Op::kStore, "dx") == x);
  CHECK(moved(Op::kLoad, "y_in") + moved(Op::kLoad, "y_in#2") + moved(Op::kLoad, "y_in#3") == y);
  const int64_t passes = kind.heads == 1 && !kind.offset ? 1 : 2;  // heads read dy for dz, and again for dB
  CHECK(moved(Op::kLoad, "dy") + moved(Op::kLoad, "dy#2") + moved(Op::kLoad, "dy#3") == passes * y);
}

TEST(x_is_read_once_in_each_direction) {
  for (double p : {0.0, 0.1}) check_traffic({}, 8, p);
  for (const SiblingKind& kind : {kMLora, kRLora, kHydra}) check_traffic(kind, 8, 0.1);
}

int main() { return check::run_tests(); }
