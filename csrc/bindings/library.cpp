// Every operator of align_ext, on one page. Formulas and shapes: csrc/ops/<op>.h; Python: align_ext/ops/<op>.py.
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(align_ext, m) {
  m.def("group_rows(Tensor group, int groups) -> Tensor order");
  m.def("grouped_lora(Tensor x, Tensor A, Tensor B, float scaling, Tensor? offsets, Tensor? order, float p, "
        "Tensor? rng, Tensor? weight, Tensor? bias, Tensor? base_out) -> (Tensor y, Tensor z)");
  m.def("grouped_lora_backward(Tensor dy, Tensor? dz, Tensor x, Tensor z, Tensor A, Tensor B, float scaling, "
        "Tensor? offsets, Tensor? order, float p, Tensor? rng, Tensor? weight, bool need_dx) "
        "-> (Tensor dx, Tensor dA, Tensor dB)");

  m.def("dropout_sum(Tensor x, Tensor A, Tensor B, float scaling, float offset_scaling, Tensor? A0, Tensor? B0, "
        "int site, float p, Tensor? rng, Tensor? weight, Tensor? bias, Tensor? base_out) -> (Tensor y, Tensor z)");
  m.def("dropout_sum_backward(Tensor dy, Tensor? dz, Tensor x, Tensor z, Tensor A, Tensor B, float scaling, "
        "float offset_scaling, Tensor? A0, Tensor? B0, int site, float p, Tensor? rng, Tensor? weight, bool need_dx) "
        "-> (Tensor dx, Tensor dA, Tensor dB)");

  m.def("routed_lora(Tensor x, Tensor A, Tensor B, Tensor R, float scaling, float offset_scaling, Tensor? A0, "
        "Tensor? B0, int top_k, float tau, int site, float p, Tensor? rng, Tensor? weight, Tensor? bias, "
        "Tensor? base_out) -> (Tensor y, Tensor z, Tensor w)");
  m.def("routed_lora_backward(Tensor dy, Tensor? dz, Tensor? dw, Tensor x, Tensor z, Tensor w, Tensor A, Tensor B, "
        "Tensor R, float scaling, float offset_scaling, Tensor? A0, Tensor? B0, float tau, int site, float p, "
        "Tensor? rng, Tensor? weight, bool need_dx) -> (Tensor dx, Tensor dA, Tensor dB, Tensor dR)");

  // Up to three layers with the same x, each as in dropout_sum or, with R, routed_lora. R, A0, B0, bias, dz and dw:
  // empty, or one for each layer, without elements where there is none.
  m.def("sibling_lora(Tensor x, Tensor[] A, Tensor[] B, Tensor[] R, float[] scaling, float[] offset_scaling, "
        "Tensor[] A0, Tensor[] B0, int top_k, float tau, int site, float p, Tensor? rng, Tensor[] weight, "
        "Tensor[] bias) -> (Tensor[] y, Tensor[] z, Tensor[] w)");
  m.def("sibling_lora_backward(Tensor[] dy, Tensor[] dz, Tensor[] dw, Tensor x, Tensor[] z, Tensor[] w, Tensor[] A, "
        "Tensor[] B, Tensor[] R, float[] scaling, float[] offset_scaling, Tensor[] A0, Tensor[] B0, float tau, "
        "int site, float p, Tensor? rng, Tensor[] weight, bool need_dx) "
        "-> (Tensor dx, Tensor[] dA, Tensor[] dB, Tensor[] dR)");

  // These take all layers at once: z holds the latents [tokens, rank of the layer] of each, for the same tokens.
  m.def("task_moments(Tensor[] z, Tensor task, int num_tasks, int rank) -> Tensor");
  m.def("gaussian_kl_tables(Tensor moments, float eps, int ddof, bool mean_pairs) -> (Tensor loss, Tensor tables)");
  m.def("gaussian_kl(Tensor z, Tensor task, int num_tasks, float eps, int ddof, bool mean_pairs) "
        "-> (Tensor loss, Tensor tables)");
  m.def("gaussian_kl_backward(Tensor d_loss, float scale, Tensor[] z, Tensor task, Tensor tables) -> Tensor dz");

  m.def("mk_mmd(Tensor[] z, Tensor task, int num_tasks, float[] bandwidths, int num_kernels, bool u_statistic, "
        "int n_max, bool mean_pairs) -> (Tensor loss, Tensor gradient, Tensor slot)");
  m.def("mk_mmd_backward(Tensor d_loss, Tensor gradient, Tensor slot, ScalarType dtype) -> Tensor dz");
}
// clang-format on
