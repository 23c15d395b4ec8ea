// Moments: blocks of 1024 rows of a layer, each with a mean about a pivot and then squares about that mean, merged in
// block order (Chan). Up to 16 rows are added in the type of z, the rest in double: the gradient is small where tasks
// are alike, and shows what the moments lost. Tables: one layer after the other, in double. Backward: one pass over z.
#include "ops/gaussian_kl.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "ops/sizes.h"

namespace align::cpu {
namespace {

constexpr int64_t kBlockRows = 1024;
constexpr int64_t kChunkRows = 16;  // rows that are added in the type of z
constexpr int64_t kDims = 16;       // dimensions handled at a time

// Returns where the run of equal ids that begins at t ends, at most end.
ALIGN_INLINE int64_t run_end(const int64_t* task, int64_t t, int64_t end) {
  const int64_t id = task[t++];
  while (t < end && task[t] == id) ++t;
  return t;
}

// Calls body(width, first dimension) for [0, rank) in pieces of 16, 8 and 1 dimensions; width is a compile-time
// constant.
template <typename Body>
ALIGN_INLINE void for_dims(int64_t rank, const Body& body) {
  int64_t d = 0;
  for (; d + kDims <= rank; d += kDims) body(std::integral_constant<int, kDims>{}, d);
  for (; d + 8 <= rank; d += 8) body(std::integral_constant<int, 8>{}, d);
  for (; d < rank; ++d) body(std::integral_constant<int, 1>{}, d);
}

// A vector with one dimension in each lane. GCC does not vectorise loops that add to memory.
template <int kWidth, typename T>
ALIGN_INLINE auto load_dims(const T* source) {
  return load<kWidth* int(sizeof(Acc<T>))>(source);
}
template <int kWidth, typename T, typename V>
ALIGN_INLINE void store_dims(T* target, const V& v) {
  store<kWidth* int(sizeof(Acc<T>))>(target, v);
}

// The same of doubles in memory, rounded to A, and a sum added to them.
template <typename A, int kWidth>
ALIGN_INLINE auto load_rounded(const double* source) {
  return __builtin_convertvector(load_dims<kWidth>(source), Vec<A, kWidth* int(sizeof(A))>);
}
template <int kWidth, typename V>
ALIGN_INLINE void add_dims(double* target, const V& sum) {
  using Wide = Vec<double, kWidth* int(sizeof(double))>;
  store_dims<kWidth>(target, load_dims<kWidth>(target) + __builtin_convertvector(sum, Wide));
}

// ---- Moments

// n | mean | M2 of a task within a block of rows.
struct Moments {
  double* data;
  int64_t rank;

