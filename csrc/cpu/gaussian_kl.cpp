// Moments: blocks of 1024 rows, each with a mean about a pivot and then squares about that mean, merged in block
// order (Chan). Tables: one layer after the other, in double. Backward: one pass over z.
#include "ops/gaussian_kl.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace align::cpu {
namespace {

constexpr int64_t kBlockRows = 1024;
constexpr int64_t kDims = 32;  // dimensions handled at a time, in local arrays

// First row of a run of equal ids that ends before end.
ALIGN_INLINE int64_t run_end(const int64_t* task, int64_t t, int64_t end) {
  const int64_t id = task[t];
  while (t < end && task[t] == id) ++t;
  return t;
}

// Calls body(constant width, first dimension) over [0, rank) in pieces of 32, 8 and 1, so that inner loops have
// constant lengths.
template <typename Body>
ALIGN_INLINE void for_dims(int64_t rank, const Body& body) {
  int64_t d = 0;
  for (; d + kDims <= rank; d += kDims) body(std::integral_constant<int, kDims>{}, d);
  for (; d + 8 <= rank; d += 8) body(std::integral_constant<int, 8>{}, d);
  for (; d < rank; ++d) body(std::integral_constant<int, 1>{}, d);
}

// ---- Moments

// A task's n | mean | M2 within a block of rows.
template <typename A>
struct Moments {
  A* data;
  int64_t rank;

  ALIGN_INLINE A& count() const { return data[0]; }
  ALIGN_INLINE A* mean() const { return data + 1; }
  ALIGN_INLINE A* m2() const { return data + 1 + rank; }
};

template <typename T>
ALIGN_INLINE Moments<Acc<T>> moments_of(const TaskMomentsArgs<T>& args, Acc<T>* all, int64_t i) {
  return {all + i * (2 * args.rank + 1), args.rank};
}

// Calls body(id, first row, last row) for every run of rows of a task that counts.
template <typename T, typename Body>
ALIGN_INLINE void for_runs(const TaskMomentsArgs<T>& args, int64_t begin, int64_t end, const Body& body) {
  for (int64_t t = begin; t < end;) {
    const int64_t last = run_end(args.task, t, end), id = args.task[t];
    if (id >= 0 && id < args.tasks) body(id, t, last);
    t = last;
  }
}

// Row pivot of each task is its first row in the block: while sums are collected M2 holds it, and mean the sum of
// differences from it.
template <typename T>
ALIGN_INLINE void block_means(const TaskMomentsArgs<T>& args, int64_t begin, int64_t end, Acc<T>* out) {
  using A = Acc<T>;
  const int64_t rank = args.rank;
  for_runs(args, begin, end, [&](int64_t id, int64_t first, int64_t last) ALIGN_INLINE_LAMBDA {
    const Moments<A> m = moments_of(args, out, id);
    if (m.count() == 0) {
      for (int64_t d = 0; d < rank; ++d) m.m2()[d] = widen(args.z[first * rank + d]);
    }
    m.count() += A(last - first);
    for_dims(rank, [&](auto width, int64_t d) ALIGN_INLINE_LAMBDA {
      A sum[width()] = {};
      for (int64_t t = first; t < last; ++t) {
        for (int l = 0; l < width(); ++l) sum[l] += widen(args.z[t * rank + d + l]) - m.m2()[d + l];
      }
      for (int l = 0; l < width(); ++l) m.mean()[d + l] += sum[l];
    });
  });
  for (int64_t i = 0; i < args.tasks; ++i) {
    const Moments<A> m = moments_of(args, out, i);
    for (int64_t d = 0; d < rank && m.count() > 0; ++d) {
      m.mean()[d] = m.m2()[d] + m.mean()[d] / m.count();
      m.m2()[d] = 0;
    }
  }
}

template <typename T>
ALIGN_INLINE void block_squares(const TaskMomentsArgs<T>& args, int64_t begin, int64_t end, Acc<T>* out) {
  using A = Acc<T>;
  const int64_t rank = args.rank;
  for_runs(args, begin, end, [&](int64_t id, int64_t first, int64_t last) ALIGN_INLINE_LAMBDA {
    const Moments<A> m = moments_of(args, out, id);
    for_dims(rank, [&](auto width, int64_t d) ALIGN_INLINE_LAMBDA {
      A sum[width()] = {};
      for (int64_t t = first; t < last; ++t) {
        for (int l = 0; l < width(); ++l) {
          const A difference = widen(args.z[t * rank + d + l]) - m.mean()[d + l];
          sum[l] += difference * difference;
        }
      }
      for (int l = 0; l < width(); ++l) m.m2()[d + l] += sum[l];
    });
  });
}

template <typename T>
struct MomentsJob {
  const TaskMomentsArgs<T>& args;
  Acc<T>* partial;  // [blocks, tasks, 2 rank + 1]
};

template <typename T>
void moments_blocks(const MomentsJob<T>& job, int64_t first, int64_t last) {
  run_widest([&](auto) ALIGN_INLINE_LAMBDA {
    const auto& args = job.args;
    const int64_t size = args.tasks * (2 * args.rank + 1);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlockRows, end = std::min(begin + kBlockRows, args.tokens);
      Acc<T>* out = job.partial + block * size;
      std::fill_n(out, size, Acc<T>(0));
      block_means(args, begin, end, out);
      block_squares(args, begin, end, out);
    }
  });
}

