// The tokens that take part are gathered into tiles of 32 rows of one task, dimension by dimension, so that a vector
// holds a dimension of several rows. Every unordered pair of tiles is handled once: squared distances, then kernels
// and their weights (32 x 32, in the first-level cache), then what each tile's rows are pulled by the other's. The
// pairs of tiles are cut into slabs by their number alone; each slab sums value and gradient on its own, and the slabs
// are added in their order.
#include "ops/mk_mmd.h"

#include "cpu/arena.h"
#include "cpu/mmd_tiles.h"
#include "cpu/parallel.h"

namespace align::cpu {
namespace {

constexpr int64_t kMaxSlabs = 8;
constexpr int64_t kTilesPerSlab = 4;  // a slab has a gradient of its own: little beside its share of the pairs

int64_t slabs_of(int64_t tiles) { return std::clamp<int64_t>(tiles / kTilesPerSlab, 1, kMaxSlabs); }

struct Tile {
  int64_t task;
  int64_t first;  // row of the gradient
  int64_t rows;
};

// The call and its workspace.
template <typename T>
struct Job {
  using A = Acc<T>;
  const MkMmdArgs<T>& args;
  Arena arena;
  // of each task: tokens, those already seen, those that take part, the first of their rows
  int64_t *count, *seen, *chosen, *first;
  int64_t* token;  // [rows]
  Tile* tile;      // [tiles]
  double* mean;    // [rank], of z
  double* value;   // [slabs]
  A* z;            // [tiles, rank, kMmdTileRows], zero beyond a tile's rows
  A* pull;         // [slabs, tiles, rank, kMmdTileRows]: sum_b omega h (z_a - z_b), but for a factor
  // of the tokens that take part
  int64_t tiles = 0, rows = 0, tasks = 0;
  double bandwidth = 1;

  Job(const MkMmdArgs<T>& args, void* workspace) : args(args), arena(workspace) {
    const int64_t most_rows = mmd_rows(args.tokens, args.tasks, args.n_max);
    const int64_t most_tiles = mmd_tiles(most_rows, args.tasks), most_slabs = slabs_of(most_tiles);
    for (int64_t** of_task : {&count, &seen, &chosen, &first}) *of_task = arena.take<int64_t>(args.tasks);
    token = arena.take<int64_t>(most_rows);
    tile = arena.take<Tile>(most_tiles);
    mean = arena.take<double>(args.rank);
    value = arena.take<double>(most_slabs);
    z = arena.take<A>(most_tiles * tile_size());
    pull = arena.take<A>(most_slabs * most_tiles * tile_size());
  }

  int64_t tile_size() const { return args.rank * kMmdTileRows; }
  int64_t slabs() const { return slabs_of(tiles); }
  A* z_of(int64_t i) const { return z + i * tile_size(); }
  A* pull_of(int64_t slab, int64_t i) const { return pull + (slab * tiles + i) * tile_size(); }

