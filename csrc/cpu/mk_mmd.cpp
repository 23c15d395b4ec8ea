// The tokens that take part are gathered into tiles of 32 rows of one task, dimension by dimension, so that a vector
// holds a dimension of several rows. Every unordered pair of tiles is handled once: squared distances, then kernels and
// their weights (32 x 32, in the first-level cache), then the gradient of the rows of both tiles. Tiles form groups
// that meet in pairs like the players of a tournament: in a round every group is in one pair. So no two threads write
// to the same tile, and the sum of a tile is added up in the order of the rounds.
#include "ops/mk_mmd.h"

#include "cpu/arena.h"
#include "cpu/mmd_tiles.h"
#include "cpu/parallel.h"

namespace align::cpu {
namespace {

constexpr int64_t kMaxGroups = 16;

// The number of groups: even, and so that a group has two tiles or more if there are enough tiles.
int64_t groups_of(int64_t tiles) { return std::clamp<int64_t>(tiles / 4 * 2, 2, kMaxGroups); }

// The number of blocks. A block is a pair of groups, or a group with itself.
int64_t blocks_of(int64_t groups) { return groups * (groups + 1) / 2; }

struct Tile {
  int64_t task;
  int64_t first;  // row of the gradient
  int64_t rows;
};

// A call of the operator, the layer under way, and the workspace, which serves one layer after the other.
template <typename T>
struct Job {
  using A = Acc<T>;
  const MkMmdArgs<T>& args;
  Arena arena;
  int64_t layer = 0;
  // For each task: its tokens, the tokens seen so far, the tokens that take part, and the first row of these.
  int64_t *count, *seen, *chosen, *first;
  int64_t* token;  // [rows]
  Tile* tile;      // [tiles]
  double* value;   // [blocks]
  A* z;            // [tiles, rank, kMmdTileRows], zero beyond a tile's rows
  A* centered;     // like z, minus the center of the tile
  A* center;       // [tiles, rank]
  A* dz;           // like z: sum_b omega h (z_a - z_b), up to a factor
  // The numbers of tiles, rows and tasks that take part.
  int64_t tiles = 0, rows = 0, tasks = 0;
  double bandwidth = 1;

  Job(const MkMmdArgs<T>& args, void* workspace) : args(args), arena(workspace) {
    const int64_t most_rows = mmd_rows(args.tokens, args.tasks, args.n_max);
    const int64_t most_tiles = mmd_tiles(most_rows, args.tasks);
    for (int64_t** of_task : {&count, &seen, &chosen, &first}) *of_task = arena.allocate<int64_t>(args.tasks);
    token = arena.allocate<int64_t>(most_rows);
    tile = arena.allocate<Tile>(most_tiles);
    value = arena.allocate<double>(blocks_of(groups_of(most_tiles)));
    z = arena.allocate<A>(most_tiles * args.rank * kMmdTileRows);
    centered = arena.allocate<A>(most_tiles * args.rank * kMmdTileRows);
    center = arena.allocate<A>(most_tiles * args.rank);
    dz = arena.allocate<A>(most_tiles * args.rank * kMmdTileRows);
  }

  int64_t rank() const { return args.ranks[layer]; }
  int64_t tile_size() const { return rank() * kMmdTileRows; }
  int64_t groups() const { return groups_of(tiles); }
  int64_t first_of(int64_t group) const { return tiles * group / groups(); }
  A* z_of(int64_t i) const { return z + i * tile_size(); }
  TileRows<A> rows_of(int64_t i) const {
    return {z_of(i), centered + i * tile_size(), center + i * rank(), tile[i].rows};
  }
  A* dz_of(int64_t i) const { return dz + i * tile_size(); }
  A* gradient() const { return args.gradient + layer * mmd_rows(args.tokens, args.tasks, args.n_max) * args.rank; }

