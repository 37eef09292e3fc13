#include "team.h"

#include <omp.h>

#include <atomic>

namespace latentkv {
namespace {

std::atomic<int> live{0};

struct Team {
  bool is_live = false;

  void set(bool now) {
    live += (int)now - (int)is_live;
    is_live = now;
  }
  ~Team() { set(false); }
};

thread_local Team own;

}  // namespace

bool forks(bool worth) {
  if (!worth || omp_get_max_threads() == 1) return false;
  if (!own.is_live) own.set(true);
  return true;
}

int live_teams() { return live; }

void release_team() {
  // torch's regions in this thread have the same team, so it is released whether or not ours forked.
  omp_pause_resource_all(omp_pause_soft);
  own.set(false);
}

}  // namespace latentkv