// Chan's merge of the blocks of one task, in their order.
template <typename T>
void merge_task(const MomentsJob<T>& job, int64_t blocks, int64_t i) {
  const auto& args = job.args;
  const int64_t size = args.tasks * (2 * args.rank + 1);
  const Moments<Acc<T>> out = moments_of(args, args.moments, i);
  std::fill_n(out.data, 2 * args.rank + 1, Acc<T>(0));
  for (int64_t block = 0; block < blocks; ++block) {
    const Moments<Acc<T>> b = moments_of(args, job.partial + block * size, i);
    if (b.count() == 0) continue;
    const Acc<T> total = out.count() + b.count(), share = b.count() / total;
    for (int64_t d = 0; d < args.rank; ++d) {
      const Acc<T> delta = b.mean()[d] - out.mean()[d];
      out.mean()[d] += delta * share;
      out.m2()[d] += b.m2()[d] + delta * delta * out.count() * share;
    }
    out.count() = total;
  }
}

// ---- Tables

// Sums over the active tasks, of kDims dimensions.
struct TaskSums {
  double v[kDims] = {}, mu[kDims] = {};                  // then their means
  double p[kDims] = {}, pc[kDims] = {}, c2[kDims] = {};  // sum p, p c, c^2
  double spread[kDims] = {}, weighted[kDims] = {};       // sum (v - mean v)^2 p, p c^2
};

template <typename A>
struct LayerMoments {
  const GaussianKlTablesArgs<A>& args;
  const A* moments;  // [tasks, 2 rank + 1]

  double n(int64_t i) const { return moments[i * (2 * args.rank + 1)]; }
  double mu(int64_t i, int64_t d) const { return moments[i * (2 * args.rank + 1) + 1 + d]; }
  double v(int64_t i, int64_t d) const {
    return moments[i * (2 * args.rank + 1) + 1 + args.rank + d] / (n(i) - args.ddof) + args.eps;
  }
  bool active(int64_t i) const { return n(i) >= std::max(2, 1 + args.ddof); }
};

// The loss's terms of dimensions [first, first + count), not yet divided by 4; fills sums.
template <typename A>
double sum_tasks(const LayerMoments<A>& layer, double active, int64_t first, int64_t count, TaskSums& sums) {
  const int64_t tasks = layer.args.tasks;
  for (int64_t i = 0; i < tasks; ++i) {
    if (!layer.active(i)) continue;
    for (int64_t l = 0; l < count; ++l) {
      sums.v[l] += layer.v(i, first + l) / active;
      sums.mu[l] += layer.mu(i, first + l) / active;
    }
  }
  for (int64_t i = 0; i < tasks; ++i) {
    if (!layer.active(i)) continue;
    for (int64_t l = 0; l < count; ++l) {
      const double v = layer.v(i, first + l), p = 1 / v, c = layer.mu(i, first + l) - sums.mu[l];
      sums.p[l] += p;
      sums.pc[l] += p * c;
      sums.c2[l] += c * c;
      sums.spread[l] += (v - sums.v[l]) * (v - sums.v[l]) * p;
      sums.weighted[l] += p * c * c;
    }
  }
  double loss = 0;
  for (int64_t l = 0; l < count; ++l) {
    loss += active / sums.v[l] * sums.spread[l] + active * sums.weighted[l] + sums.p[l] * sums.c2[l];
  }
  return loss;
}