  // omega for two different tokens of tasks i and j.
  double omega(int64_t i, int64_t j) const {
    const double ni = double(chosen[i]), nj = double(chosen[j]);
    return i != j ? -1 / (ni * nj) : double(tasks - 1) / (ni * (args.u_statistic ? ni - 1 : ni));
  }
  double pairs_scale() const { return args.mean_pairs ? 2 / double(tasks * (tasks - 1)) : 1; }
};

// ---- The tokens that take part

// Counts the tokens of the tasks, and assigns rows and tiles to them.
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
  std::fill_n(job.dz_of(index), job.tile_size(), Acc<T>(0));
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* row = job.args.z[job.layer] + job.token[tile.first + r] * job.args.strides[job.layer];
    for (int64_t d = 0; d < job.rank(); ++d) z[d * kMmdTileRows + r] = widen(row[d]);
  }
  for (int64_t d = 0; d < job.rank(); ++d) {
    Acc<T> sum = 0;
    for (int64_t r = 0; r < tile.rows; ++r) sum += z[d * kMmdTileRows + r];
    const Acc<T> center = job.center[index * job.rank() + d] = sum / Acc<T>(tile.rows);
    for (int r = 0; r < kMmdTileRows; ++r) {
      job.centered[index * job.tile_size() + d * kMmdTileRows + r] = z[d * kMmdTileRows + r] - center;
    }
  }
}

// 2 sum |z - mean|^2 / (n - 1). Each of the 32 rows of a tile has its own sum, side by side in vectors.
template <typename T>
double mean_distance(const Job<T>& job) {
  double total = 0;
  run_widest([&](auto) ALIGN_INLINE_LAMBDA {
    double squares[kMmdTileRows] = {};
    for (int64_t d = 0; d < job.rank(); ++d) {
      double sum[kMmdTileRows] = {}, mean = 0;
      for (int64_t i = 0; i < job.tiles; ++i) {
        const Acc<T>* z = job.z_of(i) + d * kMmdTileRows;  // zero beyond the tile's rows
        for (int r = 0; r < kMmdTileRows; ++r) sum[r] += double(z[r]);
      }
      for (int r = 0; r < kMmdTileRows; ++r) mean += sum[r] / double(job.rows);
      for (int64_t i = 0; i < job.tiles; ++i) {
        const Acc<T>* z = job.z_of(i) + d * kMmdTileRows;
        for (int r = 0; r < kMmdTileRows; ++r) {
          const double difference = r < job.tile[i].rows ? double(z[r]) - mean : 0;
          squares[r] += difference * difference;
        }
      }
    }
    for (double sum : squares) total += sum;
  });
  return 2 * total / double(job.rows - 1);
}

// ---- Pairs

// Two groups that meet.
struct Block {
  int64_t a, b;
};

// All groups but the last one form a circle. In a round the groups at equal distances from group `round` meet, and
// group `round` meets the last group. In one more round each group meets itself.
int64_t blocks_in(int64_t round, int64_t groups) { return round == groups - 1 ? groups : groups / 2; }
Block block_at(int64_t round, int64_t index, int64_t groups) {
  const int64_t circle = groups - 1;
  if (round == circle) return {index, index};
  if (index == 0) return {round, circle};
  return {(round + index) % circle, (round + circle - index) % circle};
}

// Whether the gradient adds up differences of rows. It must if the narrowest kernel may be so narrow that near rows
// outweigh all others; it also does at ranks so small that products would save little.
template <typename T>
bool adds_differences(const Job<T>& job) {
  constexpr int kMaxHeuristic = 6;  // the narrowest bandwidth is an eighth of the mean squared distance
  constexpr int64_t kMinRank = 8;
  const MmdKernels& kernels = job.args.kernels;
  return !kernels.relative || kernels.count > kMaxHeuristic || job.rank() < kMinRank;
}

// Processes a block and returns what it adds to the value.
template <int W, bool kDifferences, typename T>
ALIGN_INLINE double run_block(const Job<T>& job, const Rates<Acc<T>>& rates, const Block& block) {
  using A = Acc<T>;
  alignas(64) A h[kTilePairs] = {}, transposed[kTilePairs];
  double values[kMmdTileRows] = {}, value = 0;
  for (int64_t i = job.first_of(block.a); i < job.first_of(block.a + 1); ++i) {
    for (int64_t j = block.a == block.b ? i : job.first_of(block.b); j < job.first_of(block.b + 1); ++j) {
      const double omega = job.omega(job.tile[i].task, job.tile[j].task);
      const A weight = A(omega * double(job.rows) * double(job.rows));
      const TilePair<A> pair{job.rows_of(i), job.rows_of(j), job.rank(), weight, i == j};
      squared_distances<W>(pair, h);
      kernels_of<W>(pair, rates, (i == j ? 1 : 2) * omega, h, values);
      add_gradients<W, kDifferences>(h, pair, job.dz_of(j));
      if (i == j) continue;
      transpose<W>(h, transposed);
      add_gradients<W, kDifferences>(transposed, TilePair<A>{pair.b, pair.a, pair.rank, weight, false}, job.dz_of(i));
    }
  }
  for (double of_lane : values) value += of_lane;
  return value;
}