  // omega of two different tokens of tasks i and j.
  double omega(int64_t i, int64_t j) const {
    const double ni = double(chosen[i]), nj = double(chosen[j]);
    return i != j ? -1 / (ni * nj) : double(tasks - 1) / (ni * (args.u_statistic ? ni - 1 : ni));
  }
  double pairs_scale() const { return args.mean_pairs ? 2 / double(tasks * (tasks - 1)) : 1; }
};

// ---- Who takes part

// Counts the tasks' tokens, and lays out rows and tiles.
template <typename T>
void cut_tasks(Job<T>& job) {
  const auto& args = job.args;
  std::fill_n(job.count, args.tasks, int64_t(0));
  for (int64_t t = 0; t < args.tokens; ++t) {
    if (args.task[t] >= 0 && args.task[t] < args.tasks) ++job.count[args.task[t]];
  }
  for (int64_t i = 0; i < args.tasks; ++i) {
    const int64_t chosen = job.count[i] < 2 ? 0 : std::min(job.count[i], args.n_max);
    job.chosen[i] = chosen;
    job.first[i] = job.rows;
    job.tasks += chosen > 0;
    for (int64_t r = 0; r < chosen; r += kMmdTileRows) {
      job.tile[job.tiles++] = {i, job.rows + r, std::min<int64_t>(kMmdTileRows, chosen - r)};
    }
    job.rows += chosen;
  }
}

// Token o of a task's n is the j-th of its m chosen ones iff o = floor(j n / m); then j = ceil(o m / n).
template <typename T>
void choose_tokens(Job<T>& job) {
  const auto& args = job.args;
  std::fill_n(job.seen, args.tasks, int64_t(0));
  for (int64_t t = 0; t < args.tokens; ++t) {
    const int64_t i = args.task[t];
    args.slot[t] = -1;
    if (i < 0 || i >= args.tasks || job.chosen[i] == 0) continue;
    const int64_t n = job.count[i], m = job.chosen[i], o = job.seen[i]++;
    const int64_t j = n == m ? o : (o * m + n - 1) / n;
    if (j >= m || (n != m && j * n / m != o)) continue;
    args.slot[t] = int32_t(job.first[i] + j);
    job.token[job.first[i] + j] = t;
  }
}

template <typename T>
void gather_tile(const Job<T>& job, int64_t index) {
  const Tile& tile = job.tile[index];
  Acc<T>* z = job.z_of(index);
  std::fill_n(z, job.tile_size(), Acc<T>(0));
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* row = job.args.z + job.token[tile.first + r] * job.args.rank;
    for (int64_t d = 0; d < job.args.rank; ++d) z[d * kMmdTileRows + r] = widen(row[d]);
  }
}

// 2 sum |z - mean|^2 / (n - 1).
template <typename T>
double mean_distance(const Job<T>& job) {
  std::fill_n(job.mean, job.args.rank, 0.0);
  double squares = 0;
  run_widest([&](auto) ALIGN_INLINE_LAMBDA {
    for (int64_t i = 0; i < job.tiles; ++i) {
      for (int64_t d = 0; d < job.args.rank; ++d) {
        const Acc<T>* z = job.z_of(i) + d * kMmdTileRows;
        double sum = 0;
        for (int r = 0; r < kMmdTileRows; ++r) sum += double(z[r]);
        job.mean[d] += sum / double(job.rows);
      }
    }
    for (int64_t i = 0; i < job.tiles; ++i) {
      for (int64_t d = 0; d < job.args.rank; ++d) {
        const Acc<T>* z = job.z_of(i) + d * kMmdTileRows;
        for (int64_t r = 0; r < job.tile[i].rows; ++r) {
          const double difference = double(z[r]) - job.mean[d];
          squares += difference * difference;
        }
      }
    }
  });
  return 2 * squares / double(job.rows - 1);
}

// ---- Slabs

// The tiles of a pair, in the order (0, 0), (0, 1), .. (1, 1), (1, 2), ..
struct PairOfTiles {
  int64_t i, j;
};

PairOfTiles pair_at(int64_t index, int64_t tiles) {
  int64_t i = 0;
  while (index >= tiles - i) index -= tiles - i++;
  return {i, i + index};
}

int64_t slab_begin(int64_t slab, int64_t slabs, int64_t tiles) { return tiles * (tiles + 1) / 2 * slab / slabs; }

template <int W, typename T>
ALIGN_INLINE void run_slab(const Job<T>& job, const Rates<Acc<T>>& rates, int64_t slab) {
  using A = Acc<T>;
  alignas(64) A h[kTilePairs] = {}, transposed[kTilePairs];
  const int64_t rank = job.args.rank, begin = slab_begin(slab, job.slabs(), job.tiles);
  const int64_t count = slab_begin(slab + 1, job.slabs(), job.tiles) - begin;
  auto [i, j] = pair_at(begin, job.tiles);
  std::fill(job.pull_of(slab, i), job.pull_of(slab, job.tiles), A(0));  // earlier tiles are in no pair of the slab
  double value = 0;
  for (int64_t done = 0; done < count; ++done) {
    const Tile &a = job.tile[i], &b = job.tile[j];
    const TilePair<A> pair{job.z_of(i), job.z_of(j), a.rows, b.rows, rank, i == j};
    const double omega = job.omega(a.task, b.task);
    const A weight = A(omega * double(job.rows) * double(job.rows));
    value += (i == j ? 1 : 2) * omega * kernels_of<W>(pair, rates, h);
    pull_tile<W>(h, pair, weight, job.pull_of(slab, j));
    if (i != j) {
      transpose<W>(h, transposed);
      pull_tile<W>(transposed, TilePair<A>{pair.b, pair.a, b.rows, a.rows, rank, false}, weight, job.pull_of(slab, i));
    }
    if (++j == job.tiles) j = ++i;
  }
  job.value[slab] = value;
}

template <typename T>
void run_slabs(const Job<T>& job, const Rates<Acc<T>>& rates, int64_t first, int64_t last) {
  const auto run = [&](auto width) ALIGN_INLINE_LAMBDA {
    for (int64_t slab = first; slab < last; ++slab) run_slab<width()>(job, rates, slab);
  };
  if constexpr (std::is_same_v<T, double>) {  // for gradient checks: no wide version
    run(std::integral_constant<int, 16>{});
  } else {
    run_widest(run);
  }
}

template <typename T>
void add_slabs(const Job<T>& job, Acc<T> factor, int64_t index) {
  using A = Acc<T>;
  const Tile& tile = job.tile[index];
  const int64_t rank = job.args.rank;
  A* sum = job.pull_of(0, index);
  for (int64_t slab = 1; slab < job.slabs(); ++slab) {
    if (pair_at(slab_begin(slab, job.slabs(), job.tiles), job.tiles).i > index) break;
    const A* part = job.pull_of(slab, index);
    for (int64_t e = 0; e < job.tile_size(); ++e) sum[e] += part[e];
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t d = 0; d < rank; ++d)
      job.args.gradient[(tile.first + r) * rank + d] = factor * sum[d * kMmdTileRows + r];
  }
}