  ALIGN_INLINE double& count() const { return data[0]; }
  ALIGN_INLINE double* mean() const { return data + 1; }
  ALIGN_INLINE double* m2() const { return data + 1 + rank; }
};

// The latents of one layer.
template <typename T>
struct Layer {
  const T* z;  // [tokens, rank]
  int64_t rank;
  const int64_t* task;
  int64_t tasks;
};

template <typename T>
ALIGN_INLINE Layer<T> layer_of(const Latents<T>& latents, int64_t tasks, int64_t index) {
  return {latents.z[index], latents.ranks[index], latents.task, tasks};
}

// Calls body(layer). It is compiled a second time for rank 8, because loops over such short rows cost too much.
template <typename T, typename Body>
ALIGN_INLINE void with_rank(const Layer<T>& layer, const Body& body) {
  layer.rank == 8 ? body(Layer<T>{layer.z, 8, layer.task, layer.tasks}) : body(layer);
}

template <typename T>
ALIGN_INLINE Moments moments_of(const Layer<T>& layer, double* all, int64_t i) {
  return {all + i * (2 * layer.rank + 1), layer.rank};
}

// Calls body(id, first row, end) for every run of rows of the same task, without rows that do not count.
template <typename T, typename Body>
ALIGN_INLINE void for_runs(const Layer<T>& layer, int64_t begin, int64_t end, const Body& body) {
  for (int64_t t = begin; t < end;) {
    const int64_t last = run_end(layer.task, t, end), id = layer.task[t];
    if (id >= 0 && id < layer.tasks) body(id, t, last);
    t = last;
  }
}

// Adds term(row's dimensions, load of the row's dimensions) of rows [first, last) to target, by chunks.
template <int kWidth, typename T, typename Term>
ALIGN_INLINE void add_rows(const Layer<T>& layer, int64_t first, int64_t last, int64_t d, double* target,
                           const Term& term) {
  while (first < last) {
    const int64_t end = std::min(first + kChunkRows, last);
    decltype(load_dims<kWidth>(layer.z)) sum = {};
    for (; first < end; ++first) sum += term(load_dims<kWidth>(layer.z + first * layer.rank + d));
    add_dims<kWidth>(target + d, sum);
  }
}

// The pivot of a task is its first row in the block. While sums are collected M2 holds the pivot, and mean the sum of
// the differences from it.
template <typename T>
ALIGN_INLINE void block_means(const Layer<T>& layer, int64_t begin, int64_t end, double* out) {
  const int64_t rank = layer.rank;
  for_runs(layer, begin, end, [&](int64_t id, int64_t first, int64_t last) ALIGN_INLINE_LAMBDA {
    const Moments m = moments_of(layer, out, id);
    if (m.count() == 0) {
      for (int64_t d = 0; d < rank; ++d) m.m2()[d] = widen(layer.z[first * rank + d]);
    }
    m.count() += double(last - first);
    for_dims(rank, [&](auto width, int64_t d) ALIGN_INLINE_LAMBDA {
      const auto pivot = load_rounded<Acc<T>, width()>(m.m2() + d);
      add_rows<width()>(layer, first, last, d, m.mean(), [&](const auto& z) ALIGN_INLINE_LAMBDA { return z - pivot; });
    });
  });
  for (int64_t i = 0; i < layer.tasks; ++i) {
    const Moments m = moments_of(layer, out, i);
    for (int64_t d = 0; d < rank && m.count() > 0; ++d) {
      m.mean()[d] = m.m2()[d] + m.mean()[d] / m.count();
      m.m2()[d] = 0;
    }
  }
}

// The squares are about the mean as rounded to the type of z, whose distance from the mean is taken off again.
template <typename T>
ALIGN_INLINE void block_squares(const Layer<T>& layer, int64_t begin, int64_t end, double* out) {
  const int64_t rank = layer.rank;
  for_runs(layer, begin, end, [&](int64_t id, int64_t first, int64_t last) ALIGN_INLINE_LAMBDA {
    const Moments m = moments_of(layer, out, id);
    for_dims(rank, [&](auto width, int64_t d) ALIGN_INLINE_LAMBDA {
      const auto mean = load_rounded<Acc<T>, width()>(m.mean() + d);
      add_rows<width()>(layer, first, last, d, m.m2(), [&](const auto& z) ALIGN_INLINE_LAMBDA {
        const auto difference = z - mean;
        return difference * difference;
      });
    });
  });
  for (int64_t i = 0; i < layer.tasks; ++i) {
    const Moments m = moments_of(layer, out, i);
    for (int64_t d = 0; d < rank; ++d) {
      const double rounding = m.mean()[d] - double(Acc<T>(m.mean()[d]));
      m.m2()[d] -= m.count() * rounding * rounding;
    }
  }
}

template <typename T>
struct MomentsJob {
  const TaskMomentsArgs<T>& args;
  int64_t blocks;    // blocks of rows of a layer
  double* partials;  // [layers, blocks], each with room for [tasks, 2 rank + 1] of the widest layer