template <typename A>
void fill_tables(const LayerMoments<A>& layer, double active, double scale, int64_t first, int64_t count,
                 const TaskSums& sums, A* tables) {
  const int64_t rank = layer.args.rank;
  for (int64_t i = 0; i < layer.args.tasks; ++i) {
    if (!layer.active(i)) continue;
    A* a = tables + i * 3 * rank + first;
    A *b = a + rank, *center = b + rank;
    for (int64_t l = 0; l < count; ++l) {
      const double mu = layer.mu(i, first + l), p = 1 / layer.v(i, first + l), c = mu - sums.mu[l];
      const double d_mu = 0.5 * (active * p * c + c * sums.p[l] - sums.pc[l]);
      const double d_var = 0.25 * (sums.p[l] - p * p * (active * sums.v[l] + active * c * c + sums.c2[l]));
      a[l] = A(scale * d_mu / layer.n(i));
      b[l] = A(scale * 2 * d_var / (layer.n(i) - layer.args.ddof));
      center[l] = A(mu);
    }
  }
}

template <typename A>
void layer_tables(const GaussianKlTablesArgs<A>& args, int64_t index) {
  const int64_t rank = args.rank, tasks = args.tasks;
  const LayerMoments<A> layer{args, args.moments + index * tasks * (2 * rank + 1)};
  A* tables = args.tables + index * tasks * 3 * rank;
  std::fill_n(tables, tasks * 3 * rank, A(0));
  double active = 0, loss = 0;
  for (int64_t i = 0; i < tasks; ++i) active += layer.active(i);
  const double scale = args.mean_pairs ? 2 / (active * (active - 1)) : 1;
  for (int64_t first = 0; first < rank && active >= 2; first += kDims) {
    const int64_t count = std::min(kDims, rank - first);
    TaskSums sums;
    loss += sum_tasks(layer, active, first, count, sums);
    fill_tables(layer, active, scale, first, count, sums, tables);
  }
  args.loss[index] = active >= 2 ? A(0.25 * scale * loss) : A(0);
}

// ---- Backward

template <typename T>
void backward_rows(const GaussianKlBackwardArgs<T>& args, int64_t begin, int64_t end) {
  run_widest([&](auto) ALIGN_INLINE_LAMBDA {
    using A = Acc<T>;
    const int64_t rank = args.rank;
    const A d_loss = args.d_loss[0];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t id = args.task[t];
      const bool counts = id >= 0 && id < args.tasks;
      const A* a = args.tables + (counts ? id * 3 * rank : 0);
      const A *b = a + rank, *mu = b + rank;
      for_dims(rank, [&](auto width, int64_t d) ALIGN_INLINE_LAMBDA {
        for (int l = 0; l < width(); ++l) {
          const int64_t e = t * rank + d + l;
          const A dz = counts ? d_loss * (a[d + l] + b[d + l] * (widen(args.z[e]) - mu[d + l])) : A(0);
          args.dz[e] = narrow<T>(dz);
        }
      });
    }
  });
}

}  // namespace

template <typename T>
int64_t task_moments_workspace(int64_t tokens, int64_t rank, int64_t tasks) {
  return (tokens + kBlockRows - 1) / kBlockRows * tasks * (2 * rank + 1) * int64_t(sizeof(Acc<T>));
}

template <typename T>
void task_moments(const TaskMomentsArgs<T>& args) {
  const MomentsJob<T> job{args, static_cast<Acc<T>*>(args.workspace)};
  const int64_t blocks = (args.tokens + kBlockRows - 1) / kBlockRows;
  parallel_for(0, blocks, 4, [&job](int64_t begin, int64_t end) { moments_blocks(job, begin, end); });
  for (int64_t i = 0; i < args.tasks; ++i) merge_task(job, blocks, i);
}

template <typename A>
void gaussian_kl_tables(const GaussianKlTablesArgs<A>& args) {
  parallel_for(0, args.layers, 16, [&args](int64_t begin, int64_t end) {
    for (int64_t layer = begin; layer < end; ++layer) layer_tables(args, layer);
  });
}

template <typename T>
void gaussian_kl_backward(const GaussianKlBackwardArgs<T>& args) {
  parallel_for(0, args.tokens, 2048, [&args](int64_t begin, int64_t end) { backward_rows(args, begin, end); });
}

#define ALIGN_INSTANTIATE(T)                                             \
  template int64_t task_moments_workspace<T>(int64_t, int64_t, int64_t); \
  template void task_moments(const TaskMomentsArgs<T>&);                 \
  template void gaussian_kl_backward(const GaussianKlBackwardArgs<T>&);
ALIGN_INSTANTIATE(float)
ALIGN_INSTANTIATE(double)
ALIGN_INSTANTIATE(bfloat16)
ALIGN_INSTANTIATE(float16)
#undef ALIGN_INSTANTIATE
template void gaussian_kl_tables(const GaussianKlTablesArgs<float>&);
template void gaussian_kl_tables(const GaussianKlTablesArgs<double>&);

}  // namespace align::cpu