// Value and gradient of the tokens that take part.
template <typename T>
double run_pairs(const Job<T>& job) {
  const auto& args = job.args;
  const Rates<Acc<T>> rates(args.kernels, job.bandwidth);
  parallel_for(0, job.slabs(), 1, [&](int64_t begin, int64_t end) { run_slabs(job, rates, begin, end); });
  const double rows = double(job.rows), beta = args.kernels.beta[0] / job.bandwidth;
  const Acc<T> factor = Acc<T>(-4 * beta / (rows * rows) * job.pairs_scale());
  parallel_for(0, job.tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) add_slabs(job, factor, i);
  });
  double value = 0;
  for (int64_t slab = 0; slab < job.slabs(); ++slab) value += job.value[slab];
  for (int64_t i = 0; i < args.tasks && !args.u_statistic; ++i) {  // each token with itself
    if (job.chosen[i] > 0) value += job.omega(i, i) * double(job.chosen[i]) * args.kernels.count;
  }
  return value * job.pairs_scale();
}

}  // namespace

template <typename T>
int64_t mk_mmd_workspace(const MkMmdArgs<T>& args) {
  return Job<T>(args, nullptr).arena.bytes();
}

template <typename T>
void mk_mmd(const MkMmdArgs<T>& args) {
  Job<T> job(args, args.workspace);
  cut_tasks(job);
  choose_tokens(job);
  bool some = job.tasks >= 2;
  if (some) {
    parallel_for(0, job.tiles, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) gather_tile(job, i);
    });
    if (args.kernels.relative) job.bandwidth = mean_distance(job);
    some = !(args.kernels.relative && job.bandwidth < kMmdMinBandwidth);
  }
  args.loss[0] = some ? Acc<T>(run_pairs(job)) : Acc<T>(0);
  const int64_t written = some ? job.rows : 0, rows = mmd_rows(args.tokens, args.tasks, args.n_max);
  std::fill_n(args.gradient + written * args.rank, (rows - written) * args.rank, Acc<T>(0));
}

template <typename T>
void mk_mmd_backward(const MkMmdBackwardArgs<T>& args) {
  parallel_for(0, args.tokens, 2048, [&args](int64_t begin, int64_t end) {
    const int64_t rank = args.rank;
    for (int64_t t = begin; t < end; ++t) {
      const Acc<T>* row = args.gradient + std::max<int64_t>(args.slot[t], 0) * rank;
      for (int64_t d = 0; d < rank; ++d) {
        args.dz[t * rank + d] = narrow<T>(args.slot[t] < 0 ? Acc<T>(0) : args.d_loss[0] * row[d]);
      }
    }
  });
}

#define ALIGN_INSTANTIATE(T)                                 \
  template int64_t mk_mmd_workspace<T>(const MkMmdArgs<T>&); \
  template void mk_mmd(const MkMmdArgs<T>&);                 \
  template void mk_mmd_backward(const MkMmdBackwardArgs<T>&);
ALIGN_INSTANTIATE(float)
ALIGN_INSTANTIATE(double)
ALIGN_INSTANTIATE(bfloat16)
ALIGN_INSTANTIATE(float16)
#undef ALIGN_INSTANTIATE

}  // namespace align::cpu