  double* block_moments(int64_t layer, int64_t block) const {
    return partials + (layer * blocks + block) * args.tasks * (2 * args.latents.rank + 1);
  }
};

// Computes the moments of pieces [first, last) of all layers x blocks.
template <typename T>
void moments_blocks(const MomentsJob<T>& job, int64_t first, int64_t last) {
  run_widest([&](auto) ALIGN_INLINE_LAMBDA {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t index = piece / job.blocks, block = piece % job.blocks;
      const Layer<T> layer = layer_of(job.args.latents, job.args.tasks, index);
      const int64_t begin = block * kBlockRows, end = std::min(begin + kBlockRows, job.args.latents.tokens);
      double* out = job.block_moments(index, block);
      std::fill_n(out, layer.tasks * (2 * layer.rank + 1), 0.0);
      with_rank(layer, [&](const auto& of_rank) ALIGN_INLINE_LAMBDA {
        block_means(of_rank, begin, end, out);
        block_squares(of_rank, begin, end, out);
      });
    }
  });
}

// Merges the blocks of a task of one layer in their order (Chan).
template <typename T>
void merge_task(const MomentsJob<T>& job, int64_t index, int64_t i) {
  const Layer<T> layer = layer_of(job.args.latents, job.args.tasks, index);
  const int64_t rank = job.args.latents.rank;
  Acc<T>* out = job.args.moments + (index * layer.tasks + i) * (2 * rank + 1);
  std::fill_n(out, 2 * rank + 1, Acc<T>(0));
  double count = 0;
  for (int64_t block = 0; block < job.blocks; ++block) {
    count += moments_of(layer, job.block_moments(index, block), i).count();
  }
  out[0] = Acc<T>(count);
  for (int64_t d = 0; d < layer.rank; ++d) {
    double n = 0, mean = 0, m2 = 0;
    for (int64_t block = 0; block < job.blocks; ++block) {
      const Moments b = moments_of(layer, job.block_moments(index, block), i);
      if (b.count() == 0) continue;
      const double delta = b.mean()[d] - mean, fraction = b.count() / (n + b.count());
      mean += delta * fraction;
      m2 += b.m2()[d] + delta * delta * n * fraction;
      n += b.count();
    }
    out[1 + d] = Acc<T>(mean);
    out[1 + rank + d] = Acc<T>(m2);
  }
}

// ---- Tables

// Sums over the active tasks for kDims dimensions.
struct TaskSums {
  double v[kDims] = {}, mu[kDims] = {};                  // first sums, then means
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

// Fills sums, and returns the terms of the loss for dimensions [first, first + count), not yet divided by 4.
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

// Computes the gradient of rows [begin, end) of one layer.
template <typename T>
ALIGN_INLINE void backward_of(const GaussianKlBackwardArgs<T>& args, const Layer<T>& layer, const Acc<T>* tables, T* dz,
                              int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t width = args.latents.rank;
  const A d_loss = args.d_loss[0] * A(args.scale);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t id = layer.task[t];
    if (id < 0 || id >= layer.tasks) {
      std::fill_n(dz + t * layer.rank, layer.rank, narrow<T>(A(0)));
      continue;
    }
    const A* a = tables + id * 3 * width;
    const A *b = a + width, *mu = b + width;
    for_dims(layer.rank, [&](auto dims, int64_t d) ALIGN_INLINE_LAMBDA {
      const int64_t e = t * layer.rank + d;
      const auto of_mean = load_dims<dims()>(layer.z + e) - load_dims<dims()>(mu + d);
      const auto of_a = load_dims<dims()>(a + d), of_b = load_dims<dims()>(b + d);
      decltype(load_dims<dims()>(a)) value = d_loss * (of_a + of_b * of_mean), none = {};
      store_dims<dims()>(dz + e, (of_a != 0) | (of_b != 0) ? value : none);  // z may be NaN where no gradient is
    });
  }
}

template <typename T>
void backward_rows(const GaussianKlBackwardArgs<T>& args, int64_t index, int64_t begin, int64_t end) {
  run_widest([&](auto) ALIGN_INLINE_LAMBDA {
    const Acc<T>* tables = args.tables + index * args.tasks * 3 * args.latents.rank;
    T* dz = args.dz + index * args.dz_stride;
    with_rank(layer_of(args.latents, args.tasks, index),
              [&](const auto& layer) ALIGN_INLINE_LAMBDA { backward_of(args, layer, tables, dz, begin, end); });
  });
}

int64_t row_blocks(int64_t tokens) { return (tokens + kBlockRows - 1) / kBlockRows; }

}  // namespace

template <typename T>
int64_t task_moments_workspace(const Latents<T>& latents, int64_t tasks) {
  return product({latents.layers, row_blocks(latents.tokens), tasks, 2 * latents.rank + 1, int64_t(sizeof(double))});
}

template <typename T>
void task_moments(const TaskMomentsArgs<T>& args) {
  const MomentsJob<T> job{args, row_blocks(args.latents.tokens), static_cast<double*>(args.workspace)};
  const int64_t layers = args.latents.layers;
  parallel_for(0, layers * job.blocks, 4, [&job](int64_t begin, int64_t end) { moments_blocks(job, begin, end); });
  parallel_for(0, layers, 16, [&job](int64_t begin, int64_t end) {
    for (int64_t layer = begin; layer < end; ++layer) {
      for (int64_t i = 0; i < job.args.tasks; ++i) merge_task(job, layer, i);
    }
  });
}

template <typename A>
void gaussian_kl_tables(const GaussianKlTablesArgs<A>& args) {
  parallel_for(0, args.layers, 16, [&args](int64_t begin, int64_t end) {
    for (int64_t layer = begin; layer < end; ++layer) layer_tables(args, layer);
  });
}

template <typename T>
void gaussian_kl_backward(const GaussianKlBackwardArgs<T>& args) {
  const int64_t tokens = args.latents.tokens;
  parallel_for(0, args.latents.layers * tokens, 2048, [&args, tokens](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t layer = begin / tokens, first = layer * tokens, last = std::min(end, first + tokens);
      backward_rows(args, layer, begin - first, last - first);
      begin = last;
    }
  });
}

#define ALIGN_INSTANTIATE(T)                                           \
  template int64_t task_moments_workspace(const Latents<T>&, int64_t); \
  template void task_moments(const TaskMomentsArgs<T>&);               \
  template void gaussian_kl_backward(const GaussianKlBackwardArgs<T>&);
ALIGN_FOR_CPU_TYPES(ALIGN_INSTANTIATE)
template void gaussian_kl_tables(const GaussianKlTablesArgs<float>&);
template void gaussian_kl_tables(const GaussianKlTablesArgs<double>&);

}  // namespace align::cpu
