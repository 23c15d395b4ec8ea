// Every operator of align_ext, on one page. Formulas and shapes: csrc/ops/<op>.h; Python: align_ext/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(align_ext, m) {
  // ids, step and slot reach the Python autograd formula only (align_ext/ops/_keyed.py); no kernel reads them.
  m.def(
      "grouped_lora(Tensor x, Tensor A, Tensor B, float scaling, Tensor? offsets, Tensor? group, float p, "
      "Tensor? rng, Tensor? weight, Tensor? bias, Tensor? base_out, Tensor? ids, Tensor? step, Tensor? slot) "
      "-> (Tensor y, Tensor z)");
  m.def(
      "grouped_lora_backward(Tensor dy, Tensor? dz, Tensor x, Tensor z, Tensor A, Tensor B, float scaling, "
      "Tensor? offsets, Tensor? group, float p, Tensor? rng, Tensor? weight, bool need_dx) "
      "-> (Tensor dx, Tensor dA, Tensor dB)");

  m.def("task_moments(Tensor z, Tensor task, int num_tasks) -> Tensor");
  m.def("gaussian_kl_tables(Tensor moments, float eps, int ddof, bool mean_pairs) -> (Tensor loss, Tensor tables)");
  m.def(
      "gaussian_kl(Tensor z, Tensor task, int num_tasks, float eps, int ddof, bool mean_pairs) "
      "-> (Tensor loss, Tensor tables)");
  m.def("gaussian_kl_backward(Tensor d_loss, Tensor z, Tensor task, Tensor tables) -> Tensor dz");
}