// Processes blocks [first, last) of a round.
template <typename T>
void run_blocks(const Job<T>& job, const Rates<Acc<T>>& rates, int64_t round, int64_t first, int64_t last) {
  const auto run = [&](auto width) ALIGN_INLINE_LAMBDA {
    for (int64_t index = first; index < last; ++index) {
      const Block block = block_at(round, index, job.groups());
      job.value[round * (job.groups() / 2) + index] = adds_differences(job)
                                                          ? run_block<width(), true>(job, rates, block)
                                                          : run_block<width(), false>(job, rates, block);
    }
  };
  if constexpr (std::is_same_v<T, double>) {  // for gradient checks: always 16-byte vectors
    run(std::integral_constant<int, 16>{});
  } else {
    run_widest(run);
  }
}

template <typename T>
void write_tile(const Job<T>& job, Acc<T> factor, int64_t index) {
  const Tile& tile = job.tile[index];
  const int64_t rank = job.rank(), width = job.args.rank;
  const Acc<T>* dz = job.dz_of(index);
  for (int64_t r = 0; r < tile.rows; ++r) {
    Acc<T>* gradient = job.gradient() + (tile.first + r) * width;
    for (int64_t d = 0; d < rank; ++d) gradient[d] = factor * dz[d * kMmdTileRows + r];
    std::fill_n(gradient + rank, width - rank, Acc<T>(0));
  }
}

// Returns the value, and writes the gradient of the tokens that take part.
template <typename T>
double run_pairs(const Job<T>& job) {
  const auto& args = job.args;
  const Rates<Acc<T>> rates(args.kernels, job.bandwidth);
  const int64_t groups = job.groups();
  for (int64_t round = 0; round < groups; ++round) {
    parallel_for(0, blocks_in(round, groups), 1,
                 [&](int64_t begin, int64_t end) { run_blocks(job, rates, round, begin, end); });
  }
  const double rows = double(job.rows), beta = args.kernels.beta[0] / job.bandwidth;
  const Acc<T> factor = Acc<T>(-4 * beta / (rows * rows) * job.pairs_scale());
  parallel_for(0, job.tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) write_tile(job, factor, i);
  });
  double value = 0;
  for (int64_t block = 0; block < blocks_of(groups); ++block) value += job.value[block];
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
  for (; job.layer < args.layers; ++job.layer) {
    bool some = job.tasks >= 2;
    if (some) {
      parallel_for(0, job.tiles, 8, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) gather_tile(job, i);
      });
      if (args.kernels.relative) job.bandwidth = mean_distance(job);
      some = !(args.kernels.relative && job.bandwidth < kMmdMinBandwidth);
    }
    args.loss[job.layer] = some ? Acc<T>(run_pairs(job)) : Acc<T>(0);
    const int64_t written = some ? job.rows : 0, rows = mmd_rows(args.tokens, args.tasks, args.n_max);
    std::fill_n(job.gradient() + written * args.rank, (rows - written) * args.rank, Acc<T>(0));
  }
}

template <typename T>
void mk_mmd_backward(const MkMmdBackwardArgs<T>& args) {
  parallel_for(0, args.layers * args.tokens, 2048, [&args](int64_t begin, int64_t end) {
    const int64_t rank = args.rank;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t layer = i / args.tokens, slot = args.slot[i % args.tokens];
      T* dz = args.dz + i * rank;
      if (slot < 0) {
        std::fill_n(dz, rank, narrow<T>(Acc<T>(0)));
        continue;
      }
      const Acc<T>* row = args.gradient + (layer * args.rows + slot) * rank;
      for (int64_t d = 0; d < rank; ++d) dz[d] = narrow<T>(args.d_loss[layer] * row[d]);
    }
  });
}

#define ALIGN_INSTANTIATE(T)                                 \
  template int64_t mk_mmd_workspace<T>(const MkMmdArgs<T>&); \
  template void mk_mmd(const MkMmdArgs<T>&);                 \
  template void mk_mmd_backward(const MkMmdBackwardArgs<T>&);
ALIGN_FOR_CPU_TYPES(ALIGN_INSTANTIATE)

}  // namespace align::cpu
